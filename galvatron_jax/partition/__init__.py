"""The partitioner's planning half: from a layer's operations and a strategy to layouts, collectives and residuals.

In: `LayerKind` (its joint forward and backward program) and `LayerStrategy`. Out: `LayerPlan` for the cost model, and
`LocalPlan`, the instructions that the runtime executes. Imports `spec` only; no JAX.
"""

from galvatron_jax.partition.boundary import boundary_collectives as boundary_collectives
from galvatron_jax.partition.boundary import boundary_steps as boundary_steps
from galvatron_jax.partition.boundary import home_spec as home_spec
from galvatron_jax.partition.layer_plan import BoundarySpec as BoundarySpec
from galvatron_jax.partition.layer_plan import Collective as Collective
from galvatron_jax.partition.layer_plan import LayerPlan as LayerPlan
from galvatron_jax.partition.layer_plan import ParameterPlan as ParameterPlan
from galvatron_jax.partition.layer_plan import PhasePlan as PhasePlan
from galvatron_jax.partition.layers import LocalPlan as LocalPlan
from galvatron_jax.partition.layers import plan_layer as plan_layer
from galvatron_jax.partition.layers import plan_local as plan_local
from galvatron_jax.partition.layers import plan_series as plan_series
from galvatron_jax.partition.lookups import looks_up_parameters as looks_up_parameters
from galvatron_jax.partition.remat import distinct_remats as distinct_remats
from galvatron_jax.partition.series import LayerSeries as LayerSeries
