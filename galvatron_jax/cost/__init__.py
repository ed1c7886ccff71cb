"""Time and memory of plans.

In: a `ModelSpec`, the partitioner's `LayerPlan` of each (layer kind, strategy), a `ClusterSpec` and optionally a
`Profile`. Out: seconds of a collective (`links`), of a layer's computation (`compute`), bytes of a layer (`memory`),
and the `Prediction` of a whole plan (`step.price_plan`). What the search minimises is computed here and nowhere else.

May import `partition`, `spec`, `errors` and `units`; never JAX.
"""

from galvatron_jax.cost.derive import derive_profile as derive_profile
from galvatron_jax.cost.memory import OptimizerMemory as OptimizerMemory
from galvatron_jax.cost.model import CostModel as CostModel
from galvatron_jax.cost.step import price_plan as price_plan
