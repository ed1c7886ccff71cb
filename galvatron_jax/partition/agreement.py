"""Whether a layer is planned alike at another micro-batch, without planning it there."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cached_property

from galvatron_jax.partition.choice import Choice
from galvatron_jax.partition.parameters import Storage
from galvatron_jax.partition.ports import Ports
from galvatron_jax.partition.setting import DearChoice, DearRows, Setting
from galvatron_jax.partition.static import StaticKind
from galvatron_jax.partition.strategy_axes import plan_axes
from galvatron_jax.spec.strategy import LayerStrategy

Dear = tuple[DearChoice | DearRows, ...]
"""What was chosen at a cost."""


class Agreement:
    """Where plans made in a setting hold as well.

    Sizes decide what an axis can shard, by divisibility, which factor is the cheapest, and whether rows of tables are
    worked on where they are stored. The first is asked at every micro-batch. The others, of choices that move bytes
    (what is free is free at any size), at one end: at the other end the choice was made, and costs are affine.
    """

    def __init__(
        self,
        static: StaticKind,
        strategy: LayerStrategy,
        mesh: Mapping[str, int],
        setting: Setting,
        ports: Ports,
        *,
        planned_at: int,
        traced_at: int,
    ) -> None:
        self.static, self.strategy, self.mesh = static, strategy, mesh
        self.setting, self.ports = setting, ports
        self.planned_at, self.traced_at = planned_at, traced_at
        self._known_sizes: dict[int, tuple[int, ...]] = {}
        self._shapes: dict[int, bool] = {}
        self._choices: dict[tuple[int, int], tuple[DearChoice | DearRows, bool]] = {}
        """By identity and micro-batch, choices and whether they hold."""

    def holds_from(self, microbatches: Sequence[int], dear: Dear) -> int:
        """The index from which on what was planned holds.

        Args:
            microbatches: ascending, the one planned last.
            dear: what was chosen at a cost.
        """
        first = len(microbatches) - 1
        while first and self._shapes_alike(microbatches[first - 1]):
            first -= 1
        while not all(self._holds(choice, microbatches[first]) for choice in dear):
            first += 1
        return first

    def _shapes_alike(self, microbatch: int) -> bool:
        if microbatch not in self._shapes:
            sizes = self._sizes(microbatch)
            self._shapes[microbatch] = microbatch == self.planned_at or (
                self._are_affine(sizes, microbatch) and self._can_shard_alike(sizes)
            )
        return self._shapes[microbatch]

    @cached_property
    def _shards(self) -> dict[int, int]:
        """Devices of all axes that may shard a factor, for those that grow."""
        axes = self.ports.axes
        return {
            factor: math.prod([a.size for a, f in zip(axes.axes, axes.allowed, strict=True) if factor in f])
            for factor in self.setting.growing
        }

    def _sizes(self, microbatch: int) -> tuple[int, ...]:
        if microbatch not in self._known_sizes:
            sizes = self.static.program.sizes(self.static.kind.batch_factor, microbatch, self.traced_at)
            self._known_sizes[microbatch] = sizes
        return self._known_sizes[microbatch]

    def _are_affine(self, sizes: tuple[int, ...], microbatch: int) -> bool:
        here = self.setting.sizes
        return self.static.is_affine(self.setting.growing) and all(
            sizes[f] * self.planned_at == here[f] * microbatch for f in self.setting.growing
        )

    def _can_shard_alike(self, sizes: tuple[int, ...]) -> bool:
        """Whether the same axes can shard the same factors, and ports are laid out alike."""
        axes, here = self.ports.axes, self.setting.sizes
        if all(
            sizes[f] % n == 0 and here[f] % n == 0 and (sizes[f] == n) == (here[f] == n)
            for f, n in self._shards.items()
        ):
            return True  # All axes that may shard what grows do, and leave as much or as little of it whole.
        if plan_axes(self.static, self.strategy, self.mesh, sizes) != axes:
            return False
        if any(math.gcd(sizes[factor], n) != math.gcd(here[factor], n) for factor, n in self._shards.items()):
            return False
        there = Ports(self.static, axes, sizes, self.ports.sp_kind, Storage(self.static, axes, sizes))
        return there.outputs == self.ports.outputs and there.inputs(sharded=False) == self.ports.inputs(sharded=False)

    def _holds(self, choice: DearChoice | DearRows, microbatch: int) -> bool:
        if microbatch == self.planned_at:
            return True
        key = id(choice), microbatch
        if key not in self._choices:
            self._choices[key] = choice, self._comes_out_alike(choice, microbatch)
        return self._choices[key][1]

    def _comes_out_alike(self, choice: DearChoice | DearRows, microbatch: int) -> bool:
        if isinstance(choice, DearRows):
            return choice.pays(microbatch / self.planned_at) == choice.pays()
        there = Choice(choice.setting.elsewhere(self._sizes(microbatch)), choice.op, choice.states)
        return there.cheapest(choice.axis, choice.chosen)[0] is choice.factor
