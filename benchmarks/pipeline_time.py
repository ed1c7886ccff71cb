"""Step times of pipelines on two real hosts against the makespan of their own schedule tables.

A GPT in two stages on the testbed's two hosts, under 1F1B (which recomputes) and GPipe, with 4 and 16 micro-batches.
Each stage's forward and backward is timed alone on its host, and the step once more with an idle table: what is left
then are the permutes of every tick, synchronisation and update. The table's makespan with the stages' times, and that
rest, should make the step. All are timed in turns, and compared turn by turn.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from harness import Claim, Outcome, run
from parts.pipeline_record import compared
from testbed import Testbed

GLOBAL_BATCH = 16
SIZES = {"num_layers": 6, "width": 256, "num_heads": 8, "mlp_width": 1024, "vocab_size": 1024, "seq_length": 128}
STARTS = [0, 4]
"""First layers of the stages: the embedding and three blocks; three blocks and the head."""
SCHEDULES, COUNTS = ("1f1b", "gpipe"), (4, 16)
LIMIT = 0.10
ROUNDS, FULL_ROUNDS = 21, 51
"""Of step, idle step and turns, one after another; medians count."""


def measure(full: bool, *, link: str, only: Sequence[str] | None) -> Outcome:
    """Every schedule with every number of micro-batches."""
    bandwidth = None if link == "open" else float(link) * 1e6
    results = []
    with Testbed(bandwidth_bits_per_s=bandwidth, alone=True) as bed:
        for schedule in SCHEDULES:
            for count in COUNTS:
                if only and f"{schedule}:{count}" not in only:
                    continue
                results.append(one(bed, schedule, count, FULL_ROUNDS if full else ROUNDS))
                print(_line(results[-1]), flush=True)
    claims = [
        Claim(f"{r['schedule']}, {r['microbatches']} micro-batches: |predicted / measured - 1|", abs(r["error"]), LIMIT)
        for r in results
    ]
    return Outcome(results, claims)


def one(bed: Testbed, schedule: str, count: int, rounds: int) -> dict[str, Any]:
    """One plan, measured and predicted."""
    arguments = {
        "schedule": schedule,
        "num_microbatches": count,
        "global_batch": GLOBAL_BATCH,
        "starts": STARTS,
        "sizes": SIZES,
        "rounds": rounds,
    }
    answers = bed.run("parts.pipeline_host:measure", arguments, timeout_s=500)
    return {"network": bed.description, **compared(schedule, count, answers.values)}


def _line(row: dict[str, Any]) -> str:
    return (
        f"{row['schedule']:6} {row['microbatches']:3} micro-batches: measured {row['measured_s']:.4f} s, predicted "
        f"{row['predicted_s']:.4f} s ({100 * row['error']:+.1f} %), of it {row['idle_s']:.4f} s without work"
    )


if __name__ == "__main__":
    run(
        measure,
        devices="two hosts of one core",
        options={
            "link": {"default": "open", "help": "Mbit/s between the hosts; open by default"},
            "only": {"action": "append", "metavar": "SCHEDULE:COUNT", "help": "measure this only; may be repeated"},
        },
    )
