"""Predicted step times against measured ones, on two real hosts with an open link, 2 Gbit/s and 500 Mbit/s.

Profiles the hosts and a model's layers on each link, searches, and measures the plan found beside 35 others: data
parallelism with every ZeRO stage, tensor and both kinds of sequence parallelism, pipelines of every schedule, remat,
and many micro-batches. All take their turn in three rounds, and layers and collectives with them: a shared machine's
speed changes by the minute. A step's figure is the least of its repeats, and so is a layer's, as delays only add to
them; of a collective, which a step has many of, it is the median. The record has the steps' median and most too. It
takes long, and can be interrupted: rounds that were done stay in `--folder`, and the next run goes on there.
`--seconds` ends a run before it would itself. `--quick` takes one model, two links and a dozen plans.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from harness import Claim, Outcome, run
from parts.accuracy_plans import LINKS, MODELS, QUICK
from parts.accuracy_plans import plans as every_plan
from parts.accuracy_record import ROUNDS, SEARCHED, Bench, summary
from testbed import Testbed

ERROR, RANKS, SLOWER = 0.08, 0.05, 0.03
STEPS, FULL_STEPS = 4, 8
"""Per plan, link and round."""
FOLDER = Path.home() / ".cache" / "galvatron_jax" / "time_accuracy"


def measure(full: bool, *, quick: bool, seconds: float, folder: str) -> Outcome:
    """Measures what is missing, then compares all."""
    models = list(MODELS)[:1] if quick else list(MODELS)
    links = ("open", "500 Mbit/s") if quick else tuple(LINKS)
    names = QUICK if quick else None
    begin, rows = time.monotonic(), []
    with Testbed(alone=True) as bed:
        print(f"network: {bed.network}")
        if bed.why_loopback is not None:
            links = ("open",)
        benches = {model: Bench(Path(folder) / model, links, every_plan) for model in models}
        for model, bench in benches.items():
            if not bench.profiled:
                bed.run("parts.accuracy_host:profile", {"model": model, "folder": folder, "links": links})
            left = seconds - (time.monotonic() - begin)
            plans = {name: plan.model_dump(mode="json") for name, plan in bench.missing(names).items()}
            if plans and left > 0:
                arguments = {"model": model, "plans": plans, "folder": folder, "links": links}
                rounds = list(range(bench.done(names), ROUNDS))
                effort = {"rounds": rounds, "steps": FULL_STEPS if full else STEPS, "seconds": left}
                done = bed.run("parts.accuracy_host:measure", arguments | effort, timeout_s=left + 1800).values[0]
                print(f"{model}: {len(plans)} plans, {len(done)} rounds of {len(rounds)} done", flush=True)
    for bench in benches.values():
        rows += bench.rows(names) if bench.profiled else []
    complete = all(bench.profiled and not bench.missing(names) for bench in benches.values())
    _print(rows)
    if not complete:
        print("Not complete; run again to go on.")
        return Outcome(rows, [])
    for each in summary(rows):
        print(each)
    return Outcome([*summary(rows), *rows], _claims(rows))


def _claims(rows: list[dict[str, Any]]) -> list[Claim]:
    sums = summary(rows)
    listed = [abs(row["error"]) for row in rows if not row["plan"].startswith(SEARCHED)]
    claims = [Claim(f"mean absolute error of {len(listed)} step times", sum(listed) / len(listed), ERROR)]
    for each in sums:
        where = f"{each['model']}, {each['link']}"
        claims.append(Claim(f"{where}: 1 - Spearman's rank correlation", round(1 - each["spearman"], 4), RANKS))
        claims.append(Claim(f"{where}: searched plan / fastest measured - 1", each["searched_over_fastest"], SLOWER))
    return claims


def _print(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        print(
            f"{row['model']:6} {row['link']:10} {row['plan']:24} measured {1e3 * row['measured_s']:8.1f} ms, predicted "
            f"{1e3 * row['predicted_s']:8.1f} ms {100 * row['error']:+6.1f} %"
        )


def _draw(saved: Path) -> None:
    """Predicted over measured, one picture per model, beside the record."""
    rows = [row for row in json.loads(saved.read_text())["results"] if "plan" in row]
    try:
        import matplotlib  # An optional extra, for pictures alone.
    except ImportError:
        print("No picture: matplotlib is not installed (`pip install 'galvatron-jax[plot]'`).")
        return

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    models = list(dict.fromkeys(row["model"] for row in rows))
    figure, every = plt.subplots(1, len(models), figsize=(6 * len(models), 5.5), squeeze=False)
    for axes, model in zip(every[0], models, strict=True):
        own = [row for row in rows if row["model"] == model]
        ends = [f(row[key] for row in own for key in ("measured_s", "predicted_s")) for f in (min, max)]
        axes.plot(ends, ends, color="0.7", linewidth=1, label="predicted = measured")
        for link in dict.fromkeys(row["link"] for row in own):
            some = [row for row in own if row["link"] == link]
            axes.scatter([r["measured_s"] for r in some], [r["predicted_s"] for r in some], s=18, alpha=0.8, label=link)
        axes.set(xscale="log", yscale="log", xlabel="measured step, s", ylabel="predicted step, s", title=model)
        axes.legend()
    figure.suptitle("Steps on two hosts of one core, by bandwidth of their link")
    figure.tight_layout()
    figure.savefig(saved.with_suffix(".png"), dpi=130)


if __name__ == "__main__":
    run(
        measure,
        devices="two hosts of one core",
        options={
            "quick": {"action": "store_true", "help": "one model, two links, a dozen plans"},
            "seconds": {"type": float, "default": 7200.0, "help": "begin no round after so many seconds"},
            "folder": {"default": str(FOLDER), "help": "where measurements are kept"},
        },
        saved=_draw,
    )
