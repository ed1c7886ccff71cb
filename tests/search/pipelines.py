"""Random pipelines, small enough for brute force."""

from __future__ import annotations

import itertools

import numpy as np

from galvatron_jax.search.pipeline import Cut, Held, Pipeline, StageOptions, Tie
from galvatron_jax.spec.plan import Schedule
from galvatron_jax.spec.strategy import LayerStrategy, Remat

SCHEDULES = (
    Schedule.GPIPE,
    Schedule.ONE_F_ONE_B,
    Schedule.ONE_F_ONE_B_STASH,
    Schedule.INTERLEAVED,
)
REMATS = tuple(Remat)


def random_options(rng: np.random.Generator, count: int) -> StageOptions:
    """A layer whose options trade seconds for bytes, roughly."""
    classes = int(rng.integers(1, 3))
    need = rng.integers(1, 60, count)
    speed = rng.uniform(1, 3, count) + 40 / need
    return StageOptions(
        strategies=tuple(LayerStrategy(dp=("a",) * 0, zero=0, remat=REMATS[i % len(REMATS)]) for i in range(count)),
        forward_s=speed * rng.uniform(0.2, 0.5, count),
        backward_s=speed * rng.uniform(0.5, 1.0, count),
        once_s=rng.uniform(0, 4, count),
        static_bytes=need,
        residual_bytes=rng.integers(0, 12, count),
        workspace_bytes=rng.integers(0, 15, count),
        boundary=rng.integers(0, classes, count),
        num_classes=classes,
        enter_s=rng.uniform(0, 0.5, (classes, 2)),
        leave_s=rng.uniform(0, 0.5, (classes, 2)),
    )


def random_pipeline(seed: int, *, layers: int | None = None, options: int | None = None) -> tuple[Pipeline, int]:
    """A pipeline of few layers, and a budget that binds."""
    rng = np.random.default_rng(seed)
    schedule = SCHEDULES[int(rng.integers(len(SCHEDULES)))]
    degree = int(rng.integers(2, 4))
    chunks = 2 if schedule is Schedule.INTERLEAVED else 1
    degree = 2 if chunks == 2 else degree
    count = layers or int(rng.integers(degree * chunks, 6))
    count = max(count, degree * chunks)
    kinds = [random_options(rng, options or int(rng.integers(1, 4))) for _ in range(int(rng.integers(1, 4)))]
    if rng.random() < 0.5:
        chosen = sorted(int(rng.integers(len(kinds))) for _ in range(count))  # Runs of like layers.
    else:
        chosen = [int(rng.integers(len(kinds))) for _ in range(count)]
    found = tuple(kinds[k] for k in chosen)
    tables: dict[tuple[int, int], np.ndarray] = {}
    for pair in itertools.pairwise(chosen):
        shape = (kinds[pair[0]].num_classes, kinds[pair[1]].num_classes, 2)
        tables.setdefault(pair, rng.uniform(0, 1.5, shape) * rng.integers(0, 2, shape))
    cut = Cut(int(rng.integers(0, 6)), float(rng.uniform(0, 0.3)), float(rng.uniform(0, 0.3)))
    tied = rng.random() < 0.4
    repeats: list[StageOptions | None] = [None] * count
    ties = ()
    if tied:
        last = found[-1]
        lighter = {**vars(last), "static_bytes": last.static_bytes // 2}
        lighter.pop("_hash", None)
        repeats[-1] = StageOptions(**lighter)
        ties = (Tie((0, count - 1), float(rng.uniform(0, 2))),)
    held = (Held(0, count - 1, int(rng.integers(1, 5))),) if rng.random() < 0.3 else ()
    problem = Pipeline(
        schedule=schedule,
        degree=degree,
        num_chunks=chunks,
        num_microbatches=int(rng.integers(1, 9)),
        layers=found,
        repeats=tuple(repeats),
        moves=tuple(tables[pair] for pair in itertools.pairwise(chosen)),
        cuts=(Cut(), *(cut for _ in range(count - 1))),
        held=held,
        ties=ties,
        fixed_bytes=int(rng.integers(0, 5)),
    )
    return problem, int(rng.integers(40, 320))
