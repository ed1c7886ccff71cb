"""Pipelines of unlike stages give what one device gives, whatever the schedule."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from galvatron_jax.errors import InputError
from galvatron_jax.models import registry
from galvatron_jax.runtime import packing
from galvatron_jax.runtime.optimizer_state import nested
from galvatron_jax.runtime.program import State, StepProgram
from galvatron_jax.runtime.step import build_step
from galvatron_jax.spec.plan import LayerGroup, Schedule, Stage
from galvatron_jax.trace.functional import named_leaves
from galvatron_jax.trace.model import trace

from .matrix import plain, traced
from .pipelines import LAYERS, PipelineCase, parameters, plan_in_stages
from .reference import OPTIMIZERS, Trajectory, batches, either, initial, reference, to_numpy, whole_step
from .test_parity import TOLERANCE, differences

TIED = PipelineCase("gpt2_tied_dropout", 2, Schedule.ONE_F_ONE_B_STASH, "every-kind", 2)


@pytest.fixture(autouse=True)
def full_precision() -> Iterator[None]:
    with jax.default_matmul_precision("highest"):
        yield


def tree(model: str, optimizer: optax.GradientTransformation) -> State:
    """A state before the first step that no plan has touched."""
    parameters, model_state = initial(model)
    opt_state = optimizer.init(nested(parameters))
    return {"params": parameters, "opt_state": opt_state, "model_state": model_state, "step": jnp.int32(0)}


def train(step: StepProgram, model: str, optimizer: str, num_microbatches: int) -> Trajectory:
    """What the plan gives for what the reference does."""
    begin = tree(model, either(*OPTIMIZERS.values()))
    begin["opt_state"] = begin["opt_state"]._replace(chosen=jnp.int32(list(OPTIMIZERS).index(optimizer)))
    state, losses, first = step.from_tree(begin), [], None
    for batch in batches(model, num_microbatches):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
        if first is None:
            first = to_numpy(named_leaves(step.to_tree(state)["opt_state"].gradients))
    assert int(state["step"]) == len(losses)
    return Trajectory(losses, first, to_numpy(step.parameters(state)), to_numpy(state["model_state"]))


@pytest.mark.standard_promotion
@pytest.mark.parametrize("case", parameters())
def test_a_pipeline_trains_as_one_device_does(case: PipelineCase) -> None:
    step = case.build(either(*OPTIMIZERS.values()))
    for optimizer in OPTIMIZERS:
        wanted = reference(case.model, optimizer, case.num_microbatches)
        found = train(step, case.model, optimizer, case.num_microbatches)
        np.testing.assert_allclose(found.losses, wanted.losses, rtol=TOLERANCE, err_msg=f"loss under {optimizer}")
        assert differences(found.gradients, wanted.gradients) == {}, "gradients"
        assert differences(found.model_state, wanted.model_state) == {}, f"state under {optimizer}"
        assert differences(found.parameters, wanted.parameters) == {}, f"parameters under {optimizer}"


@pytest.mark.standard_promotion
@pytest.mark.parametrize(
    "case",
    [
        TIED,
        PipelineCase("llama", 2, Schedule.ONE_F_ONE_B, "every-kind", 2),
        PipelineCase("llama", 2, Schedule.GPIPE, "alike", 2),
    ],
    ids=str,
)
def test_arrays_are_synchronised_and_updated_in_parts(case: PipelineCase, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layer by layer, whatever their size."""
    monkeypatch.setattr(packing, "_PART_BYTES", 1)
    monkeypatch.setattr(packing, "_BATCH_BYTES", 1)
    step = case.build(either(*OPTIMIZERS.values()))
    for optimizer in OPTIMIZERS:
        wanted = reference(case.model, optimizer, case.num_microbatches)
        found = train(step, case.model, optimizer, case.num_microbatches)
        assert differences(found.gradients, wanted.gradients) == {}, "gradients"
        assert differences(found.parameters, wanted.parameters) == {}, f"parameters under {optimizer}"


def decay_matrices(parameters: dict) -> dict:
    return jax.tree.map(lambda x: x.ndim > 1, parameters)


@pytest.mark.standard_promotion
def test_half_precision_tracks_single() -> None:
    family = registry.family("gpt2")
    losses = {}
    for dtype in ("float32", "bfloat16"):
        config = registry.model_config("gpt2", "tiny", dtype=dtype)
        model = nnx.eval_shape(lambda config=config: family.model(config, rngs=nnx.Rngs(0)))
        shapes = family.example_batch(config, 8)
        found = trace(
            model,
            family.loss_fn,
            shapes,
            make=lambda seed, config=config: family.model(config, rngs=nnx.Rngs(jax.random.key(seed))),
        )
        stages = [
            Stage(groups=(LayerGroup(start=start, stop=stop, strategy=plain(dp="b", tp="c")),))
            for start, stop in ((0, 2), (2, len(found.spec.layers)))
        ]
        plan = plan_in_stages(
            "gpt2", (0, 2), (plain(dp="bc"),), degree=2, schedule=Schedule.ONE_F_ONE_B_STASH, num_microbatches=2
        ).model_copy(update={"stages": tuple(stages)})
        step = build_step(found, plan, optax.adamw(1e-3))
        rng = np.random.default_rng(0)
        batch = {name: rng.integers(0, 64, (16, *x.shape[1:])).astype(x.dtype) for name, x in shapes.items()}
        state, losses[dtype] = step.init(0), []
        for _ in range(4):
            state, metrics = step(state, batch)
            losses[dtype].append(float(metrics["loss"]))
    assert losses["float32"][-1] < losses["float32"][0]
    np.testing.assert_allclose(losses["bfloat16"], losses["float32"], rtol=2e-2)  # 8 bits of mantissa, layer upon layer


OTHERS = {
    "clipped": optax.chain(optax.clip_by_global_norm(0.1), optax.adamw(1e-3, eps=1e-3, mask=decay_matrices)),
    "lamb": optax.lamb(1e-3, eps=1e-2),
    "adafactor": optax.adafactor(1e-3, min_dim_size_to_factor=8, eps=1e-4),
}
"""Optimizers that look at all parameters at once, at each as a whole, or at their shapes."""


@pytest.mark.standard_promotion
@pytest.mark.parametrize("name", ["clipped", pytest.param("lamb", marks=pytest.mark.slow), "adafactor"])
def test_optimizers_that_see_more_than_an_element(name: str) -> None:
    optimizer = OTHERS[name]
    step = TIED.build(optimizer)
    assert (step.optimizer_program.update is None) == (name == "adafactor")
    state, begin = step.from_tree(tree(TIED.model, optimizer)), tree(TIED.model, optimizer)
    parameters, opt_state = begin["params"], begin["opt_state"]
    for batch in batches(TIED.model, TIED.num_microbatches)[:2]:
        state, _ = step(state, batch)
    model_state = begin["model_state"]
    update = jax.jit(optimizer.update)
    for batch in batches(TIED.model, TIED.num_microbatches)[:2]:
        _, gradients, model_state = whole_step(TIED.model, parameters, model_state, batch, TIED.num_microbatches)
        updates, opt_state = update(nested(gradients), opt_state, nested(parameters))
        new = optax.apply_updates(nested(parameters), updates)
        parameters = named_leaves(new)
    assert differences(to_numpy(step.parameters(state)), to_numpy(parameters)) == {}
    found = to_numpy(named_leaves(step.to_tree(state)["opt_state"]))
    assert differences(found, to_numpy(named_leaves(opt_state))) == {}


@pytest.mark.standard_promotion
def test_state_goes_from_plan_to_plan_without_loss() -> None:
    optimizer = optax.adamw(1e-3)
    step = TIED.build(optimizer)
    state = step.init(0)
    assert differences(to_numpy(step.parameters(state)), to_numpy(initial(TIED.model)[0])) == {}
    assert jax.tree.map(lambda x: x.sharding, state) == step.state_shardings
    moved = PipelineCase(TIED.model, 2, Schedule.INTERLEAVED, "zero3").build(optimizer)
    back = step.to_tree(step.from_tree(moved.to_tree(moved.from_tree(step.to_tree(state)))))
    same = jax.tree.map(
        lambda a, b: bool(np.array_equal(a, b)),
        to_numpy(named_leaves(back)),
        to_numpy(named_leaves(step.to_tree(state))),
    )
    assert all(same.values()), same


@pytest.mark.standard_promotion
def test_counters_that_all_stages_read_go_on_by_themselves() -> None:
    model = "linen_scan_gpt"
    plan = plan_in_stages(model, (0, 2), (plain(dp="bc"),), degree=2, schedule=Schedule.ONE_F_ONE_B, num_microbatches=4)
    step = build_step(traced(model), plan, either(*OPTIMIZERS.values()))
    assert step.clock is not None
    assert step.clock.paths == ("rng/count",)
    wanted, found = reference(model, "sgd", 4), train(step, model, "sgd", 4)
    np.testing.assert_allclose(found.losses, wanted.losses, rtol=TOLERANCE)
    assert differences(found.gradients, wanted.gradients) == {}
    assert differences(found.model_state, wanted.model_state) == {}


def test_state_made_from_data_for_other_stages_is_refused() -> None:
    """A running mean that one layer makes and another, in another stage, reads for the next micro-batch."""

    class Mean(nnx.Variable):
        pass

    class Block(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.linear = nnx.Linear(8, 8, rngs=rngs)

        def __call__(self, x: jax.Array, mean: jax.Array) -> jax.Array:
            return x + self.linear(x - mean)

    class Net(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.blocks = nnx.List([Block(rngs) for _ in range(4)])
            self.mean = Mean(jnp.zeros(8))

        def __call__(self, x: jax.Array) -> jax.Array:
            for block in self.blocks:
                x = block(x, self.mean[...])
            self.mean[...] = x.mean(0)
            return x

    shapes = {"inputs": np.zeros((8, 8), np.float32)}
    model = nnx.eval_shape(lambda: Net(nnx.Rngs(0)))
    found = trace(model, lambda model, batch: (model(batch["inputs"]) ** 2).mean(), shapes)
    plan = plan_in_stages("gpt2", (0, 2), (plain(dp="bc"),), degree=2, schedule=Schedule.GPIPE, num_microbatches=2)
    stages = [
        Stage(groups=(LayerGroup(start=start, stop=stop, strategy=plain(dp="bc")),))
        for start, stop in ((0, 2), (2, len(found.spec.layers)))
    ]
    with pytest.raises(InputError, match="'mean' is read in pipeline stages .* and made from data in"):
        build_step(found, plan.model_copy(update={"stages": tuple(stages)}), optax.sgd(0.1))


def test_the_models_have_the_layers_that_the_cases_count_on() -> None:
    assert {model: len(traced(model).spec.layers) for model in LAYERS} == LAYERS
