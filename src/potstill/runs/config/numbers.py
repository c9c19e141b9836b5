"""Numbers that are fixed or change over training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Discriminator, Field, Tag, model_validator

from potstill.losses import schedule as schedules
from potstill.runs.config.document import Part


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
    warmup: int = Field(0, ge=0, description="steps of a straight line to its first value before it")
    warmup_start: float | None = Field(
        None, description="where that line starts: 0 unless given; the schedule's first value holds it for so long"
    )

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
        apart = {"schedule", "warmup", "warmup_start"}
        given = {name: value for name, value in self if value is not None and name not in apart}
        if needed - set(given) or set(given) - needed - ({"steps"} if spans else set()):
            raise ValueError(
                f"expected {self.schedule} with {', '.join(sorted(needed))}"
                f"{' (and steps)' if spans else ''}, got {', '.join(sorted(given)) or 'nothing'}"
            )
        if self.warmup_start is not None and not self.warmup:
            raise ValueError(f"expected warmup, its steps, beside warmup_start, got {self.warmup_start} alone")
        if spans:
            given.setdefault("steps", max(steps - self.warmup, 1))
        built: schedules.Schedule = getattr(schedules, self.schedule)(**given)
        return schedules.warmup(built, self.warmup, self.warmup_start or 0.0) if self.warmup else built

    @property
    def ends(self) -> list[float]:
        """Values that it takes, between which all others are."""
        given = [self.value, self.start, self.end, *(self.values or [])]
        return [value for value in given if value is not None] + ([self.warmup_start or 0.0] if self.warmup else [])


# A mapping is a schedule, all else must be a number: so that only one of the two reports a mistake.
Number = Annotated[
    Annotated[float, Tag("a number")] | Annotated[SchedulePart, Tag("a schedule")],
    Discriminator(lambda value: "a schedule" if isinstance(value, Mapping | SchedulePart) else "a number"),
]


def _within(wanted: str, allowed: Callable[[float], bool]) -> Callable[[float | SchedulePart], float | SchedulePart]:
    def look(value: float | SchedulePart) -> float | SchedulePart:
        ends = [value] if isinstance(value, float) else value.ends
        for place, end in enumerate(ends):
            if not allowed(end):
                warmed = not isinstance(value, float) and value.warmup and place == len(ends) - 1
                raise ValueError(
                    f"expected {wanted}, got {end}{' from its warm-up: give warmup_start' if warmed else ''}"
                )
        return value

    return look


Share = Annotated[Number, AfterValidator(_within("a number in [0, 1]", lambda value: 0 <= value <= 1))]
Weight = Annotated[Number, AfterValidator(_within("a number >= 0", lambda value: value >= 0))]
Temperature = Annotated[Number, AfterValidator(_within("a number > 0", lambda value: value > 0))]
