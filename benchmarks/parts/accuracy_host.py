"""One host's share of `time_accuracy.py`: it profiles the two hosts, and measures plans, at every speed of their link.

A host sets the speed of its own end. The first one writes what was found; both do the work.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
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
from galvatron_jax.spec.cluster import ClusterSpec
from galvatron_jax.spec.plan import Plan
from galvatron_jax.spec.profile import Profile
from galvatron_jax.trace.model import Traced, trace

OPTIMIZER = optax.adamw(1e-3)
EFFORT = Sampling(window_s=0.5, budget_s=3.0)
"""Samples as long as a step: the machine's speed changes within it, so the least of shorter ones is less."""
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
    """The first profile of every link, and the plan that a search finds with it."""
    traced, place = trace_model(model, GLOBAL_BATCH), Path(folder) / model
    place.mkdir(parents=True, exist_ok=True)
    memory = optimizer_memory(OPTIMIZER, traced.spec)
    if jax.process_index() == 0:
        optimizer = {"slots": memory.param_like_slots, "scalar_bytes": memory.scalar_bytes}
        (place / "optimizer.json").write_text(json.dumps(optimizer))
        traced.spec.save(place / "model.json")
    for link, cluster, found in _profiles(traced, place, links, number=0):
        if jax.process_index() == 0:
            result = search(
                traced.spec, cluster, profile=found, global_batch=GLOBAL_BATCH, optimizer=memory, space=SPACE
            )
            result.plan.save(place / f"searched {file_name(link)}.json")


def _profiles(
    traced: Traced, place: Path, links: Sequence[str], *, number: int
) -> Iterator[tuple[str, ClusterSpec, Profile]]:
    """Measures anew on each link; layers, on which it has no bearing, once."""
    layers = None
    for link in links:
        set_link(link)
        cache = str(place / f"cache {file_name(link)} {number}")
        options = {"cache_dir": cache, "progress": False, "sampling": EFFORT}
        cluster_file = place / f"cluster {file_name(link)}.json"
        cluster = ClusterSpec.load(cluster_file) if number else live_cluster(**options)
        if layers is None:
            found = measure_profile(traced, cluster, GLOBAL_BATCH, space=SPACE, **options)
            layers = found.layers
        else:
            found = measure_collectives(traced.spec, [], cluster=cluster, **options)
            found = found.model_copy(update={"layers": layers})
        if jax.process_index() == 0:
            cluster.save(cluster_file)
            found.save(place / f"profile {file_name(link)} {number}.json")
        yield link, cluster, found


def measure(
    *,
    model: str,
    plans: Mapping[str, dict],
    folder: str,
    links: Sequence[str],
    rounds: Sequence[int],
    steps: int,
    seconds: float,
) -> list[int]:
    """Step times of all plans on every link, round by round: all see the same moods of a shared machine.

    What is predicted from is measured in every round too.

    Args:
        model: by its name in `MODELS`.
        plans: documents by name.
        folder: where records lie, which grow by each round.
        links: by name.
        rounds: numbers of those to run.
        steps: per plan, link and round.
        seconds: after so many no round begins.

    Returns:
        Numbers of the rounds done.
    """
    begin, done, place = time.monotonic(), [], Path(folder) / model
    traced = trace_model(model, GLOBAL_BATCH)
    ready = {name: Ready.compiled(model, Plan.model_validate(document)) for name, document in plans.items()}
    for number in rounds:
        if multihost_utils.broadcast_one_to_all(np.int32(time.monotonic() - begin > seconds)):
            break
        if number:
            list(_profiles(traced, place, links, number=number))
        found: dict[str, dict[str, list[float]]] = {name: {} for name in ready}
        for link in links:
            set_link(link)
            for name, each in ready.items():
                found[name][link] = each.time(steps)
        if jax.process_index() == 0:
            for name, times in found.items():
                _add(place / f"measured {file_name(name)}.json", plans[name], times)
        done.append(number)
    return done


@dataclass
class Ready:
    """A plan's compiled step with what it runs on."""

    step: StepProgram
    batch: Any
    state: Any

    @classmethod
    def compiled(cls, model: str, plan: Plan) -> Ready:
        """Its first step is done."""
        traced, sizes = trace_model(model, GLOBAL_BATCH // plan.num_microbatches), MODELS[model]
        tokens = np.random.default_rng(0).integers(0, sizes["vocab_size"], (GLOBAL_BATCH, sizes["seq_length"] + 1))
        step = build_step(traced, plan, OPTIMIZER)
        ready = cls(step, step.place({"tokens": tokens.astype(np.int32)}), ordinary_state(step))
        ready.time(1)
        return ready

    def time(self, steps: int) -> list[float]:
        """Seconds of steps, of the slowest host."""
        times = []
        for _ in range(steps):
            jax.block_until_ready(self.state)
            begin = time.perf_counter()
            self.state, metrics = self.step.jitted(self.state, self.batch)
            jax.block_until_ready((self.state, metrics))
            times.append(time.perf_counter() - begin)
        own = np.asarray(times, np.float32)
        return np.asarray(multihost_utils.process_allgather(own)).reshape(-1, steps).max(axis=0).tolist()


def _add(path: Path, plan: dict, times: Mapping[str, Sequence[float]]) -> None:
    """Adds a round to a plan's record, in one go."""
    record: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    if record.get("plan") != plan:
        record = {"plan": plan, "rounds": 0, "seconds": {link: [] for link in times}}
    record["rounds"] += 1
    for link, seconds in times.items():
        record["seconds"][link] += seconds
    path.with_suffix(".partial").write_text(json.dumps(record))
    path.with_suffix(".partial").replace(path)


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
