"""Models that the tests run, by name: the zoo's families at a tiny size, and models written as users write them."""

from __future__ import annotations

from . import (
    batchnorm_net,
    linen_gpt,
    linen_llama,
    linen_scan_gpt,
    linen_vit,
    mamba,
    nnx_scan_gpt,
    plain_mlp,
    recurrent,
    refined_bias,
    remat_gpt,
    unet,
    zoo,
)
from .case import ModelCase as ModelCase

_CASES = [
    *zoo.CASES,
    mamba.tiny(),
    mamba.tiny(depthwise=True),
    unet.tiny(),
    linen_gpt.tiny(),
    linen_llama.tiny(),
    linen_vit.tiny(),
    nnx_scan_gpt.tiny(),
    linen_scan_gpt.tiny(),
    batchnorm_net.tiny(),
    plain_mlp.tiny(),
    remat_gpt.tiny(),
    recurrent.tiny(dense=False),
    recurrent.tiny(dense=True),
    refined_bias.tiny(),
]
MODELS: dict[str, ModelCase] = {case.name: case for case in _CASES}
