"""What the compiler says of a plan, beside what was predicted, as tables."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Group, RenderableType
from rich.table import Table

from galvatron_jax.report.plans import plan_title
from galvatron_jax.report.text import facts, share, titled
from galvatron_jax.units import format_bytes, format_rate, format_seconds
from galvatron_jax.verify.verification import Verification


def verification_report(found: Verification) -> Iterator[RenderableType]:
    """Everything that was found out about a plan."""
    yield memory_check_table(found)
    yield collective_check_table(found)
    yield replay_table(found)
    took = ", ".join(f"{name} {format_seconds(seconds)}" for name, seconds in found.seconds.items())
    yield f"Verified in {format_seconds(sum(found.seconds.values()))}: {took}."


def memory_check_table(found: Verification) -> Group:
    """Bytes of the device that needs most, as predicted and as compiled."""
    memory, predicted = found.memory, found.prediction.largest
    peak = found.prediction.peak_bytes
    rest = peak - predicted.argument_bytes
    table = Table()
    table.add_column("part")
    for name in ("predicted", "compiled", "predicted / compiled − 1"):
        table.add_column(name, justify="right")
    rows = (
        ("arguments: state and batch", predicted.argument_bytes, memory.argument_bytes),
        ("all else: gradients, residuals, workspace", rest, memory.peak_bytes - memory.argument_bytes),
    )
    for name, first, second in rows:
        table.add_row(name, format_bytes(first), format_bytes(second), _difference(first, second))
    table.add_section()
    whole = peak, memory.peak_bytes
    table.add_row("peak", *map(format_bytes, whole), _difference(*whole), style="bold")
    budget = format_bytes(found.budget_bytes)
    verdict = "fits" if found.fits else "DOES NOT FIT"
    table.add_row("budget", budget, budget, verdict, style=None if found.fits else "red")
    return titled(f"Memory per device by XLA's compiler for {_target(found)}: {plan_title(found.plan)}", table)


def collective_check_table(found: Verification) -> Group:
    """Every kind of collective over every group."""
    table = Table()
    for name in ("operation", "mesh axes"):
        table.add_column(name)
    for name in ("devices", "predicted", "count", "compiled", "count"):
        table.add_column(name, justify="right")
    table.add_column("")
    for check in found.collectives:
        table.add_row(
            check.operation,
            " ".join(check.axes) or "–",
            str(check.members),
            format_bytes(check.predicted.bytes),
            str(check.predicted.count),
            format_bytes(check.compiled.bytes),
            str(check.compiled.count),
            "equal" if check.as_predicted else _difference(check.predicted.bytes, check.compiled.bytes),
        )
    title = "Collectives of a step, bytes of operands per device (XLA combines some)"
    return titled(f"{title}: {plan_title(found.plan)}", table)


def replay_table(found: Verification) -> Group:
    """The compiled schedule run through, beside the predicted step."""
    span, predicted = found.replay, found.prediction.time
    rows = [
        ("kernels", f"{format_seconds(span.compute_s)}, {span.kernels} of them"),
        ("collectives", format_seconds(span.communication_s)),
        ("of that exposed", f"{format_seconds(span.exposed_s)} ({share(span.exposed_s, span.seconds)} of the step)"),
        ("FLOPs of matrix products", format_rate(span.flops, "FLOP").removesuffix("/s")),
        ("memory traffic", format_bytes(span.bytes)),
        ("step, replayed", format_seconds(span.seconds)),
        ("step, predicted", f"{format_seconds(predicted.step_s)} ({_difference(predicted.step_s, span.seconds)})"),
    ]
    return facts(f"Replay of the compiled schedule on {_target(found)}: {plan_title(found.plan)}", rows)


def verified_table(found: Sequence[Verification]) -> Group:
    """Several plans of a search, best first."""
    table = Table()
    for name in ("plan", "predicted step", "replayed", "predicted peak", "compiled peak", ""):
        table.add_column(name, justify="left" if name in ("plan", "") else "right")
    for number, one in enumerate(found):
        table.add_row(
            str(number + 1),
            format_seconds(one.prediction.time.step_s),
            format_seconds(one.replay.seconds),
            format_bytes(one.prediction.peak_bytes),
            format_bytes(one.memory.peak_bytes),
            "fits" if one.fits else "does not fit: dropped",
        )
    first = found[0]
    return titled(f"The best plans by XLA's compiler for {_target(first)}, {format_bytes(first.budget_bytes)}", table)


def _target(found: Verification) -> str:
    return f"{found.cluster.num_devices} × {found.cluster.device.name}"


def _difference(first: float, second: float) -> str:
    return f"{100 * (first / second - 1):+.1f} %" if second else ("equal" if not first else "only predicted")
