"""Forward times per layer type, as Hetu-Galvatron's model profiler writes them.

A file holds the raw forward milliseconds of whole models, `layernum[L]_bsz{B}_seq{S}`, and what was derived from them:
`layertype_{k}_bsz{B}_seq{S}`, milliseconds per layer and example, and `layertype_other_...`, the rest (embedding and
head) per example. Version 2.0 has no `_seq`, and derives `layertype_{k}` alone, without `_bsz`. Several layer types
write `seq[512,512]`, one length each.
"""

from __future__ import annotations

import itertools
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any, NamedTuple

from galvatron_jax.spec.files import read_data
from galvatron_jax.spec.galvatron.reading import Faults, SequenceKey, choose_sequence, format_sequence, parse_sequence

_SEQ = r"(?:_seq(\[\d+(?:,\d+)*\]|\d+(?:_\d+)*))?"
_DERIVED = re.compile(rf"layertype_(\d+|other(?:_\d+)?)(?:_bsz(\d+))?{_SEQ}")
_RAW = re.compile(rf"layernum(\[\d+(?:,\d+)*\]|\d+(?:_\d+)*)_bsz(\d+){_SEQ}")
_FORMS = ("layernum[L]_bszB_seqS", "layertype_K_bszB_seqS", "layertype_other_bszB_seqS", "layertype_K")

_OTHER = -1
"""Stands for what is no layer: embedding and head together."""


class _Point(NamedTuple):
    """What a time was measured of."""

    kind: int
    """Layer type, or `_OTHER`."""
    batch: int | None
    """Examples; None where the file does not say."""
    sequence: SequenceKey


@dataclass(frozen=True)
class ForwardTimes:
    """Forward seconds per example at each batch that was measured, at one sequence length."""

    seconds_per_example: Mapping[int | None, float]
    """By examples in the batch; one entry at None where the file does not say which batch was measured."""

    @property
    def points(self) -> tuple[tuple[int, float], ...]:
        """Pairs of examples and seconds of the whole batch, ascending."""
        return tuple(sorted((b or 1, (b or 1) * s) for b, s in self.seconds_per_example.items()))


@dataclass(frozen=True)
class ComputationProfile:
    """Forward times of a model's layer types, and of its embedding and head together."""

    source: str
    sequence: SequenceKey
    layers: tuple[ForwardTimes, ...]
    """Per layer type."""
    other: ForwardTimes | None
    """Embedding and head together; None where a file says nothing of them."""


def read_computation(path: str | PathLike[str], *, sequence: int | Sequence[int] | None = None) -> ComputationProfile:
    """Reads a `computation_profiling_*.json` file of Hetu-Galvatron 2.0 to 3.0.

    Where a derived key is missing, it is computed from the raw ones as its profiler does: the difference of two models
    that differ in one layer type's count, per layer and example; what is left of the smallest is `other`.

    Args:
        path: The file.
        sequence: Tokens (one number per layer type where they differ); None where the file has one length only.

    Raises:
        DocumentError: naming every fault of the file.
    """
    data = read_data(path)
    faults = Faults(str(path), "computation profile")
    derived, raw = _parse(data, faults)
    faults.check()
    times = _derive(raw) | derived
    types = sorted({point.kind for point in times} - {_OTHER})
    if types != list(range(len(types))) or not types:
        faults.add("layertype_K", _missing_types(types, raw))
    faults.check()
    chosen = choose_sequence(_sequences(times, types), sequence, source=str(path), what="times")
    layers = tuple(_select(times, kind, chosen[kind : kind + 1] if chosen else None) for kind in types)
    other = _select(times, _OTHER, chosen)
    for kind, layer in enumerate(layers):
        if not layer.seconds_per_example:
            faults.add(f"layertype_{kind}_bszB_seqS", f"has no time at sequence length {format_sequence(chosen)}.")
        if any(seconds < 0 for seconds in layer.seconds_per_example.values()):
            faults.add(f"layertype_{kind}", "models with more layers took less time: profile the model again.")
    faults.check()
    return ComputationProfile(str(path), chosen, layers, other if other.seconds_per_example else None)


def _parse(
    data: Mapping[str, Any], faults: Faults
) -> tuple[dict[_Point, float], dict[tuple[int, SequenceKey], dict[tuple[int, ...], float]]]:
    """Derived seconds per example, and raw seconds of whole models by batch and sequence, then layer counts."""
    derived: dict[_Point, float] = {}
    raw: dict[tuple[int, SequenceKey], dict[tuple[int, ...], float]] = defaultdict(dict)
    for key, value in data.items():
        if match := _DERIVED.fullmatch(key):
            kind = _OTHER if match[1].startswith("other") else int(match[1])
            batch = int(match[2]) if match[2] else None
            derived[_Point(kind, batch, parse_sequence(match[3]))] = _seconds(key, value, batch, faults)
        elif match := _RAW.fullmatch(key):
            counts = parse_sequence(match[1]) or ()
            seconds = _seconds(key, value, int(match[2]), faults)
            raw[int(match[2]), parse_sequence(match[3])][counts] = seconds
        else:
            faults.unknown(key, _FORMS)
    return derived, raw


def _seconds(key: str, value: Any, batch: int | None, faults: Faults) -> float:
    if batch == 0:
        faults.add(repr(key), "names a batch of 0 examples; expected at least 1.")
    return faults.number(repr(key), value, unit="milliseconds") / 1e3


def _derive(raw: Mapping[tuple[int, SequenceKey], Mapping[tuple[int, ...], float]]) -> dict[_Point, float]:
    """Seconds per layer and example by differences of models, as its `model_profiler` forms them."""
    times: dict[_Point, float] = {}
    for (batch, sequence), models in raw.items():
        base = min(models, key=sum)
        layers = {}
        for counts, seconds in models.items():
            more = (
                [kind for kind, count in enumerate(counts) if count != base[kind]] if len(counts) == len(base) else []
            )
            if len(more) == 1:
                kind = more[0]
                layers[kind] = (seconds - models[base]) / batch / (counts[kind] - base[kind])
                times[_Point(kind, batch, sequence[kind : kind + 1] if sequence else None)] = layers[kind]
        if len(layers) == len(base):
            rest = models[base] / batch - sum(layers[kind] * count for kind, count in enumerate(base))
            times[_Point(_OTHER, batch, sequence)] = max(0.0, rest)
    return times


def _missing_types(types: Sequence[int], raw: Mapping) -> str:
    if types:
        absent = sorted(set(range(types[-1])) - set(types))
        return f"layer types are numbered from 0, but {', '.join(map(str, absent))} of 0 to {types[-1]} has no time."
    if raw:
        counts = sorted({counts for models in raw.values() for counts in models})
        listed = " and ".join(f"layernum{list(count)}" for count in counts)
        return (
            f"no layer's time can be told from {listed} alone: profile a second model with more layers at the same "
            "batch and sequence length, or add the derived keys."
        )
    return "the file has no times."


def _sequences(times: Mapping[_Point, float], types: Sequence[int]) -> set[SequenceKey]:
    """Sequence lengths at which every layer type has a time."""
    of_other = {point.sequence for point in times if point.kind == _OTHER}
    per_type = [{point.sequence for point in times if point.kind == kind} for kind in types]
    if len(types) == 1:
        return per_type[0]
    if of_other:
        return of_other
    if any(None in lengths for lengths in per_type):
        return {None}
    return {tuple(seq[0] for seq in lengths if seq) for lengths in itertools.product(*per_type)}


def _select(times: Mapping[_Point, float], kind: int, sequence: SequenceKey) -> ForwardTimes:
    return ForwardTimes({p.batch: seconds for p, seconds in times.items() if p.kind == kind and p.sequence == sequence})
