"""Memory and time of whole plans."""

import pytest

from galvatron_jax.cost import OptimizerMemory, price_plan
from galvatron_jax.cost.links import Group, ring_seconds
from galvatron_jax.cost.memory import SAME
from galvatron_jax.cost.model import Batching, CostModel
from galvatron_jax.cost.planner import default_planner
from galvatron_jax.cost.sizes import batch_spec, local_bytes, value_dims
from galvatron_jax.cost.wiring import Hop, wire
from galvatron_jax.errors import PlanMismatchError
from galvatron_jax.spec.plan import LayerGroup, MeshAxis, Plan, Schedule, Stage
from galvatron_jax.spec.profile import CollectiveKind
from galvatron_jax.spec.strategy import LayerStrategy
from tests.runtime.matrix import traced
from tests.search.fake import FakePlanner, cluster, toy_model

ADAM = OptimizerMemory(("float32", "float32"), 4)
WEIGHT = 4 * 64 * 64
DATA = LayerStrategy(dp=("a", "b"))


def plan(*groups: tuple[int, int, LayerStrategy], **changes: object) -> Plan:
    fields = {
        "model": "toy",
        "mesh": (MeshAxis(name="a", size=2), MeshAxis(name="b", size=2)),
        "global_batch": 8,
        "stages": (Stage(groups=tuple(LayerGroup(start=a, stop=b, strategy=s) for a, b, s in groups)),),
        "batch_axes": ("a", "b"),
    }
    return Plan(**(fields | changes))


def price(found: Plan, *, tied: bool = False, skip: bool = False, optimizer: OptimizerMemory = ADAM):
    model = toy_model(2, tied=tied, skip=skip)
    return price_plan(model, found, cluster=cluster(), optimizer=optimizer, planner=FakePlanner())


def test_plain_data_parallelism_holds_everything_whole() -> None:
    memory = price(plan((0, 4, DATA))).memory[0]
    assert memory.parameter_bytes == 4 * WEIGHT
    assert memory.optimizer_bytes == 2 * 4 * WEIGHT + 4
    assert memory.gradient_bytes == 4 * WEIGHT
    assert memory.batch_bytes == 2 * (8 // 4) * 32 * 4
    parts = memory.model_dump(exclude={"total_bytes"})
    assert memory.total_bytes == sum(parts.values())


def test_a_tied_parameter_counts_once() -> None:
    memory = price(plan((0, 4, DATA)), tied=True).memory[0]
    assert memory.parameter_bytes == 3 * WEIGHT
    # Each layer that uses it has a gradient of its own.
    assert memory.gradient_bytes == 4 * WEIGHT


def test_layers_that_disagree_on_a_tied_parameter_are_refused() -> None:
    other = LayerStrategy(dp=("a", "b"), zero=3)
    with pytest.raises(PlanMismatchError, match="share 'table' but would lay it out differently"):
        price(plan((0, 1, other), (1, 4, DATA)), tied=True)


def test_synchronisation_is_paid_once_whatever_the_number_of_microbatches() -> None:
    one, four = (price(plan((0, 4, LayerStrategy(dp=("a",))), num_microbatches=n, batch_axes=("a",))) for n in (1, 4))
    assert one.time.synchronisation_s == four.time.synchronisation_s > 0
    assert four.memory[0].residual_bytes == one.memory[0].residual_bytes // 4


def test_micro_batches_after_one_another_read_and_write_what_they_add_to() -> None:
    one, four = (
        price(plan((0, 4, LayerStrategy(dp=("a",))), num_microbatches=n, batch_axes=("a",))).time for n in (1, 4)
    )
    added = 2 * 4 * WEIGHT / cluster().device.memory_bandwidth_bytes_per_s
    assert four.compute_s - one.compute_s == pytest.approx(4 * added)


def test_what_a_stage_stashes_is_copied_in_and_out() -> None:
    inner = LayerStrategy(dp=("b",))
    stages = tuple(Stage(groups=(LayerGroup(start=a, stop=b, strategy=inner),)) for a, b in ((0, 2), (2, 4)))
    staged = {"stages": stages, "pipeline_axes": ("a",), "batch_axes": ("b",), "num_microbatches": 4}
    again, stashed = (
        price(plan(**staged, schedule=schedule)) for schedule in (Schedule.ONE_F_ONE_B, Schedule.ONE_F_ONE_B_STASH)
    )
    residual = price(plan((0, 4, inner), batch_axes=("b",), num_microbatches=4)).memory[0].residual_bytes // 2
    copied = 2 * residual / cluster().device.memory_bandwidth_bytes_per_s
    assert stashed.stages[0].forward_s - again.stages[0].forward_s == pytest.approx(copied)
    assert stashed.stages[0].backward_s < again.stages[0].backward_s + copied


def test_devices_of_a_host_sum_parameter_by_parameter_and_a_loop_each_one_for_all_its_layers() -> None:
    gpus = cluster()
    host = gpus.model_copy(update={"device": gpus.device.model_copy(update={"name": "cpu"})})
    mesh, model = (MeshAxis(name="a", size=4),), traced("gpt2").spec
    dp = LayerStrategy(dp=("a",))
    together, apart = (
        CostModel.build(
            model, cluster=each, mesh=mesh, profile=None, optimizer=ADAM, planner=default_planner()
        )
        for each in (gpus, host)
    )  # fmt: skip
    batching = Batching(8, 1, ("a",))
    for index, wiring in enumerate(together.wiring.layers):
        sums = [each for p in together.plan(index, dp, batching).parameters for each in p.sync]
        alike = sum(other.kind == wiring.kind for other in model.layers) if wiring.looped else 1
        one, other = (costs.layer_cost(wiring, dp, batching).synchronisation_s for costs in (together, apart))
        latency = ring_seconds(CollectiveKind.ALL_REDUCE, Group(4, 1), payload_bytes=0, cluster=gpus)
        assert other - one == pytest.approx((len(sums) / alike - 1) * latency)
        assert len(sums) > 1


def test_unlike_neighbours_pay_for_the_change_of_layout_both_ways() -> None:
    tensor = LayerStrategy(dp=("a",), tp=("b",))
    plain = price(plan((0, 4, DATA))).time
    mixed = price(plan((0, 2, DATA), (2, 4, tensor))).time
    alone = price(plan((0, 4, tensor), batch_axes=("a",))).time
    assert mixed.communication_s > (plain.communication_s + alone.communication_s) / 2 > 0


def test_slots_take_the_dtype_they_are_kept_in() -> None:
    narrow = OptimizerMemory(("bfloat16", SAME))
    assert price(plan((0, 4, DATA)), optimizer=narrow).memory[0].optimizer_bytes == 4 * (WEIGHT // 2 + WEIGHT)


def test_a_pipeline_is_priced_by_its_schedule() -> None:
    inner = LayerStrategy(dp=("b",))
    stages = tuple(Stage(groups=(LayerGroup(start=a, stop=b, strategy=inner),)) for a, b in ((0, 2), (2, 4)))
    found = price(
        plan(
            stages=stages,
            pipeline_axes=("a",),
            batch_axes=("b",),
            num_microbatches=4,
            schedule=Schedule.ONE_F_ONE_B,
        )
    )
    assert [len(found.stages), len(found.memory)] == [2, 2]
    assert found.time.bubble_s > 0
    assert found.time.step_s > 4 * max(stage.forward_s + stage.backward_s for stage in found.stages)
    beside = {"total_bytes", "padded_bytes", "reserved_bytes"}
    for memory in found.memory:
        assert memory.total_bytes == sum(memory.model_dump(exclude=beside).values())
    # One program runs on all devices.
    assert len({memory.peak_bytes for memory in found.memory}) == 1
    assert len({memory.argument_bytes for memory in found.memory}) == 1
    assert found.peak_bytes >= found.largest.total_bytes
    assert any(memory.reserved_bytes > 0 for memory in found.memory)


def test_stages_that_disagree_on_a_tied_parameter_are_refused() -> None:
    strategies = (LayerStrategy(dp=("b",)), LayerStrategy(dp=("b",), zero=3))
    stages = tuple(
        Stage(groups=(LayerGroup(start=start, stop=start + 2, strategy=strategy),))
        for start, strategy in zip((0, 2), strategies, strict=True)
    )
    changes = {"stages": stages, "pipeline_axes": ("a",), "batch_axes": ("b",), "schedule": Schedule.GPIPE}
    with pytest.raises(PlanMismatchError, match="share 'table' but would lay it out differently"):
        price(plan(**changes), tied=True)


def test_a_value_with_several_readers_is_held_in_the_plan_wide_layout() -> None:
    straight, skipping = wire(toy_model(2)), wire(toy_model(2, skip=True))
    assert straight.held == ()
    assert straight.layers[1].hops == (Hop(output=0, input=1, differentiable=True),)
    assert skipping.held == ((0, 0),)
    assert skipping.layers[1].hops == ()
    assert skipping.layers[3].reads[-1].port == 3


def test_shapes_follow_the_micro_batch_and_layouts_divide_them() -> None:
    kind = toy_model(1).kinds[1]
    dims = value_dims(kind, 2, microbatch=16, model_microbatch=8)
    assert dims == (16, 32, 64)
    spec = batch_spec(kind, 2, ("a", "b"))
    assert spec == (("a", "b"), (), ())
    assert local_bytes(dims, "float32", spec, {"a": 2, "b": 2}) == 4 * 4 * 32 * 64
