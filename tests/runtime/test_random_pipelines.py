"""Pipelines drawn at random from what the search may find build, run, end, and give what one device gives."""

from __future__ import annotations

import faulthandler
import functools
import itertools
import random
from collections import Counter
from collections.abc import Iterator

import jax
import numpy as np
import optax
import pytest

from galvatron_jax.runtime.step import build_step
from galvatron_jax.search.space import SearchSpace, batch_axes_for
from galvatron_jax.spec.plan import LayerGroup, MeshAxis, Plan, Schedule, Stage
from galvatron_jax.trace.functional import named_leaves

from .matrix import AXES, MICROBATCH, traced
from .pipelines import SCHEDULES
from .reference import batches, initial, to_numpy, whole_step
from .test_parity import TOLERANCE, differences
from .test_pipelines import tree

HANG_S = 600
"""After so long a test hangs: the process is ended, and the test fails."""
NUM_SEEDS, NUM_FAST = 50, 2
MODELS = ("gpt2_tied_dropout", "llama", "moe", "t5", "bert", "vit")


@pytest.fixture(autouse=True)
def watchdog() -> Iterator[None]:
    faulthandler.dump_traceback_later(HANG_S, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


@pytest.fixture(autouse=True)
def full_precision() -> Iterator[None]:
    with jax.default_matmul_precision("highest"):
        yield


def draw(seed: int) -> Plan:
    """A plan with stages anywhere, and for every layer any strategy of the search space."""
    rng = random.Random(seed)
    model = traced(rng.choice(MODELS))
    layers, kinds = model.spec.layers, model.spec.kinds
    schedule = rng.choice(SCHEDULES)
    chunks = 2 if schedule is Schedule.INTERLEAVED else 1
    degree = rng.choice([d for d in (2, 4) if d * chunks <= len(layers)])
    mesh = tuple(MeshAxis(name=name, size=2) for name in AXES)
    inside = mesh[degree // 2 :]
    options = {
        kind: SearchSpace().strategies(kinds[kind], mesh=inside, microbatch=MICROBATCH, pruned=Counter())
        for kind in {layer.kind for layer in layers}
    }
    chosen = [rng.choice(options[layer.kind]) for layer in layers]
    _agree(model.spec, chosen)
    starts = [0, *sorted(rng.sample(range(1, len(layers)), degree * chunks - 1)), len(layers)]
    stages = tuple(
        Stage(groups=tuple(LayerGroup(start=i, stop=i + 1, strategy=chosen[i]) for i in range(start, stop)))
        for start, stop in itertools.pairwise(starts)
    )
    count = rng.choice((1, 2, 3, 5, 8))
    return Plan(
        model=model.spec.name,
        mesh=mesh,
        global_batch=MICROBATCH * count,
        num_microbatches=count,
        schedule=schedule,
        stages=stages,
        pipeline_axes=AXES[: degree // 2],
        batch_axes=rng.choice(batch_axes_for(inside, MICROBATCH)),
    )


def _agree(spec: object, chosen: list) -> None:
    """Layers that share a parameter take one strategy, as the search wants."""
    first: dict[str, int] = {}
    for index, layer in enumerate(spec.layers):
        for reference in layer.inputs:
            if reference.startswith("param:"):
                owner = first.setdefault(reference, index)
                chosen[index] = chosen[owner] if owner != index else chosen[index]


@functools.cache
def one_device(model: str, count: int) -> tuple:
    """Loss and gradients of the first batch."""
    parameters, state = initial(model)
    loss, gradients, _ = whole_step(model, parameters, state, batches(model, count)[0], count)
    return float(loss), to_numpy(gradients)


def seeds() -> list:
    return [pytest.param(seed, marks=() if seed < NUM_FAST else (pytest.mark.slow,)) for seed in range(NUM_SEEDS)]


@pytest.mark.standard_promotion
@pytest.mark.parametrize("seed", seeds())
def test_a_random_pipeline_runs_as_one_device_does(seed: int) -> None:
    plan = draw(seed)
    # After a step of plain descent from zero momentum, the trace of the momentum is the gradient.
    optimizer = optax.sgd(1e-3, momentum=0.9)
    step = build_step(traced(plan.model), plan, optimizer)
    state, metrics = step(step.from_tree(tree(plan.model, optimizer)), batches(plan.model, plan.num_microbatches)[0])
    loss, gradients = one_device(plan.model, plan.num_microbatches)
    np.testing.assert_allclose(float(metrics["loss"]), loss, rtol=TOLERANCE)
    found = {
        path.partition("trace/")[2]: x for path, x in to_numpy(named_leaves(step.to_tree(state)["opt_state"])).items()
    }
    assert differences(found, gradients) == {}
