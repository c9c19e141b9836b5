"""The page of a shape search: search.html, from search.json."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from potstill.evaluate.report import canvas
from potstill.evaluate.report.render import render
from potstill.evaluate.summary import read_record


def write_search_report(directory: Path) -> Path:
    """Write search.html, one self-contained page, from search.json; return its path."""
    record = read_search(directory)
    rows = [row | {"number": number} for number, row in enumerate(record["shapes"], 1)]
    steps = sorted({step for row in rows for step, _ in row["losses"]})
    return render(
        "search.html.j2",
        directory / "search.html",
        record=record,
        rows=sorted(rows, key=lambda row: (-row["losses"][-1][0], row["losses"][-1][1])),
        chosen=record["chosen"] + 1,
        steps=steps,
        picture=_rounds(rows, record["chosen"]),
    )


def read_search(directory: Path) -> dict[str, Any]:
    advice = "Finish it with potstill run --resume, or potstill design --search."
    return read_record(directory / "search.json", "search", "the record of a shape search", advice)


def _rounds(rows: Sequence[dict[str, Any]], chosen: int) -> Markup:
    """The loss of each shape after each round, with its number at the last one."""
    figure, axes = canvas.create("steps of training")
    ends = []
    for place, row in enumerate(rows):
        curve = [(step, loss) for step, loss in row["losses"] if math.isfinite(loss)]
        if not curve:
            continue
        model = "student" if place == chosen else "baseline"
        canvas.line(axes, model, curve, marked=True)
        step, loss = curve[-1]
        ends.append(f"{row['number']}: {loss:.3f} after {step} steps")
        canvas.annotate(axes, str(row["number"]), curve[-1], model, (7, 0), va="center")
    axes.margins(x=0.06)
    return canvas.svg(figure, "rounds", f"Loss over steps of training: {'; '.join(ends)}.")
