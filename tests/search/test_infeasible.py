"""What a search says when nothing fits: how far off it is, and the smallest changes that would fit."""

import pytest

from galvatron_jax.search import OptimizerMemory, SearchSpace, search
from galvatron_jax.search.infeasible import NothingFitsError
from galvatron_jax.spec.strategy import Remat
from tests.search.fake import FakePlanner, cluster, toy_model

ADAM = OptimizerMemory(("float32", "float32"), 4)


def failure(space: SearchSpace, *, memory_bytes: int = 60_000, nodes: int = 1) -> NothingFitsError:
    with pytest.raises(NothingFitsError) as caught:
        search(
            toy_model(4),
            cluster(nodes, 4),
            global_batch=8,
            memory_bytes=memory_bytes,
            optimizer=ADAM,
            space=space,
            planner=FakePlanner(),
        )
    return caught.value


@pytest.mark.parametrize(
    ("space", "remedy"),
    [
        (SearchSpace(zero=(0, 1)), "allowing ZeRO 3"),
        (SearchSpace(remat=(Remat.NONE, Remat.DOTS)), "allowing full rematerialisation"),
        (SearchSpace(num_microbatches=(1, 2)), "allowing more micro-batches"),
    ],
)
def test_what_was_not_allowed_is_among_what_would_fit(space: SearchSpace, remedy: str) -> None:
    error = failure(space)
    assert remedy in str(error).split("What would fit: ")[1]
    assert remedy not in str(failure(SearchSpace()))


def test_without_a_number_of_devices_that_would_do_the_model_has_to_shrink() -> None:
    assert "or a smaller model or shorter sequences" in str(failure(SearchSpace(), memory_bytes=1_000))


def test_of_a_pipeline_every_group_over_the_budget_is_named() -> None:
    error = failure(SearchSpace(pipeline_degrees=(2,)))
    over = str(error).split("Over the budget: ")[1].split(". Largest part")[0]
    memory = error.nearest.prediction.memory
    assert [part.split(" by ")[0] for part in over.split(", ")] == [
        f"group {index}" for index, one in enumerate(memory) if one.total_bytes > 60_000
    ]
    assert error.need_bytes == max(one.peak_bytes for one in memory)


@pytest.mark.parametrize("degrees", [(1,), (2,), None])
def test_the_budget_that_is_said_to_fit_fits(degrees: tuple[int, ...] | None) -> None:
    space = SearchSpace(pipeline_degrees=degrees)
    error = failure(space)
    question = {"global_batch": 8, "optimizer": ADAM, "space": space, "planner": FakePlanner()}
    found = search(toy_model(4), cluster(1, 4), memory_bytes=error.need_bytes, **question)
    assert found.prediction.peak_bytes <= error.need_bytes
