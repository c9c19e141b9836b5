"""What a sweep came to, for a reader who was not there: sweep.html, from sweep.json."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from markupsafe import Markup

from potstill.data.files import write_text
from potstill.errors import DataError
from potstill.evaluate.report.page import environment
from potstill.evaluate.report.tradeoff_pictures import Dot, expectations, pareto
from potstill.evaluate.report.words import count, milliseconds, nats, percent, size, times
from potstill.evaluate.tradeoff import Limits
from potstill.models.capacity import expected_share

COSTS = {"parameters": "parameters", "bytes": "size", "latency_ms": "latency"}


def write_sweep_report(run_directory: Path) -> Path:
    """Write sweep.html, one self-contained page.

    Args:
        run_directory: of a sweep; sweep.json is in it.

    Returns:
        The page's path.

    Raises:
        DataError: there is no sweep in it.
    """
    summary = read_sweep(run_directory)
    rendered = (
        environment(autoescape=True)
        .get_template("sweep.html.j2")
        .render(
            summary=summary,
            headlines=list(_headlines(summary)),
            columns=list(summary["vary"]),
            models=[],
            table=list(_table(summary)),
            pictures={key: _pareto(summary, key) for key in ("parameters", "latency_ms")} if summary["runs"] else {},
            expected=_expected(summary),
            limits=str(Limits(**summary["limits"])),
        )
    )
    write_text(run_directory / "sweep.html", rendered)
    return run_directory / "sweep.html"


def read_sweep(directory: Path) -> dict[str, Any]:
    """The content of sweep.json."""
    path = directory / "sweep.json"
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        summary = None
    if not isinstance(summary, dict) or summary.get("kind") != "sweep":
        raise DataError(f"report: expected the summary of a sweep in {path}, got none. Finish it with --resume first.")
    return summary


def _headlines(summary: Mapping[str, Any]) -> Iterator[dict[str, str]]:
    place, teacher = summary["recommended"]["place"], summary["teacher"]
    yield {
        "value": str(len(summary["runs"])),
        "name": "students compared",
        "detail": " × ".join(f"{len(values)} of {key.rpartition('.')[2]}" for key, values in summary["vary"].items()),
    }
    if place is None:
        return
    chosen = summary["runs"][place]
    yield {"value": percent(chosen["quality"]), "name": "of the teacher's quality", "detail": f"by number {place + 1}"}
    if teacher.get("parameters"):
        yield {
            "value": f"{times(teacher['parameters'] / chosen['parameters'])}×",
            "name": "smaller",
            "detail": f"{count(chosen['parameters'])} against {count(teacher['parameters'])} parameters",
        }
    yield {"value": milliseconds(chosen["latency_ms"]), "name": "for one row", "detail": "one forward pass"}


def _table(summary: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for place, (row, prediction) in enumerate(zip(summary["runs"], summary["predictions"], strict=True)):
        fitted = prediction["fitted"]
        yield {
            "number": place + 1,
            "chosen": place == summary["recommended"]["place"],
            "values": [_said(row["values"][key]) for key in summary["vary"]],
            "cells": [
                percent(row["quality"], 1),
                nats(row["loss"]),
                count(row["parameters"]),
                size(row["bytes"]),
                milliseconds(row["latency_ms"]),
            ],
            "fronts": ", ".join(COSTS[key] for key, places in summary["fronts"].items() if place in places),
            "directory": row["directory"],
            "fitted": "–" if fitted is None else _with_range(fitted),
            "published": [percent(estimate["value"]) for estimate in prediction["published"].values()],
        }


def _with_range(estimate: Mapping[str, Any]) -> str:
    value, low, high = (percent(estimate[key]) for key in ("value", "low", "high"))
    return f"{value} ({low} to {high})"


def _said(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _pareto(summary: Mapping[str, Any], key: str) -> Markup:
    place, on_front = summary["recommended"]["place"], summary["fronts"][key]
    dots = [
        Dot(str(i + 1), row[key], row["quality"], i in on_front, i == place)
        for i, row in enumerate(summary["runs"])
        if math.isfinite(row["quality"])
    ]
    return Markup(pareto(dots, key, summary["teacher"].get(key))) if dots else Markup("")


def _expected(summary: Mapping[str, Any]) -> dict[str, Any] | None:
    """Predicted beside measured: the picture, the tasks, and how far off the sweep's own law was."""
    known = [one for one in summary["predictions"] if one["published"] and math.isfinite(one["measured"])]
    if not known:
        return None
    tasks = list(known[0]["published"])
    least, most = (pick(one["compression"] for one in known) for pick in (min, max))
    along = [least * (most / least) ** (i / 24) for i in range(25)]
    published = {task: [(c, expected_share(c, task).value) for c in along] for task in tasks}
    smaller = [one for one in known if one["compression"] > 1 and one["measured"] > 0]
    exponents = [-math.log(one["measured"]) / math.log(one["compression"]) for one in smaller]
    mean = sum(exponents) / len(exponents) if exponents else None
    errors = [abs(one["fitted"]["value"] - one["measured"]) for one in known if one["fitted"]]
    return {
        "picture": Markup(
            expectations(
                [(one["compression"], one["measured"]) for one in known],
                published,
                [] if mean is None else [(c, c**-mean) for c in along],
            )
        ),
        "tasks": tasks,
        "sources": list(dict.fromkeys(known[0]["published"][task]["source"] for task in tasks)),
        "exponent": None if mean is None else f"{mean:.2f}",
        "error": None if not errors else percent(sum(errors) / len(errors), 1),
        "within": sum(
            one["fitted"]["low"] <= one["measured"] <= one["fitted"]["high"] for one in known if one["fitted"]
        ),
        "fitted": len(errors),
    }
