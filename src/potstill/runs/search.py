"""Search the shape of a pruned student: shapes of one size, compared right after pruning and after short trainings."""

from __future__ import annotations

import gc
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

from accelerate import PartialState
from datasets import Dataset
from rich.console import Console
from transformers import PretrainedConfig

from potstill.data.batches import in_batches
from potstill.data.encoding_notes import plural
from potstill.errors import PotstillError, RecipeError, RunError, one_line
from potstill.evaluate.report.search import write_search_report
from potstill.evaluate.sequence import measure
from potstill.evaluate.speed import forward_seconds
from potstill.evaluate.versions import versions
from potstill.files import write_json
from potstill.models.candidates import Candidates, next_shape
from potstill.models.capture import ActivationCapture
from potstill.models.checksums import with_checksum, without_checksum
from potstill.models.loading import suppress_warnings
from potstill.models.pruning import Importance, measure_importance
from potstill.models.shapes import DesignShape, config_fields, text_config
from potstill.models.size import count_parameters
from potstill.models.spacing import evenly_spaced
from potstill.runs.build import BuiltRun, TrainingPlan, build_objective, build_run
from potstill.runs.build_student import (
    StudentBuilder,
    budget_of,
    calibrated_quickly,
    calibration_batches,
    calibration_precision,
    initialization_of,
)
from potstill.runs.config.run import Recipe
from potstill.runs.config.student import BudgetPart
from potstill.runs.finished_parts import FinishedParts
from potstill.runs.measure import EVAL_ROWS
from potstill.runs.progress import part
from potstill.runs.rehearsal import temporary_folder
from potstill.runs.steps import short_training, train

SCORED_ROWS = 32  # of the training data, on which shapes are compared; no short training has them
SHORT_SHARE, SHORT_STEPS = 0.03, (8, 50)  # of the run's steps, and bounds: the first short trainings
FORWARD_SHARE = 1 / 3  # of a training step's time


class SearchPlan(NamedTuple):
    """What a search does: successive halving."""

    shapes: int  # that are pruned and measured
    rounds: tuple[tuple[int, int], ...]  # how many of the best are trained anew, for how many steps each

    def __str__(self) -> str:
        rounds = ", ".join(f"the best {students} trained for {steps} steps each" for students, steps in self.rounds)
        return f"{self.shapes} shapes pruned and measured, {rounds}"

    def batches(self, plan: TrainingPlan) -> float:
        """Count the batches of training that a search takes as long as."""
        steps = sum(students * steps for students, steps in self.rounds)
        scored = (self.shapes + sum(students for students, _ in self.rounds)) * SCORED_ROWS / plan.batch_rows
        return steps * plan.batches + FORWARD_SHARE * scored


def plan_search(shapes: int, steps: int) -> SearchPlan:
    """Plan a search before a run of so many steps.

    >>> print(plan_search(8, 1000))
    8 shapes pruned and measured, the best 4 trained for 30 steps each, the best 2 trained for 60 steps each
    """
    short = min(max(round(SHORT_SHARE * steps), SHORT_STEPS[0]), SHORT_STEPS[1])
    students, rounds = max(2, shapes // 2), []
    while students > 1:
        rounds.append((students, short))
        students, short = students // 2, 2 * short
    return SearchPlan(shapes, tuple(rounds))


def search_shape(recipe: Recipe, directory: Path, console: Console) -> tuple[Recipe, str]:
    """Search the shape of the recipe's student; return the recipe with it, and a note about those that it beat.

    The directory gets search.json and search.html. What an earlier search for the same recipe measured there is kept.
    """
    request = recipe.measured_request(directory)
    record = _read(directory, request)
    if record is None:
        record = _search(recipe, directory, request, console)
        write_json(directory / "search.json", with_checksum(record))
        write_search_report(directory)
    chosen = record["shapes"][record["chosen"]]
    student = recipe.student.model_copy(update={"design": chosen["design"]})
    return recipe.model_copy(update={"student": student}), _note(record)


def _read(directory: Path, request: Any) -> dict[str, Any] | None:
    """Read a finished search for the same recipe."""
    with suppress(OSError, ValueError):
        record = without_checksum(json.loads((directory / "search.json").read_text(encoding="utf-8")))
        return record if record.get("request") == request else None
    return None  # there is none, or it is damaged


def _search(recipe: Recipe, directory: Path, request: Any, console: Console) -> dict[str, Any]:
    _check(recipe)
    with suppress_warnings():
        with part(console, "reading models and data, for the search"):
            search = _Search.build(recipe)
        directory.mkdir(parents=True, exist_ok=True)
        finished = FinishedParts(directory / "search-parts.json", request)

        def loss(shape: DesignShape, steps: int, compute: Callable[[], float]) -> float:
            title = f"{describe(shape)}, {f'{steps} steps' if steps else 'pruned'}"
            value = finished.get(title, lambda: _finite(compute, title, console), keep=lambda _: True)
            gc.collect()
            if value is None:
                return math.inf
            console.print(f"{title}: loss {value:.3f}", highlight=False, markup=False)
            return float(value)

        _check_number(search.candidates.shapes)
        wanted = recipe.student.searches
        plan = plan_search(min(len(search.candidates.shapes), wanted), search.built.plan.steps)
        curves: dict[DesignShape, list[tuple[int, float]]] = {}
        losses: dict[DesignShape, float] = {}
        while len(losses) < plan.shapes and (shape := search.next_shape(losses, plan.shapes)):
            losses[shape] = loss(shape, 0, partial(search.pruned_loss, shape))
            curves[shape] = [(0, losses[shape])]
            search.forget(sorted(losses, key=lambda shape: losses[shape])[plan.rounds[0][0] :])
        _check_number([*losses])
        if (number := len(losses)) < wanted:
            note = f"student.design.search: {number} shapes have this size, fewer than {wanted}."
            console.print(note, style="dim", highlight=False, markup=False)
        for students, steps in plan.rounds:
            best = sorted(losses, key=lambda shape: losses[shape])[:students]
            search.forget(losses.keys() - set(best))
            losses = {shape: loss(shape, steps, partial(search.trained_loss, shape, steps)) for shape in best}
            for shape in best:
                curves[shape].append((steps, losses[shape]))
    chosen = min(losses, key=lambda shape: losses[shape])
    if not math.isfinite(losses[chosen]):
        raise RunError("student.design.search: expected a shape that can be pruned and trained, got none. Name one.")
    finished.remove()
    shapes = [{"design": search.design(shape), **vars(shape), "losses": curve} for shape, curve in curves.items()]
    for row, shape in zip(shapes, curves, strict=True):
        row["parameters"] = count_parameters(search.candidates.config(shape))
    created = datetime.now(UTC).isoformat(timespec="seconds")
    facts = {"kind": "search", "name": recipe.name, "created": created, "request": request, "versions": versions()}
    facts |= {"rows": len(search.scored)}
    return {**facts, "chosen": [*curves].index(chosen), "shapes": shapes}


def _check(recipe: Recipe) -> None:
    if recipe.teacher.name != "model":
        raise RecipeError(
            "student.design.search: expected a teacher that is one model (teacher.model alone), got "
            f"{recipe.teacher.title}. Search with the model alone, then put the shape into this recipe."
        )
    if recipe.task == "encoder" or recipe.task == "masked":
        raise RecipeError(
            f"student.design.search: expected the task causal, classification or regression, got {recipe.task}. Leave "
            "search out: the shape is then that of the fixed rule."
        )
    if (processes := PartialState().num_processes) > 1:
        raise RecipeError(
            f"student.design.search: expected one process, got {processes}. Search first with potstill design "
            "--search, and put the shape into the recipe."
        )


def _check_number(shapes: Sequence[DesignShape]) -> None:
    if len(shapes) < 2:
        raise RecipeError(
            "student.design.search: expected a budget that several shapes meet within 5%, got one that "
            f"{describe(shapes[0])} alone meets. Leave search out, or change the budget."
        )


def _finite(compute: Callable[[], float], title: str, console: Console) -> float | None:
    """Compute a loss; None, and a line that says why, where a shape cannot be made or its training diverges."""
    try:
        loss = compute()
    except PotstillError as error:
        console.print(f"{title}: left out. {one_line(error)}", style="red", highlight=False, markup=False)
        return None
    return loss if math.isfinite(loss) else None


def describe(shape: DesignShape) -> str:
    grouped = shape.heads != shape.kv_heads
    heads = f"{shape.heads}/{shape.kv_heads} heads" if grouped else plural(shape.heads, "head")
    return f"{plural(shape.layers, 'layer')} of width {shape.hidden}, {heads}, feed-forward {shape.ffn}"


def _note(record: dict[str, Any]) -> str:
    """Describe the chosen shape and those that it beat."""

    def result(row: dict[str, Any]) -> str:
        shape = DesignShape(**{name: row[name] for name in DesignShape.__dataclass_fields__})
        steps, loss = row["losses"][-1]
        return f"{describe(shape)}: {loss:.3f} {f'after {steps} steps' if steps else 'pruned'}"

    chosen = record["shapes"][record["chosen"]]
    others = sorted((row for row in record["shapes"] if row is not chosen), key=lambda row: -row["losses"][-1][0])
    own = dict(chosen["losses"])  # others were left out at earlier steps
    beaten = "; ".join(f"{result(row)} ({own[row['losses'][-1][0]]:.3f})" for row in others)
    return (
        f"student.design.search: {result(chosen)}, {chosen['parameters']:,} parameters. Losses are of "
        f"{record['rows']} training rows; those of the others, with its own at the same step: {beaten}."
    )


@dataclass(frozen=True)
class _Search:
    """The objects that all shapes share."""

    built: BuiltRun
    builder: StudentBuilder  # of the first shape
    candidates: Candidates
    allows: Callable[[PretrainedConfig], bool]  # whether the budget's other limits are met
    train: Dataset  # the other training rows
    scored: Dataset
    students: dict[DesignShape, StudentBuilder] = field(default_factory=dict)  # that may be trained

    @classmethod
    def build(cls, recipe: Recipe) -> _Search:
        built = build_run(calibrated_quickly(recipe))
        builder, budget = built.new_student, recipe.student.design
        assert isinstance(builder, StudentBuilder)
        assert isinstance(budget, BudgetPart)
        assert builder.design is not None
        assert builder.source is not None
        larger = text_config(builder.source.config)
        allows = partial(budget_of(budget).allows, teacher=larger, seconds=forward_seconds)
        candidates = Candidates(larger, builder.design, budget.keep or "balanced")
        rows = built.train.dataset
        scored = {*evenly_spaced(min(SCORED_ROWS, max(1, len(rows) // 4)), len(rows))}
        others = [number for number in range(len(rows)) if number not in scored]
        builder = replace(builder, recipe=recipe)
        return cls(built, builder, candidates, allows, rows.select(others), rows.select(sorted(scored)))

    def next_shape(self, losses: Mapping[DesignShape, float], number: int) -> DesignShape | None:
        """Choose the shape to measure next; the first is within all limits, others are left out where they are not.

        A limit is tried when a shape's turn comes, because timing takes long.
        """
        shapes = self.candidates.shapes
        while shape := next_shape(shapes, losses, number):
            if not losses or self.allows(self.candidates.config(shape)):
                return shape
            shapes.remove(shape)
        return None

    @cached_property
    def importance(self) -> Importance:
        """Of the parts of the model that is pruned, measured once."""
        assert self.builder.source is not None
        with calibration_precision(self.builder):
            return measure_importance(self.builder.source, calibration_batches(self.builder, self.train))

    def design(self, shape: DesignShape) -> dict[str, Any]:
        """The recipe's student.design of a shape."""
        assert self.builder.source is not None
        return config_fields(shape, text_config(self.builder.source.config))

    def student(self, shape: DesignShape) -> StudentBuilder:
        """The builder of a shape's student: the last ones are kept, as fitting takes long."""
        if shape not in self.students:
            builder = replace(self.builder, design=self.candidates.config(shape), initialization=None)
            initialization = initialization_of(builder, self.train, self.importance)
            self.students[shape] = replace(builder, initialization=initialization)
        return self.students[shape]

    def forget(self, shapes: Iterable[DesignShape]) -> None:
        """Free the memory of students that are not needed any more."""
        for shape in shapes:
            self.students.pop(shape, None)

    def pruned_loss(self, shape: DesignShape) -> float:
        return self._loss(self.student(shape)())

    def trained_loss(self, shape: DesignShape, steps: int) -> float:
        """Train a pruned student for some steps, with the recipe's objective and arguments."""
        recipe, built, builder = self.built.recipe, self.built, self.student(shape)
        plan = built.plan._replace(steps=steps)
        arguments = short_training(recipe.train, steps, built.plan.steps) | {"save_strategy": "no"}
        reads_layers = any(term.reads_layers for term in recipe.objective)
        layers = ActivationCapture(builder()).shape if reads_layers else None
        objective = build_objective(builder, built.teacher, self.train, plan, layers)
        with temporary_folder(Path(recipe.output)) as folder:
            short = replace(
                built,
                recipe=recipe.model_copy(update={"train": arguments}),
                new_student=builder,
                train=replace(built.train, dataset=self.train),
                plan=plan,
            )
            trainer = train(short, "student", objective, folder, Console(quiet=True), None)
        return self._loss(trainer.distiller.student)

    def _loss(self, model: Any) -> float:
        built = self.built
        batches = in_batches(self.scored, built.tokenizer, EVAL_ROWS)
        model = model.to(PartialState().device)
        quality = measure(built.recipe.task, None, {"student": model}, batches, vocabulary=built.vocabulary or None)
        return float(quality["student"].loss)
