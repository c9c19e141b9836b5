"""Fix the shape of a student with a limit on latency: it is timed once, on the machine where its run begins."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate import PartialState

from potstill.errors import RecipeError
from potstill.models.loading import suppress_warnings
from potstill.models.shapes import DesignShape, config_fields, design_shape, text_config
from potstill.runs.build import build_run
from potstill.runs.build_student import StudentBuilder, calibrated_quickly
from potstill.runs.config.run import Recipe
from potstill.runs.config.student import BudgetPart
from potstill.runs.finished_parts import FinishedParts
from potstill.runs.search import describe


def fix_timed_shape(recipe: Recipe, directory: Path) -> tuple[Recipe, str]:
    """Return the recipe with the largest shape that is timed within its limits, and a note.

    The directory keeps the shape: a run that goes on, on another machine or a busier one, has the same student.
    """
    if (processes := PartialState().num_processes) > 1:
        raise RecipeError(
            f"student.design.latency_ms: expected one process, got {processes}. Time a student first with potstill "
            "design --latency-ms, and put its parameters into the recipe (params)."
        )
    budget = recipe.student.design
    assert isinstance(budget, BudgetPart)
    directory.mkdir(parents=True, exist_ok=True)
    kept = FinishedParts(directory / "timed-shape.json", recipe.measured_request(directory))
    found = kept.get("found", lambda: _timed_shape(recipe), keep=bool)
    shape, design = DesignShape(**found["shape"]), found["design"]
    note = (
        f"student.design.latency_ms: {describe(shape)}, the largest whose forward pass took at most "
        f"{budget.latency_ms:g} ms here."
    )
    return recipe.model_copy(update={"student": recipe.student.model_copy(update={"design": design})}), note


def _timed_shape(recipe: Recipe) -> dict[str, Any]:
    """Time students of the recipe's budget; return the shape of the largest within it, also as fields of a config."""
    with suppress_warnings():
        built = build_run(calibrated_quickly(recipe))
    builder = built.new_student
    assert isinstance(builder, StudentBuilder)
    assert builder.design is not None
    larger = builder.source.config if builder.source is not None else built.loaded.config
    shape = design_shape(builder.design)
    return {"shape": asdict(shape), "design": config_fields(shape, text_config(larger))}
