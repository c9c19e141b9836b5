"""Numbers that change over training: a schedule is a function from the step to a value.

>>> temperature = stages(4.0, 0.5, stages=5, steps=500)
>>> [temperature(step) for step in (0, 100, 200, 300, 400)]
[4.0, 3.125, 2.25, 1.375, 0.5]
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence

from potstill.errors import ShapeError

Schedule = Callable[[int], float]


def _share(step: int, steps: int) -> float:
    return min(max(step / steps, 0.0), 1.0)


def _positive(name: str, what: str, value: float) -> None:
    if not value > 0:
        raise ShapeError(f"schedule.{name}: expected {what} > 0, got {value}.")


def constant(value: float) -> Schedule:
    """The same value at every step."""
    return lambda step: value


def linear(start: float, end: float, steps: int) -> Schedule:
    """start + (end - start) * step / steps, then end."""
    _positive("linear", "steps", steps)
    return lambda step: start + (end - start) * _share(step, steps)


def cosine(start: float, end: float, steps: int) -> Schedule:
    """end + (start - end) * (1 + cos(pi * step / steps)) / 2, then end: slow at both ends."""
    _positive("cosine", "steps", steps)
    return lambda step: end + (start - end) * (1 + math.cos(math.pi * _share(step, steps))) / 2


def exponential(start: float, end: float, steps: int) -> Schedule:
    """start * (end / start) ** (step / steps), then end: the same factor each step, fastest at first when falling."""
    _positive("exponential", "steps", steps)
    _positive("exponential", "start * end", start * end)
    return lambda step: start * (end / start) ** _share(step, steps)


def piecewise(values: Sequence[float], boundaries: Sequence[int]) -> Schedule:
    """values[i] from step boundaries[i - 1] on: one value more than boundaries.

    >>> piecewise([1.0, 0.5], [100])(100)
    0.5
    """
    if len(values) != len(boundaries) + 1 or list(boundaries) != sorted(set(boundaries)):
        raise ShapeError(
            "schedule.piecewise: expected one value more than boundaries and rising boundaries, got "
            f"{len(values)} values and boundaries {list(boundaries)}."
        )
    return lambda step: values[bisect_right(boundaries, step)]


def stages(start: float, end: float, stages: int, steps: int) -> Schedule:
    """`stages` equal stretches of constant value, evenly spaced from start to end."""
    _positive("stages", "stages - 1", stages - 1)
    _positive("stages", "steps", steps)
    return lambda step: start + (end - start) * min(max(step, 0) * stages // steps, stages - 1) / (stages - 1)


def warmup(schedule: Schedule, steps: int, start: float = 0.0) -> Schedule:
    """A straight line from `start` to the schedule's first value over `steps`, then the schedule from its step 0."""
    _positive("warmup", "steps", steps)
    line = linear(start, schedule(0), steps)
    return lambda step: line(step) if step < steps else schedule(step - steps)
