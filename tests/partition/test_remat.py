"""Which rematerialisation policies are the same for a layer, and what layers keep."""

from __future__ import annotations

from itertools import pairwise

import pytest

from galvatron_jax.partition import distinct_remats
from galvatron_jax.partition.layers import plan_layer, plan_local
from galvatron_jax.spec.model import LayerKind
from galvatron_jax.spec.strategy import LayerStrategy, Remat
from tests.runtime.matrix import MICROBATCH, traced

MESH = {"a": 2, "b": 2, "c": 2}
EVERY = tuple(Remat)


def kinds(model: str) -> dict[str, LayerKind]:
    return {kind.name: kind for kind in traced(model).spec.kinds}


@pytest.mark.parametrize("model", ["gpt2", "llama"])
def test_embeddings_have_one_policy_heads_three_and_blocks_all(model: str) -> None:
    found = {name: distinct_remats(kind, EVERY) for name, kind in kinds(model).items()}
    assert found.pop("embedding") == (Remat.NONE,)
    assert found.pop("head") == (Remat.NONE, Remat.DOTS, Remat.FULL)
    assert set(found.values()) == {EVERY}


def test_of_equal_policies_the_first_that_is_allowed_stands_for_all() -> None:
    embedding = kinds("gpt2")["embedding"]
    assert distinct_remats(embedding, (Remat.FULL, Remat.DOTS)) == (Remat.FULL,)
    assert distinct_remats(embedding, ()) == ()


@pytest.mark.parametrize(
    "strategy", [LayerStrategy(dp=("a", "b", "c"), zero=3), LayerStrategy(dp=("a",), tp=("b", "c"))]
)
def test_equal_policies_are_planned_as_one(strategy: LayerStrategy) -> None:
    embedding = kinds("gpt2")["embedding"]
    plans = [
        plan_layer(
            embedding, strategy.model_copy(update={"remat": remat}), mesh=MESH, microbatch=MICROBATCH,
            model_microbatch=MICROBATCH,
        )
        for remat in EVERY
    ]  # fmt: skip
    assert all(one == other for one, other in pairwise(plans))


@pytest.mark.parametrize("model", ["gpt2", "llama", "t5"])
def test_indices_made_of_the_batch_are_not_kept(model: str) -> None:
    for kind in kinds(model).values():
        local = plan_local(
            kind, LayerStrategy(dp=("a", "b", "c")), mesh=MESH, microbatch=MICROBATCH, model_microbatch=MICROBATCH
        )
        kept = [kind.program.values[residual.value] for residual in local.residuals]
        assert not [value for value in kept if value.dtype == "int32"]
        assert kept or kind.name == "embedding"
