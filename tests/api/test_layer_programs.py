"""What the profiler runs for a layer: where layers repeat, the executor's loop, which gives what they give singly."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from galvatron_jax.api.layer_programs import TimedLayer, timed_layer
from galvatron_jax.api.loop_programs import LAYERS, TimedLoop
from galvatron_jax.profiler import LayerTimingRequest
from galvatron_jax.runtime.emit import STAND_INS, LayerProgram
from galvatron_jax.runtime.runs import Way
from galvatron_jax.spec.profile import LocalShape
from galvatron_jax.spec.strategy import LayerStrategy, Remat
from tests.runtime.matrix import traced

STRATEGIES = {
    "alone": LayerStrategy(),
    "full": LayerStrategy(remat=Remat.FULL),
    "tp": LayerStrategy(tp=("a",)),
    "zero3": LayerStrategy(dp=("a",), zero=3),
}
REPEATED = ("gpt2", "t5", "moe", "nnx_scan_gpt")


def timed(model: str, strategy: LayerStrategy, kind: int) -> TimedLayer | TimedLoop:
    found = traced(model)
    shape = LocalShape(batch=4 if strategy.dp else 8, tp=2 if strategy.tp else 1)
    request = LayerTimingRequest(found.spec.kinds[kind].fingerprint, "layer", shape, strategy.remat, strategy, 8)
    return timed_layer(found, request, mesh={"a": 2} if strategy.dp or strategy.tp else {})


def repeated_kind(model: str) -> int:
    """The kind of which most layers are."""
    kinds = [layer.kind for layer in traced(model).spec.layers]
    return max(set(kinds), key=kinds.count)


def random(struct: jax.ShapeDtypeStruct, seed: int) -> jax.Array:
    if jnp.issubdtype(struct.dtype, jax.dtypes.prng_key):
        return jnp.broadcast_to(jax.random.key(seed), struct.shape)
    if not jnp.issubdtype(struct.dtype, jnp.floating):
        return jnp.ones(struct.shape, struct.dtype)
    return 0.1 * jax.random.normal(jax.random.key(seed), struct.shape, struct.dtype)


@pytest.mark.standard_promotion
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("model", REPEATED)
def test_a_loop_gives_what_its_layers_give_one_by_one(model: str, strategy: str) -> None:
    loop = timed(model, STRATEGIES[strategy], repeated_kind(model))
    assert isinstance(loop, TimedLoop)
    run, found = loop._run, traced(model)
    program = LayerProgram(run.local, found.programs[run.kind].flat, via=STAND_INS)
    arrays = [random(struct, seed) for seed, struct in enumerate(loop.forward_inputs)]
    _, inputs, residuals = loop.forward_fn(*arrays)
    assert jax.eval_shape(loop.forward_fn, *loop.forward_inputs)[1:] == jax.eval_shape(lambda: (inputs, residuals))

    carried = {port: way.output for port, way in enumerate(run.inputs) if way.way is Way.CARRY}
    ports, kept = list(arrays), []
    for layer in range(LAYERS):
        own = [x[layer] if run.inputs[p].way is Way.STACKED else x for p, x in enumerate(ports)]
        outputs, left = program.forward(own)
        kept.append((own, left))
        for port, output in carried.items():
            ports[port] = outputs[output]
    for index, one in enumerate(residuals):
        np.testing.assert_allclose(one, jnp.stack([left[index] for _, left in kept]), rtol=1e-5, atol=1e-6)

    leaves = jax.tree.leaves((inputs, residuals))
    cotangents = [random(struct, 90 + seed) for seed, struct in enumerate(loop.backward_inputs[len(leaves) :])]
    gradients = loop.backward_fn(*leaves, *cotangents)
    seeds = dict(zip(loop._cotangents, cotangents, strict=True))
    differentiable = [p for p, port in enumerate(run.local.static.kind.inputs) if port.gradient is not None]
    assert set(gradients) == set(differentiable)
    back = {}
    for layer in reversed(range(LAYERS)):
        back |= {q: seeds[names[layer]] for q, names in enumerate(run.outputs) if names[layer] in seeds}
        own = dict(zip(differentiable, program.backward(*kept[layer], back), strict=True))
        for port in differentiable:
            if run.inputs[port].way is Way.STACKED:
                np.testing.assert_allclose(gradients[port][layer], own[port], rtol=1e-4, atol=1e-6)
        back |= {output: own[port] for port, output in carried.items() if port in own}
    for port, output in carried.items():
        if port in gradients:
            np.testing.assert_allclose(gradients[port], back[output], rtol=1e-4, atol=1e-6)


def test_a_layer_that_does_not_repeat_is_timed_alone() -> None:
    found = traced("gpt2")
    once = [kind for kind in range(len(found.spec.kinds)) if kind != repeated_kind("gpt2")]
    assert once
    assert all(isinstance(timed("gpt2", LayerStrategy(), kind), TimedLayer) for kind in once)
