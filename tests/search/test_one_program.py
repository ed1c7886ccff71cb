"""Pipelines that are found against all whose program fits: the best, and what the rule `slots-alike` loses."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import pytest

from galvatron_jax.cost.model import Batching, CostModel
from galvatron_jax.errors import InfeasibleError
from galvatron_jax.search import SearchSpace
from galvatron_jax.search.pipeline import PipelineSolution, evaluate
from galvatron_jax.search.pipeline_problems import PipelineProblem, layouts_of, schedules_of
from galvatron_jax.search.question import Question
from galvatron_jax.search.space import Rule, batch_axes_for, meshes_for
from galvatron_jax.search.stages import PipelineBuilder
from galvatron_jax.search.tables import TableBuilder
from galvatron_jax.spec.strategy import Remat
from tests.search.fake import FakePlanner, cluster, toy_model
from tests.search.questions import question

COUNTS, BATCH, DRAWS = (1, 4), 8, 40
SPACE = SearchSpace(
    zero=(0, 3), remat=(Remat.NONE, Remat.FULL), sequence=(), num_microbatches=COUNTS, pipeline_degrees=(2,)
)


def drawn(rng: random.Random, disabled: frozenset[Rule]) -> Question:
    """A toy in two stages, with anything from too little memory to enough."""
    return question(
        model=toy_model(
            rng.choice([1, 2]),
            tied=rng.random() < 0.5,
            skip=rng.random() < 0.5,
            width=rng.choice([16, 64, 256]),
            unread=rng.random() < 0.3,
        ),
        cluster=cluster(*rng.choice([(1, 2), (2, 1), (2, 2), (1, 4)])),
        planner=FakePlanner(rng.choice([0.1, 1.0, 30.0])),
        memory_bytes=int(rng.choice([60e3, 120e3, 250e3, 500e3, 2e6]) * rng.uniform(0.7, 1.3)),
        space=replace(SPACE, disabled_rules=disabled),
    )


def found_s(asked: Question) -> float:
    """Seconds of the plan that is found, which is called proven."""
    try:
        found = asked.answer(runners_up=False)
    except InfeasibleError:
        return math.inf
    assert found.statistics.proven
    return found.prediction.time.step_s


def problems(asked: Question) -> Iterator[PipelineProblem]:
    for layout in layouts_of(tuple(meshes_for(asked.cluster)), SPACE):
        costs = CostModel.build(
            asked.model,
            cluster=asked.cluster,
            mesh=layout.stage_axes,
            profile=None,
            optimizer=asked.optimizer,
            planner=asked.planner,
            pipeline_axes=layout.pipeline_axes,
        )
        # Whatever is dominated counts, too.
        space = replace(SPACE, disabled_rules=frozenset({Rule.DOMINATED}))
        builder = PipelineBuilder(TableBuilder(costs, space, Counter()))
        for count, pipelining in itertools.product(COUNTS, schedules_of(layout, SPACE)):
            batching = Batching(BATCH, count, batch_axes_for(layout.stage_axes, BATCH // count)[0])
            if pipelining.num_stages <= len(asked.model.layers):
                for pipeline in builder.build(pipelining, batching):
                    yield PipelineProblem(builder, pipelining, batching, pipeline)


def solutions(problem: PipelineProblem) -> Iterator[PipelineSolution]:
    pipeline = problem.pipeline
    for cut in itertools.combinations(range(1, len(pipeline.layers)), pipeline.num_stages - 1):
        for options in itertools.product(*(range(len(layer)) for layer in pipeline.layers)):
            yield evaluate(pipeline, (0, *cut), options)


def least_s(asked: Question) -> float:
    """Seconds of the fastest pipeline whose program fits, by trying all."""
    best = math.inf
    for problem in problems(asked):
        faster = [one for one in solutions(problem) if one.seconds < best]
        for one in sorted(faster, key=lambda one: one.seconds):
            if problem.peak_bytes(one) <= asked.budget_bytes:
                best = one.seconds
                break
    return best


@pytest.mark.slow
def test_the_best_program_that_fits_is_found() -> None:
    rng = random.Random(0)
    for asked in [drawn(rng, frozenset({Rule.SLOTS_ALIKE})) for _ in range(DRAWS)]:
        least = least_s(asked)
        assert found_s(asked) == (least if math.isinf(least) else pytest.approx(least, rel=1e-9))


@pytest.mark.slow
def test_little_is_lost_where_slots_are_alike() -> None:
    rng = random.Random(1)
    pairs = [(found_s(asked), least_s(asked)) for asked in (drawn(rng, frozenset()) for _ in range(DRAWS))]
    assert all(math.isinf(found) == math.isinf(least) for found, least in pairs)
    losses = [found / least - 1 for found, least in pairs if math.isfinite(least)]
    assert len(losses) >= DRAWS // 2
    assert min(losses) > -1e-9
    assert sum(loss < 1e-9 for loss in losses) >= 0.7 * len(losses)
    assert sum(losses) / len(losses) < 0.01
    assert max(losses) < 0.1
