"""One host's share of `time_accuracy.py`: it profiles the two hosts, and measures plans, at every speed of their link.

A host sets the speed of its own end. The first one writes what was found; both do the work.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx
from jax.experimental import multihost_utils
from parts.accuracy_plans import GLOBAL_BATCH, LINKS, MODELS
from testbed import limit

from galvatron_jax.api.optimizer import optimizer_memory
from galvatron_jax.api.profiling import measure_profile
from galvatron_jax.models import registry
from galvatron_jax.profiler import Sampling, live_cluster
from galvatron_jax.profiler import profile as measure_collectives
from galvatron_jax.runtime.program import StepProgram
from galvatron_jax.runtime.step import build_step
from galvatron_jax.search import SearchSpace, search
from galvatron_jax.search.space import Rule
from galvatron_jax.spec.plan import Plan
from galvatron_jax.trace.model import Traced, trace

OPTIMIZER = optax.adamw(1e-3)
EFFORT = Sampling(budget_s=1.0, min_samples=5)
SPACE = SearchSpace(pipeline_degrees=None, disabled_rules=frozenset({Rule.TP_ACROSS_NODES}))
"""Each host has one device, so all parallelism is across."""


def set_link(name: str) -> None:
    """Sets the speed of this host's end of the link, and waits until the others have done so."""
    bits_per_s = LINKS[name]
    devices = [device for device in os.listdir("/sys/class/net") if device.startswith("gx")]
    for device in devices:
        subprocess.run(["tc", "qdisc", "del", "dev", device, "root"], check=False, capture_output=True)
        if bits_per_s is not None:
            subprocess.run(["tc", "qdisc", "add", "dev", device, "root", *limit(bits_per_s)], check=True)
    multihost_utils.sync_global_devices(name)


def profile(*, model: str, folder: str, links: Sequence[str]) -> None:
    """Profiles per link; layers, on which the link has no bearing, once."""
    traced, place = trace_model(model, GLOBAL_BATCH), Path(folder) / model
    place.mkdir(parents=True, exist_ok=True)
    memory, layers = optimizer_memory(OPTIMIZER, traced.spec), None
    for link in links:
        set_link(link)
        cache = str(place / f"cache {file_name(link)}")
        options = {"cache_dir": cache, "progress": False, "sampling": EFFORT}
        cluster = live_cluster(**options)
        if layers is None:
            found = measure_profile(traced, cluster, GLOBAL_BATCH, space=SPACE, **options)
            layers = found.layers
        else:
            found = measure_collectives(traced.spec, [], cluster=cluster, **options)
            found = found.model_copy(update={"layers": layers})
        if jax.process_index() == 0:
            cluster.save(place / f"cluster {file_name(link)}.json")
            found.save(place / f"profile {file_name(link)}.json")
            result = search(
                traced.spec, cluster, profile=found, global_batch=GLOBAL_BATCH, optimizer=memory, space=SPACE
            )
            result.plan.save(place / f"searched {file_name(link)}.json")
    if jax.process_index() == 0:
        optimizer = {"slots": memory.param_like_slots, "scalar_bytes": memory.scalar_bytes}
        (place / "optimizer.json").write_text(json.dumps(optimizer))
        traced.spec.save(place / "model.json")


def measure(
    *, model: str, plans: Mapping[str, dict], folder: str, links: Sequence[str], steps: int, seconds: float
) -> list[str]:
    """Step times of plans on every link; no plan begins after so many seconds.

    Returns:
        Names of the plans measured.
    """
    begin, done = time.monotonic(), []
    for name, document in plans.items():
        late = multihost_utils.broadcast_one_to_all(np.int32(time.monotonic() - begin > seconds))
        if late:
            break
        plan = Plan.model_validate(document)
        traced = trace_model(model, GLOBAL_BATCH // plan.num_microbatches)
        step = build_step(traced, plan, OPTIMIZER)
        found = time_plan(step, model, links, steps)
        if jax.process_index() == 0:
            record = {"plan": document, "seconds": found}
            path = Path(folder) / model / f"measured {file_name(name)}.json"
            path.with_suffix(".partial").write_text(json.dumps(record))
            path.with_suffix(".partial").replace(path)
        done.append(name)
        jax.clear_caches()
    return done


def time_plan(step: StepProgram, model: str, links: Sequence[str], steps: int) -> dict[str, list[float]]:
    """Seconds of steps per link, of the slowest host."""
    sizes = MODELS[model]
    tokens = np.random.default_rng(0).integers(0, sizes["vocab_size"], (GLOBAL_BATCH, sizes["seq_length"] + 1))
    batch, state = step.place({"tokens": tokens.astype(np.int32)}), ordinary_state(step)
    found = {}
    for link in links:
        set_link(link)
        times = []
        for _ in range(steps + 1):
            jax.block_until_ready(state)
            begin = time.perf_counter()
            state, metrics = step.jitted(state, batch)
            jax.block_until_ready((state, metrics))
            times.append(time.perf_counter() - begin)
        own = np.asarray(times[1:], np.float32)
        found[link] = np.asarray(multihost_utils.process_allgather(own)).reshape(-1, steps).max(axis=0).tolist()
    return found


def ordinary_state(step: StepProgram) -> Any:
    """A state of small numbers, which takes no program to make."""

    def leaf(shape: jax.ShapeDtypeStruct) -> jax.Array:
        rng = np.random.default_rng(0)

        def local(index: Any) -> np.ndarray:
            own = [len(range(*part.indices(size))) for part, size in zip(index, shape.shape, strict=True)]
            if np.issubdtype(shape.dtype, np.integer):
                return np.zeros(own, shape.dtype)
            return (0.02 * np.abs(rng.standard_normal(own))).astype(shape.dtype)

        return jax.make_array_from_callback(shape.shape, shape.sharding, local)

    return jax.tree.map(leaf, step.state_shapes)


def trace_model(name: str, microbatch: int) -> Traced:
    """A model of the zoo, abstract."""
    family = registry.family(name)
    config = registry.model_config(name, registry.presets(name)[0], **MODELS[name])

    def make(seed: int | None) -> nnx.Module:
        return family.model(config, rngs=nnx.Rngs(jax.random.key(0 if seed is None else seed)))

    batch = family.example_batch(config, microbatch)
    return trace(nnx.eval_shape(lambda: make(0)), family.loss_fn, batch, make=make, name=name)


def file_name(name: str) -> str:
    """A name without what files cannot have in theirs."""
    return name.replace("/", "-").replace(",", "")
