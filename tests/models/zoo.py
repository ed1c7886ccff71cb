"""Small models of the package's zoo, with the options that the matrices of tests want."""

from __future__ import annotations

import dataclasses
import functools
from types import ModuleType
from typing import Any

from galvatron_jax.models import bert, gpt2, llama, moe, swin, t5, vit

from .case import ModelCase


def _case(name: str, module: ModuleType, model: type, **overrides: Any) -> ModelCase:
    config = dataclasses.replace(module.PRESETS["tiny"], **overrides)
    return ModelCase(
        name=name,
        flavour="nnx",
        make=lambda: lambda rngs: model(config, rngs=rngs),
        loss_fn=module.loss_fn,
        batch=functools.partial(module.random_batch, config),
    )


CASES = [
    _case("gpt2", gpt2, gpt2.GPT2, tie_embeddings=False),
    _case("gpt2_tied_dropout", gpt2, gpt2.GPT2, dropout=0.1),
    _case("gpt2_large_vocabulary", gpt2, gpt2.GPT2, vocab_size=2048, tie_embeddings=True),
    _case("llama", llama, llama.Llama, num_kv_heads=8),
    _case("llama_tp_over_kv", llama, llama.Llama, num_kv_heads=2),
    _case("bert", bert, bert.Bert),
    _case("bert_dropout", bert, bert.Bert, dropout=0.1),
    _case("vit", vit, vit.ViT),
    _case("vit_mean", vit, vit.ViT, pooling="mean"),
    _case("swin", swin, swin.Swin),
    _case("t5", t5, t5.T5),
    _case("t5_gated_untied", t5, t5.T5, gated=True, tie_embeddings=False),
    _case("moe", moe, moe.MoE),
]
