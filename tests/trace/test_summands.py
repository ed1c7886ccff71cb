"""Which ports hand gradients on as summands."""

from __future__ import annotations

import pytest

from galvatron_jax.spec.model import ModelSpec
from galvatron_jax.trace.summands import mark_summands
from tests.models import MODELS
from tests.runtime.matrix import traced

SHARING = {
    "t5": {
        ("outputs", "embedding", "out1"), ("inputs", "T5EncoderBlock", "in5"),
        ("outputs", "glue", "out2"), ("inputs", "T5DecoderBlock", "in5"),
    },
    "refined_bias": {
        ("outputs", "embedding", "out1"), ("inputs", "BiasedBlock", "in3"), ("outputs", "BiasedBlock", "out1"),
        *[("inputs", "head", f"in{i}") for i in range(5)],
    },
}  # fmt: skip
SHARING["t5_gated_untied"] = SHARING["t5"]


def marked(spec: ModelSpec) -> set[tuple[str, str, str]]:
    return {
        (side, kind.name, port.name)
        for kind in spec.kinds
        for side in ("inputs", "outputs")
        for port in getattr(kind, side)
        if port.summands
    }


@pytest.mark.parametrize("name", MODELS)
def test_only_what_layers_share_without_a_batch_is_handed_on_as_summands(name: str) -> None:
    assert marked(traced(name).spec) == SHARING.get(name, set())


def test_a_port_at_which_one_layer_reads_a_batch_is_not_marked() -> None:
    spec = traced("t5").spec
    number = next(i for i, kind in enumerate(spec.kinds) if kind.name == "T5EncoderBlock")
    port = next(p for p, x in enumerate(spec.kinds[number].inputs) if x.summands)
    index = max(i for i, layer in enumerate(spec.layers) if layer.kind == number)
    layer = spec.layers[index]
    other = spec.layers[index - 1].outputs[0]
    changed = layer.model_copy(update={"inputs": (*layer.inputs[:port], other, *layer.inputs[port + 1 :])})
    layers = (*spec.layers[:index], changed, *spec.layers[index + 1 :])
    found = marked(spec.model_copy(update={"kinds": mark_summands(spec.kinds, layers)}))
    assert found == {place for place in SHARING["t5"] if place[1] in ("glue", "T5DecoderBlock")}


def test_what_one_layer_alone_reads_is_not_marked() -> None:
    spec = traced("t5").spec
    blocks = [i for i, layer in enumerate(spec.layers) if spec.kinds[layer.kind].name == "T5EncoderBlock"]
    layers = [layer for i, layer in enumerate(spec.layers) if i not in blocks[1:]]
    found = marked(spec.model_copy(update={"kinds": mark_summands(spec.kinds, layers)}))
    assert found == {place for place in SHARING["t5"] if place[1] in ("glue", "T5DecoderBlock")}
