"""What is traded for what: the front, the recommendation and the prediction, against what they must be."""

from __future__ import annotations

import math
import random
import re

import pytest

from potstill.errors import ShapeError
from potstill.evaluate.tradeoff import (
    Candidate,
    Limits,
    pareto_front,
    predict,
    recommend,
    relative_quality,
    retention,
)


def candidates(*rows: tuple[float, int, float]) -> list[Candidate]:
    """(quality, parameters, latency)."""
    return [
        Candidate(f"s{i}", quality, size, 4 * size, latency, 5 * size)
        for i, (quality, size, latency) in enumerate(rows)
    ]


def test_no_point_of_the_front_is_dominated() -> None:
    draw = random.Random(0)
    for _ in range(200):
        costs = [draw.randint(1, 6) for _ in range(8)]
        qualities = [draw.randint(1, 6) / 6 for _ in range(8)]
        found = pareto_front(costs, qualities)

        pairs = set(zip(costs, qualities, strict=True))
        pairs -= {(c, q) for c, q in pairs for d, r in pairs if (c, q) != (d, r) and d <= c and r >= q}
        assert {(costs[i], qualities[i]) for i in found} == pairs
        assert len(found) == len(pairs)
        assert [costs[i] for i in found] == sorted(costs[i] for i in found)


def test_what_diverged_is_on_no_front() -> None:
    assert pareto_front([1, 2, 3], [math.nan, 0.5, 0.4]) == [1]
    assert pareto_front([math.nan, 2], [0.9, 0.5]) == [1]
    assert pareto_front([], []) == []


def test_quality_is_the_ratio_of_perplexities() -> None:
    assert relative_quality(2.0, 2.0) == 1
    assert relative_quality(2.0, 3.0) == pytest.approx(math.exp(2) / math.exp(3))
    assert math.isnan(relative_quality(2.0, math.nan))
    assert relative_quality(2.0, 1e6) == 0


STUDENTS = candidates((0.2, 100, 1.0), (0.6, 200, 2.0), (0.65, 400, 3.5), (0.7, 800, 8.0), (0.5, 800, 9.0))


@pytest.mark.parametrize(
    ("limits", "place", "why"),
    [
        (Limits(max_parameters=400), 2, "The best with at most 400 parameters: s2"),
        (Limits(max_latency_ms=2.5), 1, "The best with at most 2.5 ms: s1"),
        (Limits(max_bytes=3200), 3, "The best with at most 3.2 kB on disk"),
        (Limits(max_memory_bytes=2000), 2, "The best with at most 2.0 kB of memory: s2"),
        (Limits(max_memory_bytes=2000, max_parameters=300), 1, "The best with at most 300 parameters, at most 2.0 kB"),
        (Limits(min_quality=0.62), 2, "The smallest with at least 62% of the teacher's quality: s2"),
        (
            Limits(min_quality=0.62, max_latency_ms=3.0),
            None,
            "No student has at most 3.0 ms, at least 62%.*nearest is s1",
        ),
        (Limits(max_parameters=50), None, "No student has at most 50 parameters; the smallest is s0"),
        (Limits(), 1, "The knee, after which more quality costs more parameters: s1"),
    ],
)
def test_the_student_to_take(limits: Limits, place: int | None, why: str) -> None:
    found = recommend(STUDENTS, limits)
    assert found.place == place
    assert re.match(why, found.why), found.why


def test_memory_that_is_not_known_is_within_no_limit() -> None:
    unknown = Candidate("old", 0.9, 10, 40, 1.0)
    assert recommend([unknown], Limits(max_memory_bytes=10**12)).place is None
    assert recommend([unknown], Limits()).place == 0


def test_a_metric_that_fails_does_not_decide_what_is_retained() -> None:
    teacher = {"a": 80.0, "b": 40.0, "c": 50.0, "d": 0.0, "e": 9.0}
    share, shares = retention(teacher, {"a": 72.0, "b": 4.0, "c": 40.0, "d": 3.0})
    assert shares == pytest.approx({"a": 0.9, "b": 0.1, "c": 0.8})
    assert share == pytest.approx(0.8)
    with pytest.raises(ShapeError, match="a metric of both"):
        retention({"a": 1.0}, {"b": 1.0})


def test_one_student_none_and_those_that_diverged() -> None:
    assert recommend(STUDENTS[:1], Limits()).place == 0
    assert recommend([], Limits()).place is None
    rising = recommend(candidates((0.1, 100, 1.0), (0.2, 200, 1.0), (0.5, 400, 1.0)), Limits())
    assert rising.place == 2
    assert rising.why.startswith("The best, as quality still rises with size: s2")
    lost = candidates((math.nan, 1, 1.0), (0.4, 2, 1.0))
    assert recommend(lost, Limits()).place == 1
    assert recommend(lost[:1], Limits(max_parameters=9)).place is None


def test_of_equals_the_smaller_is_taken() -> None:
    assert recommend(candidates((0.5, 300, 1.0), (0.5, 200, 1.0)), Limits(max_parameters=900)).place == 1


def test_a_law_is_found_again_and_no_student_predicts_itself() -> None:
    compressions = [2.0, 4.0, 8.0]
    exact = predict(compressions, [c**-0.5 for c in compressions])
    for one in exact:
        assert one.fitted is not None
        assert one.fitted.value == pytest.approx(one.measured) == pytest.approx(one.fitted.low)
    assert [one.fitted.extrapolated for one in exact if one.fitted] == [False, False, True]
    moved = predict(compressions, [2.0**-0.5, 4.0**-0.5, 0.01])
    assert moved[2].fitted == exact[2].fitted
    assert moved[0].fitted != exact[0].fitted


def test_where_there_is_nothing_to_predict_from() -> None:
    assert predict([2.0, 4.0], [0.5, 0.4])[0].fitted is None  # one other student is no interval
    bare = predict([math.nan, 0.5, 1.0], [0.5, 0.5, 0.5])
    assert [bool(one.published) for one in bare] == [False, False, True]
    assert all(one.fitted is None for one in bare)


@pytest.mark.parametrize("limit", [0, -1.0, math.nan])
def test_limits_that_nothing_meets_are_refused(limit: float) -> None:
    with pytest.raises(ShapeError, match="max_latency_ms: expected a limit > 0, got"):
        Limits(max_latency_ms=limit)
