"""What of a recipe does not go with its task."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

from potstill.losses.alignment import DISTRIBUTIONS, SEQUENCE_TASKS, OF_TOKENS, Task, instead
from potstill.runs.config.data import MASKED_SHARE, DataPart
from potstill.runs.config.inside import HiddenPart
from potstill.runs.config.objective import TermPart
from potstill.runs.config.teacher import TeacherPart


def misfits(
    task: Task, objective: Sequence[TermPart], data: DataPart, evaluate: Any, teacher: TeacherPart
) -> Iterator[str]:
    """Each mistake as a line that begins with its key."""
    for place, part in enumerate(objective):
        if task not in part.tasks:
            why = instead(task, part.tasks)
            yield f"objective.{place}: expected a term for the task {task}, got {part.term}. {why}."
        elif task == "encoder" and isinstance(part, HiddenPart) and part.select_batches is not None:
            yield (
                f"objective.{place}.select_batches: expected none for the task encoder, got {part.select_batches}. "
                "Dimensions are picked by a head's own loss. Use a projection."
            )
    speakers = {"teacher": teacher, **{f"teacher.ensemble.{i}": one for i, one in enumerate(teacher.ensemble or ())}}
    for where, key in product(speakers, ("cache", "server")):
        if task != "causal" and getattr(speakers[where], key) is not None:
            yield f"{where}.{key}: expected {where}.model for the task {task}, got {key}, which is of causal models."
    if teacher.ensemble is not None and task not in DISTRIBUTIONS:
        yield f"teacher.ensemble: expected one teacher for the task {task}, got several. They mix distributions."
    for name in ("train", "eval"):
        part = getattr(data, name)
        for key in ("pair", "label"):
            if task not in SEQUENCE_TASKS and getattr(part, key) is not None:
                yield f"data.{name}.{key}: expected the task classification or regression with it, got {task}."
        if task != "causal" and part.teacher_prompt is not None:
            yield f"data.{name}.teacher_prompt: expected the task causal with it, got {task}."
        for key in ("prompt", "completion", "messages", "input_ids"):
            if task not in OF_TOKENS and getattr(part, key) is not None:
                yield f"data.{name}.{key}: expected field for the texts of the task {task}, got {key}."
    if data.packing and task not in OF_TOKENS:
        yield f"data.packing: expected false for the task {task}, got true. A row is one example."
    if task != "masked" and data.masked_share != MASKED_SHARE:
        yield f"data.masked_share: expected the task masked with it, got {task}."
    if task == "encoder" and evaluate.baseline:
        yield "evaluate.baseline: expected false for the task encoder, got true. There are no labels to train on."
