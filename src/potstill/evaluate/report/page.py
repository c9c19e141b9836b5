"""The pages of a run: report.html, and the student's model card."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from potstill.data.show import ShownRow, runs
from potstill.errors import DataError
from potstill.evaluate import summary as records
from potstill.evaluate.exported import export_facts
from potstill.evaluate.formatting import count, minus, nats, percent, size
from potstill.evaluate.measures import TASK_LABELS, of_run
from potstill.evaluate.report import pictures
from potstill.evaluate.report.canvas import thin
from potstill.evaluate.report.diagnosis import read_diagnosis
from potstill.evaluate.report.render import FASTER, SMALLER, WITHIN_SPREAD, Headline, ratio_headline, render
from potstill.evaluate.summary import RUNS, Summary
from potstill.evaluate.verdict import leakage, verdict
from potstill.files import write_text

ROWS_FILE = "rows.json"
_GAP = ("teacher", "baseline", "student")
_LABEL_DISTANCE = 25  # least distance of two labels on a phone, in percent of the line


def write_report(run_directory: Path) -> Path:
    """Write report.html, one self-contained page, from summary.json, metrics.jsonl and recipe.yaml; return its path."""
    summary = records.read_summary(run_directory)
    held_out, training = records.read_metrics(run_directory / "metrics.jsonl")
    losses = (summary.curve.teacher_loss, summary.rows.teacher.loss if summary.rows.teacher else None)
    floor = next((loss for loss in losses if loss is not None), math.nan)
    curves = {}
    if held_out:
        curves["held_out"] = pictures.curves(
            "held-out", "Held-out cross-entropy in nats", held_out, floor if math.isfinite(floor) else None
        )
    if training:
        thinned = {run: thin(curve) for run, curve in training.items()}
        curves["training"] = pictures.curves("training", "Training loss", thinned, markers=1)
    return render(
        "report.html.j2",
        run_directory / "report.html",
        **_facts(summary, run_directory),
        headlines=list(_headlines(summary)),
        gap=_gap(summary.rows),
        curves=curves,
        positions=_positions(summary.kl_by_position),
        trained_on=_read_rows(run_directory / ROWS_FILE),
        diagnosis=read_diagnosis(run_directory / "diagnose.json"),
        recipe=records.read_text(run_directory / "recipe.yaml"),
    )


def write_rows(rows: Sequence[ShownRow], run_directory: Path) -> None:
    """Write rows.json, the first training rows, for the report."""
    records = [{"title": row.title, "runs": runs(row.tokens), "teacher": runs(row.teacher or ())} for row in rows]
    write_text(run_directory / ROWS_FILE, json.dumps(records, ensure_ascii=False))


def _read_rows(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else []


def write_student_card(run_directory: Path) -> Path:
    """Write student/README.md, a Hugging Face model card, from summary.json; return its path."""
    summary = records.read_summary(run_directory)
    folder = run_directory / "student"
    if not folder.is_dir():
        raise DataError(f"report: expected a saved student in {folder}, got nothing. Finish the run first.")
    return render("student_card.md.j2", folder / "README.md", **_facts(summary, run_directory))


def _facts(summary: Summary, run_directory: Path) -> dict[str, Any]:
    """Data of both the page and the card."""
    training, train_tokens, rows = summary.training, summary.data.train_tokens, summary.rows
    passes = gap_formula = None
    if training.steps and training.tokens_per_step and train_tokens:
        passes = f"{training.steps * training.tokens_per_step / train_tokens:.1f}"
    if summary.gap_closed is not None and rows.teacher and rows.baseline:
        baseline, student, teacher = (nats(scores.loss) for scores in (rows.baseline, rows.student, rows.teacher))
        gap_formula = f"({baseline} - {student}) / ({baseline} - {teacher}) = {percent(summary.gap_closed)}"
    return {
        "summary": summary,
        "verdict": verdict(summary),
        "models": list(rows.columns()),
        "table": list(_table(summary)),
        "labels": TASK_LABELS[summary.task],
        "gap_formula": gap_formula and minus(gap_formula),
        "passes": passes,
        **export_facts(run_directory),
    }


def _table(summary: Summary) -> Iterator[dict[str, Any]]:
    columns = summary.rows.columns()
    for measure in of_run(summary.task, summary.rows.student.bits_per_byte is not None):
        values = {model: getattr(scores, measure.key) for model, scores in columns.items()}
        trained = [values[run] for run in RUNS if values.get(run) is not None]
        best = measure.better(*trained) if measure.better and len(set(trained)) > 1 else None
        texts = {model: "–" if value is None else measure.write(value) for model, value in values.items()}
        winners = [run for run in RUNS if best is not None and values.get(run) == best]
        cells = [{"model": model, "text": text, "best": model in winners} for model, text in texts.items()]
        if any(value is not None for value in values.values()):
            yield {"name": measure.name, "meaning": measure.meaning, "cells": cells}


def _headlines(summary: Summary) -> Iterator[Headline]:
    teacher, baseline, student = summary.rows.teacher, summary.rows.baseline, summary.rows.student
    uncut = summary.rows.uncut_teacher
    if uncut and uncut.parameters and student.parameters:
        yield ratio_headline(uncut.parameters, student.parameters, SMALLER)
    if (adapter := summary.adapter) is not None:
        saved = f", {size(adapter.bytes)} on disk" if adapter.bytes is not None else ", merged"
        detail = f"{adapter.title}: {count(adapter.trained)}{saved}"
        yield Headline(percent(adapter.share, 1), "of its parameters trained", detail)
    if summary.gap_closed is not None and leakage(summary.data.eval_in_train) is None:
        yield Headline(percent(summary.gap_closed), "of the gap closed", "from baseline to teacher")
    if student.agreement is not None:
        detail = f"on the most likely {TASK_LABELS[summary.task].output}"
        if baseline and baseline.agreement is not None:
            detail = f"the baseline has {percent(baseline.agreement, 1)}"
        yield Headline(percent(student.agreement, 1), "agreement with the teacher", detail)
    if teacher and teacher.latency_ms and student.latency_ms:
        words = FASTER if _differ(summary) else WITHIN_SPREAD
        yield ratio_headline(teacher.latency_ms, student.latency_ms, words)


def _differ(summary: Summary) -> bool:
    """Whether the middle halves of the teacher's and the student's latencies are apart, where they were recorded."""
    teacher, student = (summary.latency.get(name) for name in ("teacher", "student"))
    return teacher is None or student is None or teacher.low_ms > student.high_ms or student.low_ms > teacher.high_ms


def _gap(rows: records.ScoresByModel) -> dict[str, Any] | None:
    """Place the models of the gap between the highest and the lowest loss, in percent; None if labels would overlap."""
    present = {model: scores for model, scores in rows.present().items() if model in _GAP}
    losses = {model: scores.loss for model, scores in present.items() if math.isfinite(scores.loss)}
    high, low = max(losses.values(), default=0.0), min(losses.values(), default=0.0)
    if len(losses) < len(_GAP) or high == low:
        return None
    at = {model: round(100 * (high - loss) / (high - low), 2) for model, loss in losses.items()}
    if abs(at["teacher"] - at["baseline"]) < _LABEL_DISTANCE:
        return None
    return {
        "stops": [{"model": model, "loss": losses[model], "at": at[model]} for model in _GAP],
        "left": min(at["baseline"], at["student"]),
        "width": round(abs(at["student"] - at["baseline"]), 2),
        "won": at["student"] >= at["baseline"],
    }


def _positions(positions: records.PositionKL | None) -> dict[str, Any] | None:
    kl = {} if positions is None else {run: getattr(positions, run) for run in RUNS}
    values = {run: [math.nan if x is None else x for x in by_bin] for run, by_bin in kl.items() if by_bin is not None}
    if positions is None or not any(math.isfinite(value) for by_bin in values.values() for value in by_bin):
        return None
    pairs = zip(values.get("baseline", []), values["student"], strict=False)
    closer = [student < baseline for baseline, student in pairs if math.isfinite(baseline + student)]
    picture = pictures.kl_by_position(positions.edges, values)
    return {"picture": picture, "closer": sum(closer), "bins": len(closer)}
