"""`galvatron-jax verify`: what XLA's GPU compiler says of a plan, for GPUs that are not here."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import jax

from galvatron_jax.api.planning import Request, make_request
from galvatron_jax.api.verification import verify_request
from galvatron_jax.cli.arguments import Verify
from galvatron_jax.cli.config import OptimizerConfig, load_model_config
from galvatron_jax.cli.models import load_model
from galvatron_jax.cli.optimizers import make_optimizer
from galvatron_jax.cli.output import Output
from galvatron_jax.cli.ranges import parse_memory
from galvatron_jax.models import registry
from galvatron_jax.report.verifications import verification_report
from galvatron_jax.spec.plan import Plan
from galvatron_jax.spec.validation import validate
from galvatron_jax.verify.targets import read_target
from galvatron_jax.verify.verification import Verification

FITS, DOES_NOT_FIT = 0, 1


def run(arguments: Verify, output: Output) -> int:
    """Compiles the plan's step, and prints what came out beside what was predicted.

    Returns:
        0 when the compiler's peak is within the budget, 1 when it is not.

    Raises:
        GalvatronError: when plan, model or target are missing, faulty or do not go together, or there is no compiler.
    """
    use_no_gpu()
    plan = Plan.load(arguments.plan)
    read_target(arguments.target)
    memory = None if arguments.memory is None else parse_memory(arguments.memory)
    request = verify_question(arguments.model, arguments.optimizer, plan.global_batch, memory)
    output.say(f"Compiling the step of {request.name} for {arguments.target} …")
    found = verify_request(request, plan, target=arguments.target)
    output.show(verification_report(found))
    output.result(verification_document(found))
    return FITS if found.fits else DOES_NOT_FIT


def verify_question(model: str, optimizer: str, global_batch: int, memory_bytes: int | None) -> Request:
    """What is to be compiled, from what the command line names.

    Raises:
        GalvatronError: when the model or the optimizer are missing or faulty.
    """
    chosen = validate(OptimizerConfig, {"name": optimizer}, "the command line")
    loaded = load_model(load_model_config(model, families=registry.families()), batch_size=global_batch)
    return make_request(
        loaded.model,
        loaded.loss_fn,
        make_optimizer(chosen, steps=1),
        loaded.example_batch,
        memory_per_device=memory_bytes,
        num_microbatches=None,
        name=loaded.name,
    )


def use_no_gpu() -> None:
    """Leaves GPUs that are here alone: the compiler needs none, and describes those that are not. Call it first."""
    jax.config.update("jax_platforms", "cpu")


def verification_document(found: Verification) -> dict[str, Any]:
    """What `--json` prints."""
    span = found.replay
    return {
        "target": found.cluster.name,
        "fits": found.fits,
        "budget_bytes": found.budget_bytes,
        "memory": asdict(found.memory),
        "memory_error": found.memory_error,
        "prediction": found.prediction.model_dump(mode="json"),
        "collectives": [{**asdict(check), "as_predicted": check.as_predicted} for check in found.collectives],
        "replay": {
            "step_s": span.seconds,
            "compute_s": span.compute_s,
            "communication_s": span.communication_s,
            "exposed_s": span.exposed_s,
            "kernels": span.kernels,
            "flops": span.flops,
            "bytes": span.bytes,
        },
        "seconds": dict(found.seconds),
    }
