"""Sharding rules: which dims of a primitive's operands and results go together. A table that users can extend.

A rule says, for one application of a primitive, which *relations* hold between dims. The relation
`parallel((0, 1), (0,))` of a matrix product's left rows, say, lets them be sharded with no communication; its
contraction is a `reduce` relation. The same relations drive the factor analysis (dims in one relation are made of the
same factors) and the partitioner (a factor in a relation may be sharded).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from galvatron_jax.spec.program import FactorKind, Linearity


@dataclass(frozen=True)
class Ref:
    """Some dims of one operand or result, read as one long dim; or a piece of it.

    `Ref((1,), ("suffix", 4))` is the minor piece of size 4 of dim 1: the piece that an aligned slice keeps.
    """

    dims: tuple[int, ...]
    piece: tuple[str, int] | None = None


@dataclass(frozen=True)
class Relation:
    """Dims that are sharded together, one `Ref` (or None) per operand and per result."""

    kind: FactorKind
    operands: tuple[Ref | None, ...]
    results: tuple[Ref | None, ...]


@dataclass(frozen=True)
class Rule:
    """What the partitioner must know of one application of a primitive."""

    relations: tuple[Relation, ...] = ()
    linearity: Linearity = Linearity.NONE
    combine: str = "sum"
    elementwise: bool = False
    flops_per_point: float = 0.0
    known: bool = True


@dataclass(frozen=True)
class Application:
    """One application of a primitive, as a rule sees it."""

    primitive: str
    params: Mapping[str, Any]
    operand_shapes: tuple[tuple[int, ...], ...]
    result_shapes: tuple[tuple[int, ...], ...]
    scalar_operands: tuple[bool, ...] = field(default=())
    """Per operand, whether it is a literal scalar."""

    def one(self, index: int, dim: int) -> tuple[Ref | None, ...]:
        """Refs to `dim` of operand `index` alone."""
        return tuple(Ref((dim,)) if k == index else None for k in range(len(self.operand_shapes)))


ShardingRule = Callable[[Application], Rule | None]
LocalBinder = Callable[..., list]

SHARDING_RULES: dict[str, ShardingRule] = {}
LOCAL_BINDERS: dict[str, LocalBinder] = {}


def register_rule(primitive: str, sharding: ShardingRule, *, local: LocalBinder | None = None) -> None:
    """Teaches the partitioner a primitive.

    Args:
        primitive: name of the JAX primitive, as a jaxpr prints it.
        sharding: from an `Application` to its `Rule`, or None where this application has no rule.
        local: how to run it on local shapes, `local(bind, *operands) -> results` with a
            `galvatron_jax.runtime.binders.LocalBind`; without one the primitive is bound again with its parameters.

    Example:
        >>> from galvatron_jax.trace.rules import elementwise_rule
        >>> register_rule("my_activation", elementwise_rule)
    """
    SHARDING_RULES[primitive] = sharding
    if local is not None:
        LOCAL_BINDERS[primitive] = local


def find_rule(application: Application) -> Rule:
    """The rule of an application; one with `known=False` and no relation where the table has none."""
    make = SHARDING_RULES.get(application.primitive)
    rule = make(application) if make else None
    return rule if rule is not None else Rule(known=False)


def _rule(*names: str) -> Callable[[ShardingRule], ShardingRule]:
    def add(function: ShardingRule) -> ShardingRule:
        for name in names:
            SHARDING_RULES[name] = function
        return function

    return add


def _parallel(operands: tuple, results: tuple) -> Relation:
    return Relation(FactorKind.PARALLEL, operands, results)


def _dims(*dims: int | None) -> tuple[Ref | None, ...]:
    return tuple(None if d is None else Ref((d,)) for d in dims)


# ------------------------------------------------------------------------------------------------ elementwise

LINEAR_UNARY = {"neg", "convert_element_type", "copy", "copy_p", "real", "imag", "stop_gradient", "sharding_constraint"}
_TRANSCENDENTAL = set(
    "exp exp2 log log2 log1p expm1 tanh logistic sin cos tan asin acos atan atan2 sinh cosh asinh acosh atanh pow erf "
    "erfc erf_inv lgamma digamma rsqrt sqrt cbrt".split()
)
ELEMENTWISE = (
    set(
        "add sub mul div rem max min integer_pow square abs sign and or xor not eq ne lt gt le ge select_n "
        "bitcast_convert_type add_any is_finite floor ceil round clamp nextafter conj complex shift_left "
        "shift_right_logical shift_right_arithmetic population_count clz reduce_precision name mul_add eq_to "
        "le_to lt_to one_minus_square polynomial".split()
    )
    | LINEAR_UNARY
    | _TRANSCENDENTAL
)


def elementwise_rule(application: Application) -> Rule:
    """Every dim is parallel; operands of size 1 along it, and scalars, take no part."""
    shape = application.result_shapes[0]
    relations = []
    for dim, size in enumerate(shape):
        operands = tuple(
            Ref((dim,)) if len(s) == len(shape) and s[dim] == size else None for s in application.operand_shapes
        )
        relations.append(_parallel(operands, tuple(Ref((dim,)) for _ in application.result_shapes)))
    name = application.primitive
    linearity = Linearity.NONE
    if name in LINEAR_UNARY and jax.dtypes.issubdtype(application.params.get("new_dtype", np.float32), np.inexact):
        linearity = Linearity.UNARY
    elif name in ("add", "sub", "add_any"):
        linearity = Linearity.ADDITIVE
    elif name in ("mul", "div"):
        linearity = Linearity.SCALE
    return Rule(tuple(relations), linearity, elementwise=True, flops_per_point=_elementwise_flops(application))


def _elementwise_flops(application: Application) -> float:
    """FLOPs per element of the result."""
    if application.primitive == "polynomial":
        return 2.0 * (len(application.operand_shapes) - 2)  # Of degree n: n + 1 coefficients, n products and sums.
    return 10.0 if application.primitive in _TRANSCENDENTAL else 1.0


for _name in ELEMENTWISE:
    SHARDING_RULES[_name] = elementwise_rule


# ------------------------------------------------------------------------------------------------ contractions


@_rule("dot_general")
def _dot_general(application: Application) -> Rule:
    (lhs_contract, rhs_contract), (lhs_batch, rhs_batch) = application.params["dimension_numbers"]
    relations = [
        Relation(FactorKind.REDUCE, _dims(a, b), (None,)) for a, b in zip(lhs_contract, rhs_contract, strict=True)
    ]
    out = 0
    for a, b in zip(lhs_batch, rhs_batch, strict=True):
        relations.append(_parallel(_dims(a, b), _dims(out)))
        out += 1
    for index, (used, shape) in enumerate(
        zip(
            (set(lhs_contract) | set(lhs_batch), set(rhs_contract) | set(rhs_batch)),
            application.operand_shapes,
            strict=True,
        )
    ):
        for dim in range(len(shape)):
            if dim not in used:
                relations.append(_parallel(application.one(index, dim), _dims(out)))
                out += 1
    return Rule(tuple(relations), flops_per_point=2.0)


@_rule("conv_general_dilated")
def _convolution(application: Application) -> Rule:
    params = application.params
    numbers = params["dimension_numbers"]
    lhs, rhs, out = numbers.lhs_spec, numbers.rhs_spec, numbers.out_spec
    lhs_shape, rhs_shape = application.operand_shapes
    out_shape = application.result_shapes[0]
    features, batches = params["feature_group_count"], params["batch_group_count"]
    relations = []
    if batches == 1:
        relations.append(_parallel(_dims(lhs[0], None), _dims(out[0])))
    if features == batches == 1:
        relations.append(_parallel(_dims(None, rhs[0]), _dims(out[1])))
        relations.append(Relation(FactorKind.REDUCE, _dims(lhs[1], rhs[1]), (None,)))
    elif batches == 1 and features == lhs_shape[lhs[1]] == out_shape[out[1]]:
        relations.append(_parallel(_dims(lhs[1], rhs[0]), _dims(out[1])))
    elif features == 1 and batches == lhs_shape[lhs[0]] == out_shape[out[1]]:
        relations.append(_parallel(_dims(lhs[0], rhs[0]), _dims(out[1])))
        relations.append(Relation(FactorKind.REDUCE, _dims(lhs[1], rhs[1]), (None,)))
    points = math.prod(out_shape) * math.prod(rhs_shape) / max(1, rhs_shape[rhs[0]])
    return Rule(tuple(relations), flops_per_point=2.0 * points / _iteration_points(application, relations))


def _iteration_points(application: Application, relations: list[Relation]) -> float:
    """Points of the result and of the reduced relations: what `flops_per_point` is relative to."""
    points = math.prod(application.result_shapes[0])
    for relation in relations:
        if relation.kind is FactorKind.REDUCE and relation.operands[0] is not None:
            points *= math.prod(application.operand_shapes[0][d] for d in relation.operands[0].dims)
    return max(1.0, points)


# ------------------------------------------------------------------------------------------------ shape changes


@_rule("reshape", "squeeze", "expand_dims")
def _reshape(application: Application) -> Rule | None:
    if application.params.get("dimensions") is not None and application.primitive == "reshape":
        return None
    operand, result = application.operand_shapes[0], application.result_shapes[0]
    relation = _parallel((Ref(tuple(range(len(operand)))),), (Ref(tuple(range(len(result)))),))
    return Rule((relation,), Linearity.UNARY)


@_rule("transpose")
def _transpose(application: Application) -> Rule:
    relations = [_parallel(_dims(i), _dims(j)) for j, i in enumerate(application.params["permutation"])]
    return Rule(tuple(relations), Linearity.UNARY)


@_rule("broadcast_in_dim")
def _broadcast_in_dim(application: Application) -> Rule:
    operand, result = application.operand_shapes[0], application.result_shapes[0]
    relations = [
        _parallel(_dims(i), _dims(int(j)))
        for i, j in enumerate(application.params["broadcast_dimensions"])
        if operand[i] == result[j]
    ]
    return Rule(tuple(relations))


@_rule("tile")
def _tile(application: Application) -> Rule:
    reps = application.params["reps"]
    shape = application.operand_shapes[0]
    return Rule(
        tuple(
            _parallel(_dims(i), _dims(i) if reps[i] == 1 else (Ref((i,), ("suffix", n)),)) for i, n in enumerate(shape)
        ),
        Linearity.UNARY,
    )


@_rule("iota", "random_seed", "random_wrap", "random_unwrap", "random_fold_in", "random_split", "random_clone")
@_rule("random_bits", "threefry2x32", "rng_bit_generator", "create_token")
def _replicated(application: Application) -> Rule:
    """Computed in full on every device; what needs a shard slices it, so random bits equal the unsharded ones."""
    return Rule()


@_rule("optimization_barrier")
def _barrier(application: Application) -> Rule:
    count = len(application.operand_shapes)
    relations = [
        _parallel(application.one(k, dim), tuple(Ref((dim,)) if j == k else None for j in range(count)))
        for k, shape in enumerate(application.operand_shapes)
        for dim in range(len(shape))
    ]
    return Rule(tuple(relations))


# ------------------------------------------------------------------------------------------------ reductions


@_rule("reduce_sum", "reduce_max", "reduce_min", "reduce_and", "reduce_or", "reduce_prod", "reduce_xor")
@_rule("argmax", "argmin")
def _reduction(application: Application) -> Rule:
    axes = application.params["axes"]
    kept = [i for i in range(len(application.operand_shapes[0])) if i not in axes]
    width, outs = len(application.operand_shapes), len(application.result_shapes)
    relations = [_parallel(_dims(*[i] * width), _dims(*[j] * outs)) for j, i in enumerate(kept)]
    name = application.primitive
    combine = {"reduce_max": "max", "reduce_or": "max", "reduce_min": "min", "reduce_and": "min"}.get(name, "sum")
    if name in ("reduce_sum", "reduce_max", "reduce_min", "reduce_and", "reduce_or"):
        relations += [Relation(FactorKind.REDUCE, _dims(i), (None,)) for i in axes]
    linearity = Linearity.UNARY if name == "reduce_sum" else Linearity.NONE
    return Rule(tuple(relations), linearity, combine, flops_per_point=1.0)


@_rule("cumsum", "cumlogsumexp", "cummax", "cummin", "cumprod")
def _cumulative(application: Application) -> Rule:
    linearity = Linearity.UNARY if application.primitive == "cumsum" else Linearity.NONE
    return _all_but(application, {application.params["axis"]}, linearity)


@_rule("rev")
def _reverse(application: Application) -> Rule:
    return _all_but(application, set(application.params["dimensions"]), Linearity.UNARY)


@_rule("sort")
def _sort(application: Application) -> Rule:
    return _all_but(application, {application.params["dimension"]})


def _all_but(application: Application, blocked: set[int], linearity: Linearity = Linearity.NONE) -> Rule:
    """Every dim parallel in all operands and results, except those that the operation acts along."""
    width, outs = len(application.operand_shapes), len(application.result_shapes)
    rank = len(application.result_shapes[0])
    relations = [_parallel(_dims(*[i] * width), _dims(*[i] * outs)) for i in range(rank) if i not in blocked]
    return Rule(tuple(relations), linearity, flops_per_point=1.0)


@_rule("top_k", "approx_top_k")
def _top_k(application: Application) -> Rule:
    rank = len(application.operand_shapes[0])
    axis = application.params.get("axis", application.params.get("reduction_dimension", rank - 1)) % rank
    outs = len(application.result_shapes)
    relations = [_parallel(_dims(i), _dims(*[i] * outs)) for i in range(rank) if i != axis]
    return Rule(tuple(relations), flops_per_point=1.0)


@_rule("reduce_window_sum", "reduce_window_max", "reduce_window_min", "select_and_gather_add")
def _window(application: Application) -> Rule:
    window = application.params["window_dimensions"]
    strides = application.params["window_strides"]
    same = [i for i, n in enumerate(window) if n == 1 and strides[i] == 1]
    width = len(application.operand_shapes)
    relations = [_parallel(_dims(*[i] * width), _dims(i)) for i in same]
    return Rule(tuple(relations), flops_per_point=float(math.prod(window)))


@_rule("select_and_scatter_add")
def _window_gradient(application: Application) -> Rule:
    window = application.params["window_dimensions"]
    strides = application.params["window_strides"]
    same = [i for i, n in enumerate(window) if n == 1 and strides[i] == 1]
    return Rule(tuple(_parallel(_dims(i, i), _dims(i)) for i in same), flops_per_point=float(math.prod(window)))


# ------------------------------------------------------------------------------------------------ pieces


@_rule("slice")
def _slice(application: Application) -> Rule:
    params = application.params
    operand, result = application.operand_shapes[0], application.result_shapes[0]
    strides = params["strides"] or (1,) * len(operand)
    relations = []
    for dim, (whole, kept) in enumerate(zip(operand, result, strict=True)):
        start, stride = params["start_indices"][dim], strides[dim]
        if whole == kept:
            relations.append(_parallel(_dims(dim), _dims(dim)))
        elif kept > 1 and stride == 1 and whole % kept == 0 and start % kept == 0:
            relations.append(_parallel((Ref((dim,), ("suffix", kept)),), _dims(dim)))
        elif kept > 1 and stride > 1 and whole == kept * stride:
            relations.append(_parallel((Ref((dim,), ("prefix", kept)),), _dims(dim)))
    return Rule(tuple(relations), Linearity.UNARY)


@_rule("split")
def _split(application: Application) -> Rule:
    params = application.params
    outs = len(application.result_shapes)
    relations = []
    for dim in range(len(application.operand_shapes[0])):
        if dim != params["axis"]:
            relations.append(_parallel(_dims(dim), _dims(*[dim] * outs)))
        elif len(set(params["sizes"])) == 1:
            piece = Ref((dim,), ("suffix", params["sizes"][0]))
            relations.append(_parallel((piece,), _dims(*[dim] * outs)))
    return Rule(tuple(relations), Linearity.UNARY)


@_rule("concatenate")
def _concatenate(application: Application) -> Rule:
    axis = application.params["dimension"]
    width = len(application.operand_shapes)
    sizes = {shape[axis] for shape in application.operand_shapes}
    relations = []
    for dim in range(len(application.result_shapes[0])):
        if dim != axis:
            relations.append(_parallel(_dims(*[dim] * width), _dims(dim)))
        elif len(sizes) == 1:
            relations.append(_parallel(_dims(*[dim] * width), (Ref((dim,), ("suffix", sizes.copy().pop())),)))
    return Rule(tuple(relations), Linearity.ADDITIVE)


@_rule("stack")
def _stack(application: Application) -> Rule:
    axis = application.params.get("axis", application.params.get("dimension", 0))
    kept = [i for i in range(len(application.result_shapes[0])) if i != axis]
    width = len(application.operand_shapes)
    return Rule(tuple(_parallel(_dims(*[j] * width), _dims(i)) for j, i in enumerate(kept)), Linearity.ADDITIVE)


@_rule("unstack")
def _unstack(application: Application) -> Rule:
    axis = application.params["axis"]
    kept = [i for i in range(len(application.operand_shapes[0])) if i != axis]
    outs = len(application.result_shapes)
    return Rule(tuple(_parallel(_dims(i), _dims(*[j] * outs)) for j, i in enumerate(kept)), Linearity.UNARY)


@_rule("pad")
def _pad(application: Application) -> Rule:
    config = application.params["padding_config"]
    relations = [_parallel(_dims(i, None), _dims(i)) for i, edges in enumerate(config) if tuple(edges) == (0, 0, 0)]
    return Rule(tuple(relations), Linearity.ADDITIVE)


@_rule("dynamic_slice")
def _dynamic_slice(application: Application) -> Rule:
    operand, result = application.operand_shapes[0], application.result_shapes[0]
    relations = [_parallel(application.one(0, i), _dims(i)) for i in range(len(operand)) if operand[i] == result[i]]
    return Rule(tuple(relations))


@_rule("dynamic_update_slice")
def _dynamic_update_slice(application: Application) -> Rule:
    operand, update = application.operand_shapes[:2]
    rest = (None,) * (len(application.operand_shapes) - 2)
    relations = [_parallel((*_dims(i, i), *rest), _dims(i)) for i in range(len(operand)) if operand[i] == update[i]]
    return Rule(tuple(relations))


# ------------------------------------------------------------------------------------------------ gather, scatter


@_rule("gather")
def _gather(application: Application) -> Rule:
    numbers = application.params["dimension_numbers"]
    sizes = application.params["slice_sizes"]
    operand, indices = application.operand_shapes
    hidden = set(numbers.collapsed_slice_dims) | set(numbers.operand_batching_dims)
    offset = [i for i in range(len(operand)) if i not in hidden]
    relations = [
        _parallel(_dims(i, None), _dims(o))
        for o, i in zip(numbers.offset_dims, offset, strict=True)
        if sizes[i] == operand[i]
    ]
    relations += [
        Relation(FactorKind.INDEX, _dims(i, None), (None,))
        for i in numbers.collapsed_slice_dims
        if sizes[i] == 1 and i in numbers.start_index_map
    ]
    batching = dict(zip(numbers.start_indices_batching_dims, numbers.operand_batching_dims, strict=True))
    free = [i for i in range(len(application.result_shapes[0])) if i not in numbers.offset_dims]
    for out, index_dim in zip(free, range(len(indices) - 1), strict=True):
        relations.append(_parallel(_dims(batching.get(index_dim), index_dim), _dims(out)))
    return Rule(tuple(relations))


@_rule("scatter-add", "scatter_add")
def _scatter_add(application: Application) -> Rule:
    numbers = application.params["dimension_numbers"]
    operand, indices, updates = application.operand_shapes
    hidden = set(numbers.inserted_window_dims) | set(numbers.operand_batching_dims)
    window = [i for i in range(len(operand)) if i not in hidden]
    relations = [
        _parallel(_dims(i, None, u), _dims(i))
        for u, i in zip(numbers.update_window_dims, window, strict=True)
        if updates[u] == operand[i]
    ]
    relations += [
        Relation(FactorKind.SCATTER_INDEX, _dims(i, None, None), _dims(i))
        for i in numbers.inserted_window_dims
        if i in numbers.scatter_dims_to_operand_dims
    ]
    batching = dict(zip(numbers.scatter_indices_batching_dims, numbers.operand_batching_dims, strict=True))
    free = [i for i in range(len(updates)) if i not in numbers.update_window_dims]
    for update_dim, index_dim in zip(free, range(len(indices) - 1), strict=True):
        if index_dim in batching:
            target = batching[index_dim]
            relations.append(_parallel(_dims(target, index_dim, update_dim), _dims(target)))
        else:
            relations.append(Relation(FactorKind.ZERO_REDUCE, _dims(None, index_dim, update_dim), (None,)))
    return Rule(tuple(relations), Linearity.LAST)
