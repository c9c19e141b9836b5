"""The record of a whole run."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from potstill.recipe.data import DataPart
from potstill.recipe.document import Document, Part
from potstill.recipe.objective import TermPart
from potstill.recipe.student import StudentPart
from potstill.recipe.teacher import TeacherPart
from potstill.recipe.training import TrainPart


class EvaluatePart(Part):
    """What the report says beside the student's own figures."""

    baseline: bool = Field(False, description="train the same student on labels alone, and compare")
    continuations: int = Field(3, ge=0, description="held-out beginnings that each model continues")
    curve_rows: int = Field(128, ge=1, description="held-out rows, evenly spread, for the learning curves")


class Recipe(Document):
    """A whole run."""

    name: str = Field(min_length=1)
    seed: int = Field(0, ge=0)
    teacher: TeacherPart
    student: StudentPart
    data: DataPart
    objective: list[TermPart] = Field(min_length=1)
    train: TrainPart = Field(default_factory=dict, description="any field of transformers.TrainingArguments")
    evaluate: EvaluatePart = Field(default_factory=lambda: EvaluatePart.model_validate({}))
    output: str = Field(min_length=1, description="the run directory")

    @model_validator(mode="after")
    def _a_prefix_is_a_cache(self) -> Self:
        recomputes = any(self.train.get(f"{name}_checkpointing") for name in ("gradient", "activation"))
        if self.student.adapter is not None and self.student.adapter.kind == "prefix" and recomputes:
            raise ValueError(
                "student.adapter: expected no checkpointing of activations with prefix, got it in train: layers that "
                "are computed again read no cache, and the prefix is one. Use prompt or lora, or leave it out."
            )
        return self
