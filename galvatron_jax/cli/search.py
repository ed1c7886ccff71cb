"""`galvatron-jax search`: the best plan of a model on a cluster that need not be here."""

from __future__ import annotations

from galvatron_jax.api import find_plan
from galvatron_jax.cli.arguments import Search
from galvatron_jax.cli.config import OptimizerConfig, load_model_config
from galvatron_jax.cli.devices import use_virtual_cpus
from galvatron_jax.cli.models import load_model
from galvatron_jax.cli.optimizers import make_optimizer
from galvatron_jax.cli.output import Output
from galvatron_jax.models import registry
from galvatron_jax.search import SearchResult
from galvatron_jax.spec.validation import validate


def run(arguments: Search, output: Output) -> int:
    """Searches, prints the plan and why, and saves it.

    Raises:
        InfeasibleError: when no plan fits the budget.
    """
    use_virtual_cpus(arguments.virtual_cpus)
    config = load_model_config(arguments.model, families=registry.families())
    optimizer = validate(OptimizerConfig, {"name": arguments.optimizer}, "the command line")
    loaded = load_model(config, batch_size=arguments.global_batch)
    output.say(f"Tracing {loaded.name} and searching for {arguments.cluster} …")
    planned = find_plan(
        loaded.model,
        loaded.loss_fn,
        make_optimizer(optimizer, steps=1),
        loaded.example_batch,
        memory_per_device=arguments.memory,
        num_microbatches=arguments.num_microbatches,
        cluster=arguments.cluster,
        profile=arguments.profile,
        name=loaded.name,
    )
    assert planned.result is not None
    output.show(planned.report())
    if arguments.out:
        planned.plan.save(arguments.out)
        output.say(f"Plan written to {arguments.out}")
    output.result(_document(planned.result))
    return 0


def _document(result: SearchResult) -> dict:
    statistics = result.statistics
    return {
        "plan": result.plan.model_dump(mode="json"),
        "bound_by": result.bound_by,
        "runners_up": [
            {
                "family": other.family,
                "fits": other.fits,
                "reason": other.reason(result.prediction),
                "plan": other.plan.model_dump(mode="json"),
            }
            for other in result.runners_up
        ],
        "search": {
            "seconds": statistics.seconds,
            "combinations": statistics.problems,
            "options": statistics.options,
            "proven": statistics.proven,
            "unlimited_step_s": statistics.unlimited_s,
        },
    }
