"""Numbers that change over training: a schedule is a function from the optimiser step to a value.

>>> temperature = stages(4.0, 0.5, stages=5, steps=500)
>>> [temperature(step) for step in (0, 100, 200, 300, 400)]
[4.0, 3.125, 2.25, 1.375, 0.5]
"""

from __future__ import annotations

import math
from abc import abstractmethod
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, replace
from typing import Annotated, Any, Self, TypeVar, cast

from potstill.errors import ShapeError
from potstill.losses.declared import Declared, Either, NonEmpty, Range

D = TypeVar("D", bound=Any)


@dataclass(frozen=True)
class Schedule(Declared):
    """A number that changes over training.

    Args:
        warmup: steps of a straight line to the schedule's first value; the schedule starts behind them.
        warmup_start: where that line starts; 0 by default. The schedule's first value holds it for so long.
    """

    key = "schedule"
    _: KW_ONLY
    warmup: Annotated[int, Range(ge=0)] = 0
    warmup_start: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.warmup_start is not None and not self.warmup:
            raise ShapeError(f"expected warmup, its steps, beside warmup_start, got {self.warmup_start} alone")

    @abstractmethod
    def after_warmup(self, step: int) -> float:
        """The value at a step, counted from the end of the warm-up."""

    def __call__(self, step: int) -> float:
        if not self.warmup or step >= self.warmup:
            return self.after_warmup(step - self.warmup)
        start = self.warmup_start or 0.0
        return start + (self.after_warmup(0) - start) * _progress(step, self.warmup)

    def over(self, steps: int) -> Self:
        """The schedule of a run of so many optimiser steps: as long as the run, unless it has its own length."""
        return self

    @property
    def extremes(self) -> dict[str, float]:
        """Values between which all others lie, by where they come from, for errors."""
        line = {" from its warm-up: give warmup_start": self.warmup_start or 0.0} if self.warmup else {}
        return {" " * i: value for i, value in enumerate(self._values())} | line

    @abstractmethod
    def _values(self) -> tuple[float, ...]: ...


@dataclass(frozen=True)
class Constant(Schedule):
    """The same value at every step."""

    value: float
    name = "constant"

    def after_warmup(self, step: int) -> float:
        return self.value

    def _values(self) -> tuple[float, ...]:
        return (self.value,)


Steps = Annotated[int | None, Range(gt=0)]


@dataclass(frozen=True)
class _FromStartToEnd(Schedule):
    """From one value to another.

    Args:
        start: the value at step 0.
        end: the value from the last step on.
        steps: how long it takes; the rest of the run behind the warm-up by default.
    """

    start: float
    end: float

    steps = cast("int | None", None)  # a field of each kind, behind its others

    def over(self, steps: int) -> Self:
        long: Self = replace(cast(Any, self), steps=self.steps or max(steps - self.warmup, 1))
        return long

    def progress(self, step: int) -> float:
        if self.steps is None:
            hint = "Give the number of steps; in a recipe it is the length of the run."
            raise ShapeError(f"schedule.{self.name}: expected steps, got none. {hint}")
        return _progress(step, self.steps)

    def _values(self) -> tuple[float, ...]:
        return self.start, self.end


@dataclass(frozen=True)
class Linear(_FromStartToEnd):
    """start + (end - start) * step / steps, then end."""

    steps: Steps = None
    name = "linear"

    def after_warmup(self, step: int) -> float:
        return self.start + (self.end - self.start) * self.progress(step)


@dataclass(frozen=True)
class Cosine(_FromStartToEnd):
    """end + (start - end) * (1 + cos(pi * step / steps)) / 2, then end: slow at both ends."""

    steps: Steps = None
    name = "cosine"

    def after_warmup(self, step: int) -> float:
        return self.end + (self.start - self.end) * (1 + math.cos(math.pi * self.progress(step))) / 2


@dataclass(frozen=True)
class Exponential(_FromStartToEnd):
    """start * (end / start) ** (step / steps), then end: the same factor each step, fastest at first when falling."""

    steps: Steps = None
    name = "exponential"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.start * self.end > 0:
            raise ShapeError(f"schedule.exponential: expected start * end > 0, got {self.start * self.end}.")

    def after_warmup(self, step: int) -> float:
        return float(self.start * (self.end / self.start) ** self.progress(step))


@dataclass(frozen=True)
class Stages(_FromStartToEnd):
    """Stretches of constant value, evenly spaced from start to end.

    Args:
        stages: how many stretches, of equal length.
    """

    stages: Annotated[int, Range(gt=1)]
    steps: Steps = None
    name = "stages"

    def after_warmup(self, step: int) -> float:
        self.progress(step)  # it must have a length
        stage = min(max(step, 0) * self.stages // (self.steps or 1), self.stages - 1)
        return self.start + (self.end - self.start) * stage / (self.stages - 1)


@dataclass(frozen=True)
class Piecewise(Schedule):
    """values[i] from step boundaries[i - 1] on.

    >>> piecewise([1.0, 0.5], [100])(100)
    0.5

    Args:
        values: one more than boundaries.
        boundaries: rising steps.
    """

    values: Annotated[tuple[float, ...], NonEmpty()]
    boundaries: tuple[int, ...]
    name = "piecewise"

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.values) != len(self.boundaries) + 1 or list(self.boundaries) != sorted(set(self.boundaries)):
            expected = "one value more than boundaries and rising boundaries"
            got = f"{len(self.values)} values and boundaries {list(self.boundaries)}"
            raise ShapeError(f"schedule.piecewise: expected {expected}, got {got}.")

    def after_warmup(self, step: int) -> float:
        return self.values[bisect_right(self.boundaries, step)]

    def _values(self) -> tuple[float, ...]:
        return self.values


# In Python a schedule reads as the function that it is: `schedule.linear(4.0, 1.0, steps=500)`.
constant, linear, cosine, exponential, stages, piecewise = Constant, Linear, Cosine, Exponential, Stages, Piecewise


def warmup(schedule: Schedule, steps: int, start: float = 0.0) -> Schedule:
    """A straight line from `start` to the schedule's first value over `steps`, then the schedule from its step 0."""
    if steps < 1:
        raise ShapeError(f"schedule.warmup: expected steps > 0, got {steps}.")
    return replace(schedule, warmup=steps, warmup_start=start)


def for_run(declared: D, steps: int) -> D:
    """Give each schedule of a declaration that has no length of its own that of a run of so many optimiser steps."""
    fields = vars(declared).items()
    return replace(declared, **{name: value.over(steps) for name, value in fields if isinstance(value, Schedule)})


def _progress(step: int, steps: int) -> float:
    return min(max(step / steps, 0.0), 1.0)


Number = Annotated[Schedule | float, Either(lambda value: isinstance(value, Mapping | Schedule))]
Weight = Annotated[Number, Range(ge=0)]
Temperature = Annotated[Number, Range(gt=0)]
Share = Annotated[Number, Range(ge=0, le=1)]


def value_at(number: float | Schedule, step: int) -> float:
    return number(step) if callable(number) else number
