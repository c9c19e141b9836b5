"""Answers compared by their meaning, and votes over them."""

from __future__ import annotations

import pytest

from potstill.generation.verify import same_answer, vote

SAME = [
    ("72", "72.0"),
    ("72 clips", "72"),
    ("1,234", "1234"),
    ("1\u202f234", "1234.00"),
    (r"1{,}234", "1234"),
    ("$5", "5 dollars"),
    ("50 cents", "$0.50"),
    ("1.5 km", "1500 m"),
    ("5 hours", "300 minutes"),
    ("5km", "5 kilometres"),
    ("1/2", "0.5"),
    (r"\frac{1}{2}", "½"),
    (r"\dfrac12", "0.5"),
    ("1 1/2", "1.5"),
    ("1½", "3/2"),
    ("50%", "0.5"),
    ("50%", "50"),
    ("25 percent", r"25\%"),
    ("10/3", "3.33"),
    ("x = 5", "5"),
    ("24 + 48 = <<24+48=72>>72 clips", "72"),
    ("-5", "−5"),
    ("$-5$", "-5"),
    ("-$5", "$-5"),
    ("2 million", "2,000,000"),
    ("1e3", "1000"),
    ("0.30000000000000004", "0.3"),
    (".5", "0.5"),
    ("$1,200.50", "1200.5"),
    ("5.", "5"),
    ("Paris", " paris. "),
    (r"\text{Paris}", "Paris"),
    ("(B)", "b"),
    ("7" * 5000, "7" * 5000 + "."),
]
DIFFERENT = [
    ("72", "73"),
    ("5", "-5"),
    ("5 km", "5 m"),
    ("5 dollars", "5 hours"),
    ("$5", "€5"),
    ("0.5", "50"),
    ("12", "12,000"),
    ("1,23", "123"),
    ("0.33", "0.34"),
    ("10/3", "3.3"),
    ("3.33", "3.333"),
    ("10000001", "10000000"),
    ("1/0", "1"),
    ("3x", "3"),
    ("x+1", "1"),
    ("x^2", "2"),
    ("5-10", "5"),
    ("5:30", "5"),
    ("2nd", "2"),
    ("3 and 4", "3"),
    ("inf", "nan"),
    ("", ""),
    (None, None),
    ("5", None),
    ("Paris", "Rome"),
    ("7" * 5000, "7" * 5001),
]


@pytest.mark.parametrize(("one", "other"), SAME)
def test_the_same_answer_in_another_form(one: str, other: str) -> None:
    assert same_answer(one, other)
    assert same_answer(other, one)


@pytest.mark.parametrize(("one", "other"), DIFFERENT)
def test_another_answer(one: str | None, other: str | None) -> None:
    assert not same_answer(one, other)
    assert not same_answer(other, one)


def test_a_vote_joins_what_is_the_same() -> None:
    assert vote(["5", "0.5", "1/2", None]) == ("0.5", 0.5)
    assert vote(["a", "b"]) == ("a", 0.5)  # of equals, the first
    assert vote([None, None]) == (None, 0.0)
    assert vote([]) == (None, 0.0)
