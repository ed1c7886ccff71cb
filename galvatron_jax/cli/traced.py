"""Questions about a model that has to be traced first, or about the live devices: what needs JAX."""

from __future__ import annotations

from typing import TYPE_CHECKING

from galvatron_jax.api import planning
from galvatron_jax.api.clusters import LIVE, resolve_cluster
from galvatron_jax.api.optimizer import optimizer_memory
from galvatron_jax.cli.arguments import Search
from galvatron_jax.cli.config import OptimizerConfig, load_model_config
from galvatron_jax.cli.devices import use_virtual_cpus
from galvatron_jax.cli.models import load_model
from galvatron_jax.cli.optimizers import make_optimizer
from galvatron_jax.cli.output import Output
from galvatron_jax.models import registry
from galvatron_jax.search import OptimizerMemory
from galvatron_jax.search.question import Question
from galvatron_jax.spec.cluster import ClusterSpec
from galvatron_jax.spec.model import ModelSpec

if TYPE_CHECKING:
    from galvatron_jax.cli.questions import Wishes


def traced_question(arguments: Search, wishes: Wishes, output: Output) -> Question:
    """Traces the model at the largest batch, and measures live devices.

    Raises:
        GalvatronError: when model, cluster or profile are missing, faulty, or do not go together.
    """
    use_virtual_cpus(arguments.virtual_cpus)
    config = load_model_config(arguments.model, families=registry.families())
    loaded = load_model(config, batch_size=max(wishes.batches))
    output.say(f"Tracing {loaded.name} and searching for {arguments.cluster} …")
    request = planning.make_request(
        loaded.model,
        loaded.loss_fn,
        make_optimizer(wishes.optimizer, steps=1),
        loaded.example_batch,
        memory_per_device=wishes.memory_bytes,
        num_microbatches=None,
        name=loaded.name,
    )
    return planning.make_question(
        request,
        request.trace(),
        cluster=arguments.cluster,
        profile=arguments.profile,
        space=wishes.space,
        global_batches=wishes.batches,
    )


def live_cluster(arguments: Search) -> ClusterSpec:
    """The devices of this machine, measured (cached)."""
    use_virtual_cpus(arguments.virtual_cpus)
    return resolve_cluster(LIVE)


def optimizer_memory_of(config: OptimizerConfig, model: ModelSpec) -> OptimizerMemory:
    """What an optimizer keeps for a model's parameters."""
    return optimizer_memory(make_optimizer(config, steps=1), model)
