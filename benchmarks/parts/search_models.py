"""Traces models for searches: `search_models.py FOLDER MODEL …`, MODEL `name=family:preset[,field=value…]`.

Writes `FOLDER/name.json` for each, and prints seconds of CPU time and of the clock per name as one JSON object. A
process of its own, so that the one that searches never imports JAX.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from flax import nnx

from galvatron_jax.models import registry
from galvatron_jax.spec.model import ModelSpec
from galvatron_jax.trace.model import trace

BATCH = 8
"""Examples traced at; the search scales to others."""


def traced(text: str) -> tuple[str, ModelSpec]:
    """A model's name and spec, from `name=family:preset[,field=value…]`."""
    name, described = text.split("=", 1)
    head, *settings = described.split(",")
    family_name, preset = head.split(":")
    pairs = (setting.split("=", 1) for setting in settings)
    family = registry.family(family_name)
    config = registry.model_config(family_name, preset, **{field: _value(value) for field, value in pairs})
    model = nnx.eval_shape(lambda: family.model(config, rngs=nnx.Rngs(0)))
    found = trace(model, family.loss_fn, family.example_batch(config, BATCH), microbatch=BATCH, name=name)
    return name, found.spec


def _value(text: str) -> bool | float | str:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def main(folder: Path, models: list[str]) -> None:
    times = {}
    for text in models:
        start, start_cpu = time.perf_counter(), time.process_time()
        name, spec = traced(text)
        spec.save(folder / f"{name}.json")
        times[name] = {"trace_cpu_s": time.process_time() - start_cpu, "trace_s": time.perf_counter() - start}
    print(json.dumps(times))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
