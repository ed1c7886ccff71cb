"""Files that Hetu-Galvatron publishes with its code: profiles of models and machines, and plans.

In: its JSON files, of versions 2.0 to 3.0 (commit cea12ff). Out: tables in base units (seconds, bytes, bytes/s), and
this package's `Profile` and `Plan`. Imports `spec`, `errors` and `units` only.

- `computation_profiling_*.json`: `read_computation`
- `memory_profiling_*.json`: `read_memory`
- `allreduce_bandwidth_*`, `p2p_bandwidth_*`, `sp_time_*`, `overlap_coefficient.json`: `read_hardware`
- both of the above as a `Profile`: `read_profile`
- `galvatron_config_*.json`, or a plan in its notation (`4-2*-1-c`): `read_plan`
"""

from galvatron_jax.spec.galvatron.computation import read_computation as read_computation
from galvatron_jax.spec.galvatron.hardware import read_hardware as read_hardware
from galvatron_jax.spec.galvatron.memory import read_memory as read_memory
from galvatron_jax.spec.galvatron.plan import read_plan as read_plan
from galvatron_jax.spec.galvatron.profile import read_profile as read_profile
from galvatron_jax.spec.galvatron.strategies import Degrees as Degrees
