"""The steps of a run after its objects are built, in order: `run` walks them, and `rehearse` before it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from accelerate import PartialState
from rich.console import Console
from transformers import PrinterCallback
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from potstill.data.show import shown_rows
from potstill.errors import RecipeError, one_line
from potstill.evaluate.exported import FOLDER
from potstill.evaluate.report.page import write_report, write_rows, write_student_card
from potstill.evaluate.summary import write_summary
from potstill.models.adapted import convert_saved, merged
from potstill.models.checksums import write_checksums
from potstill.models.loading import load_model
from potstill.models.modules import copy_modules
from potstill.runs.build import BuiltRun
from potstill.runs.config.export import export_kinds
from potstill.runs.formats.table import weight_grids
from potstill.runs.interruption import Interruption
from potstill.runs.measure import EVAL_ROWS, summarize
from potstill.runs.progress import part
from potstill.runs.training_progress import TrainingProgress
from potstill.train.callbacks import MetricsFile, SamplesFile
from potstill.train.checkpoints import check_ranks, last_checkpoint, remove_incomplete
from potstill.train.objective import Objective
from potstill.train.rollout import Rollout
from potstill.train.terms.logits import Labels
from potstill.train.tracking import flat, own_run
from potstill.train.trainer import DistillationConfig, DistillationTrainer

SHOWN_ROWS = 3  # in the report
CHECKPOINT_BYTES = 3 * 4  # of a trained parameter: itself and Adam's two moments


class Step(NamedTuple):
    """A step of a run; what it needs of earlier steps is in the run directory."""

    name: str
    do: Callable[[BuiltRun, Path, Console], object]
    every_rank: bool = False  # else the main process alone


def train_student(built: BuiltRun, directory: Path, console: Console) -> None:
    """Train and save the student."""
    _train_and_save(built, "student", built.objective, directory, console, built.new_rollout())


def train_baseline(built: BuiltRun, directory: Path, console: Console) -> None:
    """Train and save the same student on labels alone, where the recipe asks for it."""
    if built.recipe.evaluate.baseline:
        _train_and_save(built, "baseline", Objective([Labels()]), directory, console)


def train_random(built: BuiltRun, directory: Path, console: Console) -> None:
    """Train and save the same design from random weights, where the recipe asks for it."""
    if built.recipe.evaluate.random_start:
        random = replace(built, new_student=built.new_random_student)
        _train_and_save(random, "random", built.objective, directory, console)


def measure_models(built: BuiltRun, directory: Path, console: Console) -> None:
    """Measure all models as they are on the disk, and write summary.json."""
    students = {name: directory / name for name in built.recipe.evaluate.trained}
    write_summary(summarize(built, students, directory, console), directory)


def export_student(built: BuiltRun, directory: Path, console: Console) -> None:
    """Write the files that the recipe's `export` names, and measure them beside the teacher if it has their tokens."""
    if not built.recipe.export:
        return
    from potstill.runs.export import export_model  # needs packages of an extra
    from potstill.runs.formats.measure import Bench

    saved, task = directory / "student", built.recipe.task
    teacher = built.loaded.model if built.alignment_stats is None else None
    model = load_model(str(saved), "student", "float32", task)
    bench = Bench(built.tokenizer, built.eval.dataset, model, teacher, task)
    export_model(bench, export_kinds(built.recipe.export), directory / FOLDER, saved=saved, console=console)


def write_pages(built: BuiltRun, directory: Path, console: Console) -> None:
    """Write the student's card and report.html."""
    with part(console, "writing the report"):
        write_student_card(directory)
        write_report(directory)


def write_recipe(built: BuiltRun, directory: Path, console: Console) -> None:
    """Make the directory, with recipe.yaml and the first training rows."""
    built.recipe.start(directory)
    write_rows(shown_rows(built.train.dataset, built.tokenizer, SHOWN_ROWS), directory)


STEPS = (
    Step("write the recipe", write_recipe),
    Step("train student", train_student, every_rank=True),
    Step("train baseline", train_baseline, every_rank=True),
    Step("train from random weights", train_random, every_rank=True),
    Step("measure", measure_models),
    Step("export", export_student),
    Step("report", write_pages),
)


def _train_and_save(
    built: BuiltRun, name: str, objective: Objective, directory: Path, console: Console, rollout: Rollout | None = None
) -> None:
    """Train one student and save it in `directory/name`, unless it is there."""
    if not (folder := directory / name).exists():
        _save(built, train(built, name, objective, directory, console, rollout), folder)


def train(
    built: BuiltRun, name: str, objective: Objective, directory: Path, console: Console, rollout: Rollout | None
) -> DistillationTrainer:
    """Train one student, from its last checkpoint in `directory/checkpoints/name` if there is one."""
    recipe, checkpoints, shown = built.recipe, directory / "checkpoints" / name, TrainingProgress(name, console)
    interruption, checkpoint = Interruption(console), last_checkpoint(checkpoints)
    if checkpoint is not None:
        check_ranks(checkpoint, PartialState().num_processes)
    if PartialState().is_main_process:
        remove_incomplete(checkpoints)
    PartialState().wait_for_everyone()
    student, quantize = built.new_student(), recipe.student.quantize
    trainer = DistillationTrainer(
        student=student,
        grids=None if quantize is None else weight_grids(student, quantize),
        teacher=built.teacher if objective.needs_teacher else None,
        objective=objective,
        args=training_arguments(built, name, checkpoints),
        train_dataset=built.train.dataset,
        eval_dataset=built.curve,
        processing_class=built.tokenizer,
        vocabulary=built.vocabulary or None,
        task=recipe.task,
        rollout=rollout,
        prefetch=recipe.teacher.prefetch,
        callbacks=[MetricsFile(directory / "metrics.jsonl", name), shown, interruption],
    )
    if rollout is not None:
        trainer.add_callback(SamplesFile(directory / "own_texts.jsonl", name, rollout, console))
    trainer.remove_callback(PrinterCallback)
    try:
        with interruption.awaited(), own_run(trainer.args.report_to, recipe.name):
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    finally:
        shown.progress.stop()
    return trainer


def _save(built: BuiltRun, trainer: DistillationTrainer, folder: Path) -> None:
    """Save the student under a temporary name first, so that a folder with the final name is complete."""
    if built.recipe.student.merges:
        trainer.distiller.student = merged(trainer.distiller.student)
    partial, main = folder.with_name(f"{folder.name}.partial"), trainer.is_world_process_zero()  # one name on all ranks
    if main:
        shutil.rmtree(partial, ignore_errors=True)  # left by a kill during an earlier save
    try:
        trainer.save_model(str(partial))
        unset_hf_deepspeed_config()  # ZeRO-3 would shard every model that is loaded from here on
        if main:
            _complete(built, trainer, partial)
            partial.rename(folder)
    finally:
        if main:
            shutil.rmtree(partial, ignore_errors=True)  # of a save that was interrupted
    trainer.accelerator.wait_for_everyone()


def _complete(built: BuiltRun, trainer: DistillationTrainer, saved: Path) -> None:
    """Bring a saved student into its precision, and add the modules of an encoder's teacher and the checksums."""
    if built.save_dtype is not None:
        convert_saved(saved, built.save_dtype, built.recipe.task)
    teacher, student = built.loaded.config, trainer.distiller.config
    if built.recipe.task == "encoder" and teacher is not None and teacher.hidden_size == student.hidden_size:
        copy_modules(str(built.recipe.teacher.model_path), saved)
    write_checksums(saved)


def walk(steps: Iterable[Step], built: BuiltRun, directory: Path, console: Console) -> None:
    """Take some steps of a run, on the ranks that each is for."""
    for step in steps:
        if step.every_rank or PartialState().is_main_process:
            step.do(built, directory, console)
        PartialState().wait_for_everyone()


def short_training(train: Mapping[str, Any], steps: int, of: int) -> dict[str, Any]:
    """Return the arguments of a training of some steps, in place of one of more, without evaluation."""
    arguments = {name: value for name, value in train.items() if name != "load_best_model_at_end"}
    arguments |= {"max_steps": steps, "eval_strategy": "no", "report_to": "none"}
    if (warmup := arguments.get("warmup_steps", 0)) >= 1:  # else it is a share
        arguments["warmup_steps"] = round(warmup * steps / of)
    return arguments


def training_arguments(built: BuiltRun, name: str, checkpoints: Path) -> DistillationConfig:
    """Combine the recipe's `train` with defaults for what it leaves out."""
    steps = built.plan.steps
    sixth = max(1, steps // 6)
    defaults = {"logging_steps": max(1, steps // 60), "save_total_limit": 1, "per_device_eval_batch_size": EVAL_ROWS}
    intervals = {"eval_strategy": "steps", "eval_steps": sixth, "save_strategy": "steps", "save_steps": sixth}
    given = deepcopy(built.recipe.train)  # TrainingArguments writes into fsdp_config
    values: dict[str, Any] = {**defaults, **intervals, **given, "bf16": built.plan.bf16}
    values |= {"packing": built.packed is not None, "max_length": built.recipe.data.max_length}
    values["run_name"] = f"{values.get('run_name') or built.recipe.name} {name}"
    try:
        args = DistillationConfig(output_dir=str(checkpoints), seed=built.recipe.seed, disable_tqdm=True, **values)
    except (ValueError, TypeError, ImportError) as error:
        raise RecipeError(f"train: expected arguments that go together, got: {one_line(error)}") from None
    args.facts = flat(
        built.recipe.model_dump(mode="json", exclude={"train", "objective", "teacher"}, exclude_none=True)
    )
    return args
