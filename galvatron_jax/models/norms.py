"""Normalisation computed in float32, returned in the input's own dtype."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jax import Array


class LayerNorm(nnx.LayerNorm):
    """``nnx.LayerNorm`` (Ba et al., 2016) that computes in float32, also under strict dtype promotion.

    Args:
        width: length of the last dim, which is normalised.
        epsilon: added to the variance.
        param_dtype: what scale and bias are stored in.
        rngs: randomness for the initialisers.
    """

    def __init__(self, width: int, *, epsilon: float, param_dtype: str, rngs: nnx.Rngs):
        super().__init__(width, epsilon=epsilon, dtype=jnp.float32, param_dtype=param_dtype, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        """``Float[..., width]`` to the same."""
        return super().__call__(x).astype(x.dtype)


class RMSNorm(nnx.RMSNorm):
    """``nnx.RMSNorm`` (Zhang & Sennrich, 2019) that computes in float32, also under strict dtype promotion.

    Args:
        width: length of the last dim, which is normalised.
        epsilon: added to the mean square.
        param_dtype: what the scale is stored in.
        rngs: randomness for the initialisers.
    """

    def __init__(self, width: int, *, epsilon: float, param_dtype: str, rngs: nnx.Rngs):
        super().__init__(width, epsilon=epsilon, dtype=jnp.float32, param_dtype=param_dtype, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        """``Float[..., width]`` to the same."""
        return super().__call__(x).astype(x.dtype)
