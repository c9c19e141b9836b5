"""run(recipe): from a recipe to a run directory. Read it from top to bottom."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedModel, PrinterCallback
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from potstill.data.files import explain_disk_full, write_text
from potstill.data.batches import in_batches
from potstill.errors import RecipeError
from potstill.evaluate.sequence import measure
from potstill.evaluate.measures import QUALITY
from potstill.evaluate.quality import continuation, gap_closed
from potstill.evaluate.report.page import write_report, write_student_card
from potstill.evaluate.speed import bytes_on_disk, latency_ms, weight_bytes
from potstill.evaluate.versions import versions
from potstill.models.loading import load_model, suppress_warnings
from potstill.losses.alignment import TOKEN_TASKS, causal_alignment
from potstill.runs.build import Parts, prepare
from potstill.runs.config.student import BudgetPart, StudentPart
from potstill.runs.config.run import Recipe
from potstill.runs.config.teacher import TeacherPart
from potstill.models.adapted import count, is_adapted, merged
from potstill.models.modules import copy_modules
from potstill.teachers.crosstok import CrossTokenizerTeacher
from potstill.teachers.ensemble import EnsembleTeacher
from potstill.teachers.teacher import Teacher
from potstill.train.trainer import DistillationConfig, DistillationTrainer
from potstill.train.terms.logits import Labels
from potstill.train.objective import Objective
from potstill.train.callbacks import MetricsFile, ProgressBar, SamplesFile, logged_lines, seconds_of
from potstill.train.checkpoints import last_checkpoint, restore_teacher
from potstill.train.samples import collapse_warning
from potstill.train.rollout import Rollout

EVAL_ROWS = 16  # rows in a batch of the final evaluation
CHECKPOINT = 3 * 4  # bytes of a trained parameter: itself and Adam's two moments
OWN_TEXTS = 4  # of the student, in the report


@dataclass(frozen=True)
class RunResult:
    """What a run leaves.

    Args:
        directory: the run directory; `student/` and `report.html` are in it.
        summary: the content of summary.json.
    """

    directory: Path
    summary: dict[str, Any]


def run(recipe: Recipe, *, resume: bool = False, console: Console | None = None) -> RunResult:
    """Distil as a recipe says, and report.

    A run that was killed goes on where it stopped and ends in the same weights.

    Args:
        recipe: all that there is to say.
        resume: go on with the run in `recipe.output`, if there is one.
        console: where progress is shown; default: standard error.

    Raises:
        UserError: something in the recipe, the data or the models is to be corrected; nothing is lost.
        DivergedError: the loss is not finite any more.
    """
    console = console or Console(stderr=True)
    state = PartialState()
    directory = Path(recipe.output)
    require_free(directory, recipe, resume)

    with suppress_warnings():
        parts = prepare(recipe)
        if state.is_main_process:
            try:
                directory.mkdir(parents=True, exist_ok=True)
                write_text(directory / "recipe.yaml", recipe.dump())
            except OSError as error:
                raise RecipeError(
                    f"output: expected a directory to write to, got {directory}: {error.strerror}. "
                    "Choose another with --set output=DIR."
                ) from None
            for note in parts.notes:
                console.print(note, style="dim", highlight=False, markup=False)
        state.wait_for_everyone()
        with explain_disk_full(directory, CHECKPOINT * parts.size.trained):
            _train(parts, "student", parts.objective, directory, console, parts.rollout())
            if recipe.evaluate.baseline:
                _train(parts, "baseline", Objective([Labels()]), directory, console)

        if state.is_main_process:
            with console.status("evaluating on held-out data"):
                summary = _summarize(parts, directory)
            write_text(directory / "summary.json", json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
            write_student_card(directory)
            write_report(directory)
        state.wait_for_everyone()
    return RunResult(directory, json.loads((directory / "summary.json").read_text(encoding="utf-8")))


def require_free(directory: Path, recipe: Recipe, resume: bool) -> None:
    """See that a run directory holds no training, or one of the same recipe to go on with.

    Raises:
        RecipeError: it does not.
    """
    record = directory / "recipe.yaml"
    if not record.exists() or not (directory / "metrics.jsonl").exists():
        return
    if not resume:
        raise RecipeError(
            f"output: expected an empty or new directory, got {directory}, which holds a run. "
            "Go on with it with --resume, or choose another with --set output=DIR."
        )
    earlier = Recipe.load(record)
    changed = [key for key, value in recipe if value != getattr(earlier, key)]
    if changed:
        raise RecipeError(
            f"output: expected the recipe that the run in {directory} began with, got another "
            f"{', '.join(changed)}. Take {record}, or choose another directory with --set output=DIR."
        )


def _train(
    parts: Parts, name: str, objective: Objective, directory: Path, console: Console, rollout: Rollout | None = None
) -> None:
    """Train one student and save it in `directory/name`; done already where that is there."""
    target = directory / name
    if target.exists():
        return
    checkpoints = directory / "checkpoints" / name
    bar = ProgressBar(name, console)
    trainer = DistillationTrainer(
        student=parts.new_student(),
        teacher=parts.teacher if objective.needs_teacher else None,
        objective=objective,
        args=_arguments(parts, checkpoints),
        train_dataset=parts.train.dataset,
        eval_dataset=parts.curve,
        processing_class=parts.tokenizer,
        vocabulary=parts.vocabulary or None,
        task=parts.recipe.task,
        rollout=rollout,
        prefetch=parts.recipe.teacher.prefetch,
        callbacks=[MetricsFile(directory / "metrics.jsonl", name), bar],
    )
    if rollout is not None:
        trainer.add_callback(SamplesFile(directory / "own_texts.jsonl", name, rollout, console))
    trainer.remove_callback(PrinterCallback)
    try:
        trainer.train(resume_from_checkpoint=last_checkpoint(checkpoints) is not None)
    finally:
        bar.progress.stop()
    if parts.recipe.student.merges:
        trainer.distiller.student = merged(trainer.distiller.student)
    partial = directory / f"{name}.partial"
    if trainer.is_world_process_zero():
        shutil.rmtree(partial, ignore_errors=True)  # what a kill in the middle of the next line leaves
    trainer.save_model(str(partial))
    if trainer.is_world_process_zero():
        whole, made = parts.teacher_config, trainer.distiller.config
        if parts.recipe.task == "encoder" and whole is not None and whole.hidden_size == made.hidden_size:
            copy_modules(str(parts.recipe.teacher.model), partial)
        partial.rename(target)
    trainer.accelerator.wait_for_everyone()
    unset_hf_deepspeed_config()  # ZeRO-3 would shard every model that is loaded from here on


def _arguments(parts: Parts, checkpoints: Path) -> DistillationConfig:
    """The recipe's `train`, with what a run sets unless the recipe does."""
    steps = parts.steps
    values: dict[str, Any] = {
        "logging_steps": max(1, steps // 60),
        "eval_strategy": "steps",
        "eval_steps": max(1, steps // 6),
        "save_strategy": "steps",
        "save_steps": max(1, steps // 6),
        "save_total_limit": 1,
        "per_device_eval_batch_size": EVAL_ROWS,
        **parts.recipe.train,
        "bf16": parts.bf16,
    }
    try:
        return DistillationConfig(output_dir=str(checkpoints), seed=parts.recipe.seed, disable_tqdm=True, **values)
    except (ValueError, TypeError, ImportError) as error:
        reason = " ".join(str(error).split())
        raise RecipeError(f"train: expected arguments that go together, got: {reason}") from None


def _summarize(parts: Parts, directory: Path) -> dict[str, Any]:
    """Measure teacher, baseline and student as they lie on disk; the content of summary.json."""
    recipe = parts.recipe
    names = [name for name in ("baseline", "student") if (directory / name).exists()]
    folders = {name: directory / name for name in names}
    device = PartialState().device
    if (kept := last_checkpoint(directory / "checkpoints" / "student")) is not None and not parts.teacher.of_student:
        restore_teacher(parts.teacher, kept)
    # With tokens of its own a teacher cannot be measured on the student's: what it tells of the text is.
    teacher = parts.teacher_model if parts.meeting is None else None
    dtype = "auto" if recipe.student.adapter is None else recipe.student.adapter.dtype
    models = {name: load_model(str(directory / name), name, dtype, recipe.task).to(device) for name in names}
    everyone = dict(models)
    if teacher is not None:
        teacher.to(torch.device(recipe.teacher.device or device))  # type: ignore[arg-type]  # their wrapper hides it
        everyone = {"teacher": teacher, **models}
        folders["teacher"] = Path(str(recipe.teacher.model))
    of_tokens = recipe.task in TOKEN_TASKS
    measured: Mapping[str, Any] = measure(
        recipe.task, teacher, models, _batches(parts, parts.eval.dataset), vocabulary=parts.vocabulary or None
    )
    if teacher is None:
        curve_loss = _told_loss(parts, parts.curve)
    else:
        curve = _batches(parts, parts.curve)
        curve_loss = measure(recipe.task, teacher, {}, curve, vocabulary=parts.vocabulary or None)["teacher"].loss
    rows: dict[str, dict[str, float | None]] = {
        name: {
            **{one.key: getattr(measured[name], one.key) for one in QUALITY[recipe.task]},
            "parameters": count(model).all,
            "bytes": bytes_on_disk(folders[name], model),
            "latency_ms": latency_ms(model, recipe.data.max_length),
        }
        for name, model in everyone.items()
    }
    teacher_loss = measured["teacher"].loss if teacher is not None else _told_loss(parts, parts.eval.dataset)
    if teacher is None and teacher_loss is not None:
        rows = {"teacher": dict.fromkeys(rows["student"]) | {"loss": teacher_loss} | _size_of_teacher(parts), **rows}
    if isinstance(parts.teacher, CrossTokenizerTeacher):
        text = parts.teacher.meeting(parts.eval.dataset)
        for row in rows.values():
            row["bits_per_byte"] = None if row["loss"] is None else row["loss"] * text.tokens / text.bytes / math.log(2)
    closed = None
    if "baseline" in rows and teacher_loss is not None:
        closed = gap_closed(teacher_loss, measured["baseline"].loss, measured["student"].loss)
    metrics = logged_lines(directory / "metrics.jsonl")
    return {
        "name": recipe.name,
        "seed": recipe.seed,
        "task": recipe.task,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "rows": rows,
        "gap_closed": closed,
        "curve": {"rows": len(parts.curve), "teacher_loss": curve_loss},
        "kl_by_position": None  # with masks a token sees both sides, wherever it is
        if teacher is None or recipe.task != "causal"
        else {
            "edges": measured["student"].position_edges,
            **{name: measured[name].kl_by_position for name in names},
        },
        "continuations": _continuations(parts, everyone) if recipe.task == "causal" else [],
        "own_texts": _spread(logged_lines(directory / "own_texts.jsonl"), OWN_TEXTS),
        "own_text": next((line for line in reversed(metrics) if "own_length" in line), None),
        "data": {
            "train": recipe.data.train.path,
            "train_tokens": parts.train.tokens if of_tokens else None,
            "train_examples": len(parts.train.dataset),
            "eval": recipe.data.eval.path,
            "eval_tokens": parts.eval.tokens if of_tokens else None,
            "eval_examples": len(parts.eval.dataset),
        },
        "training": {
            "steps": parts.steps,
            "tokens_per_step": round(parts.train.tokens / len(parts.train.dataset) * parts.rows_per_step)
            if of_tokens
            else None,
            "seconds": {name: seconds_of(metrics, name) for name in names},
        },
        "objective": "; ".join(part.describe() for part in recipe.objective),
        "models": {
            "teacher": _describe_teacher(recipe.teacher, parts.teacher),
            "student": _describe_student(recipe.student),
        },
        "adapter": _adapter(parts, directory / "student", models["student"]),
        "teacher_weights": dict(zip(parts.teacher.names, parts.teacher.weights.tolist(), strict=True))
        if isinstance(parts.teacher, EnsembleTeacher)
        else None,
        "notes": [*parts.notes, *_alarms(metrics)],
        "versions": versions(),
    }


def _spread(lines: list[dict[str, Any]], number: int) -> list[dict[str, Any]]:
    """At most so many of the lines, the first and the last among them."""
    wanted = min(number, len(lines))
    return [lines[round(i * (len(lines) - 1) / max(wanted - 1, 1))] for i in range(wanted)]


def _alarms(metrics: list[dict[str, Any]]) -> list[str]:
    """When the student's own text collapsed for the first time, and whether it still has at the end."""
    found = [(line["step"], said) for line in metrics if (said := collapse_warning(line))]
    if not found:
        return []
    last = max(line["step"] for line in metrics if "own_share" in line)
    until = "to the end" if found[-1][0] == last else f"to step {found[-1][0]}"
    return [f"From step {found[0][0]} {until}: {found[-1][1]}"]


def _size_of_teacher(parts: Parts) -> dict[str, float | None]:
    """The size of a teacher's model that is here, though it cannot be measured on the student's tokens."""
    model = parts.teacher_model
    if model is None:
        return {}
    return {
        "parameters": model.num_parameters(),
        "bytes": weight_bytes(Path(str(parts.recipe.teacher.model))) or model.get_memory_footprint(),
    }


def _adapter(parts: Parts, folder: Path, student: Any) -> dict[str, Any] | None:
    """What was trained of the student, where it is an adapter."""
    part = parts.recipe.student.adapter
    if part is None and not is_adapted(student):
        return None
    return {
        "title": "the adapter that it came with" if part is None else part.title,
        "trained": parts.size.trained,
        "share": parts.size.trained / parts.size.all,
        "bytes": weight_bytes(folder) if is_adapted(student) else None,
        "base": student.active_peft_config.base_model_name_or_path if is_adapted(student) else None,
        "quantized": getattr(part, "bits", None) is not None,
    }


def _told_loss(parts: Parts, dataset: Dataset) -> float | None:
    """The cross-entropy of a teacher that is no model here, from what it says of the data's own tokens; None where it
    does not know, or is made of the student. One with another tokenizer is measured on the same text, by token of
    the student.
    """
    if parts.teacher.of_student or not parts.teacher.covers(dataset):
        return None
    total, tokens = 0.0, 0
    device = PartialState().device
    for batch in _batches(parts, dataset):
        there = {name: value.to(device) for name, value in batch.items()}
        alignment = causal_alignment(there["labels"])
        said = parts.teacher(there, alignment)
        told: Tensor | None
        if said.across is not None:
            told, counted = said.across.log_probs, int((said.across.student >= 0).sum())
        else:
            whole = replace(said, targets=said.targets.slice(parts.vocabulary))
            told, counted = whole.of_labels(alignment.labels), len(alignment)
        if told is None:
            return None
        total -= float(told.double().sum())
        tokens += counted
    return total / max(tokens, 1)


def _batches(parts: Parts, dataset: Dataset) -> Iterator[dict[str, Tensor]]:
    return in_batches(dataset, parts.tokenizer, EVAL_ROWS)


def _continuations(parts: Parts, models: Mapping[str, PreTrainedModel]) -> list[dict[str, str]]:
    """Held-out beginnings, evenly spread, and how each model goes on."""
    dataset = parts.eval.dataset

    def decode(ids: list[int]) -> str:
        return str(parts.tokenizer.decode(ids))

    wanted = min(parts.recipe.evaluate.continuations, len(dataset))
    found = []
    for i in range(wanted):
        row = dataset[int((i + 0.5) * len(dataset) / wanted)]
        ids, labels = row["input_ids"], row["labels"]
        prompt = next((place for place, label in enumerate(labels) if label != -100), 0)
        prompt = prompt or min(64, len(ids) // 2)
        new = min(64, parts.recipe.data.max_length - prompt)
        if prompt == 0 or new <= 0:
            continue
        said = {name: decode(continuation(model, ids[:prompt], new)) for name, model in models.items()}
        found.append({"prompt": decode(ids[:prompt]), "truth": decode(ids[prompt : prompt + new]), **said})
    return found


def _describe_student(student: StudentPart) -> str:
    whole = student.model or _describe_design(student)
    return whole if student.adapter is None else f"{whole}, with {student.adapter.title}"


def _describe_teacher(part: TeacherPart, teacher: Teacher) -> str:
    """What people call it, with the weights of an ensemble."""
    if part.ensemble is None or not isinstance(teacher, EnsembleTeacher):
        return part.title
    members = zip(part.ensemble, teacher.weights.tolist(), strict=True)
    said = ", ".join(f"{member.title} ({weight:.3f})" for member, weight in members)
    return f"an ensemble, {part.weights} weights of {part.of.replace('_', '-')}: {said}"


def _describe_design(student: StudentPart) -> str:
    design = student.design
    budget = isinstance(design, BudgetPart)
    fields = design.model_dump(exclude_none=True, exclude_defaults=True) if isinstance(design, BudgetPart) else design
    shape = ", ".join(f"{key} {value}" for key, value in (fields or {}).items())
    begins = "" if student.initialize.method == "random" else f"; begins with {student.initialize.method}"
    return f"the teacher's kind {'within' if budget else 'with'} {shape}{begins}"
