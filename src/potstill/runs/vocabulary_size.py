"""Choose how many tokens a student keeps: students of one budget are compared as pruning leaves them."""

from __future__ import annotations

import gc
import math
from dataclasses import replace
from functools import partial
from pathlib import Path

from accelerate import PartialState
from rich.console import Console

from potstill.errors import ModelError, RecipeError, one_line
from potstill.models.loading import load_tokenizer, suppress_warnings, vocabulary_size
from potstill.models.spacing import evenly_spaced
from potstill.runs.build import build_run
from potstill.runs.build_student import StudentBuilder, calibrated_quickly, initialization_of
from potstill.runs.config.run import Recipe
from potstill.runs.config.student import BudgetPart
from potstill.runs.finished_parts import FinishedParts
from potstill.runs.vocabulary import bits_per_byte

RATIO = 0.7  # of the tokens that were compared last
MULTIPLE, LEAST = 64, 1024  # numbers of tokens are multiples of the one, and at least the other
ROWS = 48  # of the training data, on which students are compared
CALIBRATION_ROWS = 16  # at most: enough to compare students, not to begin with one
PARTS = "vocabulary-sizes.json"


def choose_vocabulary_size(recipe: Recipe, directory: Path, console: Console) -> tuple[Recipe, str]:
    """Choose how many tokens the recipe's student keeps; return the recipe with the number, and a note.

    Compared are students of the recipe's budget, from all tokens to fewer and fewer until one is worse than the one
    before, by bits per byte of training text. The directory keeps what was measured, for `--resume`.
    """
    _check(recipe)
    request = recipe.model_dump(mode="json", exclude={"name", "output", "evaluate"}, exclude_none=True)
    whole = size = vocabulary_size(load_tokenizer(recipe.student.model or str(recipe.teacher.model_path), "student"))
    directory.mkdir(parents=True, exist_ok=True)
    finished, measured = FinishedParts(directory / PARTS, request), dict[int, float]()
    while size >= LEAST:
        try:
            bits = finished.get(str(size), partial(_pruned_bits, recipe, size, whole), keep=math.isfinite)
        except ModelError as error:  # of this budget there is no model with so many tokens, or the alphabet is larger
            if measured:
                break
            line = f"{size:,} tokens: left out. {one_line(error)}"
        else:
            line = f"{size:,} tokens, pruned: {bits:.3f} bits a byte"
            measured[size] = bits
        console.print(line, highlight=False, markup=False)
        if size in measured and measured[size] > min(measured.values()):
            break
        size = int(RATIO * size / MULTIPLE) * MULTIPLE
    if not measured:
        raise RecipeError(
            "student.vocabulary.keep: expected a budget that a student with fewer tokens can have, got "
            f"{recipe.student.describe()}. Raise it."
        )
    best = min(measured, key=lambda tokens: measured[tokens])
    part = recipe.student.vocabulary
    assert part is not None
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


def _pruned_bits(recipe: Recipe, size: int, whole: int) -> float:
    """Prune the recipe's student with so many of all tokens; return its bits per byte of training text."""
    part, design, start = recipe.student.vocabulary, recipe.student.design, recipe.student.initialize
    assert part is not None
    assert isinstance(design, BudgetPart)
    calibration = min(start.calibration_rows, CALIBRATION_ROWS)
    changes = {
        "vocabulary": None if size == whole else part.model_copy(update={"keep": size}),
        "design": design.model_copy(update={"search": None}),
        "initialize": start.model_copy(update={"calibration_rows": calibration}),
    }
    with_size = recipe.model_copy(update={"student": recipe.student.model_copy(update=changes)})
    with suppress_warnings():
        built = build_run(calibrated_quickly(with_size))
        assert isinstance(built.new_student, StudentBuilder)
        builder, rows = replace(built.new_student, recipe=with_size), built.train.dataset
        scored = {*evenly_spaced(min(ROWS, max(1, len(rows) // 4)), len(rows))}
        others = rows.select([number for number in range(len(rows)) if number not in scored])
        student = replace(builder, initialization=initialization_of(builder, others))().to(PartialState().device)
        bits = bits_per_byte(student, rows.select(sorted(scored)), built.tokenizer)
    del built, builder, student
    gc.collect()  # models have cycles
    return bits
