"""Prune a student in rounds: cut a part, train for some steps, cut the next part."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from potstill.errors import RecipeError
from potstill.models.design import student_config
from potstill.models.loading import suppress_warnings
from potstill.models.shapes import DesignShape, config_fields, count_experts, design_shape, text_config
from potstill.runs.build import build_run
from potstill.runs.build_student import StudentBuilder, calibrated_quickly
from potstill.runs.config.run import EvaluatePart, Recipe
from potstill.runs.config.student import BudgetPart
from potstill.runs.progress import part
from potstill.runs.search import describe
from potstill.runs.steps import STEPS, short_training, walk

ROUND_SHARE = 0.2  # of the run's steps: the training after each round but the last, which the run itself trains
MULTIPLE = 64  # of widths between the first and the last, where both are multiples of it


def round_steps(steps: int) -> int:
    """Count the steps of training after a round, of a run's steps."""
    return max(1, round(ROUND_SHARE * steps))


def prune_in_rounds(recipe: Recipe, directory: Path, console: Console, resume: bool) -> tuple[Recipe, str]:
    """Prune and train a recipe's student in all rounds but the last; return the recipe of the last, and a note.

    Each round is a run in `directory/rounds` without a report; with `resume` one that was killed goes on.
    """
    with suppress_warnings():
        with part(console, "reading models and data, for the rounds of pruning"):
            built = build_run(calibrated_quickly(recipe))
        builder = built.new_student
        assert isinstance(builder, StudentBuilder)
        assert builder.source is not None
        assert builder.design is not None
        config, last = text_config(builder.source.config), design_shape(builder.design)
        if count_experts(builder.design) != count_experts(config):
            raise RecipeError(
                "student.initialize.rounds: expected a student with as many experts as the larger model, got another. "
                "Experts are cut at once: leave rounds out, or cut them with a run of its own."
            )
        shapes = shapes_between(design_shape(config), last, recipe.student.initialize.rounds)
        for shape in shapes:
            student_config(config, config_fields(shape, config), config.vocab_size)  # before the first round trains
        steps, current = round_steps(built.plan.steps), recipe
        for number, shape in enumerate(shapes, 1):
            folder = directory / "rounds" / str(number)
            line = f"pruning, round {number}: {describe(shape)}; {steps} steps of training"
            console.print(line, highlight=False, markup=False)
            current = _cut_to(current, config_fields(shape, config))
            trained = _training(current, folder, short_training(recipe.train, steps, built.plan.steps))
            _check_folder(trained, folder, resume)
            if not (folder / "student").exists():
                walk(STEPS[:2], build_run(trained), folder, console)
            student = current.student.model_copy(update={"model": str(folder / "student")})
            current = current.model_copy(update={"student": student})
    between = "; ".join(map(describe, shapes)) or "none, as no size is between those of the two models"
    note = f"student.initialize.rounds: {len(shapes)} before this one, with {steps} steps of training each: {between}."
    if recipe.evaluate.baseline and shapes:
        note += " The baseline begins with what they learned too."
    return _cut_to(_saved_as(current, builder.save_dtype), config_fields(last, config)), note


def shapes_between(first: DesignShape, last: DesignShape, rounds: int) -> list[DesignShape]:
    """Return the shapes that a model has on its way from one to another: each size falls by the same factor a round.

    Query groups stay within both shapes'; where the last has larger ones, which merge heads, heads stay until then.

    >>> whole, small = DesignShape(30, 576, 9, 3, 64, 1536), DesignShape(8, 576, 9, 3, 64, 512)
    >>> [(shape.layers, shape.ffn) for shape in shapes_between(whole, small, 3)]
    [(19, 1088), (12, 768)]
    """
    shapes = list[DesignShape]()
    groups = [x.heads // x.kv_heads if x.kv_heads else 0 for x in (first, last)]
    for number in range(1, rounds):
        share = number / rounds
        shape = replace(first, layers=_between(first.layers, last.layers, share))
        for width in ("hidden", "ffn"):
            sizes = getattr(first, width), getattr(last, width)
            shape = replace(shape, **{width: _between(*sizes, share, math.gcd(*sizes, MULTIPLE))})
        if groups[0] >= groups[1] > 0:
            kv_heads = _between(first.kv_heads, last.kv_heads, share)
            shape = replace(shape, kv_heads=kv_heads, heads=kv_heads * _between(groups[0], groups[1], share))
            if all(x.hidden == x.heads * x.head_size for x in (first, last)):  # in many families it has to be
                shape = replace(shape, hidden=shape.heads * shape.head_size)
        if shape not in (first, last, *shapes):
            shapes.append(shape)
    return shapes


def _between(first: int, last: int, share: float, multiple: int = 1) -> int:
    """Return the size at a share of the way from one to another, where each step is the same factor."""
    if not last:
        return first
    return max(multiple * round(float(first ** (1 - share) * last**share) / multiple), last)


def _check_folder(recipe: Recipe, folder: Path, resume: bool) -> None:
    """Check that a round's directory holds nothing, or with `resume` a training of the same recipe."""
    try:
        recipe.check_directory(folder, resume)
    except RecipeError:
        raise RecipeError(
            f"output: expected no earlier rounds in {folder.parent}, or with --resume those of the same recipe, got "
            "others. Remove that directory, or choose another output with --set output=DIR."
        ) from None


def _saved_as(recipe: Recipe, dtype: torch.dtype | None) -> Recipe:
    """Return the recipe with the precision in which a student cut at once is saved."""
    name = recipe.student.save_dtype if dtype is None else str(dtype).removeprefix("torch.")
    return recipe.model_copy(update={"student": recipe.student.model_copy(update={"save_dtype": name})})


def _cut_to(recipe: Recipe, fields: dict[str, Any]) -> Recipe:
    """Return the recipe with a student of a shape, cut in one round."""
    student = recipe.student
    others = {} if isinstance(student.design, BudgetPart) else student.design
    once = student.initialize.model_copy(update={"rounds": 1})
    student = student.model_copy(update={"design": {**(others or {}), **fields}, "initialize": once})
    return recipe.model_copy(update={"student": student})


def _training(recipe: Recipe, folder: Path, train: dict[str, Any]) -> Recipe:
    """Return the recipe of a round: a training alone, whose student is saved as precisely as it was trained."""
    student = recipe.student.model_copy(update={"save_dtype": "float32", "quantize": None})
    changes = {"student": student, "train": train, "output": str(folder), "export": []}
    return recipe.model_copy(update=changes | {"evaluate": EvaluatePart.model_validate({})})
