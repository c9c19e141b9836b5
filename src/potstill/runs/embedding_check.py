"""potstill check for recipes of kind embedding: what a run will need, before anything is trained."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from potstill.embedding.encoders import TextStudent
from potstill.embedding.objective import PairObjective
from potstill.runs.embedding import default_learning_rate, new_student
from potstill.runs.embedding_sources import Material, Texts, encoder_of, gather, read_texts
from potstill.embedding.teachers import Encode
from potstill.embedding.training import EmbeddingDistiller
from potstill.embedding.vectors import Matrix, Part
from potstill.evaluate.space import MOST_ROWS
from potstill.models.loading import suppress_warnings
from potstill.runs.config.embedding import EmbeddingRecipe

TEXTS = 128  # that are encoded to time the teacher


@dataclass(frozen=True)
class EmbeddingPreflight:
    """What a run will need, estimated on this machine.

    Args:
        teacher_dimensions: of its vectors.
        parameters: of the student.
        rows: vectors to learn from; held_out_rows likewise.
        steps: at most, over all stages and students.
        encoding_seconds: of the teacher, once; 0 where its vectors are there.
        seconds: of training, at most: it ends earlier where nothing is gained.
        notes: what else the run will say.
    """

    teacher_dimensions: int
    parameters: int
    rows: int
    held_out_rows: int
    steps: int
    encoding_seconds: float
    seconds: float
    notes: tuple[str, ...]


def check(recipe: EmbeddingRecipe) -> EmbeddingPreflight:
    """Read all that a recipe names, have some texts encoded, make the student, and time two steps.

    Raises:
        UserError: the run could not start.
    """
    train = recipe.train
    with suppress_warnings():
        spoken = recipe.teacher.vectors is None
        material, rows, held_out, encoding = _some(recipe) if spoken else _all(recipe)
        student = new_student(recipe, recipe.focus, material)
        reads = isinstance(student, TextStudent)
        few = Part(material.vectors, 0, min(material.vectors.rows, 2 * train.batch_size))
        size = max(2, min(train.batch_size, few.rows // 2))
        times: list[float] = []
        EmbeddingDistiller(
            student,
            PairObjective(recipe.focus, recipe.student.prefixes),
            epochs=1,
            batch_size=size,
            learning_rate=train.learning_rate or default_learning_rate(recipe),
            reconstruction=train.reconstruction,
            seed=recipe.seed,
        ).fit(
            few,
            material.held_out[:TEXTS],
            texts=(material.texts or [])[: few.rows] if reads else None,
            held_out_texts=(material.held_out_texts or [])[:TEXTS] if reads else None,
            on_step=lambda done, total, loss: times.append(time.perf_counter()),
        )
    stages = train.temperature.stages if train.temperature else 1
    steps = -(-rows // train.batch_size) * train.epochs * stages * (3 if recipe.evaluate.front else 1)
    a_step = (times[-1] - times[0]) / max(len(times) - 1, 1) * train.batch_size / size
    parameters = sum(weight.numel() for weight in student.parameters())
    return EmbeddingPreflight(
        material.vectors.dimensions, parameters, rows, held_out, steps, encoding, steps * a_step, tuple(material.notes)
    )


def _all(recipe: EmbeddingRecipe) -> tuple[Material, int, int, float]:
    material = gather(recipe)
    return material, material.vectors.rows, len(material.held_out), 0.0


def _some(recipe: EmbeddingRecipe) -> tuple[Material, int, int, float]:
    """The same of a teacher that would first have to read all texts: a few are encoded, and timed."""
    train, held = read_texts(recipe)
    embedder, encode, _ = encoder_of(recipe.teacher)
    assert train is not None
    assert encode is not None
    texts = train.texts[: max(TEXTS, 2 * recipe.student.dimensions)]
    vectors, seconds = _timed(encode, texts)
    material = Material(Matrix(vectors), vectors, texts, texts, None, embedder, [])
    held_out = _held_out(train, held)
    total = len(train.texts) + (len(held.texts) if held else 0)
    rows = len(train.texts) - (0 if held else held_out)
    return material, rows, held_out, seconds / len(texts) * total


def _held_out(train: Texts, held: Texts | None) -> int:
    return len(held.texts) if held else min(len(train.texts) // 10, 2 * MOST_ROWS)


def _timed(encode: Encode, texts: Sequence[str]) -> tuple[torch.Tensor, float]:
    encode(texts[:2])  # the first call is slower
    began = time.perf_counter()
    vectors = torch.as_tensor(encode(texts), dtype=torch.float32)
    return vectors, time.perf_counter() - began
