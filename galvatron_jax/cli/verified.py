"""`search --verify N`: what was found, compiled; plans that do not fit are dropped. JAX is imported only then."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from galvatron_jax.cli.arguments import Search
from galvatron_jax.cli.output import Output
from galvatron_jax.errors import InfeasibleError, InputError
from galvatron_jax.search import SearchResult
from galvatron_jax.spec.plan import Plan
from galvatron_jax.units import format_bytes

if TYPE_CHECKING:
    from galvatron_jax.verify.verification import Verification


def prepare_verifying(arguments: Search) -> None:
    """Checks what verifying needs, before the search; GPUs that are here are left alone.

    Raises:
        InputError: when the arguments do not go together, there is no such target, or the compiler is missing.
    """
    if arguments.verify is not None and arguments.verify < 1:
        raise InputError(f"--verify: {arguments.verify} plans are none; give 1 or more.")
    if arguments.sweep:
        raise InputError("--verify compiles the plans of one search, and --sweep makes many; leave one of them out.")
    if arguments.model.endswith(".json"):
        raise InputError(
            f"--verify needs a model to compile, and a saved one such as {arguments.model} holds no program. Give "
            "family:size, a .toml file or module:function."
        )
    from galvatron_jax.cli.verify import use_no_gpu
    from galvatron_jax.verify.targets import read_target, target_devices

    use_no_gpu()
    name, cluster = read_target(arguments.cluster)
    target_devices(name, cluster.num_devices)


def verify_result(
    arguments: Search, result: SearchResult, memory_bytes: int | None, output: Output
) -> tuple[SearchResult, tuple[Verification, ...]]:
    """Compiles the winner and the best runners-up.

    Args:
        arguments: of the command.
        result: of the search.
        memory_bytes: the budget; None for all of the device's memory.
        output: gets a table.

    Returns:
        The result with the fastest plan that fits as its winner, and what was found of each plan, best first.

    Raises:
        InfeasibleError: when none of them fits.
    """
    from galvatron_jax.api.verification import verify_request
    from galvatron_jax.cli.verify import verify_question
    from galvatron_jax.report.verifications import verified_table

    found: list[Verification] = []
    for plan in _best(result, arguments.verify or 1):
        output.say(f"Compiling plan {len(found) + 1} for {arguments.cluster} …")
        request = verify_question(arguments.model, arguments.optimizer, plan.global_batch, memory_bytes)
        found.append(verify_request(request, plan, target=arguments.cluster))
    output.show([verified_table(found)])
    fitting = [one.plan for one in found if one.fits]
    if not fitting:
        least = min(one.memory.peak_bytes for one in found)
        raise InfeasibleError(
            f"None of the {len(found)} plans compiled fits {format_bytes(found[0].budget_bytes)}: the least peak is "
            f"{format_bytes(least)}. Search with less --memory than there is, or verify more plans."
        )
    gone = {id(one.plan) for one in found if not one.fits} | {id(fitting[0])}
    others = tuple(other for other in result.runners_up if id(other.plan) not in gone)
    return replace(result, plan=fitting[0], runners_up=others), tuple(found)


def verified_documents(found: Sequence[Verification]) -> list[dict[str, Any]]:
    """What `--json` prints of each plan."""
    if not found:
        return []
    from galvatron_jax.cli.verify import verification_document

    return [{"plan": one.plan.model_dump(mode="json"), **verification_document(one)} for one in found]


def _best(result: SearchResult, count: int) -> list[Plan]:
    """The winner, and the best plans of the other families that fit, by examples per second."""
    fitting = [other for other in result.runners_up if other.fits]
    fitting.sort(key=lambda other: other.prediction.time.step_s / other.plan.global_batch)
    return [result.plan, *(other.plan for other in fitting)][:count]
