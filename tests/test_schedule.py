from __future__ import annotations

from itertools import pairwise

import pytest

from potstill.errors import ShapeError
from potstill.losses.schedule import constant, cosine, exponential, linear, piecewise, stages, warmup


@pytest.mark.parametrize(
    ("schedule", "values"),  # at steps -5, 0, 50, 100 and 1000 of 100
    [
        (constant(0.3), [0.3, 0.3, 0.3, 0.3, 0.3]),
        (linear(4.0, 1.0, 100), [4.0, 4.0, 2.5, 1.0, 1.0]),
        (linear(0.0, 1.0, 100), [0.0, 0.0, 0.5, 1.0, 1.0]),
        (cosine(4.0, 1.0, 100), [4.0, 4.0, 2.5, 1.0, 1.0]),
        (exponential(4.0, 1.0, 100), [4.0, 4.0, 2.0, 1.0, 1.0]),
        (exponential(-4.0, -1.0, 100), [-4.0, -4.0, -2.0, -1.0, -1.0]),
        (piecewise([3.0, 2.0, 1.0], [50, 100]), [3.0, 3.0, 2.0, 1.0, 1.0]),
        (piecewise([3.0], []), [3.0, 3.0, 3.0, 3.0, 3.0]),
        (stages(4.0, 1.0, 2, 100), [4.0, 4.0, 1.0, 1.0, 1.0]),
    ],
)
def test_before_at_the_start_in_the_middle_at_the_end_and_after(schedule, values):
    assert [schedule(step) for step in (-5, 0, 50, 100, 1000)] == pytest.approx(values)


@pytest.mark.parametrize(
    ("schedule", "value"),  # a quarter of the way from 4 to 1
    [
        (linear(4.0, 1.0, 100), 3.25),
        (cosine(4.0, 1.0, 100), 3.5606602),
        (exponential(4.0, 1.0, 100), 2.8284271),
    ],
)
def test_how_fast_they_begin(schedule, value):
    assert schedule(25) == pytest.approx(value)


def test_five_stages_from_4_to_a_half():
    temperature = stages(4.0, 0.5, stages=5, steps=500)
    expected = [4.0, 3.125, 2.25, 1.375, 0.5]
    assert [temperature(step) for step in (0, 100, 200, 300, 400)] == expected
    assert [temperature(step) for step in (99, 199, 299, 399, 499)] == expected
    assert temperature(500) == 0.5


def test_stages_of_unequal_length_are_all_there():
    values = [stages(4.0, 1.0, stages=4, steps=10)(step) for step in range(10)]
    assert sorted(set(values), reverse=True) == [4.0, 3.0, 2.0, 1.0]
    assert {values.count(value) for value in values} == {2, 3}


def test_piecewise_changes_at_its_boundaries():
    schedule = piecewise([1.0, 0.5, 2.0], [10, 11])
    assert [schedule(step) for step in (9, 10, 11)] == [1.0, 0.5, 2.0]


@pytest.mark.parametrize(("start", "end"), [(4.0, 0.5), (0.5, 4.0)])
@pytest.mark.parametrize("kind", ["linear", "cosine", "exponential", "stages"])
def test_they_go_one_way_and_stay_between_their_ends(kind, start, end):
    make = {
        "linear": linear,
        "cosine": cosine,
        "exponential": exponential,
        "stages": lambda start, end, steps: stages(start, end, 5, steps),
    }[kind]
    values = [make(start, end, 37)(step) for step in range(40)]
    rising = end > start
    assert all((after >= before) if rising else (after <= before) for before, after in pairwise(values))
    assert (values[0], values[-1]) == pytest.approx((start, end))
    assert min(values) >= 0.5 - 1e-12 and max(values) <= 4.0 + 1e-12


def test_warmup_rises_in_a_line_and_hands_over_without_a_step():
    after = linear(1.0, 0.0, 100)
    schedule = warmup(after, 10)
    assert [schedule(step) for step in (0, 1, 5, 9)] == pytest.approx([0.0, 0.1, 0.5, 0.9])
    assert [schedule(10 + step) for step in (0, 50, 100, 200)] == [after(step) for step in (0, 50, 100, 200)]
    assert max(abs(schedule(step + 1) - schedule(step)) for step in range(150)) <= 0.1 + 1e-12


def test_warmup_may_start_above_zero():
    assert [warmup(constant(2.0), 4, start=1.0)(step) for step in (0, 2, 4)] == [1.0, 1.5, 2.0]


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda: linear(1, 0, 0), r"Linear.steps: expected a number > 0, got 0"),
        (lambda: cosine(1, 0, -1), r"Cosine.steps: expected a number > 0, got -1"),
        (lambda: exponential(1, 2, 0), r"Exponential.steps: expected a number > 0, got 0"),
        (lambda: exponential(1, 0, 10), r"exponential: expected start \* end > 0, got 0"),
        (lambda: exponential(-1, 1, 10), r"exponential: expected start \* end > 0, got -1"),
        (lambda: stages(1, 0, 1, 10), r"Stages.stages: expected a number > 1, got 1"),
        (lambda: stages(1, 0, 5, 0), r"Stages.steps: expected a number > 0, got 0"),
        (lambda: warmup(constant(1), 0), r"warmup: expected steps > 0, got 0"),
        (
            lambda: piecewise([1, 2], []),
            r"piecewise: expected one value more .* got 2 values and boundaries \[\]",
        ),
        (lambda: piecewise([1, 2], [5, 9]), r"piecewise: .* got 2 values and boundaries \[5, 9\]"),
        (lambda: piecewise([1, 2, 3], [9, 5]), r"piecewise: .* rising boundaries.* \[9, 5\]"),
        (lambda: piecewise([1, 2, 3], [5, 5]), r"piecewise: .* rising boundaries.* \[5, 5\]"),
    ],
)
def test_what_is_no_schedule(wrong, words):
    with pytest.raises(ShapeError, match=words):
        wrong()
