"""Small functions around single primitives, with random shapes: what the sharding rules are tested on."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st
from jax import lax
from jax.ad_checkpoint import checkpoint_name

Draw = st.DrawFn


@dataclass(frozen=True)
class Sample:
    """A function of some arrays."""

    function: Callable[..., Any]
    operands: tuple[np.ndarray, ...]


Maker = Callable[[Draw], Sample]
MAKERS: dict[str, Maker] = {}
"""From the primitive's name to how a sample with it is drawn."""

SIZES = st.sampled_from([1, 2, 3, 4, 8, 16])
DIVISIBLE = st.sampled_from([2, 4, 8, 16])


def shape(draw: Draw, *, least: int = 1, most: int = 3, sizes: Any = SIZES) -> tuple[int, ...]:
    return tuple(draw(st.lists(sizes, min_size=least, max_size=most)))


def floats(draw: Draw, dims: tuple[int, ...], *, low: float = 0.1, high: float = 0.9) -> np.ndarray:
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    return rng.uniform(low, high, dims).astype(np.float32)


def integers(draw: Draw, dims: tuple[int, ...], *, low: int = 0, high: int = 9, dtype: Any = np.int32) -> np.ndarray:
    return np.random.default_rng(draw(st.integers(0, 99))).integers(low, high, dims).astype(dtype)


def booleans(draw: Draw, dims: tuple[int, ...]) -> np.ndarray:
    return integers(draw, dims, high=2).astype(bool)


def sample(*names: str) -> Callable[[Maker], Maker]:
    def add(maker: Maker) -> Maker:
        for name in names:
            MAKERS[name] = maker
        return maker

    return add


# ------------------------------------------------------------------------------------------------ elementwise


def elementwise(name: str, function: Callable, *kinds: Callable) -> None:
    """Registers a function of arrays of one shape."""

    def make(draw: Draw) -> Sample:
        dims = shape(draw)
        return Sample(function, tuple(kind(draw, dims) for kind in kinds))

    MAKERS[name] = make


def _small(function: Callable) -> Callable:
    """The function well inside its domain: near a pole, rounding of sums in another order grows without bound."""
    return lambda x: function(x * 0.3)


_UNARY = {
    "neg": lax.neg, "exp": lax.exp, "exp2": lax.exp2, "log": lax.log, "log1p": lax.log1p, "expm1": lax.expm1,
    "tanh": lax.tanh, "logistic": lax.logistic, "sin": lax.sin, "cos": lax.cos, "tan": _small(lax.tan),
    "asin": _small(lax.asin), "acos": _small(lax.acos), "atan": lax.atan, "sinh": lax.sinh, "cosh": lax.cosh,
    "asinh": lax.asinh, "acosh": lambda x: lax.acosh(x + 1.5), "atanh": _small(lax.atanh), "erf": lax.erf,
    "erfc": lax.erfc, "erf_inv": lax.erf_inv, "lgamma": lax.lgamma, "digamma": lax.digamma, "rsqrt": lax.rsqrt,
    "sqrt": lax.sqrt, "cbrt": lax.cbrt, "square": lax.square, "abs": lax.abs, "sign": lax.sign, "floor": lax.floor,
    "ceil": lax.ceil, "round": lax.round, "is_finite": lax.is_finite, "integer_pow": lambda x: lax.integer_pow(x, 3),
    "convert_element_type": lambda x: lax.convert_element_type(x * 9, jnp.int32).astype(jnp.float32) + x,
    "reduce_precision": lambda x: lax.reduce_precision(x, 8, 20),
    "name": lambda x: checkpoint_name(x, "here"),
    "copy": jnp.copy,
    "complex": lambda x: lax.abs(lax.complex(x, x)),
    "real": lambda x: lax.real(lax.complex(x, x)),
    "imag": lambda x: lax.imag(lax.complex(x, x)),
    "conj": lambda x: lax.imag(lax.conj(lax.complex(x, x))),
    "add_any": lambda x: jax.grad(lambda y: jnp.sum(jnp.sin(y) * jnp.cos(y)))(x),
    "stop_gradient": lax.stop_gradient,
}  # fmt: skip
for _name, _function in _UNARY.items():
    elementwise(_name, _function, floats)
for _name in ("add", "sub", "mul", "div", "rem", "max", "min", "atan2", "pow", "nextafter"):
    elementwise(_name, getattr(lax, _name), floats, floats)
for _name in ("eq", "ne", "lt", "gt", "le", "ge"):
    elementwise(_name, getattr(lax, _name), integers, integers)
for _name, _primitive in (("eq_to", "eq_to_p"), ("le_to", "le_to_p"), ("lt_to", "lt_to_p")):
    elementwise(_name, getattr(lax, _primitive).bind, integers, integers)
for _name, _attribute in (("and", "bitwise_and"), ("or", "bitwise_or"), ("xor", "bitwise_xor")):
    elementwise(_name, getattr(lax, _attribute), integers, integers)
for _name in ("shift_left", "shift_right_logical", "shift_right_arithmetic"):
    elementwise(_name, getattr(lax, _name), integers, integers)
for _name in ("population_count", "clz"):
    elementwise(_name, getattr(lax, _name), integers)
elementwise("bitcast_convert_type", lambda x: lax.bitcast_convert_type(x, jnp.uint32), integers)
elementwise("not", lax.bitwise_not, integers)
elementwise("select_n", lambda c, x, y: lax.select(c, x, y), booleans, floats, floats)
elementwise("clamp", lambda x: lax.clamp(np.float32(0.3), x, np.float32(0.6)), floats)
_NEWER = {
    "log2": lambda x: lax.log2(x),
    "one_minus_square": lambda x: lax.one_minus_square(x),
    "polynomial": lambda x: lax.polynomial(x, (1.0, -0.5, 0.25)) + lax.polynomial(x, (0.5, lax.sin(x))),
}
"""Functions of primitives that older versions of JAX have not."""
for _name, _function in _NEWER.items():
    if hasattr(lax, _name):
        elementwise(_name, _function, floats)


# ------------------------------------------------------------------------------------------------ contractions


@sample("dot_general")
def _dot(draw: Draw) -> Sample:
    batch, rows, columns, inner = (shape(draw, least=k, most=2) for k in (0, 0, 0, 1))
    lhs, rhs = batch + rows + inner, batch + columns + inner
    first = tuple(draw(st.permutations(range(len(lhs)))))
    second = tuple(draw(st.permutations(range(len(rhs)))))
    at = [tuple(order.index(i) for i in range(len(order))) for order in (first, second)]
    numbers = (
        tuple(tuple(at[k][i] for i in range(len(full) - len(inner), len(full))) for k, full in enumerate((lhs, rhs))),
        tuple(tuple(at[k][i] for i in range(len(batch))) for k in range(2)),
    )
    return Sample(
        lambda x, y: lax.dot_general(x, y, numbers),
        (floats(draw, tuple(lhs[i] for i in first)), floats(draw, tuple(rhs[i] for i in second))),
    )


@sample("conv_general_dilated")
def _convolution(draw: Draw) -> Sample:
    batch, out, size = draw(DIVISIBLE), draw(DIVISIBLE), draw(st.sampled_from([4, 5, 8]))
    channels = draw(st.sampled_from([2, 4, 8]))
    groups = draw(st.sampled_from([1, 2, channels]))
    out = channels if groups == channels and draw(st.booleans()) else out * groups
    stride = draw(st.sampled_from([1, 2]))
    channels_last = draw(st.booleans())
    lhs = (batch, size, size, channels) if channels_last else (batch, channels, size, size)
    names = ("NHWC", "HWIO", "NHWC") if channels_last else ("NCHW", "OIHW", "NCHW")
    rhs = (3, 3, channels // groups, out) if channels_last else (out, channels // groups, 3, 3)
    convolve = functools.partial(
        lax.conv_general_dilated, window_strides=(stride, stride), padding="SAME", dimension_numbers=names,
        feature_group_count=groups,
    )  # fmt: skip
    return Sample(convolve, (floats(draw, lhs), floats(draw, rhs)))


# ------------------------------------------------------------------------------------------------ shape changes


@sample("reshape")
def _reshape(draw: Draw) -> Sample:
    parts = shape(draw, most=4)
    source, target = (_joined(draw, parts) for _ in range(2))
    return Sample(lambda x: lax.reshape(x, target) * 2, (floats(draw, source),))


def _joined(draw: Draw, parts: tuple[int, ...]) -> tuple[int, ...]:
    dims, start = [], 0
    while start < len(parts):
        stop = draw(st.integers(start + 1, len(parts)))
        dims.append(math.prod(parts[start:stop]))
        start = stop
    return tuple(dims)


@sample("squeeze", "expand_dims")
def _squeeze(draw: Draw) -> Sample:
    dims = shape(draw)
    return Sample(lambda x: lax.squeeze(x, (1,)), (floats(draw, (dims[0], 1, *dims[1:])),))


@sample("transpose")
def _transpose(draw: Draw) -> Sample:
    dims = shape(draw)
    order = tuple(draw(st.permutations(range(len(dims)))))
    return Sample(lambda x: lax.transpose(x, order), (floats(draw, dims),))


@sample("broadcast_in_dim")
def _broadcast(draw: Draw) -> Sample:
    dims = shape(draw, most=4)
    kept = tuple(i for i in range(len(dims)) if draw(st.booleans()))
    ones = tuple(1 if draw(st.booleans()) else dims[i] for i in kept)
    other = floats(draw, dims)
    return Sample(lambda x, y: lax.broadcast_in_dim(x, dims, kept) * y, (floats(draw, ones), other))


@sample("tile")
def _tile(draw: Draw) -> Sample:
    dims = shape(draw)
    reps = tuple(draw(st.sampled_from([1, 2, 3])) for _ in dims)
    return Sample(lambda x: lax.tile(x, reps), (floats(draw, dims),))


@sample("iota")
def _iota(draw: Draw) -> Sample:
    dims = shape(draw)
    dim = draw(st.integers(0, len(dims) - 1))
    return Sample(lambda x: x + lax.broadcasted_iota(jnp.float32, dims, dim), (floats(draw, dims),))


@sample("optimization_barrier")
def _barrier(draw: Draw) -> Sample:
    return Sample(
        lambda x, y: jnp.sum(jnp.stack([jnp.sum(v) for v in lax.optimization_barrier((x, y))])),
        (floats(draw, shape(draw)), floats(draw, shape(draw))),
    )


# ------------------------------------------------------------------------------------------------ reductions


def _axes(draw: Draw, rank: int) -> tuple[int, ...]:
    return tuple(sorted(draw(st.sets(st.integers(0, rank - 1), min_size=1))))


def reduction(name: str, function: Callable, kind: Callable = floats) -> None:
    def make(draw: Draw) -> Sample:
        dims = shape(draw)
        axes = _axes(draw, len(dims))
        return Sample(lambda x: function(x, axes), (kind(draw, dims),))

    MAKERS[name] = make


reduction("reduce_sum", lambda x, axes: jnp.sum(x, axes))
reduction("reduce_max", lambda x, axes: jnp.max(x, axes))
reduction("reduce_min", lambda x, axes: jnp.min(x, axes))
reduction("reduce_prod", lambda x, axes: jnp.prod(x, axes))
reduction("reduce_and", lambda x, axes: jnp.all(x, axes), booleans)
reduction("reduce_or", lambda x, axes: jnp.any(x, axes), booleans)
reduction("reduce_xor", lambda x, axes: lax.reduce_xor(x, axes), integers)
reduction("argmax", lambda x, axes: lax.argmax(x, axes[0], jnp.int32))
reduction("argmin", lambda x, axes: lax.argmin(x, axes[0], jnp.int32))
reduction("cumprod", lambda x, axes: lax.cumprod(1 + 0.1 * x, axes[0]))
for _name in ("cumsum", "cumlogsumexp", "cummax", "cummin"):
    reduction(_name, lambda x, axes, f=getattr(lax, _name): f(x, axes[0]))
reduction("rev", lambda x, axes: lax.rev(x, axes))
reduction("sort", lambda x, axes: lax.sort(x, dimension=axes[0]))


@sample("top_k")
def _top_k(draw: Draw) -> Sample:
    dims = (*shape(draw, most=2), draw(DIVISIBLE))
    return Sample(lambda x: lax.top_k(x, 2), (floats(draw, dims),))


@sample("approx_top_k")
def _approx_top_k(draw: Draw) -> Sample:
    dims = (*shape(draw, most=2), 8)
    return Sample(lambda x: lax.approx_max_k(x, 2, recall_target=1.0)[0], (floats(draw, dims),))


def _window(draw: Draw) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    dims = tuple(draw(st.sampled_from([4, 8])) for _ in range(3))
    window = tuple(draw(st.sampled_from([1, 2])) for _ in dims)
    return dims, window, tuple(draw(st.sampled_from([1, 2])) for _ in dims)


def windowed(name: str, start: float, operation: Callable) -> None:
    def make(draw: Draw) -> Sample:
        dims, window, strides = _window(draw)
        padding = draw(st.sampled_from(["VALID", "SAME"]))
        return Sample(
            lambda x: lax.reduce_window(x, np.float32(start), operation, window, strides, padding),
            (floats(draw, dims),),
        )

    MAKERS[name] = make


windowed("reduce_window_sum", 0.0, lax.add)
windowed("reduce_window_max", -np.inf, lax.max)
windowed("reduce_window_min", np.inf, lax.min)


@sample("select_and_scatter_add")
def _window_gradient(draw: Draw) -> Sample:
    dims, window, strides = _window(draw)

    def pool(x: Any) -> Any:
        return jnp.sum(lax.reduce_window(x, -jnp.inf, lax.max, window, strides, "VALID") ** 2)

    return Sample(jax.grad(pool), (floats(draw, dims),))


@sample("select_and_gather_add")
def _window_tangent(draw: Draw) -> Sample:
    dims, window, strides = _window(draw)

    def pool(x: Any) -> Any:
        return lax.reduce_window(x, -jnp.inf, lax.max, window, strides, "VALID")

    return Sample(lambda x, y: jax.jvp(pool, (x,), (y,))[1], (floats(draw, dims), floats(draw, dims)))


# ------------------------------------------------------------------------------------------------ pieces


@sample("slice")
def _slice(draw: Draw) -> Sample:
    dims = shape(draw)
    start, limit, stride = [], [], []
    for n in dims:
        step = draw(st.sampled_from([1, 1, 2])) if n > 1 else 1
        size = draw(st.sampled_from([n, n // 2 or 1, n // 4 or 1, max(1, n - 1)]))
        first = draw(st.integers(0, n - size) | st.sampled_from([k * size for k in range(n // size)]))
        start.append(first if step == 1 else draw(st.integers(0, min(1, n - 1))))
        limit.append(first + size if step == 1 else n)
        stride.append(step)
    return Sample(lambda x: lax.slice(x, start, limit, stride) * 2, (floats(draw, dims),))


@sample("split")
def _split(draw: Draw) -> Sample:
    dims = shape(draw)
    axis = draw(st.integers(0, len(dims) - 1))
    pieces = draw(st.sampled_from([(4, 4, 4), (8, 8), (2, 6), (1, 3, 4)]))
    dims = (*dims[:axis], sum(pieces), *dims[axis + 1 :])
    return Sample(lambda x: lax.split(x, pieces, axis), (floats(draw, dims),))


@sample("concatenate")
def _concatenate(draw: Draw) -> Sample:
    dims = shape(draw)
    axis = draw(st.integers(0, len(dims) - 1))
    others = [(*dims[:axis], draw(st.sampled_from([dims[axis], 2])), *dims[axis + 1 :]) for _ in range(2)]
    return Sample(lambda *x: lax.concatenate(x, axis), (floats(draw, dims), *(floats(draw, other) for other in others)))


@sample("stack")
def _stack(draw: Draw) -> Sample:
    dims = shape(draw)
    axis = draw(st.integers(0, len(dims)))
    return Sample(lambda *x: lax.stack(x, axis), tuple(floats(draw, dims) for _ in range(2)))


@sample("unstack")
def _unstack(draw: Draw) -> Sample:
    dims = shape(draw, least=2)
    axis = draw(st.integers(0, len(dims) - 1))
    return Sample(lambda x: lax.unstack(x, axis), (floats(draw, dims),))


@sample("pad")
def _pad(draw: Draw) -> Sample:
    dims = shape(draw)
    config = [draw(st.sampled_from([(0, 0, 0), (1, 2, 0), (0, 1, 1)])) for _ in dims]
    value = np.float32(draw(st.sampled_from([0.0, 1.5])))
    return Sample(lambda x: lax.pad(x, value, config), (floats(draw, dims),))


def _starts(draw: Draw, dims: tuple[int, ...], sizes: tuple[int, ...]) -> np.ndarray:
    """In bounds: XLA on CPU makes one slice of a clamped slice's slice, and clamps that anew."""
    return np.asarray([draw(st.integers(0, n - size)) for n, size in zip(dims, sizes, strict=True)], np.int32)


@sample("dynamic_slice")
def _dynamic_slice(draw: Draw) -> Sample:
    dims = shape(draw)
    sizes = tuple(draw(st.sampled_from([n, max(1, n // 2)])) for n in dims)
    starts = _starts(draw, dims, sizes)
    return Sample(lambda x, s: lax.dynamic_slice(x, list(s), sizes), (floats(draw, dims), starts))


@sample("dynamic_update_slice")
def _dynamic_update_slice(draw: Draw) -> Sample:
    dims = shape(draw)
    sizes = tuple(draw(st.sampled_from([n, max(1, n // 2)])) for n in dims)
    starts = _starts(draw, dims, sizes)
    return Sample(
        lambda x, u, s: lax.dynamic_update_slice(x, u, list(s)), (floats(draw, dims), floats(draw, sizes), starts)
    )


# ------------------------------------------------------------------------------------------------ gather, scatter


@sample("gather")
def _gather(draw: Draw) -> Sample:
    rows, rest, where = draw(DIVISIBLE), shape(draw, least=0, most=2), shape(draw, least=0, most=2)
    indices = integers(draw, where, low=draw(st.sampled_from([0, -2])), high=rows + draw(st.sampled_from([0, 2])))
    axis = draw(st.integers(0, len(rest)))
    table = floats(draw, (*rest[:axis], rows, *rest[axis:]))
    mode = draw(st.sampled_from(["clip", "fill", None]))
    return Sample(lambda x, i: jnp.take(x, i, axis=axis, mode=mode, fill_value=0), (table, indices))


def _batched_gather(draw: Draw) -> Sample:
    """One element a row, as a cross-entropy takes it."""
    dims = (*shape(draw, most=2), draw(DIVISIBLE))
    indices = integers(draw, dims[:-1], high=dims[-1])
    return Sample(
        lambda x, i: jnp.take_along_axis(x, i[..., None], axis=-1, mode=lax.GatherScatterMode.CLIP),
        (floats(draw, dims), indices),
    )


MAKERS["gather (batched)"] = _batched_gather


@sample("scatter-add", "scatter_add")
def _scatter_add(draw: Draw) -> Sample:
    rows, rest, where = draw(DIVISIBLE), shape(draw, least=0, most=2), shape(draw, least=0, most=2)
    indices = integers(draw, where, high=rows + draw(st.sampled_from([0, 2])))
    start = draw(st.sampled_from(["zeros", "given"]))

    def function(x: Any, i: Any, updates: Any) -> Any:
        base = jnp.zeros_like(x) if start == "zeros" else x
        return base.at[i].add(updates)

    return Sample(function, (floats(draw, (rows, *rest)), indices, floats(draw, (*where, *rest))))


# ------------------------------------------------------------------------------------------------ random numbers


@sample(
    "random_bits", "random_seed", "random_fold_in", "random_split", "random_wrap", "random_unwrap", "random_clone"
)  # fmt: skip
def _random(draw: Draw) -> Sample:
    dims = shape(draw)

    def function(x: Any, seed: Any) -> Any:
        key = jax.random.clone(jax.random.fold_in(jax.random.key(seed), 3))
        first, second = jax.random.split(jax.random.wrap_key_data(jax.random.key_data(key)))
        return x * jax.random.uniform(first, dims) + jax.random.bits(second, dims, jnp.uint32).astype(jnp.float32)

    return Sample(function, (floats(draw, dims), integers(draw, (), dtype=np.uint32)))


@sample("threefry2x32")
def _threefry(draw: Draw) -> Sample:
    dims = shape(draw, most=1)
    return Sample(
        lambda x: jax.random.bits(jax.random.PRNGKey(x[0].astype(jnp.uint32)), dims, jnp.uint32).astype(jnp.float32),
        (integers(draw, (2,)),),
    )


@sample("rng_bit_generator")
def _rng_bits(draw: Draw) -> Sample:
    dims = shape(draw)
    return Sample(
        lambda key, x: lax.rng_bit_generator(key, dims)[1].astype(jnp.float32) * x,
        (integers(draw, (4,), dtype=np.uint32), floats(draw, dims)),
    )


UNREACHED = {
    "copy_p": "older JAX's name of copy",
    "create_token": "orders effects; carries no data",
    "expand_dims": "lax makes a broadcast of it",
    "mul_add": "no such primitive in this JAX",
    "random_clone": "has no trace of its own once keys are unchecked",
    "scatter_add": "another name of scatter-add",
    "sharding_constraint": "needs a mesh to be traced",
    "stop_gradient": "leaves no equation in a jaxpr",
    "threefry2x32": "stays inside random_bits while keys are typed",
    **{name: "no such primitive in this JAX" for name in _NEWER if not hasattr(lax, name)},
}
"""Rules that no sample meets, with the reason."""
