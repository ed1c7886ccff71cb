"""How the time to build a train step grows with depth: 48 identical layers against 6, in one run.

Consecutive layers of one kind and one strategy are one loop in the program, so both are much alike. A plan with three
strategies has three loops at either depth.
"""

from __future__ import annotations

import itertools
import time
from statistics import median
from typing import Any

from harness import Claim, Outcome, run, virtual_cpus

DEVICES = virtual_cpus(8)

import jax  # noqa: E402
import optax  # noqa: E402
from flax import nnx  # noqa: E402

from galvatron_jax.models import registry  # noqa: E402
from galvatron_jax.runtime.step import build_step  # noqa: E402
from galvatron_jax.spec.plan import LayerGroup, MeshAxis, Plan, Stage  # noqa: E402
from galvatron_jax.spec.strategy import LayerStrategy  # noqa: E402
from galvatron_jax.trace.model import Traced, trace  # noqa: E402

LIMIT = 1.5
SHALLOW, DEEP = 6, 48
BATCH = 8
REPEATS, FULL_REPEATS = 3, 9
DATA = LayerStrategy(dp=("a", "b", "c"))
TENSOR = LayerStrategy(dp=("a",), tp=("b", "c"))
ZERO = LayerStrategy(dp=("a", "b", "c"), zero=3, remat="full")
PLANS = {"dp8": (DATA,), "dp2-tp4": (TENSOR,), "mixed": (DATA, TENSOR, ZERO)}
"""Strategies, each for as many consecutive layers as the others."""
PARTS = ("trace_s", "build_s", "lower_s", "compile_s")


def measure(full: bool) -> Outcome:
    results, claims = [], []
    for name, strategies in PLANS.items():
        times = in_turns(strategies, repeats=FULL_REPEATS if full else REPEATS)
        for depth, rows in times.items():
            medians = {part: round(median(row[part] for row in rows), 3) for part in PARTS}
            results.append({"plan": name, "layers": depth, **medians, "repeats": len(rows)})
            print(results[-1])
        text = f"{name}: {DEEP} layers lower and compile in as many times the seconds of {SHALLOW}"
        claims.append(Claim(text, least(times[DEEP]) / least(times[SHALLOW]), LIMIT))
    return Outcome(results, claims)


def least(rows: list[dict[str, float]]) -> float:
    """Seconds to lower and compile, the least of the repeats: other work on the machine only adds to it."""
    return min(row["lower_s"] + row["compile_s"] for row in rows)


def in_turns(strategies: tuple[LayerStrategy, ...], *, repeats: int) -> dict[int, list[dict[str, float]]]:
    """Times of both depths, one after the other."""
    times: dict[int, list[dict[str, float]]] = {SHALLOW: [], DEEP: []}
    for _ in range(repeats):
        for depth, rows in times.items():
            rows.append(build(depth, strategies))
    return times


def build(depth: int, strategies: tuple[LayerStrategy, ...]) -> dict[str, float]:
    """Seconds of each part, from the model to the compiled step."""
    jax.clear_caches()
    clock = [time.perf_counter()]
    traced = trace_model(depth)
    clock.append(time.perf_counter())
    step = build_step(traced, plan_of(traced, strategies), optax.adamw(1e-3), devices=jax.devices()[:8])
    shapes = step.state_shapes, step.batch_shapes
    clock.append(time.perf_counter())
    lowered = step.jitted.lower(*shapes)
    clock.append(time.perf_counter())
    lowered.compile()
    clock.append(time.perf_counter())
    return dict(zip(PARTS, (after - before for before, after in itertools.pairwise(clock)), strict=True))


def trace_model(depth: int) -> Traced:
    gpt2 = registry.family("gpt2")
    config = registry.model_config("gpt2", "tiny", num_layers=depth, tie_embeddings=False)

    def make(seed: Any) -> nnx.Module:
        return gpt2.model(config, rngs=nnx.Rngs(jax.random.key(0 if seed is None else seed)))

    model = nnx.eval_shape(lambda: make(0))
    return trace(model, gpt2.loss_fn, gpt2.example_batch(config, BATCH), microbatch=BATCH, make=make, name="gpt2")


def plan_of(traced: Traced, strategies: tuple[LayerStrategy, ...]) -> Plan:
    count = len(traced.spec.layers)
    bounds = [count * i // len(strategies) for i in range(len(strategies) + 1)]
    groups = tuple(
        LayerGroup(start=start, stop=stop, strategy=strategy)
        for start, stop, strategy in zip(bounds[:-1], bounds[1:], strategies, strict=True)
    )
    return Plan(
        model="gpt2",
        mesh=tuple(MeshAxis(name=name, size=2) for name in "abc"),
        global_batch=BATCH,
        stages=(Stage(groups=groups),),
        batch_axes=("a", "b", "c"),
    )


if __name__ == "__main__":
    run(measure, devices=DEVICES)
