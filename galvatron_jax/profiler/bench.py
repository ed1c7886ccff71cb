"""What all measurements of one run share: devices, cache, effort, progress."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import jax
from jax.sharding import Mesh

from galvatron_jax.profiler.cache import Key, TimingCache
from galvatron_jax.profiler.everywhere import LocalFunction, time_everywhere
from galvatron_jax.profiler.progress import Step
from galvatron_jax.profiler.timing import Sampling
from galvatron_jax.spec.profile import Timing


@dataclass(frozen=True)
class Bench:
    """Where and how to measure."""

    mesh: Mesh
    cache: TimingCache
    sampling: Sampling = field(default_factory=Sampling)
    step: Step = field(default=lambda point: None)
    """Told the name of each point as it begins."""

    def time(
        self,
        key: Key,
        work: Callable[[], tuple[LocalFunction, Sequence[jax.ShapeDtypeStruct]]],
        *,
        share: Callable[[], int] = lambda: 1,
    ) -> Timing:
        """The timing of a local function on all devices at once, from the cache or measured.

        Args:
            key: Names the work in the cache.
            work: Gives the function and its local inputs; not called when the timing is cached.
            share: By how much the time is divided, for a function that does its work several times.
        """

        def measure() -> Timing:
            function, inputs = work()
            whole = time_everywhere(function, inputs, mesh=self.mesh, sampling=self.sampling)
            parts, figures = share(), ("median_s", "spread_s", "least_s")
            return whole.model_copy(update={name: getattr(whole, name) / parts for name in figures})

        return self.cache.get_or_measure(key, measure)
