"""Draws how search times grow: `draw_growth.py RECORD.json FIGURE`, the record as `search_speed.py --save` writes it.

Needs the `plot` extra; FIGURE ends in .svg, .png or .pdf.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

COLOURS = {"planning": "#4477aa", "pricing": "#ccbb44", "solving": "#ee6677"}


def draw(record: dict[str, Any]) -> Figure:
    """One panel per quantity that grows: CPU seconds of the search, by what they went into."""
    quantities = list(dict.fromkeys(row["grows"] for row in record["results"] if row["grows"]))
    figure = Figure(figsize=(10, 3.2), layout="constrained")
    panels = figure.subplots(1, len(quantities), squeeze=False)[0]
    for panel, grows in zip(panels, quantities, strict=True):
        rows = sorted((row for row in record["results"] if row["grows"] == grows), key=lambda row: row["grown_to"])
        places, bottoms = range(len(rows)), [0.0] * len(rows)
        for part, colour in COLOURS.items():
            heights = [row["cpu_s"] * row["shares"][part] for row in rows]
            panel.bar(places, heights, bottom=bottoms, color=colour, label=part)
            bottoms = [low + height for low, height in zip(bottoms, heights, strict=True)]
        panel.set_xticks(places, [str(row["grown_to"]) for row in rows])
        panel.set_xlabel(grows)
    panels[0].set_ylabel("CPU seconds")
    panels[0].legend()
    figure.suptitle(f"Search time of Llama-2-7B on one core ({record['hardware']}, {record['date']})")
    return figure


def main(record: Path, figure: Path) -> None:
    draw(json.loads(record.read_text())).savefig(figure)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
