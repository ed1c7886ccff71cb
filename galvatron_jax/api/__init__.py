"""What a user calls: `auto_shard` marks a Flax class, `train_step` finds the plan and builds the step.

In: a model, a loss, an optimizer and an example batch. Out: a `TrainStep`. Joins the verbs below it (trace, profile,
search, run) and may import all of them; nothing but the CLI imports it.
"""

from galvatron_jax.api.decorator import auto_shard as auto_shard
from galvatron_jax.api.decorator import materialize as materialize
from galvatron_jax.api.planning import Planned as Planned
from galvatron_jax.api.profiling import Profiled as Profiled
from galvatron_jax.api.profiling import profile_model as profile_model
from galvatron_jax.api.step import TrainStep as TrainStep
from galvatron_jax.api.step import find_plan as find_plan
from galvatron_jax.api.step import train_step as train_step
