"""How the time to build a train step grows with depth: 48 identical layers against 6, in one run.

Consecutive layers of one kind and one strategy are one loop in the program, so both are much alike. A plan with three
strategies has three loops at either depth. In four pipeline stages, 96 layers stand against 12.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from statistics import median
from typing import Any

from harness import Claim, Outcome, run, virtual_cpus

DEVICES = virtual_cpus(8)

import jax  # noqa: E402
import optax  # noqa: E402
from flax import nnx  # noqa: E402

from galvatron_jax.models import registry  # noqa: E402
from galvatron_jax.runtime.step import build_step  # noqa: E402
from galvatron_jax.spec.plan import LayerGroup, MeshAxis, Plan, Schedule, Stage  # noqa: E402
from galvatron_jax.spec.strategy import LayerStrategy  # noqa: E402
from galvatron_jax.trace.model import Traced, trace  # noqa: E402

LIMIT = 1.5
DEPTHS, STAGE_DEPTHS = (6, 48), (12, 96)
"""Layers, without stages and with them."""
STAGES, MICROBATCHES = 4, 8
BATCH = 8
REPEATS, FULL_REPEATS = 3, 9
DATA = LayerStrategy(dp=("a", "b", "c"))
TENSOR = LayerStrategy(dp=("a",), tp=("b", "c"))
ZERO = LayerStrategy(dp=("a", "b", "c"), zero=3, remat="full")
PLANS = {"dp8": (DATA,), "dp2-tp4": (TENSOR,), "mixed": (DATA, TENSOR, ZERO)}
"""Strategies, each for as many consecutive layers as the others."""
STAGED = {"pp4-dp2": (LayerStrategy(dp=("c",)),)}
"""The same for plans of four stages."""
PARTS = ("trace_s", "build_s", "lower_s", "compile_s")


def measure(full: bool) -> Outcome:
    results, claims = [], []
    for name, strategies in (PLANS | STAGED).items():
        depths = STAGE_DEPTHS if name in STAGED else DEPTHS
        times = in_turns(strategies, depths, repeats=FULL_REPEATS if full else REPEATS)
        for depth, rows in times.items():
            medians = {part: round(median(row[part] for row in rows), 3) for part in PARTS}
            results.append({"plan": name, "layers": depth, **medians, "repeats": len(rows)})
            print(results[-1])
        shallow, deep = depths
        text = f"{name}: {deep} layers lower and compile in as many times the seconds of {shallow}"
        claims.append(Claim(text, least(times[deep]) / least(times[shallow]), LIMIT))
    return Outcome(results, claims)


def least(rows: list[dict[str, float]]) -> float:
    """Seconds to lower and compile, the least of the repeats: other work on the machine only adds to it."""
    return min(row["lower_s"] + row["compile_s"] for row in rows)


def in_turns(
    strategies: tuple[LayerStrategy, ...], depths: tuple[int, int], *, repeats: int
) -> dict[int, list[dict[str, float]]]:
    """Times of both depths, one after the other."""
    times: dict[int, list[dict[str, float]]] = {depth: [] for depth in depths}
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
    layers = len(traced.spec.layers)
    mesh = tuple(MeshAxis(name=name, size=2) for name in "abc")
    if strategies in STAGED.values():
        (strategy,) = strategies
        stages = [Stage(groups=(group,)) for group in shared_out(layers, [strategy] * STAGES)]
        return Plan(
            model="gpt2",
            mesh=mesh,
            global_batch=BATCH * MICROBATCHES,
            num_microbatches=MICROBATCHES,
            schedule=Schedule.ONE_F_ONE_B,
            stages=tuple(stages),
            pipeline_axes=("a", "b"),
            batch_axes=("c",),
        )
    stage = Stage(groups=shared_out(layers, strategies))
    return Plan(model="gpt2", mesh=mesh, global_batch=BATCH, stages=(stage,), batch_axes=("a", "b", "c"))


def shared_out(layers: int, strategies: Sequence[LayerStrategy]) -> tuple[LayerGroup, ...]:
    """Each strategy for as many consecutive layers as the others."""
    bounds = [layers * i // len(strategies) for i in range(len(strategies) + 1)]
    return tuple(
        LayerGroup(start=start, stop=stop, strategy=strategy)
        for (start, stop), strategy in zip(itertools.pairwise(bounds), strategies, strict=True)
    )


if __name__ == "__main__":
    run(measure, devices=DEVICES)
