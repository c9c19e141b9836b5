"""The record of a whole run."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from potstill.recipe.data import DataPart
from potstill.recipe.document import Document, Part
from potstill.recipe.objective import TermPart
from potstill.recipe.student import StudentPart
from potstill.recipe.task import misfits
from potstill.recipe.teacher import TeacherPart
from potstill.recipe.training import TrainPart
from potstill.targets import Task


class EvaluatePart(Part):
    """What the report says beside the student's own figures."""

    baseline: bool = Field(False, description="train the same student on labels alone, and compare")
    continuations: int = Field(3, ge=0, description="held-out beginnings that each causal model continues")
    curve_rows: int = Field(128, ge=1, description="held-out rows, evenly spread, for the learning curves")


class Recipe(Document):
    """A whole run."""

    name: str = Field(min_length=1)
    seed: int = Field(0, ge=0)
    task: Task = Field(
        "causal",
        description="what both models are asked for: the next token, a masked one, a class, a number, or, of an "
        "encoder without a head, what its layers say",
    )
    teacher: TeacherPart
    student: StudentPart
    data: DataPart
    objective: list[TermPart] = Field(min_length=1)
    train: TrainPart = Field(default_factory=dict, description="any field of transformers.TrainingArguments")
    evaluate: EvaluatePart = Field(default_factory=lambda: EvaluatePart.model_validate({}))
    output: str = Field(min_length=1, description="the run directory")

    @model_validator(mode="after")
    def _one_task(self) -> Self:
        if mistakes := [*misfits(self.task, self.objective, self.data, self.evaluate, self.teacher)]:
            raise ValueError("\n".join(mistakes))
        return self
