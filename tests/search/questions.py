"""Questions about the toy model, small enough for many searches."""

from __future__ import annotations

from galvatron_jax.search import OptimizerMemory, SearchSpace
from galvatron_jax.search.question import Question
from galvatron_jax.spec.strategy import Remat
from tests.search.fake import FakePlanner, cluster, toy_model

ADAM = OptimizerMemory(("float32", "float32"), 4)
SMALL = SearchSpace(zero=(0, 3), remat=(Remat.NONE, Remat.FULL), sequence=(), num_microbatches=(1, 4))
"""A space that is searched in an instant."""
PIPELINES = SearchSpace(
    zero=(0,), remat=(Remat.NONE, Remat.FULL), sequence=(), num_microbatches=(4,), pipeline_degrees=(2,)
)


def question(**changes: object) -> Question:
    """Four devices in two nodes, 8 examples."""
    fields = {
        "model": toy_model(4),
        "cluster": cluster(2, 2),
        "global_batches": (8,),
        "optimizer": ADAM,
        "space": SMALL,
        "planner": FakePlanner(),
    }
    return Question(**(fields | changes))
