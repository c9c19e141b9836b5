"""The record of a whole run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Self

from pydantic import Field, model_validator

from potstill.losses.alignment import Task
from potstill.runs.config.adapter import adapter_misfits
from potstill.runs.config.data import DataPart
from potstill.runs.config.document import Document, Part
from potstill.runs.config.objective import LogitsPart, TermPart
from potstill.runs.config.policy import MiniLLMPart, PolicyPart
from potstill.runs.config.rollout import RolloutPart
from potstill.runs.config.student import StudentPart
from potstill.runs.config.task import misfits
from potstill.runs.config.teacher import TeacherPart
from potstill.runs.config.training import TrainPart


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
    rollout: RolloutPart | None = Field(None, description="what the student writes itself; without it, nothing")
    train: TrainPart = Field(default_factory=dict, description="any field of transformers.TrainingArguments")
    evaluate: EvaluatePart = Field(default_factory=lambda: EvaluatePart.model_validate({}))
    output: str = Field(min_length=1, description="the run directory")

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        mistakes = [*misfits(self.task, self.objective, self.data, self.evaluate, self.teacher), *self._own_text()]
        mistakes += adapter_misfits(self.student.adapter, self.task, self.train)
        if mistakes:
            raise ValueError("\n".join(mistakes))
        return self

    def _own_text(self) -> Iterator[str]:
        """Who learns from text that the student writes needs a rollout, and a teacher that can speak about it."""
        for place, term in enumerate(self.objective):
            own = isinstance(term, PolicyPart | MiniLLMPart) or (isinstance(term, LogitsPart) and term.text == "own")
            if self.rollout is None and own:
                yield (
                    f"objective.{place}: expected a rollout for a term on the student's own text, got none. Add "
                    "rollout: {on_policy_fraction: 0.5}."
                )
        if self.rollout is None:
            return
        if self.task != "causal":
            yield f"rollout: expected the task causal with it, got {self.task}. Other models write no text."
        cached = [one for one in (self.teacher, *(self.teacher.ensemble or ())) if one.cache and not one.model]
        if cached:
            yield (
                "teacher: expected one that can speak about what the student writes, got a cache alone, which knows "
                "the data alone. Name teacher.model beside it: batches of data are still read from the cache."
            )
        drawn = self.rollout.server is not None and not self.rollout.plain
        for place, term in enumerate(self.objective):
            if drawn and isinstance(term, PolicyPart | MiniLLMPart) and term.importance:
                yield (
                    f"objective.{place}: expected sampling_temperature 1, top_p 1 and top_k 0 in the rollout, or "
                    "importance: false, got neither. A server tells what the student gave a token, not its sampler."
                )
        if self.rollout.guided and self.teacher.model is None:
            yield (
                "rollout: expected a teacher that is a model here for teacher_mix and teacher_top_k, got none. It "
                "reads along, token by token. Name it with teacher.model."
            )
