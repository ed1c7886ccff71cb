"""Gradients that are scattered while the next layer works, and those that are not."""

import pytest

from galvatron_jax.partition.layers import LocalPlan, plan_local
from galvatron_jax.partition.scatters import scattered_late
from galvatron_jax.spec.model import PortRole
from galvatron_jax.spec.strategy import LayerStrategy
from tests.runtime.matrix import MICROBATCH, traced

MESH = {"a": 2, "b": 2, "c": 2}


@pytest.mark.parametrize(
    ("sizes", "late"),
    [
        ({3: 8, 2: 8, 1: 2, 0: 6}, {0, 1}),
        ({3: 8, 2: 8, 1: 3, 0: 6}, {0, 1}),
        ({3: 8, 2: 7, 1: 3, 0: 6}, {0, 1}),
        ({2: 4, 1: 2, 0: 2}, {0, 1}),
        ({1: 1, 0: 9}, {0}),
        ({0: 9}, {0}),
        ({}, set()),
    ],
)
def test_those_made_last_are_late_up_to_half_of_all_bytes_and_at_least_one(sizes: dict[int, int], late: set) -> None:
    assert scattered_late(sizes) == late


def planned(zero: int) -> tuple[LocalPlan, dict[str, int]]:
    """A block of GPT-2, and its parameters' ports by name."""
    spec = traced("gpt2").spec
    kind = spec.kinds[spec.layers[1].kind]
    local = plan_local(
        kind, LayerStrategy(dp=("a", "b", "c"), zero=zero), mesh=MESH, microbatch=MICROBATCH,
        model_microbatch=spec.microbatch,
    )  # fmt: skip
    return local, {port.name: i for i, port in enumerate(kind.inputs) if port.role is PortRole.PARAMETER}


@pytest.mark.standard_promotion
@pytest.mark.parametrize("zero", [2, 3])
def test_a_blocks_mlp_is_scattered_at_once_and_its_attention_late(zero: int) -> None:
    local, ports = planned(zero)
    at_once = {name for name, port in ports.items() if port in local.scattered_at_once}
    assert at_once == {name for name in ports if name.startswith("mlp/")}
    whole = sum(parameter.storage_bytes for parameter in planned(0)[0].plan.parameters)
    assert 0 < local.plan.backward.unscattered_bytes <= whole / 2


@pytest.mark.standard_promotion
def test_what_is_not_scattered_layer_by_layer_is_neither() -> None:
    local, _ = planned(1)
    assert not local.scattered_at_once
    assert not local.plan.backward.unscattered_bytes
