"""Pipelines and chains of middle size with the trade-offs of real ones: tensor parallelism, ZeRO, rematerialisation."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import numpy as np

from galvatron_jax.search.chain import Chain, Options
from galvatron_jax.search.pipeline import Cut, Held, Pipeline, StageOptions, Tie, evaluate
from galvatron_jax.spec.plan import Schedule
from galvatron_jax.spec.strategy import LayerStrategy

GIB = 1 << 30
DEGREES = (1, 2, 4, 8)
"""Tensor-parallel degrees, each a boundary class."""
REMATS = ((0.0, 1.0), (0.15, 0.55), (1.0, 0.1))
"""Share of the forward that is repeated, share of the residuals that is kept."""


@dataclass(frozen=True)
class Kind:
    """A kind of layer on one device group of eight devices."""

    forward_s: float
    """Of a micro-batch on the whole group."""
    parameters: float
    residual_bytes: float
    """Of a micro-batch on the whole group."""
    hand_on_bytes: float


def layer_options(rng: np.random.Generator, kind: Kind, *, repeat: bool = False) -> StageOptions:
    """24 options: four degrees of tensor parallelism, ZeRO 1 or 3, three degrees of rematerialisation."""
    rows, classes = [], []
    for (label, tp), zero, (again, kept) in itertools.product(enumerate(DEGREES), (1, 3), REMATS):
        dp = 8 // tp
        share = kind.parameters / tp
        slower = 1 + 0.04 * label * rng.uniform(0.7, 1.3)
        sent = (tp - 1) / tp * 4 * kind.hand_on_bytes / dp / 100e9
        gather = share * 2 * (dp - 1) / dp / 50e9 if zero == 3 else 0.0
        forward = kind.forward_s * slower + sent + 0.5 * gather
        backward = 2 * kind.forward_s * slower + sent + gather + again * (kind.forward_s * slower + 0.5 * sent)
        once = share * 4 * (dp - 1) / dp / 50e9 + share * (16 / dp) / 1e12
        static = share * (16 / dp if zero == 3 else 4 + 12 / dp) * (0.3 if repeat else 1.0)
        residual = kind.residual_bytes / 8 * kept + kind.hand_on_bytes / dp
        workspace = (share * 2 if zero == 3 else 0) + kind.residual_bytes / 8 * (0.3 + again)
        rows.append((forward, backward, once * (0.1 if repeat else 1.0), static, residual, workspace))
        classes.append(label)
    forward, backward, once, static, residual, workspace = np.array(rows).T
    edge = np.array([[0.02, 0.03]]) * kind.forward_s * np.arange(len(DEGREES))[:, None]
    return StageOptions(
        strategies=(LayerStrategy(),) * len(rows),
        forward_s=forward,
        backward_s=backward,
        once_s=once,
        static_bytes=static.astype(np.int64),
        residual_bytes=residual.astype(np.int64),
        workspace_bytes=workspace.astype(np.int64),
        boundary=np.array(classes),
        num_classes=len(DEGREES),
        enter_s=edge,
        leave_s=edge,
    )


def middle_pipeline(seed: int) -> tuple[Pipeline, int]:
    """24 to 32 layers of two kinds in runs, between an embedding and a head, in two to four stages."""
    rng = np.random.default_rng(seed)
    schedule = (Schedule.ONE_F_ONE_B, Schedule.ONE_F_ONE_B_STASH, Schedule.GPIPE)[seed % 3]
    degree = (2, 3, 4)[seed // 3 % 3]
    body = [_body(rng), _body(rng)]
    first, last = _outer(body[0], 0.05), _outer(body[1], 1.2)
    kinds = [first, *body, last]
    runs = int(rng.integers(10, 15)), int(rng.integers(12, 17))
    order = [0] + [1] * runs[0] + [2] * runs[1] + [3]
    options = [layer_options(rng, kind) for kind in kinds]
    tables = {pair: _moves(kinds[pair[0]]) for pair in set(itertools.pairwise(order))}
    tied = rng.random() < 0.5
    count = len(order)
    sent = max(kind.hand_on_bytes for kind in body)
    cut = Cut(int(sent / 8), sent / 8 / 25e9, sent / 8 / 25e9)
    problem = Pipeline(
        schedule=schedule,
        degree=degree,
        num_chunks=1,
        num_microbatches=int(rng.integers(4, 17)),
        layers=tuple(options[kind] for kind in order),
        repeats=(*(None for _ in range(count - 1)), layer_options(rng, last, repeat=True) if tied else None),
        moves=tuple(tables[pair] for pair in itertools.pairwise(order)),
        cuts=(Cut(), *(cut for _ in range(count - 1))),
        held=(Held(runs[0], count - 1, int(sent / 8)),) if rng.random() < 0.5 else (),
        ties=(Tie((0, count - 1), float(rng.uniform(0.001, 0.02))),) if tied else (),
        fixed_bytes=GIB // 4,
    )
    return problem, _budget(problem, float(rng.choice([0.08, 0.2, 0.4, 0.7])))


def _body(rng: np.random.Generator) -> Kind:
    width = float(rng.choice([2048, 3072, 4096]))
    tokens = float(rng.choice([4096, 8192]))
    parameters = 12 * width**2
    return Kind(
        forward_s=2 * parameters * tokens / 8 / 150e12,
        parameters=parameters,
        residual_bytes=34 * width * tokens,
        hand_on_bytes=2 * width * tokens,
    )


def _outer(body: Kind, work: float) -> Kind:
    """An embedding or a head beside a kind of layer."""
    return Kind(body.forward_s * work, body.parameters * 1.3, body.residual_bytes * 0.5, body.hand_on_bytes)


def _moves(before: Kind) -> np.ndarray:
    """Seconds to change the degree of tensor parallelism."""
    label = np.arange(len(DEGREES))
    apart = np.abs(label[:, None] - label[None])
    return apart[..., None] * before.hand_on_bytes / 8 / 40e9 * np.array([1.0, 1.0])


def _budget(problem: Pipeline, share: float) -> int:
    """Between what an even cut needs at least and what its fastest options need."""
    count, stages = len(problem.layers), problem.num_stages
    starts = tuple(round(stage * count / stages) for stage in range(stages))
    small, fast = [], []
    for index in range(count):
        start = max(start for start in starts if start <= index)
        options = problem.options(index, start)
        kept = problem.residuals_kept(starts.index(start))
        small.append(int(np.argmin(options.static_bytes + kept * options.residual_bytes + options.workspace_bytes)))
        fast.append(int(np.argmin(options.forward_s + options.backward_s)))
    least, most = (max(evaluate(problem, starts, tuple(choice)).bytes) for choice in (small, fast))
    return int(least + share * max(0, most - least)) + problem.fixed_bytes


def middle_chain(seed: int) -> tuple[Chain, int]:
    """24 to 32 layers of two kinds on one group of eight devices, some with two variants of tied parameters."""
    rng = np.random.default_rng(seed)
    problem, _ = middle_pipeline(seed)
    microbatches, size = problem.num_microbatches, len(problem.layers[0])
    variants = int(rng.integers(1, 3))
    admitted = np.ones((variants, size), bool)
    admitted[0, ::2] = variants == 1
    made = {id(layer): _chain_options(layer, microbatches, np.ones((variants, size), bool)) for layer in problem.layers}
    layers = [made[id(layer)] for layer in problem.layers]
    # The first layer and the last share parameters: what one may choose depends on the other.
    layers[0], layers[-1] = replace(layers[0], admitted=admitted), replace(layers[-1], admitted=admitted)
    chain = Chain(tuple(layers), tuple(microbatches * moves.sum(-1) for moves in problem.moves))
    small = sum(int((layer.resident_bytes + layer.workspace_bytes).min()) for layer in layers)
    fast = sum(int(layer.resident_bytes[np.argmin(layer.seconds)]) for layer in layers)
    return chain, int(small + float(rng.choice([0.08, 0.2, 0.4, 0.7])) * max(0, fast - small))


def _chain_options(options: StageOptions, microbatches: int, admitted: np.ndarray) -> Options:
    return Options(
        strategies=options.strategies,
        seconds=microbatches * (options.forward_s + options.backward_s) + options.once_s,
        resident_bytes=options.static_bytes + options.residual_bytes,
        workspace_bytes=options.workspace_bytes,
        boundary=options.boundary,
        num_classes=options.num_classes,
        admitted=admitted,
    )
