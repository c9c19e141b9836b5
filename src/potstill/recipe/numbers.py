"""Numbers that are fixed or change over training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Discriminator, Field, Tag, model_validator

from potstill import schedule as schedules
from potstill.recipe.document import Part


class SchedulePart(Part):
    """A number that changes over training. `steps` is train.max_steps when it is not given."""

    schedule: Literal["constant", "linear", "cosine", "exponential", "piecewise", "stages"]
    value: float | None = None
    start: float | None = None
    end: float | None = None
    steps: int | None = Field(None, gt=0)
    stages: int | None = Field(None, gt=1)
    values: list[float] | None = None
    boundaries: list[int] | None = None
    warmup: int = Field(0, ge=0, description="steps of a straight line from 0 before it")

    @model_validator(mode="after")
    def _complete(self) -> Self:
        self.build(steps=1)
        return self

    def build(self, steps: int) -> schedules.Schedule:
        """The schedule; `steps` is how long the run is."""
        needed = {
            "constant": {"value"},
            "linear": {"start", "end"},
            "cosine": {"start", "end"},
            "exponential": {"start", "end"},
            "piecewise": {"values", "boundaries"},
            "stages": {"start", "end", "stages"},
        }[self.schedule]
        spans = self.schedule in {"linear", "cosine", "exponential", "stages"}
        given = {name: value for name, value in self if value is not None and name not in {"schedule", "warmup"}}
        if needed - set(given) or set(given) - needed - ({"steps"} if spans else set()):
            raise ValueError(
                f"expected {self.schedule} with {', '.join(sorted(needed))}"
                f"{' (and steps)' if spans else ''}, got {', '.join(sorted(given)) or 'nothing'}"
            )
        if spans:
            given.setdefault("steps", max(steps - self.warmup, 1))
        built: schedules.Schedule = getattr(schedules, self.schedule)(**given)
        return schedules.warmup(built, self.warmup) if self.warmup else built


# A mapping is a schedule, all else must be a number: so that only one of the two reports a mistake.
Number = Annotated[
    Annotated[float, Tag("a number")] | Annotated[SchedulePart, Tag("a schedule")],
    Discriminator(lambda value: "a schedule" if isinstance(value, Mapping | SchedulePart) else "a number"),
]


def _positive(value: float | SchedulePart) -> float | SchedulePart:
    if isinstance(value, float) and not value > 0:
        raise ValueError(f"expected a number > 0, got {value}")
    return value


def _not_negative(value: float | SchedulePart) -> float | SchedulePart:
    if isinstance(value, float) and not value >= 0:
        raise ValueError(f"expected a number >= 0, got {value}")
    return value


def _at_most_one(value: float | SchedulePart) -> float | SchedulePart:
    if isinstance(value, float) and not 0 <= value <= 1:
        raise ValueError(f"expected a number in [0, 1], got {value}")
    return value


Share = Annotated[Number, AfterValidator(_at_most_one)]
Weight = Annotated[Number, AfterValidator(_not_negative)]
Temperature = Annotated[Number, AfterValidator(_positive)]
