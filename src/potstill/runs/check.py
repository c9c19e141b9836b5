"""Check that a run will go through to its end, and estimate its needs; nothing is trained."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import PartialState
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedModel

from potstill.data.batches import in_batches
from potstill.evaluate.formatting import size
from potstill.evaluate.speed import extra_bytes
from potstill.losses.alignment import TOKEN_TASKS
from potstill.models.adapted import is_quantized
from potstill.models.loading import suppress_warnings
from potstill.models.placement import device_bytes, is_spread, layer_bytes, resident_bytes
from potstill.runs.build import BuiltRun, build_run, piece
from potstill.runs.build_student import StudentBuilder, calibrated_quickly, calibration_rows
from potstill.runs.compute import training_flops
from potstill.runs.config.run import Recipe
from potstill.runs.progress import part
from potstill.runs.ranks import alone_in_process
from potstill.runs.rehearsal import quick_collection, rehearse
from potstill.runs.rounds import round_steps
from potstill.runs.search import SearchPlan, plan_search
from potstill.train.distiller import Distiller

LOSS_BYTES = 2**28  # most that the loss takes on a CPU, see losses/fused_chunks.py
SHORT_TOKENS = 32  # of the first row that is timed
PASS_SECONDS = 1.0  # a batch that takes longer is the last and largest that is timed, unless it is the first


class BatchNeeds(NamedTuple):
    """Needs of one batch: measured on batches of growing size, and scaled to its own."""

    seconds: float
    bytes: int | None  # beside weights and gradients; None where they cannot be measured
    measured: int  # tokens of the largest batch that was timed, with padding
    tokens: int  # of the batch itself


class Preflight(NamedTuple):
    """Needs of a run, estimated on this machine."""

    built: BuiltRun
    memory_bytes: int  # weights, gradients and Adam's moments of the trained ones, and batch_bytes
    batch_bytes: int  # of one batch beside them, forward and backward
    batch_measured: bool  # with activations; else batch_bytes are the loss's buffers alone
    disk_bytes: int  # checkpoints and exported models
    disk_free_bytes: int
    seconds: float  # of training without the final evaluation
    batch: BatchNeeds
    flops: dict[str, float]  # of each training, see `training_flops`
    search: SearchPlan | None  # of the student's shape, before the training
    search_seconds: float
    fit_seconds: float  # of fitting the first weights to the larger model's hidden states
    placement: str | None  # where its teacher fits, in words; None where that is not one model, or has been chosen


@alone_in_process()
def check(recipe: Recipe, console: Console | None = None) -> Preflight:
    """Load everything that a recipe names, try every step of the run on short rows, and estimate what it needs."""
    console = console or Console(quiet=True)
    with suppress_warnings():
        with part(console, "reading models and data"):
            built = build_run(calibrated_quickly(recipe))
        with part(console, "trying every step on short rows"):
            student = built.new_student()
            built = replace(built, notes=(*built.notes, *rehearse(built, student)))
        with part(console, "timing a batch"), quick_collection():
            return _estimate(recipe, built, student)


def _estimate(recipe: Recipe, built: BuiltRun, student: PreTrainedModel) -> Preflight:
    """Estimate what a run needs; `built` is of the recipe but for the first weights."""
    trained = built.size.trained * 4
    exported = built.size.all if recipe.student.merges else built.size.trained
    exported *= (built.save_dtype or torch.float32).itemsize
    runs = len(recipe.evaluate.trained)
    output = Path(recipe.output).absolute()
    existing = next(folder for folder in (output, *output.parents) if folder.exists())
    batch = _batch_needs(built, student)
    batch_bytes = _loss_bytes(built, batch.tokens) if batch.bytes is None else batch.bytes
    # The student's weights, gradient and two moments of the trained ones, and the teachers' weights. The loss reads the
    # tokens in chunks and needs no more than both models' logits and a gradient.
    memory = sum(weight.numel() * weight.element_size() for weight in student.parameters()) + 3 * trained + batch_bytes
    memory += sum(resident_bytes(model) for model in built.loaded.models.values())
    copies = int(recipe.teacher.copies_student) + (recipe.student.quantize is not None)  # the weights before rounding
    memory += copies * trained
    if isinstance(built.new_student, StudentBuilder) and built.new_student.source is not built.loaded.model:
        memory += resident_bytes(built.new_student.source)  # type: ignore[arg-type]  # what the student is cut from
    # A checkpoint has the trained weights and two moments; while one is written the one before still exists. A server
    # that samples reads the trained weights from a folder.
    disk = runs * (2 * (3 + copies) * trained + exported) + (0 if built.writer is None else trained)
    free = shutil.disk_usage(existing).free
    rounds = (recipe.student.initialize.rounds - 1) * round_steps(built.plan.steps)
    batches = (runs * built.plan.steps + rounds) * built.plan.batches
    flops, measured = training_flops(built, student), batch.bytes is not None
    search = plan_search(recipe.student.searches, built.plan.steps) if recipe.student.searches else None
    searched = search.batches(built.plan) * batch.seconds if search else 0.0
    seconds = batches * batch.seconds
    fit = _fit_seconds(recipe, built, batch)
    place = _placement(built, memory)
    return Preflight(
        built, memory, batch_bytes, measured, disk, free, seconds, batch, flops, search, searched, fit, place
    )


def _placement(built: BuiltRun, memory: int) -> str | None:
    """Say where a teacher fits beside the student, by what one process needs with a whole copy of it."""
    model, room = built.loaded.model, device_bytes(PartialState().device)
    if model is None or room is None or built.teacher.of_student:
        return None
    if is_spread(model) or built.recipe.teacher.model_device is not None:
        return None
    layers = layer_bytes(model)
    gathered = memory - sum(layers) + max(layers, default=0)  # a sharded layer is whole while it runs
    offloaded = memory - resident_bytes(model) + max(layers, default=0)
    if memory <= room:
        return f"a copy on each process fits into {size(room)}"
    copy = f"a copy on each process needs {size(memory)} of {size(room)}"
    if layers and gathered < room and not is_quantized(model):
        return f"{copy}; teacher.shard fits, on {-(-sum(layers) // (room - gathered))} processes or more"
    if offloaded < room:
        return f"{copy}; teacher.device_map: auto fits, or a cache"
    return f"{copy}, and the student with its batch does not fit either: make them smaller"


def _fit_seconds(recipe: Recipe, built: BuiltRun, batch: BatchNeeds) -> float:
    """Estimate how long fitting takes: for its tokens about as long as training on them."""
    part = recipe.student.initialize
    if recipe.student.design is None or not part.fit or part.method in ("random", "selective"):
        return 0.0
    rows = calibration_rows(part.calibration_rows, built.train.dataset)
    tokens = sum(len(built.train.dataset[i]["input_ids"]) for i in rows)
    return tokens * batch.seconds / batch.tokens


def _batch_needs(built: BuiltRun, student: PreTrainedModel) -> BatchNeeds:
    """Measure one batch, forward and backward; of a slow machine small ones, which are scaled by their tokens."""
    device = PartialState().device
    recipe, plan, rollout = built.recipe, built.plan, built.new_rollout()
    options: dict[str, Any] = {"vocabulary": built.vocabulary or None, "task": recipe.task}
    if built.packed is not None:
        options["packed_length"] = built.packed.max_length
    distiller = Distiller(student, built.teacher, built.objective, **options).to(device).train()
    dtype, mixed = torch.bfloat16 if plan.bf16 else torch.float16, plan.bf16 or bool(recipe.train.get("fp16"))
    seconds = 0.0

    def run(batch: dict[str, Tensor], step: int) -> None:
        nonlocal seconds
        start = time.perf_counter()
        samples = batch if rollout is None else rollout([batch], student, step=step)[0]
        with torch.autocast(device.type, dtype=dtype, enabled=mixed):
            loss = distiller.step(samples).loss
        loss.backward()
        loss.item()  # waits for the device
        seconds = time.perf_counter() - start

    measured: list[BatchNeeds] = []
    for batch in _growing_batches(built, device):
        if not measured:
            run(batch, 0)  # the first is slower
        extra = extra_bytes(partial(run, batch, len(measured) + 1), device)
        tokens = _positions(built, batch["attention_mask"].sum(1).tolist())
        measured.append(BatchNeeds(seconds, extra, tokens, tokens))
        if seconds > PASS_SECONDS and len(measured) > 1:
            break
    if rollout is not None:
        rollout.close()
    return _scaled(built, measured, _positions(built, [len(row["input_ids"]) for row in built.first_batch]))


def _positions(built: BuiltRun, lengths: list[int]) -> int:
    """The positions of a batch of rows that models read: with padding, where rows are not packed."""
    return sum(lengths) if built.packed is not None else len(lengths) * max(lengths)


def _growing_batches(built: BuiltRun, device: torch.device) -> Iterator[dict[str, Tensor]]:
    """Batches of doubled size, up to one of the training: longer and longer pieces of a row, then more rows."""
    rows = built.first_batch
    rows.sort(key=lambda row: -len(row["input_ids"]))
    longest, number, length = len(rows[0]["input_ids"]), 1, SHORT_TOKENS
    if built.recipe.task not in TOKEN_TASKS or built.needs_whole_rows or built.recipe.rollout is not None:
        length = longest
    while True:
        cut = [piece(row, length) for row in rows[:number]] if length < longest else rows[:number]
        yield from in_batches(cut, built.tokenizer, number, device)
        if length >= longest and number >= len(rows):
            return
        length, number = (2 * length, 1) if length < longest else (length, 2 * number)


def _scaled(built: BuiltRun, measured: list[BatchNeeds], tokens: int) -> BatchNeeds:
    """Scale the largest measured batch: its time by tokens, its memory by the difference to the batch before."""
    last = measured[-1]
    if last.tokens >= tokens:
        return last
    extra = last.bytes
    if extra is not None:
        before = measured[-2] if len(measured) > 1 else BatchNeeds(0.0, 0, 0, 0)
        activations = [(x.bytes or 0) - _loss_bytes(built, x.tokens) for x in (before, last)]
        slope = max(activations[1] - activations[0], 0) / (last.tokens - before.tokens)
        extra = max(round(activations[1] + slope * (tokens - last.tokens)), 0) + _loss_bytes(built, tokens)
    return BatchNeeds(last.seconds * tokens / last.tokens, extra, last.tokens, tokens)


def _loss_bytes(built: BuiltRun, tokens: int) -> int:
    return min(3 * 4 * tokens * max(built.vocabulary, 1), LOSS_BYTES)
