"""The fastest plan that fits, by the cost model, and why.

In: a `ModelSpec`, a `ClusterSpec`, optionally a `Profile`, a global batch and a memory budget. Out: a `SearchResult`
with the `Plan`, the best plans of other families and an explanation; or an `InfeasibleError`. `space` says which
strategies are tried and which named rules prune them, `options` prices them per layer, `chain` states the problem,
`layers` solves it exactly, `oracle` solves small ones by brute force.

May import `cost`, `partition`, `spec`, `errors` and `units`; never JAX.
"""

from galvatron_jax.cost.memory import OptimizerMemory as OptimizerMemory
from galvatron_jax.search.engine import search as search
from galvatron_jax.search.engine import search_batches as search_batches
from galvatron_jax.search.explain import RunnerUp as RunnerUp
from galvatron_jax.search.explain import SearchResult as SearchResult
from galvatron_jax.search.explain import SearchStatistics as SearchStatistics
from galvatron_jax.search.space import Rule as Rule
from galvatron_jax.search.space import SearchSpace as SearchSpace
from galvatron_jax.search.space import meshes_for as meshes_for
