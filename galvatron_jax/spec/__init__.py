"""The nouns: documents that the verbs (trace, profile, search, run) hand to each other.

Five documents live in files of their own: `ClusterSpec`, `ModelSpec`, `Profile`, `Plan` and `Run`. Each is a frozen
pydantic model that a JSON (or hand-written TOML) file holds as it is. Imports nothing but `errors` and `units`;
no JAX.
"""

from galvatron_jax.spec.cluster import ClusterSpec as ClusterSpec
from galvatron_jax.spec.document import Document as Document
from galvatron_jax.spec.document import Record as Record
from galvatron_jax.spec.model import ModelSpec as ModelSpec
from galvatron_jax.spec.plan import Plan as Plan
from galvatron_jax.spec.profile import Profile as Profile
from galvatron_jax.spec.run import Run as Run
from galvatron_jax.spec.strategy import LayerStrategy as LayerStrategy
