"""Draws predicted against compiled memory: `draw_memory.py RECORD.json`; the figure lies beside the record."""

from __future__ import annotations

import json
import sys
from pathlib import Path

GIB = 2**30


def draw(record: Path) -> None:
    """Writes a scatter plot beside a record of `memory_accuracy.py`; nothing where matplotlib is not installed."""
    try:
        import matplotlib as mpl
    except ImportError:
        return
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    rows = json.loads(record.read_text())["results"]
    figure, axes = plt.subplots(figsize=(6, 6))
    for label, mark, some in (
        ("one stage", "o", [row for row in rows if row["pp"] == 1]),
        ("pipelines", "^", [row for row in rows if row["pp"] > 1]),
    ):
        peaks = [row["peak_bytes"] / GIB for row in some]
        axes.scatter(peaks, [row["predicted"]["peak_bytes"] / GIB for row in some], marker=mark, label=label)
    ends = [min(row["peak_bytes"] for row in rows) / GIB, max(row["peak_bytes"] for row in rows) / GIB]
    axes.plot(ends, ends, color="black", linewidth=0.8)
    axes.fill_between(ends, [0.9 * x for x in ends], [1.1 * x for x in ends], alpha=0.15, label="within 10 %")
    axes.set(xscale="log", yscale="log", xlabel="peak of XLA:GPU, GiB", ylabel="predicted, GiB")
    axes.set_title(f"Memory per device of {len(rows)} plans, compiled for H100s")
    axes.legend()
    figure.savefig(record.with_suffix(".png"), dpi=120, bbox_inches="tight")
    plt.close(figure)


if __name__ == "__main__":
    draw(Path(sys.argv[1]))
