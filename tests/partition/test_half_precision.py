"""Models in bfloat16 are planned as in float32."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from flax import nnx

from galvatron_jax.models import registry
from galvatron_jax.partition.layer_plan import Collective, LayerPlan
from galvatron_jax.partition.layers import plan_layer
from galvatron_jax.spec.profile import CollectiveKind
from galvatron_jax.spec.strategy import LayerStrategy, SequenceParallel
from galvatron_jax.trace.model import Traced, trace

MESH = {"a": 2, "b": 2}


def traced(family_name: str, dtype: str, **changes: str) -> Traced:
    family = registry.family(family_name)
    config = registry.model_config(family_name, "tiny", dtype=dtype, **changes)
    model = nnx.eval_shape(lambda: family.model(config, rngs=nnx.Rngs(0)))
    return trace(model, family.loss_fn, family.example_batch(config, 8))


@pytest.mark.standard_promotion
@pytest.mark.parametrize("family", ["gpt2", "llama", "t5", "vit"])
def test_gradients_wait_for_the_end_of_the_step(family: str) -> None:
    """Scatters into zeros (of embeddings' gradients) keep their sums pending whatever the zeros' dtype."""
    found, strategy = [], LayerStrategy(dp=("a", "b"))
    for dtype in ("float32", "bfloat16"):
        spec = traced(family, dtype).spec
        plans = [
            plan_layer(spec.kinds[layer.kind], strategy, mesh=MESH, microbatch=8, model_microbatch=8)
            for layer in spec.layers
        ]
        synchronised = [[bool(parameter.sync) for parameter in plan.parameters] for plan in plans]
        found.append(([[(c.kind, c.axes) for c in plan.backward.collectives] for plan in plans], synchronised))
    assert found[0] == found[1]
    assert found[1][1][1] == [True] * len(found[1][1][1])


AXES = ("a", "b")


@pytest.mark.standard_promotion
@pytest.mark.parametrize(
    "strategy",
    [
        LayerStrategy(tp=AXES),
        LayerStrategy(tp=AXES, sp=AXES, sp_kind=SequenceParallel.MEGATRON),
        LayerStrategy(sp=AXES, sp_kind=SequenceParallel.ULYSSES),
    ],
    ids=LayerStrategy.short,
)
def test_sums_of_activations_are_taken_before_a_wider_type(strategy: LayerStrategy) -> None:
    """A Llama block computes norms and rotations in float32; what products leave pending are sums in bfloat16."""
    spec = traced("llama", "bfloat16").spec
    layer = spec.layers[len(spec.layers) // 2]
    plan = plan_layer(spec.kinds[layer.kind], strategy, mesh=MESH, microbatch=8, model_microbatch=8)
    large = [c for phase in (plan.forward, plan.backward) for c in phase.collectives if c.bytes >= 8 * 32 * 64 * 2 // 4]
    assert len(large) >= 4
    assert {c.dtype for c in large} == {"bfloat16"}


@pytest.mark.standard_promotion
@pytest.mark.parametrize("family", ["gpt2", "llama", "t5", "vit", "moe"])
def test_parameters_are_gathered_in_the_narrower_type(family: str) -> None:
    """ZeRO 3 with parameters in float32 and work in bfloat16; gradients are summed in float32 all the same."""
    spec = traced(family, "bfloat16", param_dtype="float32").spec
    strategy = LayerStrategy(dp=("a", "b"), zero=3)
    for layer in spec.layers:
        kind = spec.kinds[layer.kind]
        plan = plan_layer(kind, strategy, mesh=MESH, microbatch=8, model_microbatch=8)
        narrowed = {
            operation.operands[0]
            for operation in kind.program.operations
            if operation.primitive == "convert_element_type"
            and kind.program.values[operation.results[0]].dtype == "bfloat16"
        }
        gathered = [c.dtype for c in plan.forward.collectives if c.kind is CollectiveKind.ALL_GATHER]
        whole = [p for p in plan.parameters if kind.inputs[p.port].value not in narrowed]
        assert gathered.count("float32") <= len(whole)
        assert gathered.count("bfloat16") > 0 or layer is not spec.layers[1]
        summed = [c for c in plan.backward.collectives if c.kind is CollectiveKind.REDUCE_SCATTER]
        assert {c.dtype for c in summed} <= {"float32"}


def sums(plan: LayerPlan) -> Iterator[Collective]:
    """Of parameters' gradients over data axes, scattered backward or once a step."""
    for one in (*plan.backward.collectives, *(c for parameter in plan.parameters for c in parameter.sync)):
        if one.kind in (CollectiveKind.ALL_REDUCE, CollectiveKind.REDUCE_SCATTER) and "a" in one.axes:
            yield one


@pytest.mark.standard_promotion
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@pytest.mark.parametrize("family", ["gpt2", "llama", "moe"])
def test_gradients_are_summed_in_the_type_asked_for(family: str, zero: int) -> None:
    """Where it is narrower than their own; nothing else of a layer's plan is changed."""
    strategy = LayerStrategy(dp=("a",), tp=("b",), zero=zero)
    for param_dtype in ("float32", "bfloat16"):
        spec = traced(family, "bfloat16", param_dtype=param_dtype).spec
        kind = spec.kinds[spec.layers[len(spec.layers) // 2].kind]
        about = {"mesh": MESH, "microbatch": 8, "model_microbatch": 8}
        wide, narrow = (plan_layer(kind, strategy, **about, gradient_sum_dtype=dtype) for dtype in (None, "bfloat16"))
        assert narrow.forward == wide.forward
        assert {c.dtype for c in sums(wide)} == {param_dtype}
        assert {c.dtype for c in sums(narrow)} == {"bfloat16"}
        assert (narrow == wide) == (param_dtype == "bfloat16")
        halves = 2 if param_dtype == "float32" else 1
        assert [c.bytes for c in sums(wide)] == [halves * c.bytes for c in sums(narrow)]
