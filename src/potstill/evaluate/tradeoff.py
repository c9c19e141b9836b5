"""Trade-offs between quality and cost: Pareto front, recommendation and prediction. Pure functions of numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import NamedTuple

from potstill.errors import ShapeError
from potstill.evaluate.formatting import count, milliseconds, percent, size
from potstill.models.capacity import PUBLISHED, Capability, CapacityEstimate, expected_share


@dataclass(frozen=True)
class Candidate:
    """A measured student."""

    name: str
    quality: float  # see `relative_quality`; higher is better, nan if training diverged
    parameters: int
    bytes: int  # its weights on disk
    latency_ms: float  # one forward pass over one row
    memory_bytes: float = math.nan  # to serve one row: weights and cache; nan if it is not known

    def __str__(self) -> str:
        cost = f"{count(self.parameters)} parameters, {milliseconds(self.latency_ms)} a row"
        return f"{self.name}, {cost}, {percent(self.quality)} of the teacher's quality"


@dataclass(frozen=True)
class Limits:
    """The most a student may cost, and the least quality it must keep; None for no limit."""

    max_parameters: int | None = None
    max_bytes: int | None = None
    max_latency_ms: float | None = None
    min_quality: float | None = None
    max_memory_bytes: int | None = None

    def __post_init__(self) -> None:
        for name, limit in vars(self).items():
            if limit is not None and not limit > 0:
                raise ShapeError(f"{name}: expected a limit > 0, got {limit}. Leave it out for none.")

    def __str__(self) -> str:
        texts = (
            (self.max_parameters, count, "at most {} parameters"),
            (self.max_bytes, size, "at most {} on disk"),
            (self.max_memory_bytes, size, "at most {} of memory"),
            (self.max_latency_ms, milliseconds, "at most {}"),
            (self.min_quality, percent, "at least {} of the teacher's quality"),
        )
        return ", ".join(text.format(write(limit)) for limit, write, text in texts if limit is not None)

    def allow(self, candidate: Candidate) -> bool:
        """Whether the candidate's cost, not its quality, is within the limits."""
        costs = (candidate.parameters, candidate.bytes, candidate.latency_ms, candidate.memory_bytes)
        limits = (self.max_parameters, self.max_bytes, self.max_latency_ms, self.max_memory_bytes)
        return all(limit is None or cost <= limit for cost, limit in zip(costs, limits, strict=True))


NO_LIMITS = Limits()


class Recommendation(NamedTuple):
    """The recommended student: its index in the list of candidates, None if none qualifies, and why, in a sentence."""

    place: int | None
    why: str


def relative_quality(teacher_loss: float, loss: float) -> float:
    """Compute a student's quality: its share of the teacher's probability of a held-out token, a geometric mean.

        exp(teacher_loss - loss) = teacher's perplexity / student's perplexity

    of held-out losses in nats per token: 1 is as good as the teacher, above 1 better; at 0.5 each token gets half of
    the teacher's probability.

    >>> round(relative_quality(2.0, 2.6931), 3)
    0.5
    """
    return math.exp(min(teacher_loss - loss, 700.0))


def retention(teacher: Mapping[str, float], student: Mapping[str, float]) -> tuple[float, dict[str, float]]:
    """Compute the share of the teacher's score that a student keeps: the median, and for each metric.

    Scores are those where higher is better; a metric on which the teacher has none, or that the student lacks, is left
    out. A single metric on which the student fails does not decide the median.

    >>> retention({"mmlu": 60.0, "gsm8k": 50.0, "arc": 50.0}, {"mmlu": 54.0, "gsm8k": 10.0, "arc": 40.0})
    (0.8, {'mmlu': 0.9, 'gsm8k': 0.2, 'arc': 0.8})

    Raises:
        ShapeError: the two have no metric in common.
    """
    shares = {name: student[name] / score for name, score in teacher.items() if score > 0 and name in student}
    if not shares:
        raise ShapeError(
            f"retention: expected a metric of both with a score above 0, got {', '.join(teacher) or 'none'}."
        )
    return median(shares.values()), shares


def pareto_front(costs: Sequence[float], qualities: Sequence[float]) -> list[int]:
    """Find the Pareto front: the places that no other one beats in cost without losing quality, or the reverse.

    Returns indices by rising cost, the first of equals; those with a number that is NaN or infinite are left out.

    >>> pareto_front([3, 1, 2, 2], [0.9, 0.5, 0.4, 0.7])
    [1, 3, 0]
    """
    front: list[int] = []
    finite = (i for i, pair in enumerate(zip(costs, qualities, strict=True)) if all(map(math.isfinite, pair)))
    for place in sorted(finite, key=lambda i: (costs[i], -qualities[i])):
        if not front or qualities[place] > qualities[front[-1]]:
            front.append(place)
    return front


def recommend(candidates: Sequence[Candidate], limits: Limits) -> Recommendation:
    """Recommend a student: with `min_quality` the smallest that keeps it, with other limits the best within them, with
    no limit the knee of the Pareto front, after which more quality costs more.

    The knee is the point of the front furthest above the line between its ends, over the logarithm of parameters; if
    none is above it, the best student.
    """
    measured = [i for i, candidate in enumerate(candidates) if math.isfinite(candidate.quality)]
    if not measured:
        return Recommendation(None, "No student was measured, so none can be recommended.")
    within = [i for i in measured if limits.allow(candidates[i])]
    if not within:
        smallest = min(measured, key=lambda i: candidates[i].parameters)
        return Recommendation(None, f"No student has {limits}; the smallest is {candidates[smallest]}.")
    place = best = max(within, key=lambda i: (candidates[i].quality, -candidates[i].parameters))
    why = f"The best with {limits}"
    if limits.min_quality is not None:
        good = [i for i in within if candidates[i].quality >= limits.min_quality]
        if not good:
            return Recommendation(None, f"No student has {limits}; the nearest is {candidates[best]}.")
        place = min(good, key=lambda i: (candidates[i].parameters, -candidates[i].quality))
        why = f"The smallest with {limits}"
    elif limits == NO_LIMITS:
        place = measured[_knee([candidates[i] for i in measured])]
        why = "The knee, after which more quality costs more parameters"
        if candidates[place].quality == candidates[best].quality:
            why = "The best, as quality still rises with size"
    return Recommendation(place, f"{why}: {candidates[place]}.")


def _knee(candidates: Sequence[Candidate]) -> int:
    costs = [math.log(candidate.parameters) for candidate in candidates]
    qualities = [candidate.quality for candidate in candidates]
    front = pareto_front(costs, qualities)
    first, last = front[0], front[-1]
    width, height = costs[last] - costs[first] or 1.0, qualities[last] - qualities[first]

    def above_line(place: int) -> float:
        return qualities[place] - qualities[first] - height * (costs[place] - costs[first]) / width

    return max(front, key=lambda place: (above_line(place), qualities[place]))


@dataclass(frozen=True)
class Prediction:
    """Predicted beside measured quality of a student."""

    compression: float  # the teacher's parameters over the student's
    measured: float  # quality
    published: dict[Capability, CapacityEstimate]  # share of the teacher's score that published students keep
    # quality by the law of `published`, with the exponent of the other students here; None with fewer than two
    # others, or if the student is no smaller than its teacher
    fitted: CapacityEstimate | None


def predict(compressions: Sequence[float], qualities: Sequence[float]) -> list[Prediction]:
    """Predict the quality of each student from published students, and from all others of the same sweep.

        quality = compression^-a,   a = -log(quality) / log(compression)

    with the mean a of all others, and the range of their a as the interval: no student is part of its own prediction.
    Compressions are the teacher's parameters over each student's.
    """
    tasks = list(dict.fromkeys(point.task for point in PUBLISHED))
    pairs = list(zip(compressions, qualities, strict=True))
    exponents = [
        (i, compression, -math.log(quality) / math.log(compression))
        for i, (compression, quality) in enumerate(pairs)
        if compression > 1 and 0 < quality < math.inf
    ]
    predictions = []
    for i, (compression, quality) in enumerate(pairs):
        others = [a for j, _, a in exponents if j != i]
        fitted = None
        if compression > 1 and len(others) > 1:
            value, low, high = (compression**-a for a in (sum(others) / len(others), max(others), min(others)))
            extrapolated = compression > max(other for j, other, _ in exponents if j != i)
            fitted = CapacityEstimate(value, low, high, f"{len(others)} other students", extrapolated)
        published = {task: expected_share(compression, task) for task in tasks} if compression >= 1 else {}
        predictions.append(Prediction(compression, quality, published, fitted))
    return predictions
