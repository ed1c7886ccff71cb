"""What layers keep and work with, from its parts."""

from dataclasses import replace

import pytest

from galvatron_jax.cost.memory import LayerMemory, OptimizerMemory, parameter_memory, passing, passing_bytes
from galvatron_jax.cost.pipeline import residuals_kept
from galvatron_jax.cost.wiring import LayerWiring, wire
from galvatron_jax.partition.layers import plan_layer
from galvatron_jax.partition.series import LayerSeries
from galvatron_jax.spec.model import PortRole
from galvatron_jax.spec.strategy import LayerStrategy, Remat
from tests.runtime.matrix import MICROBATCH, traced

MESH = {"a": 2, "b": 2, "c": 2}
DATA = LayerStrategy(dp=("a", "b", "c"))


def planned(model: str, index: int, strategy: LayerStrategy = DATA):
    spec = traced(model).spec
    kind = spec.kinds[spec.layers[index].kind]
    return kind, plan_layer(kind, strategy, mesh=MESH, microbatch=MICROBATCH, model_microbatch=spec.microbatch)


def test_the_layer_with_the_loss_keeps_nothing_where_its_backward_follows_at_once() -> None:
    assert passing(100, 70, 0, staged=False) == (100, 70)
    assert passing(100, 70, 130, staged=False) == (0, 130)
    assert passing(100, 70, 130, staged=True) == (100, 30)
    assert passing(100, 70, 90, staged=True) == (100, 0)


@pytest.mark.standard_promotion
def test_only_the_layer_with_the_loss_has_a_peak_of_both_passes() -> None:
    spec = traced("gpt2").spec
    for index, layer in enumerate(spec.layers):
        kind, plan = planned("gpt2", index)
        ends = any(port.role is PortRole.LOSS for port in kind.outputs)
        assert (plan.backward.through_peak_bytes > 0) == ends, layer.name
        if ends:
            most = plan.residual_bytes + plan.forward.peak_bytes + plan.backward.peak_bytes
            assert max(plan.forward.peak_bytes, plan.backward.peak_bytes) <= plan.backward.through_peak_bytes <= most


@pytest.mark.standard_promotion
def test_kept_inputs_are_part_of_the_residuals_and_all_of_them_under_full_rematerialisation() -> None:
    strategy = LayerStrategy(dp=("a", "b", "c"), remat=Remat.FULL)
    for index in range(len(traced("t5").spec.layers)):
        _, plan = planned("t5", index, strategy)
        kept = sum(size for _, size in plan.kept_inputs)
        assert kept == plan.residual_bytes
        _, everything = planned("t5", index)
        assert sum(size for _, size in everything.kept_inputs) <= everything.residual_bytes
        series = LayerSeries.of(plan, MICROBATCH)
        assert series.shared_bytes_at(MICROBATCH, frozenset(port for port, _ in plan.kept_inputs)) == kept


@pytest.mark.standard_promotion
def test_a_stage_takes_out_what_layers_outside_of_loops_read_and_makes_their_gradients_beside() -> None:
    kind, plan = planned("gpt2", 1)
    looped = wire(traced("gpt2").spec).layers[1]
    alone = replace(looped, looped=False)

    def found(wiring: LayerWiring, *, staged: bool) -> LayerMemory:
        return parameter_memory(kind, plan.parameters, wiring=wiring, optimizer=OptimizerMemory(), staged=staged)

    one = found(alone, staged=False)
    assert looped.looped
    assert found(looped, staged=True) == found(looped, staged=False) == one
    staged = found(alone, staged=True)
    assert staged == replace(one, workspace_bytes=one.parameter_bytes + one.gradient_bytes)
    assert staged.workspace_bytes > 0


@pytest.mark.standard_promotion
def test_a_loop_holds_what_zero_3_gathers_in_the_order_of_its_gathers_once_more() -> None:
    kind, plan = planned("gpt2", 1, LayerStrategy(dp=("a", "b", "c"), zero=3))
    wiring = wire(traced("gpt2").spec).layers[1]
    assert wiring.looped
    found = parameter_memory(kind, plan.parameters, wiring=wiring, optimizer=OptimizerMemory())
    turned = [p for p in plan.parameters if any(any(axes) for dim in p.storage[1:] for axes in dim)]
    assert 0 < len(turned) < len(plan.parameters)
    assert found.copied_bytes == sum(p.storage_bytes for p in turned)
    alone = parameter_memory(kind, plan.parameters, wiring=replace(wiring, looped=False), optimizer=OptimizerMemory())
    assert alone.copied_bytes == 0
    _, whole = planned("gpt2", 1, LayerStrategy(dp=("a", "b", "c"), zero=2))
    assert not any(p.turned for p in whole.parameters)


@pytest.mark.standard_promotion
def test_a_loop_backward_holds_gradients_of_two_layers_where_they_are_scattered_late() -> None:
    wiring = wire(traced("gpt2").spec).layers[1]
    for zero in (1, 2, 3):
        _, plan = planned("gpt2", 1, LayerStrategy(dp=("a", "b", "c"), zero=zero))
        _, work = passing_bytes(plan, wiring=wiring, staged=False, accumulates=True)
        _, late = passing_bytes(plan, wiring=wiring, staged=False, accumulates=False)
        _, staged = passing_bytes(plan, wiring=wiring, staged=True, accumulates=True)
        _, alone = passing_bytes(plan, wiring=replace(wiring, looped=False), staged=False, accumulates=False)
        whole = planned("gpt2", 1)[1].parameters if zero > 1 else ()
        assert late - work == sum(p.accumulator_bytes for p in whole if not p.name.startswith("mlp/"))
        assert staged == work
        assert alone == work


def test_a_pool_of_residuals_has_one_more_micro_batch_outside() -> None:
    assert residuals_kept(7, recomputes=False) == 8
    assert residuals_kept(7, recomputes=True) == 1
