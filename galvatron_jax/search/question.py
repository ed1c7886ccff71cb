"""What a search is asked, as a value: sweeps and sensitivities ask the same with one thing changed."""

from __future__ import annotations

import string
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace

from galvatron_jax.cost.links import INTRA
from galvatron_jax.cost.memory import OptimizerMemory
from galvatron_jax.cost.planner import Planner
from galvatron_jax.cost.step import price_plan
from galvatron_jax.errors import InfeasibleError, InputError
from galvatron_jax.search.engine import search, search_batches
from galvatron_jax.search.explain import SearchResult
from galvatron_jax.search.problems import Progress
from galvatron_jax.search.space import SearchSpace
from galvatron_jax.spec.cluster import ClusterSpec
from galvatron_jax.spec.model import ModelSpec
from galvatron_jax.spec.plan import Plan, Prediction
from galvatron_jax.spec.presets import cluster_preset, preset_names
from galvatron_jax.spec.profile import CollectiveTiming, Profile, Provenance

_ONE_STAGE = SearchSpace()


@dataclass(frozen=True)
class Question:
    """A model, a cluster, and what counts as a plan. Its answer is the plan with the most examples per second.

    Raises:
        InputError: when there is no batch, or the profile is another model's.
    """

    model: ModelSpec
    cluster: ClusterSpec
    global_batches: tuple[int, ...]
    """Examples of a step; of several, the batch with the most examples per second wins."""
    optimizer: OptimizerMemory
    profile: Profile | None = None
    """Measurements; None derives times from the cluster's figures."""
    memory_bytes: int | None = None
    """Budget per device; None takes the device's memory."""
    space: SearchSpace = _ONE_STAGE
    planner: Planner | None = None
    """For tests; the partitioner otherwise."""
    fewer_devices: bool = False
    """Whether the answer may leave devices unused: also asks for each part of the cluster that divides it."""

    def __post_init__(self) -> None:
        if not self.global_batches:
            raise InputError("There is no global batch to try; give at least one.")
        if self.profile is not None and self.profile.model_fingerprint != self.model.fingerprint:
            raise InputError(
                f"The profile was made for model {self.profile.model_fingerprint}, this is {self.model.fingerprint} "
                f"({self.model.name}). Profile this model, or leave the profile out."
            )

    @property
    def budget_bytes(self) -> int:
        """Budget per device."""
        return self.cluster.device.memory_bytes if self.memory_bytes is None else self.memory_bytes

    def answer(
        self, *, time_limit_s: float | None = None, runners_up: bool = True, progress: Progress | None = None
    ) -> SearchResult:
        """Searches.

        Args:
            time_limit_s: for all batches together; after it the best plan so far is returned, marked as not proven.
            runners_up: whether to look for the best plans of other families too.
            progress: told what is done.

        Raises:
            InputError: when a batch or the number of micro-batches is wrong.
            InfeasibleError: when no plan fits.
        """
        if self.fewer_devices:
            return self._answer_of_parts(time_limit_s, runners_up=runners_up, progress=progress)
        if len(self.global_batches) == 1:
            return self._search(self.global_batches[0], time_limit_s, runners_up=runners_up, progress=progress)
        share_s = None if time_limit_s is None else time_limit_s / len(self.global_batches)
        found = search_batches(
            self.model,
            self.cluster,
            global_batches=self.global_batches,
            optimizer=self.optimizer,
            time_limit_s=share_s,
            runners_up=False,
            progress=progress,
            **self._options(),
        )
        if not runners_up:
            return found
        again = self._search(found.plan.global_batch, share_s, runners_up=True, progress=progress)
        return replace(found, runners_up=again.runners_up)

    def _answer_of_parts(
        self, time_limit_s: float | None, *, runners_up: bool, progress: Progress | None
    ) -> SearchResult:
        """The best answer for all devices, or a number that divides theirs; of equals the one for most devices."""
        questions = list(self._parts())
        share_s = None if time_limit_s is None else time_limit_s / len(questions)
        found, failure = [], None
        for asked in questions:
            try:
                found.append((asked.answer(time_limit_s=share_s, runners_up=False, progress=progress), asked))
            except InfeasibleError as error:
                failure = failure or error
        if not found:
            assert failure is not None
            raise failure
        best, asked = max(found, key=lambda pair: pair[0].examples_per_s)
        if runners_up:
            best = asked.answer(time_limit_s=share_s, progress=progress)
        most = max(result.plan.global_batch / result.statistics.bound_s for result, _ in found)
        bound_s = min(best.plan.global_batch / most, best.statistics.bound_s)
        return replace(best, cluster=self.cluster.name, statistics=replace(best.statistics, bound_s=bound_s))

    def _parts(self) -> Iterator[Question]:
        """The same about all devices, and about fewer, where these fill whole nodes and make the stages asked for."""
        whole = replace(self, fewer_devices=False)
        yield whole
        total, degrees = self.cluster.num_devices, self.space.pipeline_degrees
        for count in range(total // 2, 0, -1):
            if total % count or (degrees is not None and all(count % degree for degree in degrees)):
                continue
            with suppress(InputError):
                yield whole.on_devices(count)

    def price(self, plan: Plan) -> Prediction:
        """What a plan would cost here.

        Raises:
            PlanMismatchError: when it is for another model, or cannot be.
        """
        return price_plan(
            self.model,
            plan,
            cluster=self.cluster,
            profile=self.profile,
            optimizer=self.optimizer,
            memory_bytes=self.budget_bytes,
            planner=self.planner,
        )

    def on_devices(self, num_devices: int) -> Question:
        """The same on another number of devices of the same sort.

        Raises:
            InputError: when they fill no whole nodes.
        """
        return replace(self, cluster=with_devices(self.cluster, num_devices))

    def with_bandwidth(self, level: str, multiple: float) -> Question:
        """The same with faster or slower links; measured collectives are scaled with them.

        Args:
            level: `intra` or `inter`.
            multiple: of the bandwidth. Latencies stay.
        """
        link = self.cluster.intra if level == INTRA else self.cluster.inter
        if link is None or multiple == 1:
            return self
        faster = link.model_copy(update={"bandwidth_bytes_per_s": link.bandwidth_bytes_per_s * multiple})
        profile = self.profile
        if profile is not None and profile.provenance is not Provenance.DERIVED:
            profile = profile.model_copy(update={"collectives": _scaled(profile.collectives, level, multiple)})
        return replace(self, cluster=self.cluster.model_copy(update={level: faster}), profile=profile)

    def _search(
        self, batch: int, time_limit_s: float | None, *, runners_up: bool, progress: Progress | None
    ) -> SearchResult:
        return search(
            self.model,
            self.cluster,
            global_batch=batch,
            optimizer=self.optimizer,
            time_limit_s=time_limit_s,
            runners_up=runners_up,
            progress=progress,
            **self._options(),
        )

    def _options(self) -> dict:
        return {
            "profile": self.profile,
            "memory_bytes": self.memory_bytes,
            "space": self.space,
            "planner": self.planner,
        }


def with_devices(cluster: ClusterSpec, num_devices: int) -> ClusterSpec:
    """A cluster of another size: a preset's own larger or smaller sister, else more nodes, or a part of one.

    Raises:
        InputError: when the devices fill no whole nodes, or nothing would join the nodes.

    Example:
        >>> from galvatron_jax.spec.presets import cluster_preset
        >>> larger = with_devices(cluster_preset("h100x8"), 32)
        >>> larger.name, larger.num_nodes, larger.devices_per_node
        ('h100x32', 4, 8)
    """
    if num_devices == cluster.num_devices:
        return cluster
    if num_devices < 1:
        raise InputError(f"{num_devices} devices: there must be at least 1.")
    if cluster.name in preset_names() and cluster == cluster_preset(cluster.name):
        return cluster_preset(f"{cluster.name.rstrip(string.digits)}{num_devices}")
    per_node = cluster.devices_per_node
    nodes, rest = divmod(num_devices, per_node)
    if num_devices < per_node:
        nodes, per_node, rest = 1, num_devices, 0
    if rest:
        raise InputError(
            f"{num_devices} devices do not fill nodes of {per_node} as cluster {cluster.name!r} has them; use "
            f"{num_devices - rest} or {num_devices - rest + per_node}."
        )
    if nodes > 1 and cluster.inter is None:
        raise InputError(
            f"{num_devices} devices need {nodes} nodes, but cluster {cluster.name!r} has no link between nodes: give "
            f"it `inter`, or use at most {per_node} devices."
        )
    name = f"{cluster.name} with {num_devices} devices"
    return cluster.model_copy(update={"name": name, "num_nodes": nodes, "devices_per_node": per_node})


def _scaled(timings: tuple[CollectiveTiming, ...], level: str, multiple: float) -> tuple[CollectiveTiming, ...]:
    """Collectives over links of another bandwidth: the time of the smallest message is latency, and stays."""
    smallest: dict[tuple, CollectiveTiming] = {}
    for timing in sorted(timings, key=lambda timing: timing.bytes):
        smallest.setdefault((timing.kind, timing.axis_size, timing.level), timing)
    scaled = []
    for timing in timings:
        latency_s = smallest[timing.kind, timing.axis_size, timing.level].timing.median_s
        moving_s = max(0.0, timing.timing.median_s - latency_s)
        changed = timing.timing.model_copy(update={"median_s": timing.timing.median_s - moving_s + moving_s / multiple})
        scaled.append(timing.model_copy(update={"timing": changed}) if timing.level == level else timing)
    return tuple(scaled)
