"""report.html and the student's card of an embedding run, from its summary.json and metrics.jsonl."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from potstill.evaluate.exported import export_facts
from potstill.evaluate.formatting import times
from potstill.evaluate.report import pictures
from potstill.evaluate.report.render import Headline, render
from potstill.evaluate.summary import read_record
from potstill.evaluate.verdict import leakage

_METRICS = {
    "scores": ("Human scores", "Spearman's correlation of the similarity of pairs with human scores."),
    "all_pairs": ("All pairs", "Spearman's correlation of all pairwise similarities with the teacher's."),
    "recall": ("Recall at 10", "The share of the teacher's ten nearest neighbours that are among its own ten nearest."),
}

_OTHER_DOMAIN = 0.9  # AUC; STS-B dev and train have 0.65, summaries and their sentences 0.80, summaries and STS-B 0.93


def write_embedding_report(run_directory: Path) -> Path:
    """Write report.html, one self-contained page, and student/README.md; return the page's path."""
    path, expected = run_directory / "summary.json", "the summary of an embedding run"
    summary = read_record(path, "embedding", expected, "Finish the run first.", "none")
    rows, space = summary["rows"], summary["space"]
    facts = {"summary": summary, "verdict": embedding_verdict(summary), "table": embedding_table(rows)}
    facts |= export_facts(run_directory)
    front = {f"focus: {name}": row for name, row in summary["front"].items()}
    front |= {name: rows[name] for name in ("PCA", "PCA uncentred")}
    close = "recall" if rows["student"]["scores"] is None else "scores"
    points = {name: (row["all_pairs"], row[close]) for name, row in front.items()}
    lines = map(json.loads, (run_directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    curve = {"student": [(line["epoch"], line["all_pairs"]) for line in lines if line["run"] == "student"]}
    student = run_directory / "student"
    if student.is_dir():
        reads_text = (student / "modules.json").exists()
        render("embedding_card.md.j2", student / "README.md", **facts, reads_text=reads_text)
    return render(
        "embedding.html.j2",
        run_directory / "report.html",
        **facts,
        headlines=list(_headlines(rows)),
        models=list(rows),
        space={name: pictures.space(f"{name} space", space[name], space["hues"]) for name in ("teacher", "student")},
        front=pictures.front(points, "all pairs, rank correlation with the teacher", _METRICS[close][0]),
        close=_METRICS[close][0],
        curve=pictures.curves("correlation", "Held-out rank correlation", curve, unit="epoch", digits=3),
        recipe=(run_directory / "recipe.yaml").read_text(encoding="utf-8"),
    )


def embedding_verdict(summary: Mapping[str, Any]) -> str:
    """Compare the student with PCA in one sentence."""
    if leak := leakage(summary.get("eval_in_train")):
        return leak
    teacher, student, pca = (summary["rows"][name] for name in ("teacher", "student", "PCA"))
    measured = {key: name for key, (name, _) in _METRICS.items() if student[key] is not None}
    better = [student[key] > pca[key] for key in measured]
    opening = "better than" if all(better) else "in some ways better than" if any(better) else "not better than"
    figures = ", ".join(f"{name.lower()} {student[key]:.3f} (PCA {pca[key]:.3f})" for key, name in measured.items())
    dimensions = f"{student['dimensions']} of the teacher's {teacher['dimensions']} dimensions"
    auc = summary.get("domain_auc")
    if auc is None or auc < _OTHER_DOMAIN:
        return f"With {dimensions}, held out, the student is {opening} PCA: {figures}."
    return (
        f"With {dimensions}, out of domain, the student is {opening} PCA: {figures}. The held-out rows are of another "
        f"domain than the training rows: a linear classifier of the teacher's vectors tells them apart (AUC {auc:.2f})."
    )


def embedding_table(rows: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One line for each metric, with a cell for each model."""
    table = [{"name": "Dimensions", "meaning": "", "cells": [str(row["dimensions"]) for row in rows.values()]}]
    for key, (name, meaning) in _METRICS.items():
        if rows["teacher"][key] is not None:
            cells = [f"{row[key]:.3f}" for row in rows.values()]
            table.append({"name": name, "meaning": meaning, "cells": cells})
    return table


def _headlines(rows: Mapping[str, Any]) -> Iterator[Headline]:
    student, pca, teacher = (rows[name] for name in ("student", "PCA", "teacher"))
    ratio = f"{times(teacher['dimensions'] / student['dimensions'])}×"
    yield Headline(ratio, "fewer numbers", f"{student['dimensions']} against {teacher['dimensions']} a vector")
    for key, (name, _) in _METRICS.items():
        if student[key] is not None:
            yield Headline(f"{student[key]:.2f}", name.lower(), f"PCA has {pca[key]:.2f}")
