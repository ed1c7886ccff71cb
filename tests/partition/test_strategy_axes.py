"""Logical axes, and what is stored over them: alike at as many degrees as can be."""

from __future__ import annotations

import pytest

from galvatron_jax.partition.layout import NOWHERE, Role
from galvatron_jax.partition.parameters import Storage
from galvatron_jax.partition.static import StaticKind, prepare_kind
from galvatron_jax.partition.strategy_axes import plan_axes
from galvatron_jax.spec.strategy import LayerStrategy, SequenceParallel
from tests.runtime.matrix import MICROBATCH, traced

DEGREES = (2, 4, 8)


def block(model: str) -> StaticKind:
    spec = traced(model).spec
    return prepare_kind(spec.kinds[spec.layers[1].kind])


def sizes(static: StaticKind) -> tuple[int, ...]:
    return static.program.sizes(static.kind.batch_factor, MICROBATCH, MICROBATCH)


def ulysses(static: StaticKind, names: tuple[str, ...]) -> list[tuple[str, ...]]:
    """The sequence axes of Ulysses over some mesh axes of two devices."""
    strategy = LayerStrategy(sp=names, sp_kind=SequenceParallel.ULYSSES)
    planned = plan_axes(static, strategy, dict.fromkeys(names, 2), sizes(static))
    return [axis.names for axis in planned.axes if axis.role is Role.SEQUENCE]


def test_ulysses_is_one_axis_though_rotary_positions_halve_the_heads() -> None:
    static = block("llama")
    halves = [factor for factor in static.kind.program.factors if factor.size == 2]
    assert halves
    assert ulysses(static, ("a", "b")) == [("a", "b")]


def test_ulysses_is_taken_apart_for_fewer_key_value_heads_than_devices() -> None:
    assert ulysses(block("llama_tp_over_kv"), ("a", "b", "c")) == [("a",), ("b",), ("c",)]


@pytest.mark.parametrize("model", ["gpt2", "llama", "t5"])
def test_the_dim_that_zero_shards_does_not_hang_on_the_tensor_degree(model: str) -> None:
    static, found = block(model), []
    for degree in DEGREES:
        axes = plan_axes(static, LayerStrategy(dp=("a",), tp=("b",)), {"a": 2, "b": degree}, sizes(static))
        if any(axis.size == degree for axis in axes.axes if axis.role is Role.TENSOR):
            storage = Storage(static, axes, sizes(static))
            (index,) = axes.of(Role.STORAGE)
            found.append([storage.layout(value, sharded=True)[index] for value in sorted(static.parameter_values)])
    assert len(found) > 1
    assert all(each == found[0] for each in found)


def test_small_tables_stay_whole() -> None:
    spec = traced("t5").spec
    table = next(
        (prepare_kind(kind), port.value)
        for kind in spec.kinds
        for port in kind.inputs
        if port.name.endswith("bias/table/embedding")
    )
    static, value = table
    assert value in static.bias_tables
    axes = plan_axes(static, LayerStrategy(dp=("a",)), {"a": 2}, sizes(static))
    assert set(Storage(static, axes, sizes(static)).layout(value, sharded=True)) == {NOWHERE}


def test_zero_keeps_off_a_dim_that_a_slower_tensor_axis_shards() -> None:
    """Where ZeRO's axis were the major one, its gather would first need one over the tensor axis."""
    static = block("llama")
    axes = plan_axes(static, LayerStrategy(dp=("c",), tp=("a", "b")), {"a": 2, "b": 2, "c": 2}, sizes(static))
    storage = Storage(static, axes, sizes(static))
    (index,) = axes.of(Role.STORAGE)
    tensor = axes.of(Role.TENSOR)
    for value in static.parameter_values:
        layout = storage.layout(value, sharded=True)
        assert layout[index] == NOWHERE or layout[index] not in [layout[axis] for axis in tensor]
