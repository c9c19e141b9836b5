"""The pages of a run: report.html, and the student's model card."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from markupsafe import Markup

from potstill.errors import DataError
from potstill.evaluate import summary as records
from potstill.evaluate.formatting import count, milliseconds, minus, nats, percent, size
from potstill.evaluate.measures import TASK_LABELS, of_run
from potstill.evaluate.report import pictures
from potstill.evaluate.report.diagnosis import read_diagnosis
from potstill.evaluate.report.render import Headline, ratio_headline, render
from potstill.evaluate.summary import MODELS, RUNS, Curves, Summary
from potstill.evaluate.verdict import verdict

# Least distance of two labels on a phone, in percent of the line.
_LABEL_DISTANCE = 25


def write_report(run_directory: Path) -> Path:
    """Write report.html, one self-contained page, from summary.json, metrics.jsonl and recipe.yaml; return its path.

    Raises:
        DataError: a file is missing or malformed, or summary.json lacks required values.
    """
    summary = records.read_summary(run_directory)
    held_out, training = records.read_metrics(run_directory / "metrics.jsonl")
    return render(
        "report.html.j2",
        run_directory / "report.html",
        **_facts(summary),
        headlines=list(_headlines(summary)),
        gap=_gap(summary.rows),
        curves=_learning_curves(summary, held_out, training),
        positions=_positions(summary.kl_by_position),
        diagnosis=read_diagnosis(run_directory / "diagnose.json"),
        recipe=records.read_text(run_directory / "recipe.yaml"),
    )


def write_student_card(run_directory: Path) -> Path:
    """Write student/README.md, a Hugging Face model card, from summary.json; return its path.

    Raises:
        DataError: the summary cannot be read, or there is no saved student.
    """
    summary = records.read_summary(run_directory)
    folder = run_directory / "student"
    if not folder.is_dir():
        raise DataError(f"report: expected a saved student in {folder}, got nothing. Finish the run first.")
    return render("student_card.md.j2", folder / "README.md", **_facts(summary))


def _facts(summary: Summary) -> dict[str, Any]:
    """Data of both the page and the card."""
    training, train_tokens = summary.training, summary.data.train_tokens
    passes = None
    if training.steps and training.tokens_per_step and train_tokens:
        passes = f"{training.steps * training.tokens_per_step / train_tokens:.1f}"
    return {
        "summary": summary,
        "verdict": verdict(summary),
        "models": list(summary.rows.present()),
        "table": list(_table(summary)),
        "labels": TASK_LABELS[summary.task],
        "gap_formula": _gap_formula(summary),
        "passes": passes,
    }


def _table(summary: Summary) -> Iterator[dict[str, Any]]:
    by_bytes = summary.rows.student.bits_per_byte is not None
    for measure in of_run(summary.task, by_bytes):
        values = {model: getattr(scores, measure.key) for model, scores in summary.rows.present().items()}
        if all(value is None for value in values.values()):
            continue
        trained = [values[run] for run in RUNS if values.get(run) is not None]
        best = measure.better(*trained) if measure.better and len(set(trained)) == 2 else None
        cells = [
            {
                "model": model,
                "text": "–" if value is None else measure.write(value),
                "best": best is not None and model in RUNS and value == best,
            }
            for model, value in values.items()
        ]
        yield {"name": measure.name, "meaning": measure.meaning, "cells": cells}


def _headlines(summary: Summary) -> Iterator[Headline]:
    teacher, baseline, student = summary.rows.teacher, summary.rows.baseline, summary.rows.student
    if teacher and teacher.parameters and student.parameters:
        detail = f"{count(student.parameters)} against {count(teacher.parameters)} parameters"
        yield ratio_headline(teacher.parameters / student.parameters, "smaller", "larger", "the same size", detail)
    if (adapter := summary.adapter) is not None:
        saved = f", {size(adapter.bytes)} on disk" if adapter.bytes is not None else ", merged"
        detail = f"{adapter.title}: {count(adapter.trained)}{saved}"
        yield Headline(percent(adapter.share, 1), "of its parameters trained", detail)
    if summary.gap_closed is not None:
        yield Headline(percent(summary.gap_closed), "of the gap closed", "from baseline to teacher")
    if student.agreement is not None:
        detail = f"on the most likely {TASK_LABELS[summary.task].output}"
        if baseline and baseline.agreement is not None:
            detail = f"the baseline has {percent(baseline.agreement, 1)}"
        yield Headline(percent(student.agreement, 1), "agreement with the teacher", detail)
    if teacher and teacher.latency_ms and student.latency_ms:
        detail = f"{milliseconds(student.latency_ms)} against {milliseconds(teacher.latency_ms)}"
        yield ratio_headline(teacher.latency_ms / student.latency_ms, "faster", "slower", "as fast", detail)


def _gap(rows: records.ScoresByModel) -> dict[str, Any] | None:
    """Place each model between the highest and the lowest loss, in percent; None if labels would overlap."""
    losses = {model: scores.loss for model, scores in rows.present().items() if math.isfinite(scores.loss)}
    high, low = max(losses.values(), default=0.0), min(losses.values(), default=0.0)
    if len(losses) < len(MODELS) or high == low:
        return None
    at = {model: round(100 * (high - loss) / (high - low), 2) for model, loss in losses.items()}
    if abs(at["teacher"] - at["baseline"]) < _LABEL_DISTANCE:
        return None
    return {
        "stops": [{"model": model, "loss": losses[model], "at": at[model]} for model in MODELS],
        "left": min(at["baseline"], at["student"]),
        "width": round(abs(at["student"] - at["baseline"]), 2),
        "won": at["student"] >= at["baseline"],
    }


def _gap_formula(summary: Summary) -> str | None:
    rows = summary.rows
    if summary.gap_closed is None or not rows.teacher or not rows.baseline:
        return None
    baseline, student, teacher = (nats(scores.loss) for scores in (rows.baseline, rows.student, rows.teacher))
    return minus(f"({baseline} - {student}) / ({baseline} - {teacher}) = {percent(summary.gap_closed)}")


def _learning_curves(summary: Summary, held_out: Curves, training: Curves) -> dict[str, Markup]:
    floor = summary.curve.teacher_loss
    if floor is None and summary.rows.teacher:
        floor = summary.rows.teacher.loss
    if floor is not None and not math.isfinite(floor):
        floor = None
    curves = {}
    if held_out:
        curves["held_out"] = pictures.held_out_curves(held_out, floor)
    if training:
        curves["training"] = pictures.training_curves(training)
    return curves


def _positions(positions: records.PositionKL | None) -> dict[str, Any] | None:
    if positions is None:
        return None
    values = {
        run: [math.nan if value is None else value for value in by_position]
        for run in RUNS
        if (by_position := getattr(positions, run)) is not None
    }
    if not any(math.isfinite(value) for by_position in values.values() for value in by_position):
        return None
    pairs = list(zip(values.get("baseline", []), values["student"], strict=False))
    both = [(baseline, student) for baseline, student in pairs if math.isfinite(baseline + student)]
    return {
        "picture": pictures.kl_by_position(positions.edges, values),
        "closer": sum(student < baseline for baseline, student in both),
        "bins": len(both),
    }
