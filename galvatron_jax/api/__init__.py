"""What a user calls: `auto_shard` marks a Flax class, `train_step` finds the plan and builds the step.

In: a model, a loss, an optimizer and an example batch. Out: a `TrainStep`. Joins the verbs below it (trace, profile,
search, run) and may import all of them; nothing but the CLI imports it.
"""

from galvatron_jax.api.decorator import auto_shard as auto_shard
from galvatron_jax.api.decorator import materialize as materialize
