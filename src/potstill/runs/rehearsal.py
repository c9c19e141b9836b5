"""A rehearsal: every step of a run on short rows, so that nothing fails after the training that could before it."""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from rich.console import Console
from transformers.integrations import get_reporting_integration_callbacks

from potstill.errors import PotstillError, RecipeError, RunError, one_line, remedy
from potstill.files import explain_disk_full, remove, temporary_path
from potstill.losses.alignment import TOKEN_TASKS
from potstill.models.adapted import is_adapted
from potstill.models.spacing import evenly_spaced
from potstill.runs import steps
from potstill.runs.build import BuiltRun, piece
from potstill.runs.config.run import Recipe
from potstill.runs.formats.gguf_file import GgufType, kind_notes
from potstill.runs.map_memory import check_map_memory

ROWS = 3  # for each rank; encoders are compared on 3 at least
TOKENS = 16  # of a row that is cut
CANDIDATES = 64  # evenly spaced rows among which the shortest are taken
NEW_TOKENS = 4  # of an on-policy sample
NO_TIME = 1e-6  # seconds: one batch, one pass and one continuation are measured


def rehearse(built: BuiltRun, student: Any) -> list[str]:
    """Walk the steps of a run in a temporary folder: one optimiser step, resumed for a second one.

    The folder is on the disk of the run's output. The student is one that `built.new_student` made; it does not change.

    Returns:
        Notes on the files that the run will write.

    Raises:
        RunError: a step failed; the message names it.
        PotstillError: a step's own.
    """
    _check_trackers(built.recipe.train.get("report_to"))
    check_map_memory(built, student)
    teacher, quiet = built.teacher, Console(quiet=True)
    state = {} if teacher.of_student else {name: value.clone() for name, value in teacher.state_dict().items()}
    if built.recipe.student.adapter is None:  # a copy is quicker to make; peft changes what it is given
        built = replace(built, new_student=partial(copy.deepcopy, student))
    first, whole = _small_run(built, 1), _small_run(built, 2)
    with temporary_folder(Path(built.recipe.output)) as folder, quick_collection():
        try:
            _try(steps.Step("train student", _train, every_rank=True), first, folder, quiet)
            for step in steps.STEPS:
                _try(step, whole, folder, quiet)
        finally:
            if not teacher.of_student:
                teacher.load_state_dict(state)
            if built.writer is not None:
                built.writer.push_due = True  # its server has the rehearsal's weights
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
    PartialState().wait_for_everyone()
    return [*_file_notes(built.recipe, student)]


def _file_notes(recipe: Recipe, student: Any) -> Iterator[str]:
    """Say which files do not go with what a student is trained for, and which kinds of GGUF not with its widths."""
    exported = [part.kind for part in recipe.export]
    if recipe.student.quantize not in {None, *exported} and exported:
        yield (
            f"student.quantize: the student is trained for {recipe.student.quantize}, and export writes "
            f"{', '.join(exported)} alone. Add a file of that kind."
        )
    kinds: dict[Any, str] = {part.kind: "export" for part in recipe.export if part.to == "gguf"}
    if recipe.student.quantize in get_args(GgufType):
        kinds[recipe.student.quantize] = "student.quantize"
    for kind, key in kinds.items() if not is_adapted(student) else ():
        yield from (f"{key}: {note}" for note in kind_notes(student, kind))


@contextmanager
def quick_collection() -> Iterator[None]:
    """Collect garbage without a look through all that is there already: a training does so, and a measured pass."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _train(built: BuiltRun, directory: Path, console: Console) -> None:
    """Train the student without saving it, as if the run was killed behind its first checkpoint."""
    steps.train(built, "student", built.objective, directory, console, built.new_rollout())


def _try(step: steps.Step, built: BuiltRun, folder: Path, console: Console) -> None:
    needed = steps.CHECKPOINT_BYTES * built.size.trained
    with failing_early(step.name, "a few short rows"), explain_disk_full(folder, needed):
        if step.every_rank or PartialState().is_main_process:
            step.do(built, folder, console)
    PartialState().wait_for_everyone()


@contextmanager
def failing_early(step: str, rows: str) -> Iterator[None]:
    """Name the step, and what it was tried on, in any error that is not Potstill's own."""
    try:
        yield
    except PotstillError:
        raise
    except Exception as error:
        raise RunError(
            f"run: expected the step '{step}' to work on {rows}, got {type(error).__name__}: {one_line(error, 300)}. "
            f"Nothing was trained. {remedy(error) or 'Mend its cause.'} --debug shows where it is."
        ) from error


def _check_trackers(names: Any) -> None:
    """Check that the trackers of train.report_to are installed; a rehearsal is not reported to them."""
    try:
        for tracker in get_reporting_integration_callbacks(names):
            tracker()
    except (ValueError, RuntimeError, ImportError) as error:
        raise RecipeError(
            f"train.report_to: expected trackers that are installed, got {names}: {one_line(error)}"
        ) from None


def _small_run(built: BuiltRun, num_steps: int) -> BuiltRun:
    """The run with a few short rows and few steps; each of them is logged, measured and saved."""
    train, held_out = (_short_rows(built, examples.dataset) for examples in (built.train, built.eval))
    recipe = built.recipe
    longest = max(len(row["input_ids"]) for rows in (train, held_out) for row in rows)
    every_step = {"logging_steps": 1, "eval_steps": 1, "save_steps": 1, "eval_delay": 0, "dataloader_drop_last": False}
    changes: dict[str, Any] = {  # the weights stay as they are: a rate that is too high shows in the training
        "train": {**recipe.train, **every_step, "max_steps": num_steps, "learning_rate": 0.0, "report_to": "none"},
        "data": recipe.data.model_copy(update={"max_length": longest}),
        "evaluate": recipe.evaluate.model_copy(update={"time_limit": NO_TIME}),
    }
    if recipe.rollout is not None:
        changes["rollout"] = replace(recipe.rollout, max_new_tokens=min(NEW_TOKENS, recipe.rollout.max_new_tokens))
    return replace(
        built,
        recipe=recipe.model_copy(update=changes),
        train=replace(built.train, dataset=train),
        eval=replace(built.eval, dataset=held_out),
        plan=built.plan._replace(steps=num_steps),
    )


def _short_rows(built: BuiltRun, dataset: Any) -> Dataset:
    """The shortest of some rows, or pieces of them where the teacher takes pieces."""
    rows = [dataset[i] for i in evenly_spaced(CANDIDATES, len(dataset))]
    if built.recipe.task in TOKEN_TASKS and not built.needs_whole_rows:
        rows = [piece(row, TOKENS) for row in rows]
    rows.sort(key=lambda row: len(row["input_ids"]))
    return Dataset.from_list(rows[: ROWS * PartialState().num_processes])


@contextmanager
def temporary_folder(output: Path) -> Iterator[Path]:
    """A folder on the disk of the output, the same for every rank."""
    main, names = PartialState().is_main_process, [""]
    parent = next(folder for folder in (output, *output.absolute().parents) if folder.exists())
    if main:
        try:
            folder = temporary_path(parent / ".potstill-rehearsal")
            folder.mkdir()
            names = [str(folder)]
        except OSError as error:
            reason = f"got {output}: {error.strerror}. Choose another with --set output=DIR."
            raise RecipeError(f"output: expected a directory to write to, {reason}") from None
    broadcast_object_list(names)
    try:
        yield Path(names[0])
    finally:
        if main:
            with suppress(OSError):
                remove(Path(names[0]))
