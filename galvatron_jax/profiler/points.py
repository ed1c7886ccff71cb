"""Which local shapes of which layers to time: few points that pin the curves the search reads. No device is touched."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from galvatron_jax.spec.model import LayerKind, ModelSpec
from galvatron_jax.spec.profile import LocalShape
from galvatron_jax.spec.program import FactorRole
from galvatron_jax.spec.strategy import LayerStrategy, Remat, SequenceParallel

_Degrees = tuple[int, int, SequenceParallel]
"""Degrees of tp and sp, and the kind of sp: with the local batch they fix the shape at which a device sees a layer."""


@dataclass(frozen=True)
class LayerTimingRequest:
    """One layer kind to be timed at one local shape."""

    kind: str
    """Fingerprint of the layer kind."""
    name: str
    """Readable name of the kind."""
    shape: LocalShape
    remat: Remat
    strategy: LayerStrategy
    """One of the strategies that give this local shape, with this `remat`."""
    microbatch: int
    """Examples of the global micro-batch at which the strategy gives this local batch."""


@dataclass(frozen=True)
class _Corner:
    """A local batch that a strategy and a micro-batch give."""

    batch: int
    strategy: LayerStrategy
    microbatch: int


def choose_points(
    model: ModelSpec,
    strategies: Sequence[LayerStrategy],
    *,
    mesh: Mapping[str, int],
    microbatches: Iterable[int],
    stages: Iterable[Iterable[str]] | None = None,
    max_points: int | None = 32,
) -> list[LayerTimingRequest]:
    """Chooses what to time, the most telling points first.

    Of a kind that repeats, every tp degree is timed at its largest local batch; the unsplit layer also at its middle
    and smallest, and at that of data parallelism over all devices; the largest tp degree at its smallest; the unsplit
    layer, at its middle one, also with every sort of rematerialisation there is to choose from; and the largest Ulysses
    and Megatron sequence degrees once. Of other kinds (embedding, head) the unsplit layer and the largest tp degree.
    Between these the cost model interpolates; with rematerialisation a layer's time grows with the batch as without.

    Args:
        model: The model.
        strategies: What the search may choose from.
        mesh: Mesh axis sizes by name.
        microbatches: Global micro-batches that the search may choose from, in examples.
        stages: Axes that a pipeline's stage may lie over, each of them a choice; all of the mesh's by default.
        max_points: Upper bound, the least telling dropped; None for all.
    """
    counts = Counter(layer.kind for layer in model.layers)
    repeats = max(counts.values(), default=0) > 1
    batches = sorted(set(microbatches))
    strategies = _unidle(strategies, [frozenset(axes) for axes in ([mesh] if stages is None else stages)])
    shared = max(batches, default=0) // math.prod(mesh.values())
    asked = {strategy.remat for strategy in strategies}
    # Where only communication is repeated, computation takes as long as without.
    remats = [remat for remat in (Remat.FULL, Remat.DOTS, Remat.ATTENTION) if remat in asked]
    ranked: list[tuple[int, int, LayerTimingRequest]] = []
    for index in sorted(counts):
        kind = model.kinds[index]
        corners = _corners(kind, strategies, mesh, batches)
        chosen = (
            _repeated(kind, corners, remats, shared) if counts[index] > 1 or not repeats else _single(kind, corners)
        )
        requests = dict.fromkeys(chosen)
        ranked += [(rank, index, request) for rank, request in enumerate(requests)]
    ranked.sort(key=lambda entry: entry[:2])
    return [request for _, _, request in ranked[:max_points]]


def _repeated(
    kind: LayerKind, corners: Mapping[_Degrees, list[_Corner]], remats: Sequence[Remat], shared: int
) -> Iterator[LayerTimingRequest]:
    splits = sorted(degrees for degrees in corners if degrees[1] == 1)
    if not splits:
        splits = sorted(corners)
    if not splits:
        return
    base, widest = splits[0], splits[-1]
    middle = corners[base][len(corners[base]) // 2]
    yield _request(kind, base, corners[base][-1])
    yield _request(kind, widest, corners[widest][-1])
    for remat in remats[:1]:
        yield _request(kind, base, middle, remat)
    yield _request(kind, base, corners[base][0])
    yield _request(kind, base, middle)
    yield from (_request(kind, base, corner) for corner in corners[base] if corner.batch == shared)
    for remat in remats[1:]:
        yield _request(kind, base, middle, remat)
    for degrees in splits[1:-1]:
        yield _request(kind, degrees, corners[degrees][-1])
    for sp_kind in (SequenceParallel.ULYSSES, SequenceParallel.MEGATRON):
        sequence = [degrees for degrees in corners if degrees[2] is sp_kind]
        if sequence:
            # Ulysses without tp where it exists: the pure form of the largest degree.
            degrees = max(sequence, key=lambda d: (d[1], -d[0]))
            yield _request(kind, degrees, corners[degrees][-1])
    yield _request(kind, widest, corners[widest][0])


def _single(kind: LayerKind, corners: Mapping[_Degrees, list[_Corner]]) -> Iterator[LayerTimingRequest]:
    splits = sorted(degrees for degrees in corners if degrees[1] == 1) or sorted(corners)
    for degrees in (splits[:1] + splits[-1:]) if splits else ():
        yield _request(kind, degrees, corners[degrees][-1])


def _request(kind: LayerKind, degrees: _Degrees, corner: _Corner, remat: Remat = Remat.NONE) -> LayerTimingRequest:
    tp, sp, sp_kind = degrees
    return LayerTimingRequest(
        kind=kind.fingerprint,
        name=kind.name,
        shape=LocalShape(batch=corner.batch, tp=tp, sp=sp, sp_kind=sp_kind),
        remat=remat,
        strategy=corner.strategy.model_copy(update={"remat": remat}),
        microbatch=corner.microbatch,
    )


def _corners(
    kind: LayerKind, strategies: Sequence[LayerStrategy], mesh: Mapping[str, int], microbatches: Sequence[int]
) -> dict[_Degrees, list[_Corner]]:
    """Per degrees the local batches that the search can ask for, smallest first."""
    hidden = any(factor.role is FactorRole.HIDDEN for factor in kind.program.factors)
    found: dict[_Degrees, dict[int, _Corner]] = defaultdict(dict)
    for strategy in sorted(strategies, key=lambda s: s.zero):
        tp, replicas = _size(strategy.tp, mesh), _size(strategy.dp, mesh)
        if tp > 1 and not hidden:
            continue
        # `LocalShape.sp` is the Ulysses degree; Megatron's equals tp.
        sp = _size(strategy.sp, mesh)
        for microbatch in microbatches:
            if microbatch % replicas == 0:
                corner = _Corner(microbatch // replicas, strategy, microbatch)
                found[tp, sp, strategy.sp_kind].setdefault(corner.batch, corner)
    return {degrees: [batches[size] for size in sorted(batches)] for degrees, batches in found.items()}


def _unidle(strategies: Sequence[LayerStrategy], stages: Sequence[frozenset[str]]) -> Sequence[LayerStrategy]:
    """The strategies that leave no axis of a stage without work, or all if none does."""
    return [s for s in strategies if {*s.dp, *s.tp, *s.sp} in stages] or strategies


def _size(axes: Iterable[str], mesh: Mapping[str, int]) -> int:
    return math.prod(mesh[axis] for axis in axes)
