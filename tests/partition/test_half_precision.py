"""Models in bfloat16 are planned as in float32."""

from __future__ import annotations

import pytest
from flax import nnx

from galvatron_jax.models import registry
from galvatron_jax.partition.layers import plan_layer
from galvatron_jax.spec.strategy import LayerStrategy
from galvatron_jax.trace.model import Traced, trace

MESH = {"a": 2, "b": 2}


def traced(family_name: str, dtype: str) -> Traced:
    family = registry.family(family_name)
    config = registry.model_config(family_name, "tiny", dtype=dtype)
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
