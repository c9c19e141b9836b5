"""What is traded for what: from measured students to a Pareto front and the one to take. Pure functions of numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

from potstill.evaluate.report.words import count, milliseconds, percent, size
from potstill.models.capacity import PUBLISHED, Capability, CapacityEstimate, expected_share


@dataclass(frozen=True)
class Candidate:
    """A student that was measured.

    Args:
        name: what people call it.
        quality: see `kept`; higher is better, nan where its training diverged.
        parameters: how many it has.
        bytes: its weights on disk.
        latency_ms: one forward pass over one row.
    """

    name: str
    quality: float
    parameters: int
    bytes: int
    latency_ms: float


@dataclass(frozen=True)
class Limits:
    """What a student may cost, and what it must keep; None for no limit."""

    max_parameters: int | None = None
    max_bytes: int | None = None
    max_latency_ms: float | None = None
    min_quality: float | None = None

    def __str__(self) -> str:
        write = {"parameters": count, "bytes": size, "latency_ms": milliseconds, "quality": percent}
        names = {"parameters": " parameters", "bytes": "", "latency_ms": "", "quality": " of the teacher's quality"}
        said = []
        for field in fields(self):
            which, _, what = field.name.partition("_")
            value = getattr(self, field.name)
            if value is not None:
                said.append(f"at {'most' if which == 'max' else 'least'} {write[what](value)}{names[what]}")
        return ", ".join(said)

    def allow(self, candidate: Candidate) -> bool:
        """Whether its cost is within the limits, whatever its quality."""
        most = {"parameters": self.max_parameters, "bytes": self.max_bytes, "latency_ms": self.max_latency_ms}
        return all(limit is None or getattr(candidate, name) <= limit for name, limit in most.items())


NO_LIMITS = Limits()


@dataclass(frozen=True)
class Recommendation:
    """The student to take.

    Args:
        place: in the list of candidates; None where none does what it must.
        why: in one sentence.
    """

    place: int | None
    why: str


def kept(teacher_loss: float, loss: float) -> float:
    """A student's quality: how much of its teacher's probability it gives a held-out token, by the geometric mean.

        exp(teacher_loss - loss) = teacher's perplexity / student's perplexity

    Args:
        teacher_loss: nats a token, held out.
        loss: the student's, on the same text.

    Returns:
        1 is as good as the teacher, above 1 better; 0.5 gives each token half of the probability.

    >>> round(kept(2.0, 2.6931), 3)
    0.5
    """
    return math.exp(min(teacher_loss - loss, 700.0))


def pareto_front(costs: Sequence[float], qualities: Sequence[float]) -> list[int]:
    """The Pareto front: the places that no other one beats in cost without losing quality, or the reverse.

    Args:
        costs: lower is better.
        qualities: higher is better; of the same length.

    Returns:
        Places by rising cost; of equals the first. Those with a number that is not finite are never among them.

    >>> pareto_front([3, 1, 2, 2], [0.9, 0.5, 0.4, 0.7])
    [1, 3, 0]
    """
    found: list[int] = []
    finite = (i for i, pair in enumerate(zip(costs, qualities, strict=True)) if all(map(math.isfinite, pair)))
    for place in sorted(finite, key=lambda i: (costs[i], -qualities[i])):
        if not found or qualities[place] > qualities[found[-1]]:
            found.append(place)
    return found


def recommend(candidates: Sequence[Candidate], limits: Limits) -> Recommendation:
    """The student to take: the smallest that keeps `min_quality`; without that the best within the limits; without any
    limit the knee of the front, where quality begins to cost more than it did.

    The knee is the point of the front furthest above the line between its ends, over the logarithm of parameters; where
    none is above it, the best.
    """
    usable = [i for i, one in enumerate(candidates) if math.isfinite(one.quality)]
    if not usable:
        return Recommendation(None, "No student was measured, so that none can be recommended.")
    within = [i for i in usable if limits.allow(candidates[i])]
    if not within:
        least = min(usable, key=lambda i: candidates[i].parameters)
        return Recommendation(None, f"No student has {limits}; the smallest is {_told(candidates[least])}.")

    def best(places: Sequence[int]) -> int:
        return max(places, key=lambda i: (candidates[i].quality, -candidates[i].parameters))

    if limits.min_quality is not None:
        good = [i for i in within if candidates[i].quality >= limits.min_quality]
        if not good:
            nearest = candidates[best(within)]
            return Recommendation(None, f"No student has {limits}; the nearest is {_told(nearest)}.")
        place = min(good, key=lambda i: (candidates[i].parameters, -candidates[i].quality))
        return Recommendation(place, f"The smallest with {limits}: {_told(candidates[place])}.")
    if limits != NO_LIMITS:
        place = best(within)
        return Recommendation(place, f"The best with {limits}: {_told(candidates[place])}.")
    place = _knee([candidates[i] for i in usable])
    taken = candidates[usable[place]]
    if taken.quality == max(candidates[i].quality for i in usable):
        return Recommendation(usable[place], f"The best, as quality still rises with size: {_told(taken)}.")
    return Recommendation(usable[place], f"Where quality begins to cost more than it did: {_told(taken)}.")


def _knee(candidates: Sequence[Candidate]) -> int:
    costs = [math.log(one.parameters) for one in candidates]
    on_it = pareto_front(costs, [one.quality for one in candidates])
    first, last = on_it[0], on_it[-1]
    across, up = costs[last] - costs[first], candidates[last].quality - candidates[first].quality

    def above(place: int) -> float:
        if first == last:
            return 0.0
        along = (costs[place] - costs[first]) / across
        return candidates[place].quality - candidates[first].quality - up * along

    return max(on_it, key=lambda place: (above(place), candidates[place].quality))


def _told(one: Candidate) -> str:
    return (
        f"{one.name}, {count(one.parameters)} parameters, {milliseconds(one.latency_ms)} a row, "
        f"{percent(one.quality)} of the teacher's quality"
    )


@dataclass(frozen=True)
class Prediction:
    """What might have been expected of a student, beside what was measured.

    Args:
        compression: the teacher's parameters over the student's.
        measured: its quality.
        published: task -> the share of the teacher's score that published students of that size keep.
        fitted: the quality by the law of `published`, with the exponent of the other students here; None where there
            are fewer than two others, or the student is no smaller than its teacher.
    """

    compression: float
    measured: float
    published: dict[Capability, CapacityEstimate]
    fitted: CapacityEstimate | None


def predict(compressions: Sequence[float], qualities: Sequence[float]) -> list[Prediction]:
    """Predicted beside measured quality: from published students, and from all others of the same sweep.

        quality = compression^-a,   a = -log(quality) / log(compression)

    with the mean a of all others, and the range of their a as the interval: no student is part of its own prediction.

    Args:
        compressions: the teacher's parameters over each student's.
        qualities: of each student, see `kept`.
    """
    tasks = list(dict.fromkeys(point.task for point in PUBLISHED))
    exponents = {
        i: -math.log(quality) / math.log(compression)
        for i, (compression, quality) in enumerate(zip(compressions, qualities, strict=True))
        if compression > 1 and 0 < quality < math.inf
    }
    found = []
    for i, (compression, quality) in enumerate(zip(compressions, qualities, strict=True)):
        others = [(a, compressions[j]) for j, a in exponents.items() if j != i]
        fitted = None
        if compression > 1 and len(others) > 1:
            each = [a for a, _ in others]
            value, low, high = (compression**-a for a in (sum(each) / len(each), max(each), min(each)))
            furthest = max(other for _, other in others)
            fitted = CapacityEstimate(
                value, low, high, f"{len(others)} other students", extrapolated=compression > furthest
            )
        published = {task: expected_share(compression, task) for task in tasks} if compression >= 1 else {}
        found.append(Prediction(compression, quality, published, fitted))
    return found
