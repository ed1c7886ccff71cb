"""Conversions between layouts, run on eight devices."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec

from galvatron_jax.partition.layout import NOWHERE, PENDING, Axis, Frame, Layout, Role, StepKind, convert, local_sizes
from galvatron_jax.runtime.emit import run_steps

from .shards import MESH, all_shards, layouts, logical_axes, mesh


@st.composite
def conversions(draw: st.DrawFn) -> tuple[tuple[Axis, ...], Frame, Layout, Layout]:
    """Axes, a value's frame and two of its layouts; the target keeps pending only what is pending."""
    axes = draw(logical_axes())
    sizes = tuple(draw(st.lists(st.sampled_from([1, 2, 3, 4, 8, 16]), min_size=1, max_size=3)))
    frame = Frame(sizes, tuple(draw(st.booleans()) for _ in sizes))
    source = draw(layouts(axes, frame, pending=True))
    target = draw(layouts(axes, frame))
    kept = draw(st.lists(st.booleans(), min_size=len(axes), max_size=len(axes)))
    target = tuple(
        PENDING if keep and now == PENDING else then for keep, now, then in zip(kept, source, target, strict=True)
    )
    return axes, frame, source, target


def check(axes: tuple[Axis, ...], frame: Frame, source: Layout, target: Layout) -> None:
    whole = np.random.default_rng(0).integers(-9, 9, frame.sizes).astype(np.float32)
    steps = convert(axes, frame, source, target)
    shape = tuple(local_sizes(axes, frame, target))
    everywhere = PartitionSpec(tuple(MESH))
    move = jax.shard_map(
        lambda x: run_steps(x[0], steps, shape)[None],
        mesh=mesh(), in_specs=everywhere, out_specs=everywhere, check_vma=False,
    )  # fmt: skip
    found = jax.jit(move)(all_shards(whole, axes, frame, source))
    np.testing.assert_array_equal(np.asarray(found), all_shards(whole, axes, frame, target))


@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(conversions())
def test_a_conversion_gives_each_device_its_shard(case: tuple[tuple[Axis, ...], Frame, Layout, Layout]) -> None:
    check(*case)


@pytest.mark.slow
@settings(max_examples=1000, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(conversions())
def test_any_conversion_gives_each_device_its_shard(case: tuple[tuple[Axis, ...], Frame, Layout, Layout]) -> None:
    check(*case)


@settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(conversions())
def test_only_a_change_of_layout_takes_steps(case: tuple[tuple[Axis, ...], Frame, Layout, Layout]) -> None:
    axes, frame, source, target = case
    assert (not convert(axes, frame, source, target)) == (source == target)
    assert not convert(axes, frame, source, source)


def test_a_group_of_axes_moves_between_dims_of_opposite_order() -> None:
    check(_axes("ab", "c"), Frame((1, 4, 4), (False, False, True)), (1, NOWHERE), (2, NOWHERE))


def _axes(*groups: str) -> tuple[Axis, ...]:
    return tuple(Axis(Role.DATA, tuple(g), 2 ** len(g), list(MESH).index(g[0])) for g in groups)


def test_axes_that_do_the_same_share_one_collective() -> None:
    axes, frame = _axes("a", "b", "c"), Frame((8, 8), (True, False))

    def kinds(source: Layout, target: Layout) -> list[tuple[StepKind, int]]:
        return [(s.kind, s.size) for s in convert(axes, frame, source, target)]

    p, n = PENDING, NOWHERE
    assert kinds((p, p, p), (n, n, n)) == [(StepKind.ALL_REDUCE, 8)]
    assert kinds((p, p, p), (0, 0, 0)) == [(StepKind.REDUCE_SCATTER, 8)]
    assert kinds((0, 0, 0), (n, n, n)) == [(StepKind.ALL_GATHER, 8)]
    assert kinds((0, 0, n), (0, 1, n)) == [(StepKind.ALL_TO_ALL, 2)]
    assert kinds((n, n, n), (0, 0, 1)) == [(StepKind.SLICE, 2)] * 3
