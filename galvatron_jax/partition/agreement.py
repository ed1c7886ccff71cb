"""Whether a layer is planned alike at another micro-batch, without planning it there."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from galvatron_jax.partition.choice import Choice
from galvatron_jax.partition.parameters import Storage
from galvatron_jax.partition.ports import Ports
from galvatron_jax.partition.setting import DearChoice, DearRows, Setting
from galvatron_jax.partition.static import StaticKind
from galvatron_jax.partition.strategy_axes import plan_axes
from galvatron_jax.spec.strategy import LayerStrategy


class Agreement:
    """Where plans made in a setting hold as well.

    Sizes decide what an axis can shard, by divisibility, and which factor is the cheapest. The first is asked at every
    micro-batch. The second, of choices that move bytes (what is free is free at any size), at one end: at the other end
    the choice was made, and costs are affine.
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
        self._held: tuple[tuple[int, ...], int] | None = None
        """What holds: at some micro-batches, so many choices."""
        self._shapes: dict[int, bool] = {}
        self._checked: dict[int, int] = {}
        """By micro-batch, how many of the choices are known to hold; -1 where one does not."""

    def holds(self, microbatches: Sequence[int]) -> bool:
        """Whether all that was planned so far holds at some micro-batches, which with the one planned are a range."""
        asked = tuple(microbatches), len(self.setting.dear)
        if asked != self._held:
            ends = {min(microbatches), max(microbatches)} - {self.planned_at}
            if not (all(map(self._shapes_alike, microbatches)) and all(map(self._choices_hold, ends))):
                return False
            self._held = asked
        return True

    def _shapes_alike(self, microbatch: int) -> bool:
        if microbatch not in self._shapes:
            sizes = self._sizes(microbatch)
            self._shapes[microbatch] = microbatch == self.planned_at or (
                self._are_affine(sizes, microbatch) and self._can_shard_alike(sizes)
            )
        return self._shapes[microbatch]

    def _sizes(self, microbatch: int) -> tuple[int, ...]:
        return self.static.program.sizes(self.static.kind.batch_factor, microbatch, self.traced_at)

    def _are_affine(self, sizes: tuple[int, ...], microbatch: int) -> bool:
        here = self.setting.sizes
        return self.static.is_affine(self.setting.growing) and all(
            sizes[f] * self.planned_at == here[f] * microbatch for f in self.setting.growing
        )

    def _can_shard_alike(self, sizes: tuple[int, ...]) -> bool:
        """Whether the same axes can shard the same factors, and ports are laid out alike."""
        axes = self.ports.axes
        if plan_axes(self.static, self.strategy, self.mesh, sizes) != axes:
            return False
        for factor in self.setting.growing:
            shards = math.prod(a.size for a, f in zip(axes.axes, axes.allowed, strict=True) if factor in f)
            if math.gcd(sizes[factor], shards) != math.gcd(self.setting.sizes[factor], shards):
                return False
        there = Ports(self.static, axes, sizes, self.ports.sp_kind, Storage(self.static, axes, sizes))
        return there.outputs == self.ports.outputs and there.inputs(sharded=False) == self.ports.inputs(sharded=False)

    def _choices_hold(self, microbatch: int) -> bool:
        known, dear = self._checked.get(microbatch, 0), self.setting.dear
        if known >= 0:
            holds = all(self._holds(choice, microbatch) for choice in dear[known:])
            self._checked[microbatch] = known = len(dear) if holds else -1
        return known >= 0

    def _holds(self, choice: DearChoice | DearRows, microbatch: int) -> bool:
        if isinstance(choice, DearRows):
            return choice.pays(microbatch / self.planned_at) == choice.pays()
        there = Choice(choice.setting.elsewhere(self._sizes(microbatch)), choice.op, choice.states)
        return there.cheapest(choice.axis, choice.chosen)[0] is choice.factor
