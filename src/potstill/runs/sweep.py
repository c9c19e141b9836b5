"""sweep(values, axes): a run for each combination of a recipe's values; read it from top to bottom."""

from __future__ import annotations

import copy
import gc
import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from accelerate import PartialState
from rich.console import Console

from potstill.data.files import write_text
from potstill.errors import PotstillError, RecipeError, RunError, UserError, one_line
from potstill.evaluate.report.sweep import write_sweep_report
from potstill.evaluate.speed import latency_ms
from potstill.evaluate.tradeoff import NO_LIMITS, Candidate, Limits, kept, pareto_front, predict, recommend
from potstill.evaluate.versions import versions
from potstill.losses.alignment import DISTRIBUTION_TASKS
from potstill.models.loading import load_model, suppress_warnings
from potstill.runs.config.document import read_list
from potstill.runs.config.run import Recipe
from potstill.runs.ray import start_ray
from potstill.runs.run import require_free, run

Engine = Literal["process", "ray"]

# What makes runs incomparable, or is the sweep's own to decide.
_FIXED = {
    "output": "Each run has a directory in the sweep's.",
    "name": "Each run is named after its values.",
    "data.eval": "Runs are compared on the same held-out text.",
}
_NAME = 80  # characters of a directory's name


@dataclass(frozen=True)
class Axis:
    """A key of the recipe and the values that it takes."""

    key: str
    values: tuple[Any, ...]


@dataclass(frozen=True)
class Point:
    """One combination: its values, what people call it, and its recipe, whose output is its own directory."""

    values: dict[str, Any]
    label: str
    recipe: Recipe

    @property
    def directory(self) -> Path:
        return Path(self.recipe.output)


@dataclass(frozen=True)
class SweepResult:
    """What a sweep leaves.

    Args:
        directory: with sweep.json, sweep.html and a run directory for each combination.
        summary: the content of sweep.json.
    """

    directory: Path
    summary: dict[str, Any]


def read_axes(texts: Iterable[str]) -> list[Axis]:
    """From `KEY=VALUE,VALUE,...` to what is varied; values are YAML, so that lists and mappings may hold commas.

    >>> read_axes(["train.learning_rate=1e-3,3e-3"])
    [Axis(key='train.learning_rate', values=(0.001, 0.003))]

    Raises:
        RecipeError: a text has no key or no value, or a key that may not vary.
    """
    axes: list[Axis] = []
    for text in texts:
        key, _, listed = text.partition("=")
        values = read_list(listed)
        if not key or not values:
            raise RecipeError(f"--vary: expected KEY=VALUE,VALUE such as objective.0.temperature=1,2,4, got {text}.")
        for fixed, why in _FIXED.items():
            if f"{key}.".startswith(f"{fixed}."):
                raise RecipeError(f"--vary {key}: expected another key, got one that must stay. {why}")
        if key in [axis.key for axis in axes]:
            raise RecipeError(f"--vary {key}: expected each key once, got it twice. Put all values behind one.")
        distinct = {json.dumps(value, default=str): value for value in values}
        axes.append(Axis(key, tuple(distinct.values())))
    if not axes:
        raise RecipeError(
            "sweep: expected --vary KEY=VALUE,VALUE, got none. Without it there is one run: potstill run."
        )
    return axes


def grid(values: dict[str, Any], axes: Sequence[Axis], out: Path, origin: str = "recipe") -> list[Point]:
    """Every combination of the values, as a recipe of its own.

    Args:
        values: the recipe, as its file says it.
        axes: what is varied; the last varies fastest.
        out: the sweep's directory.
        origin: how errors call the recipe.

    Raises:
        RecipeError: a combination is no recipe; the mistakes of all are told, each once.
    """
    short = _short([axis.key for axis in axes])
    points: list[Point] = []
    mistakes: dict[str, str] = {}
    for chosen in product(*(axis.values for axis in axes)):
        pairs = dict(zip((axis.key for axis in axes), chosen, strict=True))
        label = ", ".join(f"{short[key]} {_word(value)}" for key, value in pairs.items())
        directory = out / _directory("-".join(f"{short[key]} {_word(value)}" for key, value in pairs.items()))
        sets = [f"{key}={json.dumps(value, default=str)}" for key, value in pairs.items()]
        name = f"{values.get('name')}: {label}"
        sets += [f"output={json.dumps(str(directory))}", f"name={json.dumps(name)}"]
        try:
            recipe = Recipe.parse(copy.deepcopy(values), f"{origin} with {label}", sets)
        except RecipeError as error:
            said = str(error)
            mistakes.setdefault(said.partition(label)[2], said)
            continue
        points.append(Point(pairs, label, recipe))
    if mistakes:
        raise RecipeError("\n".join(mistakes.values()))
    return points


def sweep(
    values: dict[str, Any],
    axes: Sequence[Axis],
    out: Path,
    *,
    limits: Limits = NO_LIMITS,
    resume: bool = False,
    engine: Engine = "process",
    origin: str = "recipe",
    console: Console | None = None,
) -> SweepResult:
    """Run every combination, compare the students and recommend one.

    A run that is finished is not repeated, one that was killed goes on. A run that fails is told in its line, and the
    others go on.

    Args:
        values: the recipe, as its file says it, with all `--set` applied.
        axes: what is varied.
        out: the sweep's directory.
        limits: of the student that is recommended.
        resume: go on with the sweep in `out`, if there is one; more values may be added.
        engine: "process", one run after the other here; "ray", each run in a process of Ray's.
        origin: how errors call the recipe.
        console: where progress is shown; default: standard error.

    Raises:
        UserError: something in the recipe is to be corrected; nothing has run.
        RunError: some runs failed; all that could be measured is in `out`.
    """
    console = console or Console(stderr=True)
    if engine not in get_args(Engine):
        raise UserError(f"--engine: expected {' or '.join(get_args(Engine))}, got {engine}.")
    points = grid(values, axes, out, origin)
    for point in points:
        if point.recipe.task not in DISTRIBUTION_TASKS:
            raise RecipeError(
                f"sweep: expected a task of {', '.join(sorted(DISTRIBUTION_TASKS))}, got {point.recipe.task}. "
                "Runs are weighed by their likelihoods."
            )
    if (out / "recipe.yaml").exists():
        raise RecipeError(f"--out: expected a sweep's or a new directory, got {out}, which holds a run.")
    for point in points:
        require_free(point.directory, point.recipe, resume)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RecipeError(
            f"--out: expected a directory to write to, got {out}: {error.strerror}. Choose another."
        ) from None
    todo = [point for point in points if not _finished(point)]
    if len(todo) < len(points):
        console.print(f"{len(points) - len(todo)} of {len(points)} runs are finished", style="dim", highlight=False)
    failures = _with_ray(todo) if engine == "ray" else _one_by_one(todo, console)
    if PartialState().is_main_process:
        with suppress_warnings(), console.status("timing the students"):
            summary = _summarize(values, axes, points, failures, limits)
        write_text(out / "sweep.json", json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
        write_sweep_report(out)
    PartialState().wait_for_everyone()
    result = SweepResult(out, json.loads((out / "sweep.json").read_text(encoding="utf-8")))
    if failures:
        raise RunError(
            f"sweep: expected {len(points)} runs to finish, got {len(failures)} that did not "
            f"({'; '.join(f'{label}: {why}' for label, why in failures.items())}). The others are in "
            f"{out / 'sweep.html'}; --resume tries these again."
        )
    return result


def _finished(point: Point) -> bool:
    return (point.directory / "report.html").exists()


def _one_by_one(points: Sequence[Point], console: Console) -> dict[str, str]:
    """Run each here; the labels of those that failed, and why."""
    failures = {}
    for number, point in enumerate(points, 1):
        console.print(f"run {number} of {len(points)}: {point.label}", highlight=False, markup=False)
        why = _run(point.recipe, console)
        if why:
            failures[point.label] = why
            console.print(why, style="red", highlight=False, markup=False)
        gc.collect()
    return failures


def _run(recipe: Recipe, console: Console) -> str | None:
    """Run it, or go on with it. What went wrong, if the other combinations may go well."""
    try:
        run(recipe, resume=True, console=console)
    except (PotstillError, torch.OutOfMemoryError) as error:
        return one_line(error)
    return None


def _with_ray(points: Sequence[Point]) -> dict[str, str]:
    """The same, by Ray: a process for each run, with one GPU each where there are any."""
    ray = start_ray("sweep")
    gpus = 1 if torch.cuda.is_available() else 0
    task = ray.remote(num_gpus=gpus, max_retries=0)(_run_in)
    asked = [task.remote(Path.cwd(), point.recipe) for point in points]
    failures = {}
    for point, one in zip(points, asked, strict=True):
        try:
            why = ray.get(one)
        except ray.exceptions.RayError as error:  # its process was killed, or its machine is gone: the others go on
            why = str(error).strip().splitlines()[-1]
        if why:
            failures[point.label] = why
    return failures


def _run_in(folder: Path, recipe: Recipe) -> str | None:
    os.chdir(folder)  # paths in recipes are meant from there
    return _run(recipe, Console(quiet=True))


def _summarize(
    values: dict[str, Any], axes: Sequence[Axis], points: Sequence[Point], failures: dict[str, str], limits: Limits
) -> dict[str, Any]:
    """The content of sweep.json."""
    done = [point for point in points if point.label not in failures]
    told = [json.loads((point.directory / "summary.json").read_text(encoding="utf-8")) for point in done]
    teachers = [one["rows"].get("teacher") or {} for one in told]
    losses = [teacher["loss"] for teacher in teachers if teacher.get("loss") is not None]
    best = min(losses, default=None)
    rows = []
    for point, one in zip(done, told, strict=True):
        student = one["rows"]["student"]
        loss = math.nan if student["loss"] is None else student["loss"]
        rows.append(
            {
                "label": point.label,
                "directory": point.directory.name,
                "values": point.values,
                **student,
                "latency_ms": _latency(str(point.directory / "student"), point.recipe.data.max_length),
                "quality": kept(best or 0.0, loss),
                "gap_closed": one["gap_closed"],
                "seconds": one["training"]["seconds"].get("student"),
            }
        )
    candidates = [
        Candidate(row["label"], row["quality"], row["parameters"], row["bytes"], row["latency_ms"]) for row in rows
    ]
    qualities = [one.quality for one in candidates]
    sizes = [teacher.get("parameters") or math.nan for teacher in teachers]
    predictions = predict([size / one.parameters for size, one in zip(sizes, candidates, strict=True)], qualities)
    teacher = next((one for one in teachers if one.get("loss") == best), {}) if best is not None else {}
    return {
        "kind": "sweep",
        "name": values.get("name", "a sweep"),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "vary": {axis.key: list(axis.values) for axis in axes},
        "teacher": teacher,
        "runs": rows,
        "failed": failures,
        "fronts": {
            key: pareto_front([getattr(one, key) for one in candidates], qualities)
            for key in ("parameters", "bytes", "latency_ms")
        },
        "predictions": [asdict(one) for one in predictions],
        "limits": asdict(limits),
        "recommended": asdict(recommend(candidates, limits)),
        "versions": versions(),
    }


def _latency(folder: str, length: int) -> float:
    """Timed when all runs are done, one right after the other: what else the machine did during a run is no matter."""
    return latency_ms(load_model(folder, "student").to(PartialState().device), length)


def _short(keys: Sequence[str]) -> dict[str, str]:
    """Each key's last parts, as many as tell it from the others."""
    names = {}
    for key in keys:
        parts = key.split(".")
        ends = (".".join(parts[-n:]) for n in range(1, len(parts) + 1))
        names[key] = next(end for end in ends if sum(f".{other}".endswith(f".{end}") for other in keys) == 1)
    return names


def _word(value: Any) -> str:
    if isinstance(value, dict):
        return " ".join(f"{key} {_word(each)}" for key, each in value.items())
    if isinstance(value, list):
        return " ".join(map(_word, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _directory(label: str) -> str:
    """A directory's name: the label, shortened, with a digest where anything was lost."""
    name = re.sub(r"[^\w.]+", "-", label).strip("-.")
    same = re.sub(r"[ -]+", "-", label)
    if len(name) > _NAME or name != same:
        name = f"{name[:_NAME]}-{hashlib.sha256(label.encode()).hexdigest()[:8]}"
    return name
