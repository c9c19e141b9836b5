"""Estimate the needs of a run before anything is trained."""

from __future__ import annotations

import shutil
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from potstill.data.batches import in_batches
from potstill.evaluate.speed import extra_bytes
from potstill.models.loading import suppress_warnings
from potstill.runs.build import BuiltRun, build_run
from potstill.runs.config.run import Recipe
from potstill.train.distiller import Distiller

LOSS_BYTES = 2**28  # most that the loss takes on a CPU, see losses/fused_chunks.py


class Preflight(NamedTuple):
    """Needs of a run, estimated on this machine."""

    built: BuiltRun
    memory_bytes: int  # weights, gradients and Adam's moments of the trained ones, and batch_bytes
    batch_bytes: int  # of one batch beside them, forward and backward
    batch_measured: bool  # with activations; else batch_bytes are the loss's buffers alone
    disk_bytes: int  # checkpoints and exported models
    disk_free_bytes: int
    seconds: float  # of training without the final evaluation, from one timed batch


def check(recipe: Recipe) -> Preflight:
    """Load everything that a recipe names and estimate what the run needs."""
    with suppress_warnings():
        built = build_run(recipe)
        student = built.new_student()
    trained, train = built.size.trained * 4, built.train
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
    memory += trained if recipe.teacher.copies_student else 0
    # A checkpoint has the trained weights and two moments; while one is written the one before still exists. A server
    # that samples reads the trained weights from a folder.
    disk = runs * (2 * 3 * trained + exported) + (0 if built.writer is None else trained)
    free = shutil.disk_usage(existing).free
    seconds *= runs * built.plan.steps
    return Preflight(built, memory, batch_bytes, extra is not None, disk, free, seconds)


def _one_step(built: BuiltRun, student: PreTrainedModel) -> tuple[float, int | None]:
    """Measure the seconds of one optimiser step's batches, and the memory of one batch beside weights and gradients."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    recipe, plan, dataset, rollout = built.recipe, built.plan, built.train.dataset, built.new_rollout()
    options: dict[str, Any] = {"vocabulary": built.vocabulary or None, "task": recipe.task}
    distiller = Distiller(student, built.teacher, built.objective, **options).to(device)
    rows = (dataset[i] for i in range(min(plan.batch_rows, len(dataset))))
    (batch,) = in_batches(rows, built.tokenizer, plan.batch_rows, device)
    dtype, mixed = torch.bfloat16 if plan.bf16 else torch.float16, plan.bf16 or bool(recipe.train.get("fp16"))
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
    return seconds * max(plan.rows_per_step // plan.batch_rows, 1), extra
