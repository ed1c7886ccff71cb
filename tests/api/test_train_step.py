"""`train_step` end to end on eight virtual devices, and what it says to arguments that do not fit."""

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import galvatron_jax as gx
from galvatron_jax.api import find_plan, train_step
from galvatron_jax.api.optimizer import optimizer_memory
from galvatron_jax.errors import InfeasibleError, InputError, PlanMismatchError
from galvatron_jax.models import gpt2
from galvatron_jax.runtime.checkpoint import Checkpoints
from galvatron_jax.spec.cluster import ClusterSpec, DeviceSpec, Link
from galvatron_jax.spec.model import ModelSpec, Parameter
from galvatron_jax.spec.plan import LayerGroup, MeshAxis, Plan, Stage
from galvatron_jax.spec.strategy import LayerStrategy

CONFIG = gpt2.GPT2Config(vocab_size=64, seq_length=16, width=32, num_layers=2, num_heads=4, mlp_width=64)
BATCH = 8


def cluster_of(num_devices):
    device = DeviceSpec(
        name="test device",
        memory_bytes=2**30,
        peak_flops_per_s={"float32": 1e12},
        memory_bandwidth_bytes_per_s=1e11,
    )
    link = Link(name="test link", latency_s=1e-6, bandwidth_bytes_per_s=1e10)
    return ClusterSpec(
        name=f"test-{num_devices}", num_nodes=1, devices_per_node=num_devices, device=device, intra=link, source="test"
    )


def make_model(config=CONFIG):
    return gx.auto_shard(gpt2.GPT2)(config, rngs=nnx.Rngs(0))


def build(**changes):
    arguments = {
        "model": make_model(),
        "loss_fn": gpt2.loss_fn,
        "optimizer": optax.sgd(0.1, momentum=0.9),
        "example_batch": gpt2.example_batch(CONFIG, BATCH),
        "cluster": cluster_of(8),
        **changes,
    }
    positional = [arguments.pop(name) for name in ("model", "loss_fn", "optimizer", "example_batch")]
    return train_step(*positional, **arguments)


@pytest.fixture(scope="module")
def step():
    with jax.numpy_dtype_promotion("standard"):
        return build()


def test_the_loss_falls_and_the_first_one_is_the_models_own(step):
    batch = gpt2.random_batch(CONFIG, BATCH)
    model = gpt2.GPT2(CONFIG, rngs=nnx.Rngs(0))
    state = step.init()
    losses = []
    for _ in range(5):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    assert losses[0] == pytest.approx(float(gpt2.loss_fn(model, batch)), rel=1e-5)
    assert losses[-1] < losses[0]


def test_initial_values_follow_the_seed(step):
    first, again, other = (jax.tree.leaves(step.to_tree(step.init(seed))) for seed in (3, 3, 4))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True) if a.dtype == jnp.float32)
    assert any(not np.array_equal(a, b) for a, b in zip(first, other, strict=True) if a.dtype == jnp.float32)


def test_explain_names_the_model_the_devices_and_the_prediction(step):
    text = step.explain()
    assert "GPT2 on 8 devices" in text
    assert "Predicted step time (derived profile)" in text
    assert step.prediction.time.step_s > 0


def test_a_saved_plan_is_used_as_it_is(step, tmp_path):
    step.plan.save(tmp_path / "plan.json")
    again = build(plan=tmp_path / "plan.json")
    assert again.plan.stages == step.plan.stages
    assert "The plan was given" in again.explain()


def test_a_checkpoint_continues_bit_for_bit(step, tmp_path):
    batch = gpt2.random_batch(CONFIG, BATCH)
    state, _ = step(step.init(0), batch)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, step.to_tree(state))
    with Checkpoints(tmp_path) as checkpoints:
        restored = step.from_tree(checkpoints.restore(step.to_tree(step.init(5))))
    for _ in range(2):
        state, one = step(state, batch)
        restored, other = step(restored, batch)
    assert float(one["loss"]) == float(other["loss"])


def hand_written(**strategy):
    groups = (LayerGroup(start=0, stop=4, strategy=LayerStrategy(**strategy)),)
    return Plan(
        model="GPT2",
        mesh=tuple(MeshAxis(name=name, size=2) for name in "abc"),
        global_batch=BATCH,
        stages=(Stage(groups=groups),),
        batch_axes=strategy.get("dp", ()),
    )


def test_a_run_can_go_on_under_another_plan(tmp_path):
    batch = gpt2.random_batch(CONFIG, BATCH)
    split = build(plan=hand_written(dp=("a", "b", "c"), zero=3))
    other = build(plan=hand_written(dp=("a",), tp=("b", "c")))
    state, _ = split(split.init(), batch)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, split.to_tree(state))
        checkpoints.wait()
        moved = other.from_tree(checkpoints.restore(other.to_tree(other.init())))
    for _ in range(2):
        state, metrics = split(state, batch)
        moved, others = other(moved, batch)
        assert float(others["loss"]) == pytest.approx(float(metrics["loss"]), rel=1e-5)


def test_a_plan_written_by_hand_is_priced():
    step = build(plan=hand_written(dp=("a", "b"), tp=("c",)))
    assert step.plan.prediction is not None
    assert step.plan.strategies[0].tp == ("c",)


def test_the_executor_is_chosen_by_argument_or_plan():
    plan = hand_written(dp=("a", "b"), tp=("c",))
    batch = gpt2.random_batch(CONFIG, BATCH)
    local, other = build(plan=plan), build(plan=plan, executor="annotate")
    assert (local.plan.executor, other.plan.executor) == ("local", "annotate")
    assert build(plan=other.plan).plan.executor == "annotate"
    metrics = [step(step.init(0), batch)[1] for step in (local, other)]
    assert float(metrics[1]["loss"]) == pytest.approx(float(metrics[0]["loss"]), rel=1e-5)
    with pytest.raises(InputError, match="no executor 'xla'. Give one of local, annotate"):
        build(plan=plan, executor="xla")


def test_the_type_of_sums_is_chosen_by_argument_or_plan():
    own, narrow = build(), build(sum_gradients_in="bfloat16")
    assert (own.plan.gradient_sum_dtype, narrow.plan.gradient_sum_dtype) == (None, "bfloat16")
    assert narrow.prediction.time.step_s < own.prediction.time.step_s
    assert build(plan=narrow.plan).prediction == narrow.prediction
    assert build(plan=own.plan, sum_gradients_in="bfloat16").plan.gradient_sum_dtype == "bfloat16"
    batch = gpt2.random_batch(CONFIG, BATCH)
    losses = []
    for step in (own, narrow):
        state, _ = step(step.init(0), batch)
        losses.append(float(step(state, batch)[1]["loss"]))
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sum_gradients_in": "float64"}, "float64 is not narrower than the gradients, which are float32"),
        ({"sum_gradients_in": "int8"}, "'int8' is no type to sum gradients in. Known: bfloat16, float16"),
        ({"sum_gradients_in": "bfloat16", "executor": "annotate"}, "`annotate` leaves it to XLA"),
    ],
)
def test_what_gradients_cannot_be_summed_in_is_refused(changes, message):
    with pytest.raises(InputError, match=message):
        build(**changes)


class LinenNet(flax.linen.Module):
    @flax.linen.compact
    def __call__(self, x):
        for _ in range(2):
            x = flax.linen.relu(flax.linen.Dense(16)(x))
        return x


@pytest.mark.parametrize("model", [LinenNet(), nnx.Linear(16, 16, rngs=nnx.Rngs(0))], ids=["linen", "undecorated"])
def test_linen_models_and_undecorated_ones_train(model):
    def loss_fn(model, batch):
        return jnp.mean((model(batch["x"]) - 1.0) ** 2)

    batch = {"x": np.random.default_rng(0).standard_normal((BATCH, 16)).astype(np.float32)}
    step = build(model=model, loss_fn=loss_fn, example_batch=batch)
    state = step.init()
    losses = []
    for _ in range(4):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0]


def test_a_loss_that_is_no_scalar_is_refused():
    def per_example(model, batch):
        return jnp.mean(model(batch["tokens"][:, :-1]), axis=(1, 2))

    with pytest.raises(InputError, match=r"scalar.*\(8,\)"):
        build(loss_fn=per_example)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_microbatches": 3}, "8 examples does not divide into 3 micro-batches; use one of 1, 2, 4, 8"),
        ({"memory_per_device": "much"}, "'much' is no size"),
        ({"loss_fn": 3}, "loss_fn is a int"),
        ({"optimizer": 1e-3}, "optimizer is a float"),
        ({"model": "gpt"}, "give a flax.nnx.Module"),
        ({"cluster": "h10x8"}, "Did you mean 'h100x8'"),
        ({"cluster": "h100x16"}, "has 16 devices, but 8 are here"),
        ({"example_batch": {"a": np.zeros((4, 2)), "b": np.zeros((3,))}}, "one common leading dim"),
        ({"profile": "measure"}, "Only live devices can be measured"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_with_the_way_out(changes, message):
    with pytest.raises(InputError, match=message):
        build(**changes)


def test_a_batch_of_another_size_is_refused(step):
    with pytest.raises(InputError, match="The batch has 4 examples, the plan is for 8"):
        step(step.init(), gpt2.random_batch(CONFIG, 4))


def test_a_plan_for_another_model_or_batch_says_what_differs(step):
    wider = gpt2.GPT2Config(vocab_size=64, seq_length=16, width=64, num_layers=3, num_heads=4, mlp_width=64)
    with pytest.raises(PlanMismatchError, match=r"number of layers \(4 in the plan, 5 here\)"):
        build(plan=step.plan, model=make_model(wider))
    with pytest.raises(PlanMismatchError, match="8 examples per step, the example batch has 16"):
        build(plan=step.plan, example_batch=gpt2.example_batch(CONFIG, 16))
    with pytest.raises(PlanMismatchError, match="8 devices, but there are 4"):
        build(plan=step.plan, cluster=cluster_of(4))


def test_a_run_can_go_on_in_stages(tmp_path, step):
    """From a plan of one stage to one of two, through a checkpoint."""
    strategy = LayerStrategy(dp=("b", "c"))
    halves = tuple(Stage(groups=(LayerGroup(start=a, stop=a + 2, strategy=strategy),)) for a in (0, 2))
    changes = {
        "stages": halves,
        "pipeline_axes": ("a",),
        "batch_axes": ("b",),
        "schedule": "1f1b",
        "num_microbatches": 2,
    }
    piped = build(plan=step.plan.model_copy(update=changes))
    assert piped.prediction is not None
    assert len(piped.prediction.memory) == 2
    batch = gpt2.random_batch(CONFIG, BATCH)
    state, _ = step(step.init(0), batch)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, step.to_tree(state))
        checkpoints.wait()
        moved = piped.from_tree(checkpoints.restore(piped.to_tree(piped.init(0))))
    for _ in range(2):
        state, metrics = step(state, batch)
        moved, others = piped(moved, batch)
        assert float(others["loss"]) == pytest.approx(float(metrics["loss"]), rel=1e-5)


def test_a_budget_too_small_is_infeasible():
    with pytest.raises(InfeasibleError):
        build(memory_per_device="1KiB")


def test_planning_needs_no_devices_of_the_cluster():
    config = gpt2.GPT2Config(vocab_size=64, seq_length=16, width=32, num_layers=2, num_heads=4, mlp_width=64)
    planned = find_plan(
        make_model(config), gpt2.loss_fn, optax.adamw(1e-3), gpt2.example_batch(config, 64), cluster="h100x16"
    )
    assert planned.plan.num_devices == 16
    assert planned.profile.provenance == "derived"


def spec_with(**parameters):
    leaves = tuple(Parameter(path=path, shape=shape, dtype=dtype) for path, (shape, dtype) in parameters.items())
    return ModelSpec(name="m", fingerprint="f", microbatch=1, kinds=(), layers=(), parameters=leaves)


def test_optimizer_memory_counts_arrays_shaped_like_the_parameters():
    spec = spec_with(w=((4, 8), "bfloat16"), b=((8,), "bfloat16"))
    assert optimizer_memory(optax.sgd(0.1), spec).param_like_slots == ()
    assert optimizer_memory(optax.sgd(0.1, momentum=0.9), spec).param_like_slots == ("same",)
    adam = optimizer_memory(optax.adamw(1e-3), spec)
    assert (adam.param_like_slots, adam.scalar_bytes) == (("same", "same"), 4)
    mixed = optimizer_memory(optax.adamw(1e-3, mu_dtype=jnp.float32), spec)
    assert sorted(mixed.param_like_slots) == ["float32", "same"]


def test_an_optimizer_whose_state_is_not_parameter_shaped_counts_as_bytes():
    spec = spec_with(w=((256, 512), "float32"))
    memory = optimizer_memory(optax.adafactor(1e-3), spec)
    assert memory.param_like_slots == ()
    assert (256 + 512) * 4 <= memory.scalar_bytes < 256 * 512
