"""Estimate the needs of a run before anything is trained."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedModel

from potstill.data.batches import in_batches
from potstill.evaluate.speed import extra_bytes
from potstill.models.loading import suppress_warnings
from potstill.runs.build import BuiltRun, build_run
from potstill.runs.config.run import Recipe
from potstill.train.distiller import Distiller

LOSS_BYTES = 2**28  # most that the loss takes on a CPU, see losses/fused_chunks.py


@dataclass(frozen=True)
class Preflight:
    """Needs of a run, estimated on this machine."""

    teacher_parameters: int | None  # None for a teacher without a local model
    student_parameters: int
    trained_parameters: int  # of the student: all, or an adapter's
    vocabulary: int  # tokens that both models share; 0 where the task is not one of tokens
    train_tokens: int  # that are targets
    train_rows: int
    eval_tokens: int
    steps: int
    memory_bytes: int  # weights, gradients and Adam's moments of the trained ones, and batch_bytes
    batch_bytes: int  # of one batch beside them, forward and backward
    batch_measured: bool  # with activations; else batch_bytes are the loss's buffers alone
    disk_bytes: int  # checkpoints and exported models
    disk_free_bytes: int
    seconds: float  # of training without the final evaluation, from one timed batch
    notes: tuple[str, ...]  # that the run will print
    by_bytes: bool = False  # whether teacher and student are compared by bytes, for two tokenizers


def check(recipe: Recipe) -> Preflight:
    """Load everything that a recipe names and estimate what the run needs.

    Raises:
        UserError: the run could not start.
    """
    with suppress_warnings():
        built = build_run(recipe)
        student = built.new_student()
    trained, train, teacher = built.size.trained * 4, built.train, built.loaded.model
    exported = built.size.all * 4 if recipe.student.merges else trained
    runs = 2 if recipe.evaluate.baseline else 1
    output = Path(recipe.output).absolute()
    existing = next(folder for folder in (output, *output.parents) if folder.exists())
    seconds, extra = _one_step(built, student)
    batch_tokens = round(built.plan.batch_rows * train.tokens / len(train.dataset))
    batch_bytes = min(3 * 4 * batch_tokens * max(built.vocabulary, 1), LOSS_BYTES) if extra is None else extra
    # The student's weights, gradient and two moments of the trained ones, and the teachers' weights. The loss reads the
    # tokens in chunks and needs no more than both models' logits and a gradient.
    memory = sum(weight.numel() * weight.element_size() for weight in student.parameters()) + 3 * trained + batch_bytes
    memory += sum(model.get_memory_footprint() for model in built.loaded.models.values())
    # A checkpoint has the trained weights and two moments; while one is written the one before still exists. A server
    # that samples reads the trained weights from a folder.
    disk = runs * (2 * 3 * trained + exported) + (0 if built.writer is None else trained)
    return Preflight(
        teacher_parameters=None if teacher is None else teacher.num_parameters(),
        student_parameters=built.size.all,
        trained_parameters=built.size.trained,
        vocabulary=built.vocabulary,
        train_tokens=train.tokens,
        train_rows=len(train.dataset),
        eval_tokens=built.eval.tokens,
        steps=built.plan.steps,
        memory_bytes=memory + (trained if recipe.teacher.copies_student else 0),
        batch_bytes=batch_bytes,
        batch_measured=extra is not None,
        disk_bytes=disk,
        disk_free_bytes=shutil.disk_usage(existing).free,
        seconds=runs * built.plan.steps * seconds,
        notes=built.notes,
        by_bytes=built.alignment_stats is not None,
    )


def _one_step(built: BuiltRun, student: PreTrainedModel) -> tuple[float, int | None]:
    """Measure the seconds of one optimiser step's batches, and the memory of one batch beside weights and gradients."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    distiller = Distiller(
        student, built.teacher, built.objective, vocabulary=built.vocabulary or None, task=built.recipe.task
    ).to(device)
    rows = (built.train.dataset[i] for i in range(min(built.plan.batch_rows, len(built.train.dataset))))
    (batch,) = in_batches(rows, built.tokenizer, built.plan.batch_rows, device)
    dtype = torch.bfloat16 if built.plan.bf16 else torch.float16
    mixed = built.plan.bf16 or bool(built.recipe.train.get("fp16"))
    rollout = built.new_rollout()
    seconds = 0.0

    def one_batch(step: int) -> None:
        nonlocal seconds
        start = time.perf_counter()
        samples = batch if rollout is None else rollout([batch], student, step=step)[0]
        with torch.autocast(device, dtype=dtype, enabled=mixed):
            loss = distiller.step(samples).loss
        loss.backward()
        loss.item()  # waits for the device
        seconds = time.perf_counter() - start

    one_batch(0)
    extra = extra_bytes(partial(one_batch, 1), torch.device(device))
    if rollout is not None:
        rollout.close()
    return seconds * max(built.plan.rows_per_step // built.plan.batch_rows, 1), extra
