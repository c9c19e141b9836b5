"""Estimate what a run of kind embedding will need before anything is trained."""

from __future__ import annotations

import time
from typing import Any

import torch

from potstill.embedding.teachers import TextEncoder
from potstill.embedding.vectors import TensorVectors, VectorSlice
from potstill.evaluate.formatting import duration
from potstill.models.loading import suppress_warnings
from potstill.runs.config.embedding import EmbeddingRecipe
from potstill.runs.embedding import new_distiller
from potstill.runs.embedding_sources import EmbeddingData, held_out_rows, load_data, read_texts

SAMPLE_TEXTS = 128  # that are encoded to time the teacher


def check(recipe: EmbeddingRecipe) -> list[tuple[str, str]]:
    """Read everything that a recipe names, encode some texts, make the student, and time two steps.

    Returns lines of a table of what the run will need, with times of this machine.

    Raises:
        UserError: the run could not start.
    """
    train = recipe.train
    with suppress_warnings():
        encoder = recipe.teacher.load()
        if encoder is None:
            data, encoding = load_data(recipe), 0.0
            rows, held_out = data.vectors.rows, len(data.held_out)
        else:
            data, rows, held_out, encoding = _encode_sample(recipe, encoder)
        sample = VectorSlice(data.vectors, 0, min(data.vectors.rows, 2 * train.batch_size))
        size = max(2, min(train.batch_size, sample.rows // 2))
        times: list[float] = []
        distiller = new_distiller(recipe, recipe.focus, data, heats=(1.0,), epochs=1, batch_size=size)
        texts: dict[str, Any] = {}
        if recipe.student.reads_text:
            texts = {"texts": (data.texts or [])[: sample.rows]}
            texts["held_out_texts"] = (data.held_out_texts or [])[:SAMPLE_TEXTS]
        held_out_sample = data.held_out[:SAMPLE_TEXTS]
        distiller.fit(sample, held_out_sample, **texts, on_step=lambda *progress: times.append(time.perf_counter()))
    stages = train.temperature.stages if train.temperature else 1
    steps = -(-rows // train.batch_size) * train.epochs * stages * (3 if recipe.evaluate.front else 1)
    step_seconds = (times[-1] - times[0]) / max(len(times) - 1, 1) * train.batch_size / size
    parameters = sum(weight.numel() for weight in distiller.student.parameters())
    return [
        ("teacher", f"{data.vectors.dimensions:,} dimensions"),
        ("student", f"{recipe.student.dimensions:,} dimensions, {parameters:,} parameters"),
        ("train", f"{rows:,} vectors"),
        ("eval", f"{held_out:,} vectors"),
        ("steps", f"{steps:,}"),
        *([("encoding", f"about {duration(encoding)} of the teacher's work, once")] if encoding else []),
        ("time", f"about {duration(steps * step_seconds)} of training on this machine, at most"),
        *(("note", note) for note in data.notes),
    ]


def _encode_sample(recipe: EmbeddingRecipe, encoder: TextEncoder) -> tuple[EmbeddingData, int, int, float]:
    """Encode some texts: their vectors, the rows to learn from, the held-out rows, and the seconds for all texts."""
    train, held = read_texts(recipe)
    assert train is not None
    texts = train.texts[: max(SAMPLE_TEXTS, 2 * recipe.student.dimensions)]
    encoder.encode(texts[:2])  # the first call is slower
    start = time.perf_counter()
    vectors = torch.as_tensor(encoder.encode(texts), dtype=torch.float32)
    seconds = (time.perf_counter() - start) / len(texts)
    data = EmbeddingData(TensorVectors(vectors), vectors, texts, texts, teacher=encoder.model)
    total = len(train.texts)
    if held:
        return data, total, len(held.texts), seconds * (total + len(held.texts))
    held_out = held_out_rows(total)
    return data, total - held_out, held_out, seconds * total
