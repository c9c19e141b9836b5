"""The page of families: its format, and each family that is on it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import families
import walk

PAGE = Path(__file__).parents[1] / "docs" / "families.md"
KNOWN = {"causal": families.CAUSAL, "masked": families.MASKED}


def tables() -> dict[str, str]:
    text = PAGE.read_text(encoding="utf-8")
    found = {}
    for task, title in walk.TITLES.items():
        match = re.search(rf"^## {title}\n((?:\|.*\n)+)", text, re.MULTILINE)
        assert match is not None, title
        found[task] = match[1]
    return found


def test_the_page_is_as_the_walk_writes_it() -> None:
    assert PAGE.read_text(encoding="utf-8").startswith(walk.INTRO)
    for task, table in tables().items():
        rows = walk.read_table(table)
        assert walk.table(rows) == table
        assert {*rows} <= {*KNOWN[task]}
        assert {mark for row in rows.values() for mark in row.values()} <= {"yes", "no"}


def test_every_causal_family_is_on_the_page() -> None:
    assert {*walk.read_table(tables()["causal"])} == {*families.CAUSAL} - {*families.NOT_SMALL}


ROWS = [(task, family) for task, table in tables().items() for family in walk.read_table(table)]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # those of a family's own code
@pytest.mark.parametrize(("task", "family"), ROWS)
def test_a_family_does_what_the_page_says(task: str, family: str, tmp_path: Path) -> None:
    results = walk.walk(family, task, tmp_path)
    assert not {step: result for step, result in results.items() if walk.mark(result) == "fault"}
    expected = walk.read_table(tables()[task])[family]
    assert {step: walk.mark(results[step]) for step in expected} == expected
