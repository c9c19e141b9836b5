"""From a recipe to a run directory: build, rehearse, train, measure, report."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from potstill.files import explain_disk_full
from potstill.models.loading import suppress_warnings
from potstill.runs.build import build_run
from potstill.runs.config.run import Recipe
from potstill.runs.progress import part
from potstill.runs.ranks import alone_in_process, explain_lost_rank, join_ranks, lock_for_ranks
from potstill.runs.rehearsal import rehearse
from potstill.runs.rounds import prune_in_rounds
from potstill.runs.search import search_shape
from potstill.runs.start import weak_gradient
from potstill.runs.steps import CHECKPOINT_BYTES, STEPS, walk
from potstill.runs.terminal import Terminal
from potstill.runs.timed_shape import fix_timed_shape
from potstill.runs.vocabulary_size import choose_vocabulary_size


@dataclass(frozen=True)
class RunResult:
    """A finished run: its directory, with `student/` and `report.html`, and the content of summary.json."""

    directory: Path
    summary: dict[str, Any]


@alone_in_process()
@explain_lost_rank()
def run(recipe: Recipe, *, resume: bool = False, console: Console | None = None) -> RunResult:
    """Distill as a recipe says, and write a report.

    With `resume`, a run in `recipe.output` that was killed continues from its last checkpoint and ends in the same
    weights. Progress is shown on the console, by default standard error.

    Raises:
        UserError: the recipe, the data or the models need a correction, or another process writes the directory;
            nothing is lost.
        DivergedError: the loss is NaN or infinite.
        RunError: another rank of the run does not answer.
    """
    console = console or Terminal(stderr=True)
    directory, main = Path(recipe.output), join_ranks(recipe.train).is_main_process
    shown = console if main else Console(quiet=True)
    with lock_for_ranks(directory):
        return _run(recipe, directory, resume, shown)


def _run(recipe: Recipe, directory: Path, resume: bool, shown: Console) -> RunResult:
    recipe.check_directory(directory, resume, undecided=["student"])
    recipe, before = settle_student(recipe, directory, shown, resume)
    recipe.check_directory(directory, resume)
    with suppress_warnings():
        with part(shown, "reading models and data"):
            built = build_run(recipe)
            built = replace(built, notes=(*before, *built.notes))
        for warning in built.duplicates.warnings:
            shown.print(f"warning: {warning}", style="bold red", highlight=False, markup=False)
        _show_notes(built.notes, shown)
        if not (directory / "student").exists():
            with part(shown, "trying every step on short rows"):
                student = built.new_student()
                notes = rehearse(built, student)
            _show_notes(notes, shown)
            if (weak := weak_gradient(built, student)) is not None:
                shown.print(f"warning: {weak}", style="bold red", highlight=False, markup=False)
        with explain_disk_full(directory, CHECKPOINT_BYTES * built.size.trained):
            walk(STEPS, built, directory, shown)
    return RunResult(directory, json.loads((directory / "summary.json").read_text(encoding="utf-8")))


def _show_notes(notes: Iterable[str], shown: Console) -> None:
    for note in notes:
        shown.print(note, style="dim", highlight=False, markup=False)


def settle_student(recipe: Recipe, directory: Path, console: Console, resume: bool) -> tuple[Recipe, list[str]]:
    """Choose the student's tokens and shape and cut it in rounds, where the recipe asks for it.

    Return what is left to do, and notes.
    """
    notes = []
    if recipe.student.chooses_tokens:
        recipe, note = choose_vocabulary_size(recipe, directory, console)
        notes.append(note)
    if recipe.student.searches:
        recipe, note = search_shape(recipe, directory, console)
        notes.append(note)
    if recipe.student.is_timed:
        recipe, note = fix_timed_shape(recipe, directory)
        notes.append(note)
    if recipe.student.rounds:
        recipe, note = prune_in_rounds(recipe, directory, console, resume)
        notes.append(note)
    return recipe, notes
