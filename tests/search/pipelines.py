"""Random pipelines, small enough for brute force."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np

from galvatron_jax.search.pipeline import Cut, Held, Pipeline, StageOptions, Tie
from galvatron_jax.spec.plan import Schedule
from galvatron_jax.spec.strategy import LayerStrategy

SCHEDULES = (
    Schedule.GPIPE,
    Schedule.ONE_F_ONE_B,
    Schedule.ONE_F_ONE_B_STASH,
    Schedule.INTERLEAVED,
)


def random_pipeline(
    seed: int, *, layers: int = 6, options: int = 3, unlike_repeats: bool = False
) -> tuple[Pipeline, int]:
    """A pipeline on any schedule, and a budget that binds in most cases.

    Args:
        seed: of everything.
        layers: at most, unless there are more stages.
        options: of a layer, at most.
        unlike_repeats: whether layers that share parameters may have other options where they do.
    """
    rng = np.random.default_rng(seed)
    schedule = SCHEDULES[int(rng.integers(len(SCHEDULES)))]
    degree, chunks = int(rng.integers(2, 5)), 1
    if schedule is Schedule.INTERLEAVED:
        degree, chunks = ((2, 2), (2, 3), (3, 2))[int(rng.integers(3))]
    stages = degree * chunks
    count = int(rng.integers(stages, max(stages, layers) + 1))
    coarse = rng.random() < 0.3
    kinds = [random_options(rng, int(rng.integers(1, options + 1)), coarse=coarse) for _ in range(rng.integers(1, 4))]
    order = [int(kind) for kind in rng.integers(len(kinds), size=count)]
    if rng.random() < 0.5:
        order.sort()  # Runs of like layers.
    ties = random_ties(rng, count)
    users = {user for tie in ties for user in tie.users[1:]}
    problem = Pipeline(
        schedule=schedule,
        degree=degree,
        num_chunks=chunks,
        num_microbatches=int(rng.integers(1, rng.choice([5, 10, 30]))),
        layers=tuple(kinds[kind] for kind in order),
        repeats=tuple(
            random_repeat(rng, kinds[kind], unlike=unlike_repeats) if index in users else None
            for index, kind in enumerate(order)
        ),
        moves=random_moves(rng, kinds, order),
        cuts=random_cuts(rng, count),
        held=random_held(rng, count),
        ties=ties,
        fixed_bytes=int(rng.integers(0, 5)),
    )
    return problem, int(rng.integers(30, 120 + 240 * count // stages))


def random_options(rng: np.random.Generator, count: int, *, coarse: bool = False, classes: int = 0) -> StageOptions:
    """A layer whose options trade seconds for bytes, roughly.

    Args:
        rng: where numbers come from.
        count: options.
        coarse: whether seconds are whole, such that many sums are equal.
        classes: of boundaries; of a random number when 0.
    """
    classes = classes or int(rng.integers(1, 4))
    need = rng.integers(1, 60, count)
    speed = rng.uniform(1, 3, count) + 40 / need
    forward, backward, once = (
        speed * rng.uniform(0.2, 0.5, count),
        speed * rng.uniform(0.5, 1, count),
        rng.uniform(0, 4),
    )
    edges = rng.uniform(0, 0.5, (2, classes, 2)) * rng.integers(0, 2)
    if coarse:
        forward, backward, once, edges = (np.round(part) for part in (forward, backward, once, edges))
    return StageOptions(
        strategies=tuple(LayerStrategy(tp=(f"axis{option}",)) for option in range(count)),
        forward_s=forward,
        backward_s=backward,
        once_s=once * rng.integers(0, 3, count),
        static_bytes=need,
        residual_bytes=rng.integers(0, 12, count),
        workspace_bytes=rng.integers(0, 15, count),
        boundary=rng.integers(0, classes, count),
        num_classes=classes,
        enter_s=edges[0],
        leave_s=edges[1],
    )


def random_repeat(rng: np.random.Generator, options: StageOptions, *, unlike: bool) -> StageOptions:
    """The same layer where an earlier one holds its parameters: lighter, or with options of its own."""
    if unlike:
        return random_options(rng, int(rng.integers(1, 4)), classes=options.num_classes)
    return replace(options, static_bytes=options.static_bytes // 2, once_s=options.once_s / 4)


def random_ties(rng: np.random.Generator, count: int) -> tuple[Tie, ...]:
    """None in most cases; else of the first layer and the last, or of any."""
    ties = []
    if rng.random() < 0.3:
        ties.append(Tie((0, count - 1), float(rng.uniform(0, 2))))
    if rng.random() < 0.2:
        users = rng.choice(count, int(rng.integers(2, count + 1)), replace=False)
        ties.append(Tie(tuple(sorted(int(user) for user in users)), float(rng.uniform(0, 2))))
    return tuple(ties)


def random_moves(rng: np.random.Generator, kinds: list[StageOptions], order: list[int]) -> tuple[np.ndarray, ...]:
    """Seconds between classes, alike between layers of like kinds; half of them zero."""
    tables: dict[tuple[int, int], np.ndarray] = {}
    for pair in itertools.pairwise(order):
        shape = (kinds[pair[0]].num_classes, kinds[pair[1]].num_classes, 2)
        tables.setdefault(pair, rng.uniform(0, 1.5, shape) * rng.integers(0, 2, shape))
    return tuple(tables[pair] for pair in itertools.pairwise(order))


def random_cuts(rng: np.random.Generator, count: int) -> tuple[Cut, ...]:
    """Alike between all layers, or each its own."""

    def cut() -> Cut:
        return Cut(int(rng.integers(0, 6)), float(rng.uniform(0, 0.3)), float(rng.uniform(0, 0.3)))

    alike = cut()
    own = rng.random() < 0.5
    return Cut(), *(cut() if own else alike for _ in range(count - 1))


def random_held(rng: np.random.Generator, count: int) -> tuple[Held, ...]:
    """None in most cases, else up to two."""
    found = []
    for _ in range(int(rng.choice([0, 0, 1, 2]))):
        first, last = sorted(int(layer) for layer in rng.choice(count, 2, replace=False))
        found.append(Held(first, last, int(rng.integers(1, 6))))
    return tuple(found)


def random_plan(rng: np.random.Generator, problem: Pipeline) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Any cuts, and any options."""
    count = len(problem.layers)
    inner = rng.choice(np.arange(1, count), problem.num_stages - 1, replace=False)
    starts = (0, *sorted(int(start) for start in inner))
    stops = (*starts[1:], count)
    options = tuple(
        int(rng.integers(len(problem.options(layer, start))))
        for start, stop in zip(starts, stops, strict=True)
        for layer in range(start, stop)
    )
    return starts, options
