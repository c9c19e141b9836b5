"""Numbers as reports and tables write them."""

from __future__ import annotations

import pytest

from potstill.evaluate import formatting


@pytest.mark.parametrize(("value", "text"), [(1.23456, "1.235"), (-4e-9, "0.000"), (-0.25, "-0.250")])
def test_nats_have_no_negative_zero(value: float, text: str) -> None:
    assert formatting.nats(value) == text


def test_percent_has_no_negative_zero() -> None:
    assert formatting.percent(-1e-9, 1) == "0.0%"


def test_values_that_are_not_finite_are_named() -> None:
    assert formatting.nats(float("nan")) == formatting.perplexity(float("inf")) == formatting.NOT_FINITE


@pytest.mark.parametrize(
    ("milliseconds", "text"), [(0.0123, "0.012 ms"), (3.456, "3.5 ms"), (250.4, "250 ms"), (1234.0, "1.2 s")]
)
def test_times_have_two_or_three_digits(milliseconds: float, text: str) -> None:
    assert formatting.milliseconds(milliseconds) == text
