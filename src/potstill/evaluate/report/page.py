"""What a run came to, for a reader who was not there: report.html, and the student's model card."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from potstill.data.files import write_text
from potstill.errors import DataError
from potstill.evaluate.measures import WORDS, of_run
from potstill.evaluate.report import pictures
from potstill.evaluate.report.diagnosis import told
from potstill.evaluate.report.words import count, duration, judge, milliseconds, minus, nats, percent, size, times
from potstill.evaluate.summary import (
    MODELS,
    RUNS,
    Curves,
    Positions,
    Rows,
    Summary,
    checked,
    read_metrics,
    read_summary,
    read_text,
)

# Percent of the line between two labels, on a phone.
_LABELS_TOUCH = 25


def write_report(run_directory: Path) -> Path:
    """Write report.html, one self-contained page, from summary.json, metrics.jsonl and recipe.yaml.

    Args:
        run_directory: where the three files are, and where the page goes.

    Returns:
        The page's path.

    Raises:
        DataError: a file is missing, is not JSON, or does not say what a summary must.
    """
    summary = read_summary(run_directory)
    held_out, training = read_metrics(run_directory / "metrics.jsonl")
    page = environment(autoescape=True).get_template("report.html.j2")
    rendered = page.render(
        **_facts(summary),
        headlines=list(_headlines(summary)),
        gap=_gap(summary.rows),
        curves=_learning_curves(summary, held_out, training),
        positions=_positions(summary.kl_by_position),
        continuations=summary.continuations,
        diagnosis=told(run_directory / "diagnose.json"),
        recipe=read_text(run_directory / "recipe.yaml"),
    )
    write_text(run_directory / "report.html", rendered)
    return run_directory / "report.html"


def write_student_card(run_directory: Path) -> Path:
    """Write student/README.md, a Hugging Face model card, from summary.json.

    Args:
        run_directory: a run whose student has been saved.

    Returns:
        The card's path.

    Raises:
        DataError: the summary cannot be read, or there is no student.
    """
    summary = read_summary(run_directory)
    folder = run_directory / "student"
    if not folder.is_dir():
        raise DataError(f"report: expected a saved student in {folder}, got nothing. Finish the run first.")
    card = environment(autoescape=False).get_template("student_card.md.j2")
    write_text(folder / "README.md", card.render(**_facts(summary)))
    return folder / "README.md"


def verdict(summary: dict[str, Any]) -> str:
    """What the run shows, in one sentence, whichever way it went.

    Args:
        summary: what summary.json holds; rows.student.loss is enough.

    Raises:
        DataError: it does not hold that.
    """
    return judge(checked(summary, "the summary"))


def environment(*, autoescape: bool) -> Environment:
    """Where the templates are, and the filters that they use."""
    environment = Environment(
        loader=PackageLoader("potstill.evaluate", "report"),
        autoescape=autoescape,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "count": count,
        "duration": duration,
        "nats": nats,
        "percent": percent,
        "size": size,
        "number": _number,
        "quoted": _quoted,
        "visible": _visible,
        "cell": _cell,
    }
    return environment


def _number(value: float) -> str:
    return f"{value:g}"


def _quoted(text: str) -> str:
    """With its spaces and ends of lines to be seen."""
    return json.dumps(text, ensure_ascii=False)


def _visible(text: str) -> str:
    """Control characters, which HTML forbids or which turn the text around them, as a mark that shows."""
    return re.sub(
        r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]",
        "\N{REPLACEMENT CHARACTER}",
        text.replace("\r\n", "\n"),
    )


def _cell(text: str) -> str:
    """Text inside a line or a table of Markdown."""
    return re.sub(r"([\\`*_|<>\[\]])", r"\\\1", " ".join(text.split()))


# The parts of the page.


@dataclass(frozen=True)
class Headline:
    value: str
    name: str
    detail: str


def _facts(summary: Summary) -> dict[str, Any]:
    """What the page and the card both say."""
    models = [model for model, _ in summary.rows.named()]
    return {
        "summary": summary,
        "verdict": judge(summary),
        "models": models,
        "table": list(_table(summary)),
        "words": WORDS[summary.task],
        "gap_formula": _gap_formula(summary),
        "passes": _passes(summary),
    }


def _table(summary: Summary) -> Iterator[dict[str, Any]]:
    by_bytes = summary.rows.student.bits_per_byte is not None
    for measure in of_run(summary.task, by_bytes):
        values = {model: getattr(row, measure.key) for model, row in summary.rows.named()}
        if all(value is None for value in values.values()):
            continue
        trained = [values[run] for run in RUNS if values.get(run) is not None]
        best = measure.better(*trained) if measure.better and len(set(trained)) == 2 else None
        yield {
            "name": measure.name,
            "meaning": measure.meaning,
            "cells": [
                {
                    "model": model,
                    "text": "–" if value is None else measure.write(value),
                    "best": best is not None and model in RUNS and value == best,
                }
                for model, value in values.items()
            ],
        }


def _headlines(summary: Summary) -> Iterator[Headline]:
    teacher, baseline, student = summary.rows.teacher, summary.rows.baseline, summary.rows.student
    if teacher and teacher.parameters and student.parameters:
        detail = f"{count(student.parameters)} against {count(teacher.parameters)} parameters"
        yield _ratio(teacher.parameters / student.parameters, ("smaller", "larger", "the same size"), detail)
    if summary.adapter is not None:
        saved = f", {size(summary.adapter.bytes)} on disk" if summary.adapter.bytes is not None else ", merged"
        detail = f"{summary.adapter.title}: {count(summary.adapter.trained)}{saved}"
        yield Headline(percent(summary.adapter.share, 1), "of its parameters trained", detail)
    if summary.gap_closed is not None:
        yield Headline(percent(summary.gap_closed), "of the gap closed", "from baseline to teacher")
    if student.agreement is not None:
        other = baseline.agreement if baseline else None
        detail = f"the baseline has {percent(other, 1)}" if other is not None else f"on {WORDS[summary.task].likeliest}"
        yield Headline(percent(student.agreement, 1), "agreement with the teacher", detail)
    if teacher and teacher.latency_ms and student.latency_ms:
        detail = f"{milliseconds(student.latency_ms)} against {milliseconds(teacher.latency_ms)}"
        yield _ratio(teacher.latency_ms / student.latency_ms, ("faster", "slower", "as fast"), detail)


def _ratio(ratio: float, names: tuple[str, str, str], detail: str) -> Headline:
    more, less, same = names
    if 0.95 < ratio < 1.05:
        return Headline("1×", same, detail)
    return Headline(f"{times(max(ratio, 1 / ratio))}×", more if ratio > 1 else less, detail)


def _gap(rows: Rows) -> dict[str, Any] | None:
    """Where each model stands between the highest loss and the lowest, in percent, and what the student won or lost."""
    losses = {model: row.loss for model, row in rows.named() if math.isfinite(row.loss)}
    high, low = max(losses.values(), default=0.0), min(losses.values(), default=0.0)
    if len(losses) < len(MODELS) or high == low:
        return None
    at = {model: round(100 * (high - loss) / (high - low), 2) for model, loss in losses.items()}
    if abs(at["teacher"] - at["baseline"]) < _LABELS_TOUCH:
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
    baseline = nats(rows.baseline.loss)
    return minus(
        f"({baseline} - {nats(rows.student.loss)}) / ({baseline} - {nats(rows.teacher.loss)}) = "
        f"{percent(summary.gap_closed)}"
    )


def _passes(summary: Summary) -> str | None:
    """How often the training text was read."""
    training, tokens = summary.training, summary.data.train_tokens
    if not (training.steps and training.tokens_per_step and tokens):
        return None
    return f"{training.steps * training.tokens_per_step / tokens:.1f}"


def _learning_curves(summary: Summary, held_out: Curves, training: Curves) -> dict[str, Markup]:
    floor = summary.curve.teacher_loss
    if floor is None and summary.rows.teacher:
        floor = summary.rows.teacher.loss
    if floor is not None and not math.isfinite(floor):
        floor = None
    curves = {}
    if held_out:
        curves["held_out"] = Markup(pictures.held_out_curves(held_out, floor))
    if training:
        curves["training"] = Markup(pictures.training_curves(training))
    return curves


def _positions(positions: Positions | None) -> dict[str, Any] | None:
    if positions is None:
        return None
    values = {
        run: [math.nan if value is None else value for value in listed]
        for run in RUNS
        if (listed := getattr(positions, run)) is not None
    }
    if not any(math.isfinite(value) for listed in values.values() for value in listed):
        return None
    pairs = list(zip(values.get("baseline", []), values["student"], strict=False))
    both = [(baseline, student) for baseline, student in pairs if math.isfinite(baseline + student)]
    return {
        "picture": Markup(pictures.kl_by_position(positions.edges, values)),
        "nearer": sum(student < baseline for baseline, student in both),
        "stretches": len(both),
    }
