"""What the plan says of collectives is what is lowered and compiled: operation, count, bytes and group."""

from __future__ import annotations

import math
from collections.abc import Sequence

import optax
import pytest

from galvatron_jax.errors import DeadlockError
from galvatron_jax.partition.instructions import Convert, Instruction, results_of
from galvatron_jax.runtime import packing
from galvatron_jax.runtime.collectives import (
    CollectiveSignature,
    bytes_by_group,
    compiled_collectives,
    lowered_collectives,
    predicted_collectives,
    traced_collectives,
)
from galvatron_jax.runtime.emit import still_to_do
from galvatron_jax.runtime.hlo import check_deadlocks, permutes_in_branches
from galvatron_jax.spec.model import PortRole
from galvatron_jax.spec.plan import Schedule
from galvatron_jax.spec.profile import CollectiveKind
from tests.models import MODELS

from . import pipelines
from .matrix import Case, parameters
from .pipelines import PipelineCase

WITHOUT_PASSES = {
    # XLA on CPU dissolves optimisation barriers (`cse_barrier_expander`) before it last merges equal operations, so a
    # backward program's gathers of ZeRO-3's parameters, and recomputed ones, become the forward program's. On
    # accelerators the barriers stay. Boundary moves of a batch leaf that several layers read merge everywhere.
    "cse": tuple(MODELS),
    # The gradient of MoE's balance loss is one number for all experts, known when compiling: a gather of it becomes a
    # broadcast, or moves ahead of the loop over micro-batches. 8 and 4 bytes.
    "algsimp": ("moe",),
    "while-loop-invariant-code-motion": ("moe",),
}
"""XLA's passes that change collectives on CPU, with the models that are compiled without them. Then the bytes are equal
to the last one."""

OPTIMIZER = optax.sgd(0.1, momentum=0.9)


@pytest.mark.parametrize("case", parameters())
def test_collectives_are_as_planned(case: Case) -> None:
    step = case.build(OPTIMIZER)
    planned = predicted_collectives(step)
    assert traced_collectives(step) == planned
    assert lowered_collectives(step) == predicted_collectives(step, once=True)
    passes = [name for name, models in WITHOUT_PASSES.items() if case.model in models]
    compiled = compiled_collectives(step, without_passes=passes)
    assert bytes_by_group(compiled) == bytes_by_group(planned)
    assert {s.kind for s in compiled} <= set(CollectiveKind)


@pytest.mark.parametrize("case", [Case("gpt2", "zeros"), Case("llama_tp_over_kv", "tp8")], ids=str)
def test_xla_only_merges_equal_collectives(case: Case) -> None:
    """With all of XLA's passes, gathers can be fewer (see `WITHOUT_PASSES`); no sum changes, nothing is added."""
    step = case.build(OPTIMIZER)
    planned = bytes_by_group(predicted_collectives(step))
    compiled = bytes_by_group(compiled_collectives(step))
    assert set(compiled) <= set(planned)
    for (kind, axes), size in planned.items():
        if kind in (CollectiveKind.ALL_GATHER, CollectiveKind.ALL_TO_ALL):
            assert compiled.get((kind, axes), 0) <= size
        else:
            assert compiled[kind, axes] == size


def test_zero_3_gathers_parameters_in_every_microbatch() -> None:
    """Else XLA would gather them once, ahead of the loop, and hold them whole for the step."""
    one, four = (Case("bert", "tp4-zero3", m).build(OPTIMIZER) for m in (1, 4))
    group = CollectiveKind.ALL_GATHER, ("a", "b", "c")
    assert bytes_by_group(compiled_collectives(four))[group] == 4 * bytes_by_group(compiled_collectives(one))[group]


@pytest.mark.parametrize("model", ["gpt2", "t5"])
def test_gradients_of_tied_parameters_are_added_up_before_they_are_summed(model: str) -> None:
    step = Case(model, "dp8", 1).build(OPTIMIZER)
    loss = 4
    parameters = sum(math.prod(each.shape) * 4 for each in step.traced.spec.parameters)
    assert bytes_by_group(predicted_collectives(step)) == {("all-reduce", ("a", "b", "c")): parameters + loss}


def test_backward_right_behind_forward_gathers_no_parameter_again() -> None:
    """The head's: its backward follows at once."""
    step = Case("gpt2", "tp4-zero3", 1).build(OPTIMIZER)
    local = step.executor.runs[-1].local
    parameters = {port.value for port in local.static.kind.inputs if port.role is PortRole.PARAMETER}

    def gathered(instructions: Sequence[Instruction]) -> set[int]:
        return {each.value for each in instructions if isinstance(each, Convert)} & parameters

    made = {version for each in local.forward for version in results_of(each)}
    left = still_to_do(local.backward, [here for here, there in local.shared_versions.items() if there in made])
    assert gathered(local.forward) >= gathered(local.backward) > gathered(left) == set()


@pytest.mark.parametrize("model", ["gpt2", "llama", "vit", "mamba", "swin"])
def test_gradients_are_synchronised_once_whatever_the_number_of_microbatches(model: str) -> None:
    one, four = (predicted_collectives(Case(model, "dp8", m).build(OPTIMIZER)) for m in (1, 4))
    loss = CollectiveSignature("all-reduce", ("a", "b", "c"), 4, "float32")
    assert (one.pop(loss), four.pop(loss)) == (1, 4)
    assert one == four


@pytest.mark.parametrize("case", pipelines.parameters(every=8, sample=3))
def test_collectives_of_pipelines_are_as_planned(case: PipelineCase) -> None:
    step = case.build(OPTIMIZER)
    planned = predicted_collectives(step)
    assert traced_collectives(step) == planned
    assert lowered_collectives(step) == predicted_collectives(step, once=True)
    passes = [name for name, models in WITHOUT_PASSES.items() if case.model in models]
    compiled = compiled_collectives(step, without_passes=passes)
    assert bytes_by_group(compiled) == bytes_by_group(planned)
    assert permutes_in_branches(step.compiled.as_text()) == []


@pytest.mark.parametrize("mix", ["alike", "dp"])
def test_collectives_of_large_stacks_are_as_planned(mix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is synchronised and gathered in parts is no more in all."""
    case = PipelineCase("llama", 2, Schedule.ONE_F_ONE_B, mix, 4)
    whole = predicted_collectives(case.build(OPTIMIZER))
    monkeypatch.setattr(packing, "_PART_BYTES", 1)
    step = case.build(OPTIMIZER)
    planned = predicted_collectives(step)
    assert planned.total() > whole.total()
    assert bytes_by_group(planned) == bytes_by_group(whole)
    assert traced_collectives(step) == planned
    assert lowered_collectives(step) == predicted_collectives(step, once=True)


def test_gpipe_sends_values_one_way_at_a_time() -> None:
    step = PipelineCase("llama", 2, Schedule.GPIPE, "dp", 4).build(OPTIMIZER)
    moved = [n for signature, n in predicted_collectives(step).items() if signature.kind == "collective-permute"]
    assert sum(moved) == step.table.num_ticks == 2 * (4 + 2 - 1)


def test_pipelines_synchronise_gradients_once_whatever_the_number_of_microbatches() -> None:
    """Of a purely data-parallel model nothing but the loss is summed over the data axes in a tick."""
    once = []
    for count in (4, 8):
        case = PipelineCase("llama", 2, Schedule.ONE_F_ONE_B, "dp", count)
        step = case.build(OPTIMIZER)
        found = predicted_collectives(step)
        loss = CollectiveSignature("all-reduce", ("b", "c"), 4, "float32")
        assert found.pop(loss) == step.table.num_ticks
        once.append({signature: n for signature, n in found.items() if signature.axes == ("b", "c")})
    assert once[0] == once[1]
    assert once[0]


LOOPED = """
%branch (p: f32[4]) -> f32[4] {
  %p = f32[4] parameter(0)
  ROOT %moved = f32[4] collective-permute(%p), source_target_pairs={{0,1}}
}

%other (p: f32[4]) -> f32[4] {
  ROOT %p = f32[4] parameter(0)
}

ENTRY %main (i: s32[], x: f32[4]) -> f32[4] {
  %i = s32[] parameter(0)
  %x = f32[4] parameter(1)
  %chosen = f32[4] conditional(%i, %x, %x), branch_computations={%branch, %other}
  ROOT %moved = f32[4] collective-permute(%chosen), source_target_pairs={{0,1}}
}
"""


def test_a_permute_in_a_branch_is_found_before_it_hangs() -> None:
    assert len(permutes_in_branches(LOOPED)) == 1
    with pytest.raises(DeadlockError, match="1 collective-permute.* inside branches"):
        check_deadlocks(LOOPED)
