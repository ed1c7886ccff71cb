"""A model's layers measured on the live devices, at the shapes that the search may ask for."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from galvatron_jax.api.clusters import LIVE, resolve_cluster
from galvatron_jax.api.decorator import recipe_of
from galvatron_jax.api.layer_programs import timed_layer
from galvatron_jax.errors import InputError
from galvatron_jax.profiler import Sampling, choose_points, profile
from galvatron_jax.profiler.timing import DEFAULT_SAMPLING
from galvatron_jax.runtime.data import batch_size
from galvatron_jax.search import SearchSpace, meshes_for
from galvatron_jax.spec.cluster import ClusterSpec
from galvatron_jax.spec.mesh import mesh_shape
from galvatron_jax.spec.model import ModelSpec
from galvatron_jax.spec.plan import MeshAxis
from galvatron_jax.spec.profile import Profile
from galvatron_jax.spec.strategy import LayerStrategy
from galvatron_jax.trace.model import Traced, trace


@dataclass(frozen=True)
class Profiled:
    """What was measured."""

    cluster: ClusterSpec
    model: ModelSpec
    profile: Profile


def profile_model(
    model: Any,
    loss_fn: Callable[[Any, Any], Any],
    example_batch: Any,
    *,
    num_microbatches: int | None = None,
    cache_dir: str | None = None,
    name: str | None = None,
    progress: bool | None = None,
) -> Profiled:
    """Measures the live devices, and a model's layers on them; what was measured before comes from the cache.

    Args:
        model: an instance of a Flax module, NNX or Linen.
        loss_fn: `loss_fn(model, batch)`, as `train_step` takes it.
        example_batch: a pytree of arrays or shapes whose leading dim is the global batch.
        num_microbatches: by default all numbers that divide the batch.
        cache_dir: where measurements are kept; by default the user's cache folder.
        name: what to call the model; by default its class.
        progress: whether to draw progress on stderr; by default only on a terminal.
    """
    size = batch_size(example_batch)
    if num_microbatches is not None and (num_microbatches < 1 or size % num_microbatches):
        raise InputError(f"A batch of {size} examples does not divide into {num_microbatches} micro-batches.")
    recipe = recipe_of(model)
    traced = trace(
        model,
        loss_fn,
        example_batch,
        microbatch=size // (num_microbatches or 1),
        make=recipe.build if recipe else None,
        name=name,
    )
    cluster = resolve_cluster(LIVE, cache_dir=cache_dir, progress=progress)
    space = SearchSpace(num_microbatches=(num_microbatches,) if num_microbatches else None, pipeline_degrees=None)
    measured = measure_profile(traced, cluster, size, space=space, cache_dir=cache_dir, progress=progress)
    return Profiled(cluster, traced.spec, measured)


def measure_profile(
    traced: Traced,
    cluster: ClusterSpec,
    global_batch: int,
    *,
    space: SearchSpace,
    cache_dir: str | None,
    progress: bool | None,
    sampling: Sampling = DEFAULT_SAMPLING,
) -> Profile:
    """Measures the layers of a traced model and the collectives of the live devices.

    Args:
        traced: the model.
        cluster: the live devices.
        global_batch: examples per step.
        space: what the search may choose from.
        cache_dir: where measurements are kept.
        progress: whether to draw progress.
        sampling: effort per point.
    """
    mesh = meshes_for(cluster)[0]
    sizes = mesh_shape(mesh)
    counts = space.microbatch_counts(global_batch)
    microbatches = [global_batch // count for count in counts]
    stages = stage_meshes(mesh, space)
    strategies: dict[LayerStrategy, None] = {}
    for kind in traced.spec.kinds:
        for microbatch, stage in itertools.product(microbatches, stages):
            found = space.strategies(kind, mesh=stage, microbatch=microbatch, pruned=Counter())
            strategies |= dict.fromkeys(found)
    points = choose_points(
        traced.spec,
        list(strategies),
        mesh=sizes,
        microbatches=microbatches,
        stages=[[axis.name for axis in stage] for stage in stages],
    )
    programs = [(point, partial(timed_layer, traced, point, mesh=sizes)) for point in points]
    return profile(traced.spec, programs, cluster=cluster, cache_dir=cache_dir, progress=progress, sampling=sampling)


def stage_meshes(mesh: tuple[MeshAxis, ...], space: SearchSpace) -> list[tuple[MeshAxis, ...]]:
    """Axes that a stage may lie over: stages lie along the first axes, which join the slowest links."""
    degrees = space.pipeline_degrees
    return [
        mesh[stop:]
        for stop in range(len(mesh) + 1)
        if degrees is None or math.prod(axis.size for axis in mesh[:stop]) in degrees
    ]
