"""Held-out rows that are training rows are found, and the verdict does not praise a student for them."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from rich.console import Console
from typer.testing import CliRunner

from potstill.cli import app
from potstill.data.batches import Examples
from potstill.data.duplicates import count_repeats, find_covered, find_duplicates, find_overlap, hash_rows
from potstill.data.loading import load
from potstill.data.sources import Source
from potstill.evaluate.verdict import verdict
from potstill.runs.config.run import Recipe
from potstill.runs.run import run

SENTENCE = "The still stood in the yard and nobody in the village knew who had built it or why"


def examples(path: Path, rows: list[Any], ids: list[list[int]]) -> Examples:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    encoded = Dataset.from_dict({"input_ids": ids or [[1]]})
    return Examples(encoded, 1, (), sources=((path.name, load(Source(path)).dataset),))


def duplicates(tmp_path: Path, train: list[Any], held_out: list[Any], ids: Any = ([], []), **options: Any) -> Any:
    both = examples(tmp_path / "train.jsonl", train, ids[0]), examples(tmp_path / "eval.jsonl", held_out, ids[1])
    return find_duplicates(*both, **options)


def test_rows_of_both_files_are_reported_with_their_places(tmp_path: Path) -> None:
    train = [{"text": f"training row {i}"} for i in range(600)]
    found = duplicates(tmp_path, train, [{"text": "new"}, {"text": ""}, {"text": "training row 299 "}])
    (warning,) = found.warnings
    assert warning.startswith("data.eval: 1 of 3 held-out rows are training rows too, such as row 3 of eval.jsonl and ")
    assert "row 300 of train.jsonl" in warning
    assert found.share == pytest.approx(1 / 3)
    assert found.notes == ()


def test_the_same_file_twice(tmp_path: Path) -> None:
    rows = [{"prompt": f"{i}?", "completion": str(i)} for i in range(5)]
    found = duplicates(tmp_path, rows, rows)
    assert "all held-out rows are training rows" in found.warnings[0]
    assert found.share == 1
    assert len(found.warnings) == 1  # their prompts are the same too, of course


def test_different_rows_have_no_overlap(tmp_path: Path) -> None:
    found = duplicates(tmp_path, [{"text": "a"}, {"text": ""}], [{"text": "b"}, {"text": ""}])
    assert (found.share, found.warnings, found.notes) == (0.0, (), ())


def test_training_rows_that_repeat_are_counted(tmp_path: Path) -> None:
    found = duplicates(tmp_path, [{"text": "a"}, {"text": "a"}, {"text": ""}, {"text": "a"}], [{"text": "b"}])
    assert found.notes == ("data.train: 2 of 3 rows repeat an earlier row.",)


@pytest.mark.parametrize("form", ["completion", "messages"])
def test_prompts_that_were_answered_by_a_teacher(tmp_path: Path, form: str) -> None:
    def row(prompt: str, answer: str) -> dict[str, Any]:
        if form == "completion":
            return {"prompt": prompt, "completion": answer}
        turns = [("system", "Be brief."), ("user", prompt), ("assistant", answer)]
        return {"messages": [{"role": role, "content": text} for role, text in turns]}

    train = [row("Who wrote it?", "the teacher's answer"), row("Summarise.", "a"), row("Summarise.", "b")]
    held_out = [row("And when?", "In 1999."), row("Who wrote it?", "A. Nonymous"), row("Summarise.", "c")]
    found = duplicates(tmp_path, train, [*held_out, row("Summarise.", "d")])
    (warning,) = found.warnings  # a prompt that many rows have is a form
    assert "1 of 4 held-out rows have the prompt of a training row, with another answer" in warning
    assert "row 2 of eval.jsonl and row 1 of train.jsonl" in warning


def test_rows_that_are_the_same_after_encoding(tmp_path: Path) -> None:
    ids = [[*range(20)], [*range(1, 21)]], [[*range(1, 21)], [5, 6]]
    found = duplicates(tmp_path, [{"text": "a, cut off"}], [{"text": "a, cut off later"}], ids)
    (warning,) = found.warnings
    assert "1 of 2 held-out rows have the token ids of a training row" in warning
    short = [[5, 6]], [[5, 6]]
    assert duplicates(tmp_path, [{"text": "b"}], [{"text": "c"}], short).warnings == ()  # the ends of long texts


def test_nearly_the_same_rows_are_found_on_request(tmp_path: Path) -> None:
    train = [{"text": f"An opening sentence. {SENTENCE}. And a long end that differs {i} times."} for i in range(3)]
    held_out = [{"text": "Something else entirely, of which no run of eight words was ever seen"}, {"text": SENTENCE}]
    assert duplicates(tmp_path, train, held_out).warnings == ()
    (warning,) = duplicates(tmp_path, train, held_out, near=True).warnings
    assert "1 of 2 held-out rows are nearly training rows too, such as row 2 of eval.jsonl and row 1" in warning


def test_covered_texts_by_a_loop() -> None:
    """The share of runs of words, against a plain loop over tuples."""
    words = SENTENCE.lower().split()
    train = [" ".join(words[:12]), "x " * 30]
    held_out = [" ".join(words[: 8 + extra]) for extra in range(8)]

    def runs(text: str) -> set[tuple[str, ...]]:
        tokens = text.split()
        return {tuple(tokens[i : i + 8]) for i in range(len(tokens) - 7)}

    known = set().union(*map(runs, train))
    expected = [len(runs(text) & known) / len(runs(text)) >= 0.7 for text in held_out]
    overlap = find_covered(train, held_out)
    assert overlap is not None
    assert overlap.rows == sum(expected)
    assert (overlap.held_out_row, overlap.train_row) == (expected.index(True) + 1, 1)
    assert find_covered([], held_out) is None
    assert find_covered(train, []) is None
    assert find_covered(train, [""]) is None


def test_hashes_of_no_rows() -> None:
    none = hash_rows([])
    assert find_overlap(none, hash_rows([b"a"])) is None
    assert find_overlap(hash_rows([b"a"]), none) is None
    assert count_repeats(none) == 0


def test_the_verdict_does_not_praise_what_was_memorised() -> None:
    rows = {"teacher": {"loss": 3.0}, "baseline": {"loss": 3.5}, "student": {"loss": 2.0}}
    text = verdict({"rows": rows, "data": {"eval_in_train": 1.0}})
    assert text.startswith("No conclusion: 100% of the held-out rows are training rows")
    assert "better" not in text
    assert "better than its own teacher" in verdict({"rows": rows, "data": {"eval_in_train": 0.001}})


def test_held_out_training_rows_are_reported_everywhere(recipe_values: dict[str, Any], tmp_path: Path) -> None:
    recipe_values["data"]["eval"] = recipe_values["data"]["train"]
    recipe_values["data"]["near_duplicates"] = True
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe_values))
    checked = CliRunner().invoke(app, ["check", str(tmp_path / "recipe.yaml")])
    assert "all held-out rows are training rows" in " ".join(checked.stdout.split())
    printed = io.StringIO()
    result = run(Recipe.parse(recipe_values), console=Console(file=printed, width=500))
    assert "warning: data.eval: all held-out rows are training rows too" in printed.getvalue()
    assert result.summary["data"]["eval_in_train"] == 1
    assert "all held-out rows are training rows" in result.summary["notes"][0]
    for page in ("report.html", "student/README.md"):
        text = (result.directory / page).read_text()
        assert "No conclusion: 100% of the held-out rows are training rows" in text
        assert "of the gap closed" not in text
