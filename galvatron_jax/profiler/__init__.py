"""Times of layers, collectives and devices, measured on the live ones.

In: a `ModelSpec`, the local programs of its layers (from the runtime, by way of `LocalProgram`), the live devices.
Out: a `Profile` and a `ClusterSpec`. May import `spec` and what is below it, and JAX; not the runtime.
"""

from galvatron_jax.profiler.bench import Bench as Bench
from galvatron_jax.profiler.cache import TimingCache as TimingCache
from galvatron_jax.profiler.cache import default_cache_dir as default_cache_dir
from galvatron_jax.profiler.cluster import live_cluster as live_cluster
from galvatron_jax.profiler.collectives import measure_collectives as measure_collectives
from galvatron_jax.profiler.devices import live_mesh as live_mesh
from galvatron_jax.profiler.layers import LocalProgram as LocalProgram
from galvatron_jax.profiler.layers import profile_layers as profile_layers
from galvatron_jax.profiler.measure import profile as profile
from galvatron_jax.profiler.points import LayerTimingRequest as LayerTimingRequest
from galvatron_jax.profiler.points import choose_points as choose_points
from galvatron_jax.profiler.timing import Sampling as Sampling
