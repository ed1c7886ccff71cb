"""Models and plans of `time_accuracy.py`: what two devices can do with a small model, by hand and by name."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from galvatron_jax.spec.model import ModelSpec
from galvatron_jax.spec.plan import LayerGroup, MeshAxis, Plan, Schedule, Stage
from galvatron_jax.spec.strategy import LayerStrategy, Remat, SequenceParallel

GLOBAL_BATCH = 16
MODELS: dict[str, dict[str, Any]] = {
    "gpt2": {
        "num_layers": 4, "width": 256, "num_heads": 8, "mlp_width": 1024, "vocab_size": 1024, "seq_length": 128,
        "tie_embeddings": False,
    },
    "llama": {
        "num_layers": 6, "width": 192, "num_heads": 6, "num_kv_heads": 2, "mlp_width": 512, "vocab_size": 2048,
        "seq_length": 128,
    },
}  # fmt: skip
LINKS: dict[str, float | None] = {"open": None, "2 Gbit/s": 2e9, "500 Mbit/s": 5e8}
"""Bits per second each way."""

_MESH = (MeshAxis(name="a", size=2, level="inter"),)
_BOTH, _ALONE = ("a",), LayerStrategy()
_SP = {"megatron": {"tp": _BOTH, "sp": _BOTH, "sp_kind": SequenceParallel.MEGATRON}}
_SP["ulysses"] = {"sp": _BOTH, "sp_kind": SequenceParallel.ULYSSES}

QUICK = (
    "dp x1", "dp x4", "dp x1 full", "zero2 x1", "zero3 x1", "zero3 x2", "tp x1", "tp x4", "megatron x1", "ulysses x1",
    "1f1b x4", "1f1b x16", "1f1b-stash x8", "gpipe x4",
)  # fmt: skip
"""A dozen, of every sort."""


def plans(model: ModelSpec) -> dict[str, Plan]:
    """All plans of a model, by name: the strategy, `x` the number of micro-batches, and what is done again."""
    return dict(itertools.chain(_single(model), _mixed(model), _pipelines(model)))


def _single(model: ModelSpec) -> Iterator[tuple[str, Plan]]:
    """One strategy for all layers."""
    for zero, counts in ((0, (1, 2, 4, 8)), (1, (1, 4)), (2, (1, 4)), (3, (1, 2, 4))):
        for count in counts:
            yield f"{f'zero{zero}' if zero else 'dp'} x{count}", _one(model, LayerStrategy(dp=_BOTH, zero=zero), count)
    for remat in (Remat.ATTENTION, Remat.DOTS, Remat.FULL):
        yield f"dp x1 {remat}", _one(model, LayerStrategy(dp=_BOTH, remat=remat), 1)
    yield "zero3 x1 full", _one(model, LayerStrategy(dp=_BOTH, zero=3, remat=Remat.FULL), 1)
    for count in (1, 2, 4):
        yield f"tp x{count}", _one(model, LayerStrategy(tp=_BOTH), count)
        yield f"megatron x{count}", _one(model, LayerStrategy(**_SP["megatron"]), count)
    yield "tp x1 full", _one(model, LayerStrategy(tp=_BOTH, remat=Remat.FULL), 1)
    yield "megatron x1 gathers", _one(model, LayerStrategy(**_SP["megatron"], remat=Remat.GATHERS), 1)
    for count in (1, 4):
        yield f"ulysses x{count}", _one(model, LayerStrategy(**_SP["ulysses"]), count)
    yield "ulysses zero3 x1", _one(model, LayerStrategy(**_SP["ulysses"], zero=3), 1)


def _mixed(model: ModelSpec) -> Iterator[tuple[str, Plan]]:
    """Layers that differ."""
    dp, tp = LayerStrategy(dp=_BOTH), LayerStrategy(tp=_BOTH)
    last = len(model.layers) - 1
    edges = [dp if index in (0, last) else tp for index in range(last + 1)]
    halves = [dp if index <= last // 2 else LayerStrategy(dp=_BOTH, zero=3) for index in range(last + 1)]
    yield "dp at the ends, tp x2", _plan(model, [(0, edges)], 2)
    yield "dp, then zero3 x1", _plan(model, [(0, halves)], 1)


def _pipelines(model: ModelSpec) -> Iterator[tuple[str, Plan]]:
    """Two stages; four on the two hosts where they are interleaved."""
    layers = len(model.layers)
    middle = (layers + 1) // 2
    for schedule, counts in (
        (Schedule.ONE_F_ONE_B, (4, 16)),
        (Schedule.ONE_F_ONE_B_STASH, (4, 8)),
        (Schedule.GPIPE, (4, 16)),
    ):
        for count in counts:
            yield f"{schedule} x{count}", _staged(model, (0, middle), schedule, count)
    yield "1f1b x8 uneven", _staged(model, (0, middle - 1), Schedule.ONE_F_ONE_B, 8)
    quarters = (0, *(round(quarter * layers / 4) for quarter in (1, 2, 3)))
    yield "interleaved x8", _staged(model, quarters, Schedule.INTERLEAVED, 8)


def _one(model: ModelSpec, strategy: LayerStrategy, count: int) -> Plan:
    return _plan(model, [(0, [strategy] * len(model.layers))], count)


def _staged(model: ModelSpec, starts: Sequence[int], schedule: Schedule, count: int) -> Plan:
    ends = (*starts[1:], len(model.layers))
    stages = [(start, [_ALONE] * (stop - start)) for start, stop in zip(starts, ends, strict=True)]
    return _plan(model, stages, count, schedule=schedule)


def _plan(
    model: ModelSpec,
    stages: Sequence[tuple[int, Sequence[LayerStrategy]]],
    count: int,
    *,
    schedule: Schedule = Schedule.NONE,
) -> Plan:
    single = len(stages) == 1
    strategies = stages[0][1]
    return Plan(
        model=model.name,
        mesh=_MESH,
        global_batch=GLOBAL_BATCH,
        num_microbatches=count,
        schedule=schedule,
        stages=tuple(Stage(groups=tuple(_groups(start, own))) for start, own in stages),
        pipeline_axes=() if single else _BOTH,
        batch_axes=_BOTH if single and all(strategy.dp for strategy in strategies) else (),
    )


def _groups(start: int, strategies: Sequence[LayerStrategy]) -> Iterator[LayerGroup]:
    for strategy, members in itertools.groupby(enumerate(strategies, start), key=lambda pair: pair[1]):
        indices = [index for index, _ in members]
        yield LayerGroup(start=indices[0], stop=indices[-1] + 1, strategy=strategy)
