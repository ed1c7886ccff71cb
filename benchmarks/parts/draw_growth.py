"""Draws how search times grow: `draw_growth.py RECORD.json FIGURE`, the record as `search_speed.py --save` writes it.

Needs the `plot` extra; FIGURE ends in .svg, .png or .pdf.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

LABELS = {"layers": "layers", "devices": "devices", "memory": "memory per device, GiB"}
COLOURS = {"planning": "#4477aa", "pricing": "#ccbb44", "solving": "#ee6677"}


def quantity(row: dict[str, Any]) -> float:
    """What grew, from the title of the case."""
    patterns = {"layers": r"-(\d+)-layers", "devices": r"on \D+\d+x(\d+)", "memory": r"(\d+) GiB"}
    found = re.search(patterns[row["grows"]], row["case"])
    return float(found[1]) if found else 32.0  # Llama-2-7B itself is not named by its layers.


def draw(record: dict[str, Any]) -> Figure:
    """One panel per quantity: CPU seconds of the search, by what they went into."""
    figure = Figure(figsize=(10, 3.2), layout="constrained")
    panels = figure.subplots(1, len(LABELS), squeeze=False)[0]
    for panel, (grows, label) in zip(panels, LABELS.items(), strict=True):
        rows = sorted((row for row in record["results"] if row["grows"] == grows), key=quantity)
        places, bottoms = range(len(rows)), [0.0] * len(rows)
        for part, colour in COLOURS.items():
            heights = [row["cpu_s"] * row["shares"][part] for row in rows]
            panel.bar(places, heights, bottom=bottoms, color=colour, label=part)
            bottoms = [low + height for low, height in zip(bottoms, heights, strict=True)]
        panel.set_xticks(places, [f"{quantity(row):g}" for row in rows])
        panel.set_xlabel(label)
    panels[0].set_ylabel("CPU seconds")
    panels[0].legend()
    figure.suptitle(f"Search time of Llama-2-7B on one core ({record['hardware']}, {record['date']})")
    return figure


def main(record: Path, figure: Path) -> None:
    draw(json.loads(record.read_text())).savefig(figure)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
