"""One run for each combination of a recipe's values, compared."""

from __future__ import annotations

import copy
import gc
import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from accelerate import PartialState
from rich.console import Console

from potstill.errors import PotstillError, RecipeError, RunError, UserError, is_out_of_memory, one_line
from potstill.evaluate import tradeoff
from potstill.evaluate.exported import FOLDER, read_exports
from potstill.evaluate.report.sweep import FILE_COSTS, write_sweep_report
from potstill.evaluate.speed import latency_ms
from potstill.evaluate.summary import is_finished
from potstill.evaluate.verdict import leakage
from potstill.evaluate.versions import versions
from potstill.files import write_json
from potstill.losses.alignment import DISTRIBUTION_TASKS
from potstill.models.loading import load_model, suppress_warnings
from potstill.models.size import size_of
from potstill.runs.config.document import read_list
from potstill.runs.config.run import Recipe
from potstill.runs.progress import part
from potstill.runs.ranks import alone_in_process, join_ranks, lock_for_ranks
from potstill.runs.ray import start_ray
from potstill.runs.run import RunResult, run
from potstill.runs.terminal import Terminal

Engine = Literal["process", "ray"]

# Keys that may not vary, and why.
_FIXED = {
    "output": "Each run has a directory in the sweep's.",
    "name": "Each run is named after its values.",
    "data.eval": "Runs are compared on the same held-out text.",
}


class Point(NamedTuple):
    """One combination of values, its label, and its recipe with its own output directory."""

    values: dict[str, Any]
    label: str
    recipe: Recipe

    @property
    def directory(self) -> Path:
        return Path(self.recipe.output)


@dataclass(frozen=True)
class SweepResult(RunResult):
    """A finished sweep: a folder with sweep.json, sweep.html and each run's folder, and the content of sweep.json."""


def read_axes(texts: Iterable[str]) -> dict[str, list[Any]]:
    """Parse `KEY=VALUE,VALUE,...`; values are YAML, so lists and mappings may contain commas.

    >>> read_axes(["train.learning_rate=1e-3,3e-3"])
    {'train.learning_rate': [0.001, 0.003]}

    Raises:
        RecipeError: a text has no key or no value, or a key that may not vary.
    """
    axes: dict[str, list[Any]] = {}
    for text in texts:
        key, _, value_list = text.partition("=")
        values = read_list(value_list, "--vary")
        if not key or not values:
            raise RecipeError(f"--vary: expected KEY=VALUE,VALUE such as objective.0.temperature=1,2,4, got {text}.")
        for fixed, why in _FIXED.items():
            if f"{key}.".startswith(f"{fixed}."):
                raise RecipeError(f"--vary {key}: expected another key, got one that may not vary. {why}")
        if key in axes:
            raise RecipeError(f"--vary {key}: expected each key once, got it twice. Give all its values together.")
        axes[key] = [*{json.dumps(value, default=str): value for value in values}.values()]
    if not axes:
        raise RecipeError("sweep: expected --vary KEY=VALUE,VALUE, got none. For a single run use potstill run.")
    return axes


def grid(values: dict[str, Any], axes: Mapping[str, Sequence[Any]], out: Path, origin: str = "recipe") -> list[Point]:
    """Make a recipe for each combination of values; the last axis varies fastest.

    Raises:
        RecipeError: a combination is not a valid recipe; all mistakes are listed, each once, for the recipe `origin`.
    """
    short = _short_keys([*axes])
    points: list[Point] = []
    mistakes: dict[str, str] = {}
    for combination in product(*axes.values()):
        pairs = dict(zip(short, combination, strict=True))
        words = [f"{short[key]} {_text(value)}" for key, value in pairs.items()]
        label = ", ".join(words)
        own = {"output": str(out / _directory_name("-".join(words))), "name": f"{values.get('name')}: {label}"}
        sets = [f"{key}={json.dumps(value, default=str)}" for key, value in (pairs | own).items()]
        try:
            points.append(Point(pairs, label, Recipe.parse(copy.deepcopy(values), f"{origin} with {label}", sets)))
        except RecipeError as error:
            mistakes.setdefault(str(error).partition(label)[2], str(error))
    if mistakes:
        raise RecipeError("\n".join(mistakes.values()))
    return points


@alone_in_process()
def sweep(
    values: dict[str, Any],
    axes: Mapping[str, Sequence[Any]],
    out: Path,
    *,
    limits: tradeoff.Limits = tradeoff.NO_LIMITS,
    resume: bool = False,
    engine: Engine = "process",
    origin: str = "recipe",
    console: Console | None = None,
) -> SweepResult:
    """Run every combination, compare the students and recommend one within the limits.

    Finished runs are not repeated, and stopped ones resume. If a run fails, its error is recorded and the others
    continue.

    Args:
        values: the content of the recipe's file, with all `--set` applied.
        out: the sweep's directory.
        resume: continue the sweep in `out`, if there is one; it may have more values.
        engine: "process" runs one after the other in this process, "ray" each in a process of Ray.
        origin: name of the recipe in errors.

    Raises:
        UserError: the recipe needs a correction; nothing has run.
        RunError: some runs failed; results of the others are in `out`.
    """
    console = console or Terminal(stderr=True)
    if engine not in get_args(Engine):
        raise UserError(f"--engine: expected {' or '.join(get_args(Engine))}, got {engine}.")
    points = grid(values, axes, out, origin)
    tasks = ", ".join(sorted(DISTRIBUTION_TASKS))
    wrong = [point.recipe.task for point in points if point.recipe.task not in DISTRIBUTION_TASKS]
    if wrong:
        raise RecipeError(f"sweep: expected a task of {tasks}, got {wrong[0]}. Runs are compared by their likelihoods.")
    if (out / "recipe.yaml").exists():
        raise RecipeError(f"--out: expected a sweep's or a new directory, got {out}, which holds a run.")
    for point in points:
        point.recipe.check_directory(point.directory, resume)
    join_ranks(points[0].recipe.train)
    with lock_for_ranks(out, "--out"):
        facts = {"kind": "sweep", "name": values.get("name", "a sweep"), "vary": dict(axes)}
        return _sweep(points, facts, out, limits, engine, console)


def _sweep(
    points: Sequence[Point],
    facts: Mapping[str, Any],
    out: Path,
    limits: tradeoff.Limits,
    engine: Engine,
    console: Console,
) -> SweepResult:
    """Run what is missing, compare all and write the report."""
    remaining = [point for point in points if not is_finished(point.directory)]
    if len(remaining) < len(points):
        done = len(points) - len(remaining)
        console.print(f"{done} of {len(points)} runs are finished", style="dim", highlight=False)
    failures = _run_with_ray(remaining) if engine == "ray" else _run_in_turn(remaining, console)
    if PartialState().is_main_process:
        with suppress_warnings(), part(console, "timing the students"):
            compared = _summarize([point for point in points if point.label not in failures], limits)
        created = datetime.now(UTC).isoformat(timespec="seconds")
        record = {**facts, "created": created, "failed": failures, **compared, "versions": versions()}
        write_json(out / "sweep.json", record)
        write_sweep_report(out)
    PartialState().wait_for_everyone()
    if failures:
        reasons = "; ".join(f"{label}: {reason}" for label, reason in failures.items())
        raise RunError(
            f"sweep: expected {len(points)} runs to finish, got {len(failures)} that did not ({reasons}). The others "
            f"are in {out / 'sweep.html'}; --resume tries these again."
        )
    return SweepResult(out, json.loads((out / "sweep.json").read_text(encoding="utf-8")))


def _run_in_turn(points: Sequence[Point], console: Console) -> dict[str, str]:
    """Run each point here; return label -> reason of failures."""
    failures = {}
    for number, point in enumerate(points, 1):
        console.print(f"run {number} of {len(points)}: {point.label}", highlight=False, markup=False)
        if reason := _run(point.recipe, console):
            failures[point.label] = reason
            console.print(reason, style="red", highlight=False, markup=False)
        gc.collect()
    return failures


def _run_with_ray(points: Sequence[Point]) -> dict[str, str]:
    """Run each point in its own process of Ray, with one GPU each if there are any; return label -> reason."""
    ray = start_ray("sweep")
    task = ray.remote(num_gpus=1 if torch.cuda.is_available() else 0, max_retries=0)(_run)
    results = {point.label: task.remote(point.recipe, folder=Path.cwd()) for point in points}
    reasons: dict[str, str | None] = {}
    for label, result in results.items():
        try:
            reasons[label] = ray.get(result)
        except ray.exceptions.RayError as error:  # its process was killed or its machine lost: the others continue
            reasons[label] = str(error).strip().splitlines()[-1]
    return {label: reason for label, reason in reasons.items() if reason}


def _run(recipe: Recipe, console: Console | None = None, folder: Path = Path()) -> str | None:
    """Run or resume a recipe in a folder; return the reason if it fails in a way that other combinations may not."""
    os.chdir(folder)  # recipes' paths are relative to it
    try:
        run(recipe, resume=True, console=console or Console(quiet=True))
    except Exception as error:
        if not isinstance(error, PotstillError) and not is_out_of_memory(error):
            raise
        return one_line(error)
    return None


def _summarize(done: Sequence[Point], limits: tradeoff.Limits) -> dict[str, Any]:
    """Compare the finished runs for sweep.json."""
    summaries = [json.loads((point.directory / "summary.json").read_text(encoding="utf-8")) for point in done]
    teachers = [_teacher(summary) for summary in summaries]
    known = [teacher for teacher in teachers if teacher.get("loss") is not None]
    teacher = min(known, key=lambda row: row["loss"] / row["bytes_per_token"], default={})
    rows = [_row(point, summary, teacher) for point, summary in zip(done, summaries, strict=True)]
    costs = ("parameters", "bytes", "latency_ms")
    qualities = [row["quality"] for row in rows]
    figures = ("label", "quality", *costs, "memory_bytes")
    candidates = [tradeoff.Candidate(*(row[name] for name in figures)) for row in rows]
    sizes = [row.get("parameters") or math.nan for row in teachers]
    compressions = [size / row["parameters"] for size, row in zip(sizes, rows, strict=True)]
    files = [
        file
        for place, (point, summary) in enumerate(zip(done, summaries, strict=True))
        for file in _files(place, point, summary, teacher)
    ]
    recommended = tradeoff.recommend(candidates, limits)._asdict()
    if leak := leakage(max((summary["data"].get("eval_in_train") or 0.0 for summary in summaries), default=0.0)):
        recommended["why"] = f"{leak} Among these figures: {recommended['why']}"
    return {
        "teacher": teacher,
        "runs": rows,
        "fronts": {cost: tradeoff.pareto_front([row[cost] for row in rows], qualities) for cost in costs},
        "files": files,
        "file_fronts": {
            cost: tradeoff.pareto_front([file[cost] for file in files], [file["quality"] for file in files])
            for cost in FILE_COSTS
        },
        "predictions": [asdict(prediction) for prediction in tradeoff.predict(compressions, qualities)],
        "limits": asdict(limits),
        "recommended": recommended,
    }


def _teacher(summary: dict[str, Any]) -> dict[str, Any]:
    """The teacher of a run, with all its tokens; its loss is for one token of the run's student."""
    rows = summary["rows"]
    whole = {name: value for name, value in (rows.get("whole_teacher") or {}).items() if value is not None}
    return {**(rows.get("teacher") or {}), **whole, "bytes_per_token": _bytes_per_token(summary)}


def _bytes_per_token(summary: dict[str, Any]) -> float:
    """Of the held-out text, in the tokens of a run's student; 1 where it is not in tokens."""
    return summary["data"].get("eval_bytes_per_token") or 1.0


def _tokens(summary: dict[str, Any], teacher: dict[str, Any]) -> float:
    """How many tokens of a run's student are as long as one of those that the teacher's loss is for."""
    return float(teacher.get("bytes_per_token", 1.0)) / _bytes_per_token(summary)


def _row(point: Point, summary: dict[str, Any], teacher: dict[str, Any]) -> dict[str, Any]:
    """One run of the table. Its student is timed again, right after the others, in the same conditions.

    Its loss is for as much text as the teacher's: students may have other tokens.
    """
    student = summary["rows"]["student"]
    model = load_model(str(point.directory / "student"), "student").to(PartialState().device)
    loss = math.nan if student["loss"] is None else student["loss"] * _tokens(summary, teacher)
    length = point.recipe.data.max_length
    of_teacher = (summary["rows"].get("teacher") or {}).get("latency_ms")  # both were timed in turns
    return {
        "label": point.label,
        "directory": point.directory.name,
        "values": point.values,
        **student,
        "loss": student["loss"] and loss,
        "latency_ms": latency_ms(model, length),
        "speed_up": of_teacher and of_teacher / student["latency_ms"],
        "memory_bytes": student["bytes"] + length * size_of(model.config, length).kv_cache_bytes_per_token,
        "quality": tradeoff.relative_quality(teacher.get("loss", 0.0), loss),
        "gap_closed": summary["gap_closed"],
        "seconds": summary["training"]["seconds"].get("student"),
    }


def _files(place: int, point: Point, summary: dict[str, Any], teacher: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The exported files of a run that generate text, and were measured beside the teacher, by their costs."""
    exports = read_exports(point.directory / FOLDER)
    if exports is None or exports.teacher_loss is None:
        return
    rows, tokens = summary["rows"], _tokens(summary, teacher)
    whole = rows.get("whole_teacher")
    lost = 0.0 if whole is None else rows["teacher"]["loss"] - whole["loss"]  # by the teacher, with its tokens
    for file in exports.files:
        if file.loss is not None and file.tokens_per_second:
            yield {
                "run": place,
                **file.model_dump(include={"file", "kind", "program", "bytes", "peak_bytes", "loss", "teacher_kl"}),
                "ms_per_token": 1000 / file.tokens_per_second,
                "quality": tradeoff.relative_quality(tokens * (exports.teacher_loss - lost), tokens * file.loss),
            }


def _short_keys(keys: Sequence[str]) -> dict[str, str]:
    """Map each key to its last parts, as many as distinguish it from the others."""
    short = {}
    for key in keys:
        parts = key.split(".")
        ends = (".".join(parts[-n:]) for n in range(1, len(parts) + 1))
        short[key] = next(end for end in ends if sum(f".{other}".endswith(f".{end}") for other in keys) == 1)
    return short


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return " ".join(f"{key} {_text(item)}" for key, item in value.items())
    if isinstance(value, list):
        return " ".join(map(_text, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _directory_name(label: str, longest: int = 80) -> str:
    """Turn a label into a directory's name, with a digest if anything was lost."""
    name = re.sub(r"[^\w.]+", "-", label).strip("-.")
    if len(name) > longest or name != re.sub(r"[ -]+", "-", label):
        name = f"{name[:longest]}-{hashlib.sha256(label.encode()).hexdigest()[:8]}"
    return name
