"""From a recipe to a run directory: check, build, train, measure, report."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState
from rich.console import Console
from transformers import PrinterCallback
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from potstill.data.files import explain_disk_full
from potstill.errors import RecipeError, one_line
from potstill.evaluate.report.page import write_report, write_student_card
from potstill.evaluate.summary import write_summary
from potstill.models.adapted import convert_saved, merged
from potstill.models.loading import suppress_warnings
from potstill.models.modules import copy_modules
from potstill.runs.build import BuiltRun, build_run
from potstill.runs.config.run import Recipe
from potstill.runs.measure import EVAL_ROWS, summarize
from potstill.train.callbacks import MetricsFile, ProgressBar, SamplesFile
from potstill.train.checkpoints import last_checkpoint
from potstill.train.objective import Objective
from potstill.train.rollout import Rollout
from potstill.train.terms.logits import Labels
from potstill.train.trainer import DistillationConfig, DistillationTrainer

CHECKPOINT_BYTES = 3 * 4  # of a trained parameter: itself and Adam's two moments


@dataclass(frozen=True)
class RunResult:
    """A finished run: its directory, with `student/` and `report.html`, and the content of summary.json."""

    directory: Path
    summary: dict[str, Any]


def run(recipe: Recipe, *, resume: bool = False, console: Console | None = None) -> RunResult:
    """Distill as a recipe says, and write a report.

    With `resume`, a run in `recipe.output` that was killed continues from its last checkpoint and ends in the same
    weights. Progress is shown on the console, by default standard error.

    Raises:
        UserError: the recipe, the data or the models need a correction; nothing is lost.
        DivergedError: the loss is NaN or infinite.
    """
    console = console or Console(stderr=True)
    directory, main = Path(recipe.output), PartialState().is_main_process
    recipe.check_directory(directory, resume)
    with suppress_warnings():
        built = build_run(recipe)
        if main:
            recipe.start(directory)
            for warning in built.duplicates.warnings:
                console.print(f"warning: {warning}", style="bold red", highlight=False, markup=False)
            for note in built.notes:
                console.print(note, style="dim", highlight=False, markup=False)
        PartialState().wait_for_everyone()
        with explain_disk_full(directory, CHECKPOINT_BYTES * built.size.trained):
            students = {"student": train(built, "student", built.objective, directory, console, built.new_rollout())}
            if recipe.evaluate.baseline:
                students["baseline"] = train(built, "baseline", Objective([Labels()]), directory, console)
        if main:
            with console.status("evaluating on held-out data"):
                summary = summarize(built, students, directory)
            write_summary(summary, directory)
            write_student_card(directory)
            write_report(directory)
        PartialState().wait_for_everyone()
    return RunResult(directory, json.loads((directory / "summary.json").read_text(encoding="utf-8")))


def train(
    built: BuiltRun, name: str, objective: Objective, directory: Path, console: Console, rollout: Rollout | None = None
) -> Path:
    """Train one student, save it in `directory/name` and return that folder; nothing is done if it exists."""
    folder = directory / name
    if folder.exists():
        return folder
    recipe, checkpoints, bar = built.recipe, directory / "checkpoints" / name, ProgressBar(name, console)
    trainer = DistillationTrainer(
        student=built.new_student(),
        teacher=built.teacher if objective.needs_teacher else None,
        objective=objective,
        args=training_arguments(built, checkpoints),
        train_dataset=built.train.dataset,
        eval_dataset=built.curve,
        processing_class=built.tokenizer,
        vocabulary=built.vocabulary or None,
        task=recipe.task,
        rollout=rollout,
        prefetch=recipe.teacher.prefetch,
        callbacks=[MetricsFile(directory / "metrics.jsonl", name), bar],
    )
    if rollout is not None:
        trainer.add_callback(SamplesFile(directory / "own_texts.jsonl", name, rollout, console))
    trainer.remove_callback(PrinterCallback)
    try:
        trainer.train(resume_from_checkpoint=last_checkpoint(checkpoints) is not None)
    finally:
        bar.progress.stop()
    _save(built, trainer, folder)
    return folder


def _save(built: BuiltRun, trainer: DistillationTrainer, folder: Path) -> None:
    """Save the student under a temporary name first, so that a folder with the final name is complete."""
    if built.recipe.student.merges:
        trainer.distiller.student = merged(trainer.distiller.student)
    partial = folder.with_name(f"{folder.name}.partial")
    if trainer.is_world_process_zero():
        shutil.rmtree(partial, ignore_errors=True)  # left by a kill during an earlier save
    trainer.save_model(str(partial))
    unset_hf_deepspeed_config()  # ZeRO-3 would shard every model that is loaded from here on
    if trainer.is_world_process_zero():
        if built.save_dtype is not None:
            convert_saved(partial, built.save_dtype, built.recipe.task)
        teacher, student = built.loaded.config, trainer.distiller.config
        if built.recipe.task == "encoder" and teacher is not None and teacher.hidden_size == student.hidden_size:
            copy_modules(str(built.recipe.teacher.model_path), partial)
        partial.rename(folder)
    trainer.accelerator.wait_for_everyone()


def training_arguments(built: BuiltRun, checkpoints: Path) -> DistillationConfig:
    """Combine the recipe's `train` with defaults for what it leaves out."""
    steps = built.plan.steps
    sixth = max(1, steps // 6)
    defaults = {"logging_steps": max(1, steps // 60), "save_total_limit": 1, "per_device_eval_batch_size": EVAL_ROWS}
    intervals = {"eval_strategy": "steps", "eval_steps": sixth, "save_strategy": "steps", "save_steps": sixth}
    values: dict[str, Any] = {**defaults, **intervals, **built.recipe.train, "bf16": built.plan.bf16}
    try:
        return DistillationConfig(output_dir=str(checkpoints), seed=built.recipe.seed, disable_tqdm=True, **values)
    except (ValueError, TypeError, ImportError) as error:
        raise RecipeError(f"train: expected arguments that go together, got: {one_line(error)}") from None
