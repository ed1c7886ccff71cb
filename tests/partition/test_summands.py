"""Gradients of what layers share are not summed over devices by each of them."""

from __future__ import annotations

import pytest

from galvatron_jax.partition.layers import LocalPlan, plan_local
from galvatron_jax.partition.layout import PENDING, Role, StepKind
from galvatron_jax.partition.planner import steps_of
from galvatron_jax.spec.strategy import LayerStrategy
from tests.runtime.matrix import MICROBATCH, megatron, plain, traced, ulysses

MESH = {"a": 2, "b": 2, "c": 2}
STRATEGIES = {
    "dp": plain(dp="abc"),
    "tp": plain(tp="abc"),
    "zero3-tp": plain(dp="ab", tp="c", zero=3, remat="full"),
    "megatron": megatron("bc", dp="a"),
    "ulysses": ulysses("bc", dp="a", zero=2),
    "idle": plain(dp="b"),
    "nothing": plain(),
}


def planned(name: str, strategy: LayerStrategy) -> LocalPlan:
    spec = traced("t5").spec
    kind = next(kind for kind in spec.kinds if kind.name == name)
    return plan_local(kind, strategy, mesh=MESH, microbatch=MICROBATCH, model_microbatch=spec.microbatch)


@pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=STRATEGIES)
@pytest.mark.parametrize("block", ["T5EncoderBlock", "T5DecoderBlock"])
def test_a_block_hands_the_gradient_of_relative_positions_back_as_it_is_made(
    block: str, strategy: LayerStrategy
) -> None:
    local = planned(block, strategy)
    ((port, summand),) = local.summands.items()
    value, layout = local.gradient_of(port)
    assert not [step for moved, step in steps_of(local.backward) if moved == value]
    assert {step.kind for step in summand.steps} <= {StepKind.ALL_GATHER}
    spread = {name for step in summand.steps for name in step.names} | set(summand.repeated)
    pending = {
        name for axis, place in zip(local.axes.axes, layout, strict=True) if place == PENDING for name in axis.names
    }
    assert spread | pending == set(MESH)
    assert not spread & pending


@pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=STRATEGIES)
def test_who_makes_relative_positions_does_not_sum_their_cotangent_either(strategy: LayerStrategy) -> None:
    local = planned("embedding", strategy)
    port = next(i for i, port in enumerate(local.static.kind.outputs) if port.summands)
    pairs = zip(local.axes.axes, local.cotangents[port], strict=True)
    assert all(place == PENDING for axis, place in pairs if axis.role is not Role.STORAGE)
    cotangent = local.static.kind.outputs[port].cotangent
    assert not [step for moved, step in steps_of(local.backward) if moved == cotangent]
