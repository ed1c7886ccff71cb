"""Memory per layer type, as Hetu-Galvatron's model profiler writes it.

A file holds raw megabytes of whole models under `"{pp}_{tp}_{dp}[_c][_vtp][_sp]"` (keys
`layernum[L]_bsz{B}_seq{S}_rank{r}_{ms|act|act_peak}`: model states, activations, their peak), and what was derived:

- `layertype_{k}[_sp]`: `parameter_size`, and `tp_activation_per_bsz_dict` by tensor-parallel degree, and under full
  recomputation as `checkpoint`; `_sp` says that the sequence was split along with tensor parallelism;
- `other_memory_pp_off[_sp]`, `other_memory_pp_on_first[_sp]`, `other_memory_pp_on_last[_sp]`: `model_states` and
  `activation` of embedding and head: on one stage, on the first of several, on the last of several.

Since version 2.4 a level of sequence lengths ("2048", "[512,512]") lies between name and values, and `other_memory`
is given by tensor-parallel degree. Versions 2.0 to 2.3 have neither.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any

from galvatron_jax.spec.diff import format_value
from galvatron_jax.spec.files import read_data
from galvatron_jax.spec.galvatron.reading import MB, Faults, SequenceKey, choose_sequence, parse_sequence

_LAYER = re.compile(r"layertype_(\d+)(_sp)?")
_ENDS = re.compile(r"other_memory_pp_(off|on_first|on_last)(_sp)?")
_RUN = re.compile(r"(\d+)_(\d+)_(\d+)(_c)?(_vtp)?(_sp)?")
_RAW = re.compile(r"layernum(\[[\d,]+\]|[\d_]+)_bsz(\d+)(?:_seq(\[[\d,]+\]|\d+(?:_\d+)*))?_rank(\d+)_(ms|act|act_peak)")
_SEQUENCE = re.compile(r"\[?\d+([,_]\d+)*\]?")
_FORMS = ("layertype_K", "layertype_K_sp", "other_memory_pp_off", "other_memory_pp_on_first", "other_memory_pp_on_last")
_RUN_FORM, _RAW_FORM = "PP_TP_DP_c_vtp_sp", "layernum[L]_bszB_seqS_rankR_ms"


@dataclass(frozen=True)
class LayerMemory:
    """Bytes of one layer of a type."""

    parameter_bytes: float
    """Of its parameters alone, in float32, unsharded."""
    activation_bytes: Mapping[int, float]
    """What forward keeps per example, by tensor-parallel (or Ulysses) degree."""
    checkpoint_bytes: float | None
    """The same under full recomputation, unsharded; None where it was not measured."""


@dataclass(frozen=True)
class EndMemory:
    """Bytes of embedding and head, or of one of them, by the degree of vocabulary parallelism."""

    state_bytes: Mapping[int, float]
    """Parameters, gradients and optimizer state."""
    activation_bytes: Mapping[int, float]
    """What forward keeps per example."""


@dataclass(frozen=True)
class RawMemory:
    """One measurement of a whole model on one device."""

    pp: int
    tp: int
    dp: int
    checkpoint: bool
    vocabulary_parallel: bool
    sequence_parallel: bool
    layers: tuple[int, ...]
    """Layers of each type."""
    batch: int
    """Global batch."""
    sequence: SequenceKey
    rank: int
    quantity: str
    """`ms` (model states), `act` (activations kept) or `act_peak`."""
    bytes: float


@dataclass(frozen=True)
class MemoryProfile:
    """Memory of a model's layer types, and of embedding and head."""

    source: str
    sequence: SequenceKey
    sequence_parallel: bool
    """Whether tensor parallelism was measured with Megatron's sequence parallelism."""
    layers: tuple[LayerMemory, ...]
    """Per layer type."""
    whole: EndMemory
    """Embedding and head on one stage."""
    first: EndMemory
    """Embedding on the first of several stages."""
    last: EndMemory
    """Head on the last of several stages."""
    raw: tuple[RawMemory, ...] = ()


def read_memory(
    path: str | PathLike[str], *, sequence: int | Sequence[int] | None = None, sequence_parallel: bool | None = None
) -> MemoryProfile:
    """Reads a `memory_profiling_*.json` file of Hetu-Galvatron 2.0 to 3.0.

    Args:
        path: The file.
        sequence: Tokens (one number per layer type where they differ); None where the file has one length only.
        sequence_parallel: Whether to read the keys that end in `_sp`; None for these where the file has them.

    Raises:
        DocumentError: naming every fault of the file.
    """
    data = read_data(path)
    faults = Faults(str(path), "memory profile")
    _check_keys(data, faults)
    has = any(_is_table(key) and key.endswith("_sp") for key in data)
    parallel = has if sequence_parallel is None else sequence_parallel
    suffix = "_sp" if parallel else ""
    ends = {name: data.get(f"other_memory_pp_{name}{suffix}") for name in ("off", "on_first", "on_last")}
    types = sorted(int(m[1]) for key in data if (m := _LAYER.fullmatch(key)) and (m[2] or "") == suffix)
    for name, table in ends.items():
        if not isinstance(table, dict):
            faults.add(f"other_memory_pp_{name}{suffix}", _absent(table, data))
    if not types:
        faults.add(f"layertype_K{suffix}", _absent(None, data))
    elif types != list(range(len(types))):
        faults.add(f"layertype_K{suffix}", f"layer types are {types}; expected 0, 1, and so on without gaps.")
    faults.check()
    chosen = choose_sequence(_sequences(data, ends, suffix, types), sequence, source=str(path), what="memory")
    layers = tuple(_layer(data, f"layertype_{k}{suffix}", chosen and chosen[k : k + 1], faults) for k in types)
    whole, first, last = (_end(data, f"other_memory_pp_{name}{suffix}", chosen, faults) for name in ends)
    raw = tuple(_raw(data, faults))
    faults.check()
    return MemoryProfile(str(path), chosen, parallel, layers, whole, first, last, raw)


def _is_table(key: str) -> bool:
    return bool(_LAYER.fullmatch(key) or _ENDS.fullmatch(key))


def _check_keys(data: Mapping[str, Any], faults: Faults) -> None:
    for key in data:
        if not _is_table(key) and not _RUN.fullmatch(key):
            faults.unknown(key, (*_FORMS, _RUN_FORM))


def _absent(table: Any, data: Mapping[str, Any]) -> str:
    if table is not None:
        return f"found {format_value(table)}; expected a table."
    have = [key for key in data if _is_table(key)]
    return f"missing; the derived keys it has: {', '.join(have) or 'none (the profiler stopped before deriving them)'}."


def _by_sequence(table: Mapping[str, Any]) -> bool:
    """Whether a level of sequence lengths lies above the values (since version 2.4)."""
    return bool(table) and all(_SEQUENCE.fullmatch(key) for key in table)


def _sequences(data: Mapping[str, Any], ends: Mapping[str, Any], suffix: str, types: list[int]) -> set[SequenceKey]:
    table = ends["off"] if len(types) > 1 else data[f"layertype_0{suffix}"]
    if not isinstance(table, dict) or not _by_sequence(table):
        return {None}
    return {parse_sequence(key) for key in table}


def _at(data: Mapping[str, Any], key: str, sequence: SequenceKey, faults: Faults) -> tuple[str, Mapping[str, Any]]:
    """The values of a table at a sequence length, with their place."""
    table = data[key]
    if not isinstance(table, dict):
        faults.add(key, f"found {format_value(table)}; expected a table.")
        return key, {}
    if not _by_sequence(table):
        return key, table
    for name, values in table.items():
        if parse_sequence(name) == sequence:
            if isinstance(values, dict):
                return f"{key}.{name}", values
            faults.add(f"{key}.{name}", f"found {format_value(values)}; expected a table.")
            return key, {}
    wanted = ",".join(map(str, sequence or ()))
    faults.add(key, f"has no entry for sequence length {wanted}; it has {', '.join(table)}.")
    return key, {}


def _layer(data: Mapping[str, Any], key: str, sequence: SequenceKey, faults: Faults) -> LayerMemory:
    place, values = _at(data, key, sequence, faults)
    if not values:
        return LayerMemory(0.0, {}, None)
    _names(values, ("parameter_size", "tp_activation_per_bsz_dict"), place, faults)
    parameter = faults.number(f"{place}.parameter_size", values.get("parameter_size"), unit="MB")
    inner = f"{place}.tp_activation_per_bsz_dict"
    table = values.get("tp_activation_per_bsz_dict")
    if not isinstance(table, dict):
        if table is not None:
            faults.add(inner, f"found {format_value(table)}; expected a table by tensor-parallel degree.")
        return LayerMemory(parameter * MB, {}, None)
    checkpoint = None
    if "checkpoint" in table:
        checkpoint = faults.number(f"{inner}.checkpoint", table["checkpoint"], unit="MB") * MB
    degrees = {degree: value for degree, value in table.items() if degree != "checkpoint"}
    return LayerMemory(parameter * MB, _degrees(degrees, inner, faults), checkpoint)


def _end(data: Mapping[str, Any], key: str, sequence: SequenceKey, faults: Faults) -> EndMemory:
    place, values = _at(data, key, sequence, faults)
    if not values:
        return EndMemory({}, {})
    _names(values, ("model_states", "activation"), place, faults)
    tables = []
    for name in ("model_states", "activation"):
        table = values.get(name, {})
        # Versions 2.0 to 2.3 give one number: it was measured without vocabulary parallelism.
        tables.append(_degrees(table if isinstance(table, dict) else {"1": table}, f"{place}.{name}", faults))
    return EndMemory(*tables)


def _names(values: Mapping[str, Any], expected: tuple[str, str], place: str, faults: Faults) -> None:
    for name in expected:
        if name not in values:
            faults.add(f"{place}.{name}", "missing.")
    for name in values:
        if name not in expected:
            faults.unknown(name, expected)


def _degrees(table: Mapping[str, Any], place: str, faults: Faults) -> dict[int, float]:
    result = {}
    for degree, value in table.items():
        if not degree.isdecimal() or int(degree) < 1:
            faults.add(f"{place}.{degree}", "expected a tensor-parallel degree such as 1, 2, 4 or 8 as the key.")
            continue
        result[int(degree)] = faults.number(f"{place}.{degree}", value, unit="MB") * MB
    return result


def _raw(data: Mapping[str, Any], faults: Faults) -> list[RawMemory]:
    result = []
    for key, values in data.items():
        run = _RUN.fullmatch(key)
        if not run:
            continue
        pp, tp, dp = (int(run[index]) for index in (1, 2, 3))
        checkpoint, vocabulary, parallel = (bool(run[index]) for index in (4, 5, 6))
        for name, value in values.items() if isinstance(values, dict) else ():
            match = _RAW.fullmatch(name)
            if not match:
                faults.unknown(name, (_RAW_FORM,))
                continue
            layers, sequence = parse_sequence(match[1]) or (), parse_sequence(match[3])
            held = faults.number(f"{key}.{name}", value, unit="MB") * MB
            result.append(
                RawMemory(
                    pp, tp, dp, checkpoint, vocabulary, parallel, layers, int(match[2]), sequence, int(match[4]),
                    match[5], held,
                )
            )  # fmt: skip
        if not isinstance(values, dict):
            faults.add(key, f"found {format_value(values)}; expected a table.")
    return result
