"""What an embedding run came to: report.html and the student's card, from the run's records."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from potstill.errors import DataError
from potstill.evaluate.report import pictures
from potstill.evaluate.report.render import render

_MEASURES = {
    "scores": ("People's scores", "Spearman's correlation of the similarity of pairs with what people say of them."),
    "all_pairs": (
        "All pairs",
        "Spearman's correlation of all pairwise similarities with the teacher's: the whole map.",
    ),
    "recall": ("Recall at 10", "The share of the teacher's ten nearest that are among its own ten nearest."),
}


def write_embedding_report(run_directory: Path) -> Path:
    """Write report.html, one self-contained page, and student/README.md, from summary.json and metrics.jsonl.

    Args:
        run_directory: of a run of kind embedding.

    Returns:
        The page's path.

    Raises:
        DataError: the records are missing or not those of such a run.
    """
    summary = _read(run_directory / "summary.json")
    facts = {"summary": summary, "verdict": embedding_verdict(summary), "table": _table(summary["rows"])}
    front = {f"focus: {name}": row for name, row in summary["front"].items()}
    front |= {name: summary["rows"][name] for name in ("PCA", "PCA uncentred")}
    close = "recall" if summary["rows"]["student"]["scores"] is None else "scores"
    render(
        "embedding.html.j2",
        run_directory / "report.html",
        **facts,
        headlines=_headlines(summary),
        models=list(summary["rows"]),
        space={
            name: pictures.space(f"{name} space", summary["space"][name], summary["space"]["hues"])
            for name in ("teacher", "student")
        },
        front=pictures.front(
            {name: (row["all_pairs"], row[close]) for name, row in front.items()},
            "all pairs, rank correlation with the teacher",
            _MEASURES[close][0],
        ),
        close=_MEASURES[close][0],
        curve=pictures.correlation_curve(_curve(run_directory / "metrics.jsonl")),
        recipe=(run_directory / "recipe.yaml").read_text(encoding="utf-8"),
    )
    if (run_directory / "student").is_dir():
        reads = (run_directory / "student" / "modules.json").exists()
        render("embedding_card.md.j2", run_directory / "student" / "README.md", **facts, reads=reads)
    return run_directory / "report.html"


def embedding_verdict(summary: Mapping[str, Any]) -> str:
    """What the run shows, in one sentence, whichever way it went."""
    student, pca = summary["rows"]["student"], summary["rows"]["PCA"]
    said = []
    for key, (name, _) in _MEASURES.items():
        if student[key] is not None:
            said.append(f"{name.lower()} {student[key]:.3f} (PCA {pca[key]:.3f})")
    won = [student[key] > pca[key] for key in _MEASURES if student[key] is not None]
    opening = "better than" if all(won) else "not better than" if not any(won) else "in some ways better than"
    return (
        f"With {student['dimensions']} of the teacher's {summary['rows']['teacher']['dimensions']} dimensions, held "
        f"out, the student is {opening} PCA: {', '.join(said)}."
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        summary = None
    if not isinstance(summary, dict) or summary.get("kind") != "embedding":
        raise DataError(f"report: expected the summary of an embedding run in {path}, got none. Finish the run first.")
    return summary


def _table(rows: Mapping[str, Any]) -> list[dict[str, Any]]:
    table = [{"name": "Dimensions", "meaning": "", "cells": [str(row["dimensions"]) for row in rows.values()]}]
    for key, (name, meaning) in _MEASURES.items():
        values = [row[key] for row in rows.values()]
        if values[0] is not None:
            table.append({"name": name, "meaning": meaning, "cells": [f"{value:.3f}" for value in values]})
    return table


def _headlines(summary: Mapping[str, Any]) -> list[dict[str, str]]:
    student, pca, teacher = (summary["rows"][name] for name in ("student", "PCA", "teacher"))
    ratio = teacher["dimensions"] / student["dimensions"]
    found = [
        {
            "name": "fewer numbers",
            "value": f"{ratio:.0f}×" if ratio >= 9.95 else f"{ratio:.1f}×",
            "detail": f"{student['dimensions']} against {teacher['dimensions']} a vector",
        }
    ]
    for key, (name, _) in _MEASURES.items():
        if student[key] is not None:
            found.append({"name": name.lower(), "value": f"{student[key]:.2f}", "detail": f"PCA has {pca[key]:.2f}"})
    return found


def _curve(path: Path) -> list[tuple[float, float]]:
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [(line["epoch"], line["all_pairs"]) for line in lines if line["run"] == "student"]
