"""What the search tries: meshes, micro-batches, strategies per layer kind, and the named rules that prune them."""

from __future__ import annotations

import functools
import itertools
import math
import string
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum

from galvatron_jax.cost.links import INTER, INTRA
from galvatron_jax.errors import InputError
from galvatron_jax.spec.cluster import ClusterSpec
from galvatron_jax.spec.mesh import prime_factors
from galvatron_jax.spec.model import LayerKind, PortRole
from galvatron_jax.spec.plan import MeshAxis, Schedule
from galvatron_jax.spec.program import FactorRole
from galvatron_jax.spec.strategy import LayerStrategy, Remat, SequenceParallel


class Rule(StrEnum):
    """Pruning rules. Each can be switched off; what it removes is counted."""

    TP_WITHOUT_HIDDEN = "tp-without-hidden"
    """The tp degree does not divide the layer's hidden dims, so part of the work would be repeated."""
    SP_WITHOUT_SEQUENCE = "sp-without-sequence"
    """The sp degree does not divide the layer's sequence."""
    ZERO_WITHOUT_PARAMETERS = "zero-without-parameters"
    """The layer has no parameters, so every ZeRO stage is the same."""
    SAME_REMAT = "same-remat"
    """In this layer another rematerialisation policy keeps and repeats the same: embeddings, say, have nothing to
    repeat."""
    DOMINATED = "dominated"
    """Another strategy with the same layouts at its boundary is no slower and needs no more memory."""
    GPIPE = "gpipe"
    """1F1B that stashes residuals is no slower than GPipe and holds no more, whatever the stages."""
    WORK = "work"
    """The computation of a step, shared out evenly, and the schedule's bubble take longer than the best plan known."""
    TP_ACROSS_NODES = "tp-across-nodes"
    """Heuristic: tensor and sequence parallelism stay within a node."""
    REPEATED_WORK = "repeated-work"
    """Heuristic: a layer repeats its work along a mesh axis only where nothing else suits it. Repeating costs no
    communication, and may win where links are far slower than the devices."""
    ULYSSES_WITH_TP = "ulysses-with-tp"
    """Heuristic: one layer uses Ulysses or tensor parallelism, not both."""
    MICROBATCHES_ON_DEMAND = "microbatches-on-demand"
    """Heuristic, for derived times only: once the fastest plan fits, more micro-batches are not tried. A roofline never
    gains from them; measured times may, and then all are tried."""
    AXES_ON_DEMAND = "axes-on-demand"
    """Heuristic, for derived times only: a layer is priced under every ZeRO stage and rematerialisation policy on those
    axes alone on which that may make the fastest plan. Elsewhere ZeRO 0 or 1 without rematerialisation is taken to be
    the fastest on the same axes (see `stand_ins`); where the partitioner finds better, it is lost."""
    BATCH_AXES = "batch-axes"
    """Heuristic, for pipelines only: between stages the batch lies on as many of a stage's axes as divide it."""
    ONE_PROGRAM = "one-program"
    """Which pipelines count as fitting: those whose one program for all groups does, which holds the most of each part
    that any group needs. Switched off, it is enough that each group's own stages fit (not counted)."""
    SLOTS_ALIKE = "slots-alike"
    """Heuristic, for pipelines only, beside `ONE_PROGRAM`: every group must fit with as many micro-batches in flight as
    any other has (not counted)."""
    AFFINE_IN_MICROBATCH = "affine-in-microbatch"
    """A layer is planned at one micro-batch for all at which the planner would decide alike (not counted)."""


HEURISTICS = frozenset(
    {
        Rule.TP_ACROSS_NODES,
        Rule.REPEATED_WORK,
        Rule.ULYSSES_WITH_TP,
        Rule.MICROBATCHES_ON_DEMAND,
        Rule.AXES_ON_DEMAND,
        Rule.BATCH_AXES,
        Rule.SLOTS_ALIKE,
    }
)
"""Rules that may lose the optimum; all others are lossless, but for `ONE_PROGRAM`, which says what fits."""


@dataclass(frozen=True)
class SearchSpace:
    """Which plans count.

    A strategy uses every mesh axis: `dp` takes a prefix of the mesh order (slowest links first), `tp` a suffix
    (fastest links), Ulysses' `sp` what lies between. On `{"a": 2, "b": 2, "c": 2}` plain dp and tp alone give
    `dp[a,b,c]`, `dp[a,b]·tp[c]`, `dp[a]·tp[b,c]` and `tp[a,b,c]`.
    """

    tp: bool = True
    """Whether tensor parallelism is allowed."""
    tensor_degrees: tuple[int, ...] | None = None
    """Devices that tensor parallelism takes; 1 is none. None tries every one."""
    sequence: tuple[SequenceParallel, ...] = (SequenceParallel.MEGATRON, SequenceParallel.ULYSSES)
    """Kinds of sequence parallelism that are allowed."""
    zero: tuple[int, ...] = (0, 1, 2, 3)
    remat: tuple[Remat, ...] = (Remat.NONE, Remat.ATTENTION, Remat.DOTS, Remat.FULL)
    num_microbatches: tuple[int, ...] | None = None
    """None tries every divisor of the global batch."""
    pipeline_degrees: tuple[int, ...] | None = (1,)
    """Groups of devices that stages lie on; None tries every one that the cluster's prime factors make."""
    schedules: tuple[Schedule, ...] = (
        Schedule.ONE_F_ONE_B_STASH, Schedule.ONE_F_ONE_B, Schedule.INTERLEAVED, Schedule.GPIPE,
    )  # fmt: skip
    """Of pipelines."""
    num_chunks: tuple[int, ...] = (2,)
    """Virtual stages on each group under the interleaved schedule."""
    gradient_sum_dtype: str | None = None
    """Type in which gradients are summed over devices; None for their own. See `Plan.gradient_sum_dtype`."""
    disabled_rules: frozenset[Rule] = frozenset()
    """Rules not to apply."""

    def applies(self, rule: Rule) -> bool:
        """Whether a pruning rule is on."""
        return rule not in self.disabled_rules

    def microbatch_counts(self, global_batch: int) -> tuple[int, ...]:
        """Numbers of micro-batches to try, ascending.

        Raises:
            InputError: when a number that was asked for does not divide the batch, or the batch is not positive.
        """
        if global_batch < 1:
            raise InputError(f"The global batch is {global_batch}; it must be at least 1.")
        if self.num_microbatches is None:
            return tuple(count for count in range(1, global_batch + 1) if global_batch % count == 0)
        wrong = [count for count in self.num_microbatches if count < 1 or global_batch % count]
        if wrong:
            raise InputError(f"A global batch of {global_batch} cannot be cut into {wrong} equal micro-batches.")
        return tuple(sorted(set(self.num_microbatches)))

    def strategies(
        self,
        kind: LayerKind,
        *,
        mesh: tuple[MeshAxis, ...],
        microbatch: int,
        pruned: Counter[str],
        distinct: DistinctRemats | None = None,
    ) -> tuple[LayerStrategy, ...]:
        """Strategies of one layer kind, the plainest first.

        Args:
            kind: the layer kind.
            mesh: axes, slowest first.
            microbatch: examples of one micro-batch over all devices; dp must divide it.
            pruned: counts what each rule removes.
            distinct: tells which rematerialisation policies differ; None where that is not known.
        """
        remats = self._remats(kind, distinct)
        found = self._strategies(kind, self._admitted(kind, mesh, microbatch, pruned), remats, pruned)
        if len(remats) < len(self.remat):
            pruned[Rule.SAME_REMAT] += len(found) // len(remats) * (len(self.remat) - len(remats))
        return found

    def repeating(
        self,
        kind: LayerKind,
        *,
        mesh: tuple[MeshAxis, ...],
        microbatch: int,
        distinct: DistinctRemats | None = None,
    ) -> tuple[LayerStrategy, ...]:
        """Strategies for a layer that no other suits: as much dp as divides, the remaining axes repeat the work."""
        return self._strategies(kind, [_idle(mesh, microbatch)], self._remats(kind, distinct), Counter())

    def _remats(self, kind: LayerKind, distinct: DistinctRemats | None) -> tuple[Remat, ...]:
        return self.remat if distinct is None or not self.applies(Rule.SAME_REMAT) else distinct(kind, self.remat)

    def _strategies(
        self, kind: LayerKind, kept: list[Axes], remats: tuple[Remat, ...], pruned: Counter[str]
    ) -> tuple[LayerStrategy, ...]:
        return tuple(
            _strategy(dp, tp, sp, sp_kind, zero, remat)
            for remat in remats
            for zero in self.zero
            for dp, tp, sp, sp_kind in kept
            if self._admits_zero(zero, dp + (sp if sp_kind is SequenceParallel.ULYSSES else ()))
            and self._worth_zero(zero, kind, pruned)
        )

    def most_devices(self, kind: LayerKind, *, mesh: tuple[MeshAxis, ...], microbatch: int) -> int:
        """The most devices that any strategy of a layer kind shares its work out to; others repeat it."""
        kept = self._admitted(kind, mesh, microbatch, Counter())
        return max(_degree((*dp, *tp, *sp), mesh) for dp, tp, sp, _ in kept)

    def _admitted(
        self, kind: LayerKind, mesh: tuple[MeshAxis, ...], microbatch: int, pruned: Counter[str]
    ) -> list[Axes]:
        divided = [
            axes
            for axes in self._splits(mesh)
            if microbatch % _degree(axes[0], mesh) == 0
            and (self.tensor_degrees is None or _degree(axes[1], mesh) in self.tensor_degrees)
        ]
        found = [axes for axes in divided if self._admits(axes, kind, mesh, pruned)]
        idle = _idle(mesh, microbatch)
        if idle in found or (found and self.tensor_degrees is not None and 1 not in self.tensor_degrees):
            return found
        if found and self.applies(Rule.REPEATED_WORK):
            pruned[Rule.REPEATED_WORK] += 1
            return found
        return [*found, idle]

    def _splits(self, mesh: tuple[MeshAxis, ...]) -> Iterator[Axes]:
        names = tuple(axis.name for axis in mesh)
        none, megatron, ulysses = SequenceParallel.NONE, SequenceParallel.MEGATRON, SequenceParallel.ULYSSES
        for stop in range(len(names), -1, -1):
            dp, rest = names[:stop], names[stop:]
            if not rest:
                yield dp, (), (), none
                continue
            if self.tp:
                yield dp, rest, (), none
            if self.tp and megatron in self.sequence:
                yield dp, rest, rest, megatron
            if ulysses in self.sequence:
                for cut in range(len(rest), 0, -1):
                    if cut == len(rest) or self.tp:
                        yield dp, rest[cut:], rest[:cut], ulysses

    def _admits(self, axes: Axes, kind: LayerKind, mesh: tuple[MeshAxis, ...], pruned: Counter[str]) -> bool:
        """The decision tree: the first rule that fires removes the split."""
        _, tp, sp, sp_kind = axes
        inter = {axis.name for axis in mesh if axis.level == INTER}
        fires = {
            Rule.TP_WITHOUT_HIDDEN: tp and _extent(kind, FactorRole.HIDDEN) % _degree(tp, mesh),
            Rule.SP_WITHOUT_SEQUENCE: sp and _extent(kind, FactorRole.SEQUENCE) % _degree(sp, mesh),
            Rule.TP_ACROSS_NODES: inter & (set(tp) | set(sp)),
            Rule.ULYSSES_WITH_TP: tp and sp_kind is SequenceParallel.ULYSSES,
        }
        for rule, fired in fires.items():
            if fired and self.applies(rule):
                pruned[rule] += 1
                return False
        return True

    def _admits_zero(self, zero: int, replicas: tuple[str, ...]) -> bool:
        """ZeRO needs replicas to shard over; where there are none, the lowest allowed stage stands for all."""
        return bool(replicas) or zero == min(self.zero)

    def _worth_zero(self, zero: int, kind: LayerKind, pruned: Counter[str]) -> bool:
        trained = any(port.role is PortRole.PARAMETER for port in kind.inputs)
        if zero != min(self.zero) and not trained and self.applies(Rule.ZERO_WITHOUT_PARAMETERS):
            pruned[Rule.ZERO_WITHOUT_PARAMETERS] += 1
            return False
        return True


DistinctRemats = Callable[[LayerKind, tuple[Remat, ...]], tuple[Remat, ...]]
"""Of some policies, those that differ in what a layer keeps and repeats; see `Planner.distinct_remats`."""


@functools.lru_cache(maxsize=65536)
def _strategy(
    dp: tuple[str, ...], tp: tuple[str, ...], sp: tuple[str, ...], sp_kind: SequenceParallel, zero: int, remat: Remat
) -> LayerStrategy:
    """The one object for a strategy: they are listed for every layer kind and micro-batch."""
    return LayerStrategy(dp=dp, tp=tp, sp=sp, sp_kind=sp_kind, zero=zero, remat=remat)


Axes = tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...], SequenceParallel]
"""dp, tp and sp axes, and the kind of sp."""


def axes_of(strategy: LayerStrategy) -> Axes:
    """The axes that a strategy uses, whatever its ZeRO stage and rematerialisation policy."""
    return strategy.dp, strategy.tp, strategy.sp, strategy.sp_kind


def meshes_for(cluster: ClusterSpec) -> tuple[tuple[MeshAxis, ...], ...]:
    """Meshes of prime axes over all devices of a cluster: axes across nodes first, in every order of unlike primes."""
    orders = itertools.product(_orders(cluster.num_nodes), _orders(cluster.devices_per_node))
    return tuple(
        _mesh([(size, INTER) for size in nodes] + [(size, INTRA) for size in local]) for nodes, local in orders
    )


def batch_axes_for(mesh: tuple[MeshAxis, ...], microbatch: int) -> tuple[tuple[str, ...], ...]:
    """Plan-wide layouts of the batch: prefixes of the mesh that divide the micro-batch, the longest first."""
    prefixes = [tuple(axis.name for axis in mesh[:stop]) for stop in range(len(mesh), -1, -1)]
    return tuple(axes for axes in prefixes if microbatch % _degree(axes, mesh) == 0)


def _orders(number: int) -> list[tuple[int, ...]]:
    return sorted(set(itertools.permutations(prime_factors(number))), reverse=True)


def _mesh(axes: list[tuple[int, str]]) -> tuple[MeshAxis, ...]:
    letters = string.ascii_lowercase
    return tuple(MeshAxis(name=letters[index], size=size, level=level) for index, (size, level) in enumerate(axes))


def _degree(axes: Iterable[str], mesh: tuple[MeshAxis, ...]) -> int:
    chosen = set(axes)
    return math.prod(axis.size for axis in mesh if axis.name in chosen)


def _extent(kind: LayerKind, role: FactorRole) -> int:
    """Product of the kind's factors of a role: no degree that does not divide it can be used up."""
    return math.prod(factor.size for factor in kind.program.factors if factor.role is role)


def _idle(mesh: tuple[MeshAxis, ...], microbatch: int) -> Axes:
    """For a layer that nothing else fits: as much dp as divides, the remaining axes repeat the work."""
    return batch_axes_for(mesh, microbatch)[0], (), (), SequenceParallel.NONE
