"""What must not drift: collectives of every layer kind, parameter shardings, collectives of whole steps."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import optax

from galvatron_jax.partition.layer_plan import Collective
from galvatron_jax.partition.layers import plan_layer
from galvatron_jax.runtime.collectives import predicted_collectives
from galvatron_jax.runtime.storage import Group
from galvatron_jax.spec.strategy import LayerStrategy, SequenceParallel
from tests.runtime.matrix import AXES, MICROBATCH, Case, traced

FOLDER = Path(__file__).parent
MODELS = ("gpt2", "llama", "llama_tp_over_kv", "bert", "vit", "t5", "moe", "linen_llama")
MESH = dict.fromkeys(AXES, 2)
STRATEGIES = {
    "dp": LayerStrategy(dp=("a", "b", "c")),
    "zero3": LayerStrategy(dp=("a", "b", "c"), zero=3),
    "tp": LayerStrategy(dp=("a",), tp=("b", "c")),
    "megatron": LayerStrategy(dp=("a",), tp=("b", "c"), sp=("b", "c"), sp_kind=SequenceParallel.MEGATRON),
    "ulysses": LayerStrategy(dp=("a",), sp=("b", "c"), sp_kind=SequenceParallel.ULYSSES),
}

Record = dict


def _written(collectives: Iterable[Collective]) -> list[str]:
    """Collectives as text, equal ones together: `2 × all-reduce of 32768 bytes over b,c`."""
    counts = Counter(f"{c.kind.value} of {c.bytes} bytes over {','.join(sorted(c.axes))}" for c in collectives)
    return [f"{n} × {text}" for text, n in sorted(counts.items())]


def layer_collectives() -> Record:
    """Per model, layer kind and strategy: the collectives of one micro-batch, forward and backward."""
    record: Record = {}
    for model in MODELS:
        spec = traced(model).spec
        for kind in spec.kinds:
            for name, strategy in STRATEGIES.items():
                plan = plan_layer(
                    kind, strategy, mesh=MESH, microbatch=MICROBATCH, model_microbatch=spec.microbatch
                )  # fmt: skip
                record.setdefault(model, {}).setdefault(kind.name, {})[name] = {
                    "forward": _written(plan.forward.collectives),
                    "backward": _written(plan.backward.collectives),
                    "once a step": _written(c for p in plan.parameters for c in (*p.sync, *p.publish)),
                }
    return record


def _layout(group: Group, *, optimizer: bool = False) -> str:
    """Stored dims with the axes that split each: `4 × 64 × 256/c,b`."""
    axes = [(axis,) if isinstance(axis, str) else axis or () for axis in group.spec(optimizer=optimizer)]
    return " × ".join(f"{n}/{','.join(a)}" if a else str(n) for n, a in zip(group.stored_shape, axes, strict=True))


def parameter_shardings() -> Record:
    """Per model and strategy: the mesh axes on each dim of each stored array, and of its optimizer state."""
    record: Record = {}
    for model in MODELS:
        for name in ("tp", "zero3"):
            step = Case(model, {"tp": "tp4", "zero3": "zero3"}[name]).build(optax.sgd(0.1))
            record.setdefault(model, {})[name] = {
                group.key: f"{_layout(group)}; optimizer {_layout(group, optimizer=True)}"
                for group in step.storage.groups
            }
    return record


def step_collectives() -> Record:
    """Per model: the collectives of a step under data parallelism, with one and with four micro-batches."""
    return {
        model: {
            f"{m} micro-batches": [
                f"{n} × {s.kind} of {s.bytes} bytes over {','.join(s.axes)}"
                for s, n in sorted(predicted_collectives(Case(model, "dp8", m).build(optax.sgd(0.1))).items())
            ]
            for m in (1, 4)
        }
        for model in MODELS
    }


RECORDS: dict[str, Callable[[], Record]] = {
    "layer_collectives": layer_collectives,
    "parameter_shardings": parameter_shardings,
    "step_collectives": step_collectives,
}


def text_of(name: str) -> str:
    """A record as its file holds it."""
    return json.dumps(RECORDS[name](), indent=1, ensure_ascii=False) + "\n"


def path_of(name: str) -> Path:
    """The file of a record."""
    return FOLDER / f"{name}.json"
