"""Choose how many tokens a student keeps: students of one budget are compared as pruning leaves them."""

from __future__ import annotations

import gc
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from accelerate import PartialState
from datasets import Dataset
from rich.console import Console

from potstill.data.batches import in_batches
from potstill.errors import ModelError, RecipeError, one_line
from potstill.evaluate.sequence import measure
from potstill.models.loading import load_config, load_tokenizer, suppress_warnings, vocabulary_size
from potstill.models.spacing import evenly_spaced
from potstill.models.trimming import choose_tokens
from potstill.runs.build import build_run
from potstill.runs.build_student import StudentBuilder, budget_config, calibrated_quickly, initialization_of
from potstill.runs.config.run import Recipe
from potstill.runs.config.student import BudgetPart
from potstill.runs.finished_parts import FinishedParts
from potstill.runs.vocabulary import PROBE_BATCH, keep_tokens

RATIO = 0.7  # of the tokens that were compared last
MULTIPLE = 64  # of numbers of tokens
ROWS = 48  # of the training data, whose text students are compared on, of its last quarter; it calibrates on the others
LEAST_ROWS = 8  # of the training data
CALIBRATION_ROWS = 16  # at most: enough to compare students, not to begin with one
PARTS = "vocabulary-sizes.json"


def choose_vocabulary_size(recipe: Recipe, directory: Path, console: Console) -> tuple[Recipe, str]:
    """Choose how many tokens the recipe's student keeps; return the recipe with the number, and a note.

    Compared are students of the recipe's budget, from all tokens to fewer and fewer until one is worse than the best,
    by bits per byte of the same training text. The directory keeps what was measured, for `--resume`.
    """
    _check(recipe)
    model = recipe.student.model or str(recipe.teacher.model_path)
    tokenizer, config = load_tokenizer(model, "student"), load_config(model, "student")
    keep_tokens(recipe, tokenizer, config)  # a mistake in the text is found before any measurement
    part, design = recipe.student.vocabulary, recipe.student.design
    assert part is not None
    assert isinstance(design, BudgetPart)
    directory.mkdir(parents=True, exist_ok=True)
    finished = FinishedParts(directory / PARTS, recipe.measured_request(directory))
    whole = size = vocabulary_size(tokenizer)
    least, measured = len(choose_tokens(tokenizer, {}, "data")), dict[int, float]()
    while size >= least:
        try:
            budget_config(design, config, size)
        except ModelError as error:  # the family has no model of this size with so many tokens
            console.print(f"{size:,} tokens: left out. {one_line(error)}", highlight=False, markup=False)
        else:
            with_tokens = _with_tokens(recipe, None if size == whole else size)
            texts = finished.get("texts", partial(_texts, with_tokens), keep=bool)
            bits = finished.get(str(size), partial(_pruned_bits, with_tokens, texts), keep=math.isfinite)
            console.print(f"{size:,} tokens, pruned: {bits:.3f} bits a byte", highlight=False, markup=False)
            measured[size] = bits
            if bits > min(measured.values()):
                break
        size = int(RATIO * size / MULTIPLE) * MULTIPLE
    if not measured:
        raise RecipeError(
            "student.vocabulary.keep: expected a budget that a student with fewer tokens can have, got "
            f"{recipe.student.describe()}. Change it."
        )
    best = min(measured, key=lambda tokens: measured[tokens])
    kept = None if best == whole else part.model_copy(update={"keep": best})
    student = recipe.student.model_copy(update={"vocabulary": kept})
    others = ", ".join(f"{measured[n]:.3f} with {n:,}" for n in sorted(measured, reverse=True) if n != best)
    note = (
        f"student.vocabulary: {best:,} tokens; a student of this size then needs {measured[best]:.3f} bits a byte of "
        f"training text before it is trained{f', and {others}' if others else ''}."
    )
    return recipe.model_copy(update={"student": student}), note


def _check(recipe: Recipe) -> None:
    if recipe.task != "causal":
        raise RecipeError(
            f"student.vocabulary.keep: expected the task causal with auto, got {recipe.task}. Give a number of tokens, "
            "or data."
        )
    if recipe.teacher.name != "model" and recipe.student.model is None:
        raise RecipeError(
            "student.vocabulary.keep: expected a teacher that is one model (teacher.model alone) with auto, got "
            f"{recipe.teacher.title}. Name one, or keep all tokens."
        )
    if (processes := PartialState().num_processes) > 1:
        raise RecipeError(
            f"student.vocabulary.keep: expected one process with auto, got {processes}. Choose first with potstill "
            "design --vocabulary auto, and put the number into the recipe."
        )


def _texts(recipe: Recipe) -> list[str]:
    """Choose the texts that all students are compared on: halves of rows, which have room for more tokens."""
    with suppress_warnings():
        built = build_run(calibrated_quickly(recipe))
    rows = built.train.dataset
    if len(rows) < LEAST_ROWS:
        raise RecipeError(
            f"student.vocabulary.keep: expected at least {LEAST_ROWS} rows in data.train with auto, got {len(rows)}. "
            "Give a number of tokens, or more text."
        )
    first = _first_scored(rows)
    chosen = [first + i for i in evenly_spaced(min(ROWS, len(rows) - first), len(rows) - first)]
    return [str(built.tokenizer.decode(ids[: -(-len(ids) // 2)])) for ids in rows.select(chosen)["input_ids"]]


def _first_scored(rows: Dataset) -> int:
    return len(rows) * 3 // 4


def _with_tokens(recipe: Recipe, size: int | None) -> Recipe:
    """Return the recipe with so many tokens, all if None, one shape, and a quick calibration."""
    part, design, start = recipe.student.vocabulary, recipe.student.design, recipe.student.initialize
    assert part is not None
    assert isinstance(design, BudgetPart)
    calibration = min(start.calibration_rows, CALIBRATION_ROWS)
    changes = {
        "vocabulary": None if size is None else part.model_copy(update={"keep": size}),
        "design": design.model_copy(update={"search": None}),
        "initialize": start.model_copy(update={"calibration_rows": calibration}),
    }
    return recipe.model_copy(update={"student": recipe.student.model_copy(update=changes)})


def _pruned_bits(recipe: Recipe, texts: Sequence[str]) -> float:
    """Prune the recipe's student; return its bits per byte of texts."""
    with suppress_warnings():
        built = build_run(calibrated_quickly(recipe))
        assert isinstance(built.new_student, StudentBuilder)
        builder, rows = replace(built.new_student, recipe=recipe), built.train.dataset
        others = rows.select(range(_first_scored(rows)))
        student = replace(builder, initialization=initialization_of(builder, others))().to(PartialState().device)
        encoded = [built.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        scored = [{"input_ids": ids, "labels": ids} for ids in encoded if len(ids) > 1]
        quality = measure("causal", None, {"student": student}, in_batches(scored, built.tokenizer, PROBE_BATCH))
        # All texts have the same bytes for all students; a first token is no target, whatever its length.
        bits = quality["student"].loss * sum(len(row["input_ids"]) - 1 for row in scored) / math.log(2)
    del built, builder, student
    gc.collect()  # models have cycles
    return float(bits) / max(1, sum(len(text.encode()) for text in texts))
