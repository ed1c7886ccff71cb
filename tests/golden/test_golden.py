"""Golden files: what must not drift. `python -m tests.golden.regenerate` writes them anew."""

from __future__ import annotations

import json

import pytest

from .records import RECORDS, path_of, text_of


@pytest.mark.parametrize("name", sorted(RECORDS))
def test_nothing_has_drifted(name: str) -> None:
    kept = path_of(name).read_text(encoding="utf-8")
    assert text_of(name) == kept, "read the difference; if it is meant, run: python -m tests.golden.regenerate"


def count(model: str, kind: str, strategy: str, phase: str, operation: str, axes: str = "b,c") -> int:
    """How often a layer runs a collective over some axes."""
    record = json.loads(path_of("layer_collectives").read_text(encoding="utf-8"))[model][kind][strategy][phase]
    parts = [line.split(" ") for line in record]
    return sum(int(p[0]) for p in parts if p[2] == operation and p[-1] == axes)


def counts(model: str, kind: str, strategy: str, operation: str) -> tuple[int, int]:
    """Forward, and forward with backward."""
    forward, backward = (count(model, kind, strategy, phase, operation) for phase in ("forward", "backward"))
    return forward, forward + backward


BLOCKS = [("gpt2", "GPT2Block"), ("llama", "LlamaBlock"), ("bert", "BertBlock"), ("linen_llama", "Block")]


@pytest.mark.parametrize(("model", "kind"), [*BLOCKS, ("vit", "ViTBlock"), ("t5", "T5EncoderBlock")])
def test_tensor_parallelism_sums_twice_forward_and_four_times_in_all(model: str, kind: str) -> None:
    assert counts(model, kind, "tp", "all-reduce") == (2, 4)


@pytest.mark.parametrize(("model", "kind"), BLOCKS)
def test_megatron_sequence_parallelism_gathers_and_scatters_twice_each_way(model: str, kind: str) -> None:
    assert counts(model, kind, "megatron", "reduce-scatter") == (2, 4)
    # BERT's norms come after the sums: its backward program reads one gathered activation more.
    assert counts(model, kind, "megatron", "all-gather") == ((2, 5) if model == "bert" else (2, 4))


@pytest.mark.parametrize(
    ("model", "kind"), [("llama", "LlamaBlock"), ("linen_llama", "Block"), ("t5", "T5EncoderBlock")]
)
def test_ulysses_exchanges_four_times_forward_and_eight_times_in_all(model: str, kind: str) -> None:
    assert counts(model, kind, "ulysses", "all-to-all") == (4, 8)


@pytest.mark.parametrize(("model", "kind"), [("gpt2", "GPT2Block"), ("bert", "BertBlock")])
def test_ulysses_exchanges_gradients_of_a_fused_qkv_at_once(model: str, kind: str) -> None:
    """The gradients of query, key and value are one array when they go back: one exchange of thrice the bytes."""
    assert counts(model, kind, "ulysses", "all-to-all") == (4, 6)


def test_a_t5_decoder_sums_three_times_forward_and_seven_times_in_all() -> None:
    assert counts("t5", "T5DecoderBlock", "tp", "all-reduce") == (3, 7)


@pytest.mark.parametrize("model", ["gpt2", "llama", "llama_tp_over_kv", "bert", "vit", "linen_llama"])
def test_data_parallelism_sums_gradients_once_a_step(model: str) -> None:
    record = json.loads(path_of("step_collectives").read_text(encoding="utf-8"))[model]
    gradients = [[line for line in lines if " 4 bytes " not in line] for lines in record.values()]
    assert gradients[0]
    assert gradients[0] == gradients[1]
