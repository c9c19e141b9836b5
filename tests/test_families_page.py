"""The page of families: the walk that writes it, and its format."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

import families
from families_page import COST, INTRO, MISSING, STEPS, TITLES, page, read_table, several, table
from potstill.losses.alignment import Task
from walk import Results, walk

PAGE = Path(__file__).parents[1] / "docs" / "families.md"


def section(task: Task) -> tuple[str, str, list[str]]:
    """Read the table and the messages of a task, and the families that were not walked yet."""
    pattern = rf"^## {TITLES[task]}\n((?:\|.*\n)+)\nMessages:\n\n((?:- .*\n)*)(?:\n{MISSING}(.*)\.\n)?"
    match = re.search(pattern, PAGE.read_text("utf-8"), re.MULTILINE)
    assert match is not None, task
    return match[1], match[2], match[3].split(", ") if match[3] else []


def test_the_page_begins_as_the_walk_writes_it() -> None:
    assert PAGE.read_text(encoding="utf-8").startswith(INTRO)


@pytest.mark.parametrize("task", TITLES)
def test_each_family_has_a_mark_for_each_step(task: Task) -> None:
    text, _, missing = section(task)
    rows = read_table(text)
    assert table(task, rows) == text
    assert sorted([*rows, *missing]) == families.walked(task)
    assert {mark for row in rows.values() for mark in row.values()} <= {"yes", "no"}


@pytest.mark.parametrize("task", TITLES)
def test_each_no_has_its_message(task: Task) -> None:
    text, messages, _ = section(task)
    rows = read_table(text)
    of_title = {title: step for step, title in STEPS.items()}
    explained = set()
    for line in messages.splitlines():
        where, message = re.fullmatch(r"- (.*?): `(.*)`", line).groups()
        assert re.search(r"\. [A-Z].*\.$", message), f"does not say what to do: {message}"
        for titles, names in re.findall(r"([\w, ]+) \((.*?)\)", where):
            listed = [*rows] if names == "all" else names.removeprefix("all but ").split(", ")
            if names.startswith("all but "):
                listed = sorted({*rows} - {*listed})
            assert several(tuple(listed), rows) == names
            explained |= {(family, of_title[title]) for title in titles.strip().split(", ") for family in listed}
    assert explained == {(family, step) for family, row in rows.items() for step in row if row[step] == "no"}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """The results of this walk. A walk that was stopped goes on in the file that POTSTILL_WALK names."""
    return Results(Path(os.environ.get("POTSTILL_WALK") or tmp_path_factory.mktemp("walk") / "results.jsonl"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # those of a family's own code
@pytest.mark.parametrize(("task", "family"), [(task, family) for task in TITLES for family in families.walked(task)])
def test_a_family_works_or_is_refused_before_the_training(
    task: Task, family: str, tmp_path: Path, results: Results
) -> None:
    row = walk(family, task, tmp_path, results)
    assert not [result for result in row.values() if result.mark == "fault"]
    assert row["check"].mark == row["run"].mark


@pytest.mark.slow
def test_the_page_is_that_of_the_walk(results: Results) -> None:
    """Write the page anew where the walk does not agree with it."""
    assert all(sorted(results.of(task)) == families.walked(task) for task in TITLES), "families that were not walked"
    walked, written = page(results), PAGE.read_text(encoding="utf-8")
    cost = re.escape(COST).replace(re.escape("{minutes}"), r"\d+")
    if re.sub(cost, "", walked) != re.sub(cost, "", written):
        PAGE.write_text(walked, encoding="utf-8")
        pytest.fail("docs/families.md was not what the walk found; it is written anew")
