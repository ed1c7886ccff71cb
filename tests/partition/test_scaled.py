"""What a layer counts for at some sizes of its axes follows from passes that were planned at others."""

from __future__ import annotations

from collections import Counter
from dataclasses import fields, replace

import pytest

from galvatron_jax.partition import layers
from galvatron_jax.partition.layers import plan_layer, plan_series
from galvatron_jax.partition.scaled import Scaled
from galvatron_jax.partition.series import LayerSeries
from galvatron_jax.partition.static import prepare_kind
from galvatron_jax.search.space import Rule, SearchSpace
from galvatron_jax.spec.model import LayerKind
from galvatron_jax.spec.plan import MeshAxis
from galvatron_jax.spec.strategy import LayerStrategy, SequenceParallel
from tests.runtime.matrix import MICROBATCH, traced

FIRST = {"a": 2, "b": 2}
OTHERS = ({"a": 4, "b": 2}, {"b": 2, "c": 4}, {"a": 3, "b": 2}, {"a": 8, "b": 8})
EVERY = SearchSpace(disabled_rules=frozenset({Rule.ULYSSES_WITH_TP}))


def strategies(kind: LayerKind, mesh: dict[str, int], microbatch: int) -> tuple[LayerStrategy, ...]:
    axes = tuple(MeshAxis(name=name, size=size) for name, size in mesh.items())
    return EVERY.strategies(kind, mesh=axes, microbatch=microbatch, pruned=Counter())


def series(
    kind: LayerKind, strategy: LayerStrategy, mesh: dict[str, int], microbatch: int, sums: str | None = None
) -> tuple[LayerSeries, ...]:
    return plan_series(
        kind,
        strategy,
        mesh=mesh,
        microbatches=(microbatch, 2 * microbatch),
        model_microbatch=MICROBATCH,
        gradient_sum_dtype=sums,
    )


def content(found: tuple[LayerSeries, ...]) -> list[dict]:
    return [{field.name: getattr(one, field.name) for field in fields(one)} for one in found]


@pytest.fixture
def followed(monkeypatch: pytest.MonkeyPatch) -> Counter[bool]:
    """Counts the passes that were taken over, and those that were not though they might have been."""
    seen: Counter[bool] = Counter()
    counted = Scaled.counted

    def watched(self: Scaled, *about):
        found = counted(self, *about)
        seen[found is not None] += 1
        return found

    monkeypatch.setattr(Scaled, "counted", watched)
    return seen


@pytest.mark.parametrize("family", ["gpt2", "gpt2_large_vocabulary", "llama", "t5", "moe", "vit", "swin"])
def test_passes_that_are_followed_are_those_planned_by_themselves(
    family: str, monkeypatch: pytest.MonkeyPatch, followed: Counter[bool]
) -> None:
    for kind in traced(family).spec.kinds:
        shared = kind.model_copy()
        for strategy in strategies(kind, FIRST, 8):
            series(shared, strategy, FIRST, 8)
        for mesh in OTHERS:
            alone = kind.model_copy()
            # Of several hundred, some of each sort of axes; 9 goes round policies and stages, too.
            for strategy in strategies(kind, mesh, 64)[::9]:
                found = content(series(shared, strategy, mesh, 64))
                with monkeypatch.context() as patch:
                    patch.setattr(layers, "structure", lambda place: None)
                    planned = content(series(alone, strategy, mesh, 64))
                assert found == planned, (kind.name, strategy.short(), mesh)
    assert followed[True] > 3 * followed[False], followed


def test_a_choice_that_comes_out_otherwise_is_planned_by_itself(followed: Counter[bool]) -> None:
    """A Swin block under Megatron-SP shards a product otherwise at a small micro-batch than at a large one."""
    mesh, kinds = {"a": 2, "b": 2}, [kind.model_copy() for kind in traced("swin").spec.kinds]
    for kind in kinds:
        for strategy in strategies(kind, mesh, 48):
            if strategy.tp and strategy.sp and not strategy.dp:
                for sizes in ((48,), (1,)):
                    plan_series(kind, strategy, mesh=mesh, microbatches=sizes, model_microbatch=MICROBATCH)
    assert set(followed) == {False, True}


def test_an_axis_of_one_device_tells_nothing_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """For it all is free: a Swin block that merges patches chose otherwise over two devices, unasked."""
    strategy = LayerStrategy(dp=("a",), sp=("b", "c"), sp_kind=SequenceParallel.ULYSSES, zero=2)
    for kind in traced("swin").spec.kinds:
        shared, alone, mesh = kind.model_copy(), kind.model_copy(), {"a": 2, "b": 2, "c": 4}
        series(shared, strategy, {"a": 2, "b": 1, "c": 8}, 24)
        found = content(series(shared, strategy, mesh, 24))
        with monkeypatch.context() as patch:
            patch.setattr(layers, "structure", lambda place: None)
            assert found == content(series(alone, strategy, mesh, 24)), kind.name


@pytest.mark.parametrize("sums", [None, "bfloat16"])
def test_what_follows_is_what_would_run(sums: str | None) -> None:
    """Whatever is planned of gradients that are summed in another type."""
    for kind in traced("llama").spec.kinds:
        shared, mesh, other = kind.model_copy(), {"a": 4, "b": 2}, "bfloat16" if sums is None else None
        for strategy in strategies(kind, FIRST, 8):
            series(shared, strategy, FIRST, 8, other)
            series(shared, strategy, FIRST, 8, sums)
        for strategy in strategies(kind, mesh, 64)[::7]:
            planned = plan_layer(
                kind, strategy, mesh=mesh, microbatch=64, model_microbatch=MICROBATCH, gradient_sum_dtype=sums
            )
            last = series(shared, strategy, mesh, 64, sums)[0].at(64)
            assert last.forward == replace(planned.forward, instructions=()), strategy.short()
            assert last.backward == replace(planned.backward, instructions=()), strategy.short()
            assert last.residual_bytes == planned.residual_bytes
            assert last.parameters == planned.parameters


def test_models_go_with_their_kind() -> None:
    kind = traced("gpt2").spec.kinds[1].model_copy()
    memo = prepare_kind(kind).memo
    series(kind, LayerStrategy(dp=("a", "b")), FIRST, 8)
    series(kind, LayerStrategy(dp=("a",), tp=("b",)), FIRST, 8)
    series(kind, LayerStrategy(dp=("b", "a")), {"b": 2, "a": 4}, 8)
    assert len(memo.models) == 2
