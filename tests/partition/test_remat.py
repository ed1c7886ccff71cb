"""Which rematerialisation policies are the same for a layer, and what layers keep."""

from __future__ import annotations

from collections import Counter

import pytest

from galvatron_jax.partition import distinct_remats, layers
from galvatron_jax.partition.layers import plan_layer, plan_local
from galvatron_jax.partition.remat import plainest
from galvatron_jax.partition.static import prepare_kind
from galvatron_jax.spec.model import LayerKind
from galvatron_jax.spec.profile import CollectiveKind
from galvatron_jax.spec.strategy import LayerStrategy, Remat, SequenceParallel
from tests.runtime.matrix import MICROBATCH, megatron, traced

MESH = {"a": 2, "b": 2, "c": 2}
EVERY = tuple(Remat)


def kinds(model: str) -> dict[str, LayerKind]:
    return {kind.name: kind for kind in traced(model).spec.kinds}


@pytest.mark.parametrize("model", ["gpt2", "llama"])
def test_embeddings_have_one_policy_and_blocks_all(model: str) -> None:
    found = {name: distinct_remats(kind, EVERY) for name, kind in kinds(model).items()}
    assert found.pop("embedding") == (Remat.NONE,)
    # Without attention, to recompute that is to recompute nothing.
    assert found.pop("head") == (Remat.NONE, Remat.GATHERS, Remat.DOTS, Remat.FULL)
    assert set(found.values()) == {EVERY}


def test_of_equal_policies_the_first_that_is_allowed_stands_for_all() -> None:
    embedding = kinds("gpt2")["embedding"]
    assert distinct_remats(embedding, (Remat.FULL, Remat.DOTS)) == (Remat.FULL,)
    assert distinct_remats(embedding, ()) == ()


@pytest.mark.parametrize("model", ["gpt2", "t5", "recurrent_diagonal", "bert"])
@pytest.mark.parametrize(
    "strategy",
    [
        LayerStrategy(dp=("a", "b", "c"), zero=3),
        LayerStrategy(dp=("a",), tp=("b", "c"), sp=("b", "c"), sp_kind=SequenceParallel.MEGATRON),
    ],
    ids=LayerStrategy.short,
)
def test_equal_policies_are_what_planning_each_gives(
    model: str, strategy: LayerStrategy, monkeypatch: pytest.MonkeyPatch
) -> None:
    for kind in kinds(model).values():
        static = prepare_kind(kind.model_copy())
        stands_for = {remat: plainest(static, remat) for remat in EVERY}
        monkeypatch.setattr(layers, "plainest", lambda _, remat: remat)
        alone = kind.model_copy()  # Planned anew.
        plans = {
            remat: plan_layer(
                alone, strategy.model_copy(update={"remat": remat}), mesh=MESH, microbatch=MICROBATCH,
                model_microbatch=MICROBATCH,
            )
            for remat in EVERY
        }  # fmt: skip
        monkeypatch.undo()
        for remat, plain in stands_for.items():
            one, other = plans[remat], plans[plain]
            assert one.residual_bytes == other.residual_bytes
            assert one.forward == other.forward
            assert one.backward.collectives == other.backward.collectives
            assert one.backward.flops == other.backward.flops
            assert one.backward.peak_bytes >= other.backward.peak_bytes


@pytest.mark.parametrize("model", ["gpt2", "llama", "t5"])
def test_indices_made_of_the_batch_are_not_kept(model: str) -> None:
    for kind in kinds(model).values():
        local = plan_local(
            kind, LayerStrategy(dp=("a", "b", "c")), mesh=MESH, microbatch=MICROBATCH, model_microbatch=MICROBATCH
        )
        kept = [kind.program.values[residual.value] for residual in local.residuals]
        assert not [value for value in kept if value.dtype == "int32"]
        assert kept or kind.name == "embedding"


@pytest.mark.parametrize("model", ["gpt2", "llama"])
def test_gathers_keeps_shards_of_sequences_where_none_keeps_them_whole_and_repeats_nothing_else(model: str) -> None:
    kind = next(kind for name, kind in kinds(model).items() if name not in ("embedding", "head"))
    none, gathers = (
        plan_layer(
            kind, megatron("bc", dp="a", remat=remat), mesh=MESH, microbatch=MICROBATCH, model_microbatch=MICROBATCH
        )
        for remat in (Remat.NONE, Remat.GATHERS)
    )
    assert gathers.residual_bytes < none.residual_bytes
    assert gathers.forward.collectives == none.forward.collectives
    assert gathers.backward.flops == none.backward.flops
    assert gathers.backward.operations == none.backward.operations
    more = Counter(gathers.backward.collectives) - Counter(none.backward.collectives)
    assert {(one.kind, one.axes) for one in more} == {(CollectiveKind.ALL_GATHER, ("c", "b"))}
    assert not Counter(none.backward.collectives) - Counter(gathers.backward.collectives)
