"""Runs from a cache: as good as from the live teacher, and refused before training where they cannot be."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console
from typer.testing import CliRunner

from potstill.cli import app
from potstill.errors import DataError, ShapeError, UserError, VocabularyError
from potstill.runs.check import check
from potstill.runs.config.run import Recipe
from potstill.runs.run import run

QUIET = Console(quiet=True)


def build(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["cache", "build", *arguments])
    if result.exception is not None:
        raise result.exception
    return result.output


@pytest.fixture
def cached(recipe_values: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """The toys' recipe with a cache of hidden states, built from it."""
    recipe_values["teacher"]["cache"] = str(tmp_path / "cache")
    (tmp_path / "recipe.yaml").write_text(Recipe.parse(recipe_values).dump())
    build(str(tmp_path / "recipe.yaml"), "--codec", "hidden")
    return recipe_values


def losses(directory: Path) -> list[float]:
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["run"] == "student" and "loss" in line]


def test_a_run_from_a_cache_is_the_run_from_the_teacher(cached: dict[str, Any], tmp_path: Path) -> None:
    live = cached | {"teacher": {"model": cached["teacher"]["model"]}, "output": str(tmp_path / "live")}
    alone = cached | {"teacher": {"cache": cached["teacher"]["cache"]}, "output": str(tmp_path / "alone")}
    results = {name: run(Recipe.parse(values), console=QUIET) for name, values in (("live", live), ("alone", alone))}
    assert losses(tmp_path / "alone") == pytest.approx(losses(tmp_path / "live"), rel=1e-4)
    rows = {name: result.summary["rows"] for name, result in results.items()}
    assert rows["alone"]["student"]["loss"] == pytest.approx(rows["live"]["student"]["loss"], rel=1e-4)
    # The cache holds the teacher's own loss to half precision; what needs its model is left out.
    assert rows["alone"]["teacher"]["loss"] == pytest.approx(rows["live"]["teacher"]["loss"], rel=1e-3)
    assert rows["alone"]["teacher"]["kl"] is None is rows["alone"]["student"]["agreement"]
    gaps = [result.summary["gap_closed"] for result in results.values()]
    assert gaps[1] == pytest.approx(gaps[0], abs=0.02)
    assert (tmp_path / "alone" / "report.html").exists()


def test_with_the_model_beside_the_cache_everything_is_measured(cached: dict[str, Any]) -> None:
    cached["evaluate"] = {"baseline": False}
    rows = run(Recipe.parse(cached), console=QUIET).summary["rows"]
    assert rows["student"]["kl"] > 0 and rows["teacher"]["parameters"] > 0


def test_a_cache_of_the_training_data_alone(toys: Path, recipe_values: dict[str, Any], tmp_path: Path) -> None:
    out = str(tmp_path / "cache")
    shown = build(
        *("--teacher", str(toys / "teacher"), "--data", str(toys / "train.jsonl"), "--field", "text"),
        *("--max-length", "32", "--packing", "--codec", "top_k", "--top-k", "8", "--out", out),
    )
    assert "top_k (k 8, temperature 1.0)" in shown
    info = json.loads(CliRunner().invoke(app, ["cache", "info", out, "--json"]).output)
    assert info["codec"] == "top_k" and info["tokens"] > 1000 and 5 < info["bytes_per_token"] < 60
    assert "as they were written" in CliRunner().invoke(app, ["cache", "verify", out]).output

    recipe_values |= {"teacher": {"cache": out}, "evaluate": {"baseline": True}}
    result = run(Recipe.parse(recipe_values), console=QUIET)
    assert "the held-out rows" in " ".join(result.summary["notes"])
    assert "teacher" not in result.summary["rows"] and result.summary["gap_closed"] is None
    assert "the teacher was not measured on this text" in (result.directory / "report.html").read_text()
    lines = [json.loads(line) for line in (result.directory / "metrics.jsonl").read_text().splitlines()]
    assert any("eval_cross_entropy" in line for line in lines)


@pytest.mark.parametrize(
    ("change", "error", "expected"),
    [
        ({"objective": [{"term": "logits", "divergence": "reverse_kl"}]}, ShapeError, "a sample is biased"),
        (
            {"objective": [{"term": "logits", "temperature": {"schedule": "linear", "start": 1.0, "end": 3.0}}]},
            ShapeError,
            "expected the temperature 1 of the sampled targets, got",
        ),
        ({"data.max_length": 16}, DataError, "a cache that holds every row"),
    ],
)
def test_what_a_cache_does_not_hold_is_refused_before_training(
    recipe_values: dict[str, Any], tmp_path: Path, change: dict[str, Any], error: type[Exception], expected: str
) -> None:
    recipe_values["objective"] = [{"term": "logits"}]
    recipe_values["teacher"]["cache"] = str(tmp_path / "cache")
    (tmp_path / "recipe.yaml").write_text(Recipe.parse(recipe_values).dump())
    build(str(tmp_path / "recipe.yaml"), "--draws", "20")
    check(Recipe.parse(recipe_values))
    if "data.max_length" in change:
        recipe_values["data"]["max_length"] = change["data.max_length"]
    else:
        recipe_values |= change
    for attempt in (check, run):
        with pytest.raises(error, match=expected):
            attempt(Recipe.parse(recipe_values))
    assert not (tmp_path / "run").exists()


def test_another_tokenizer_is_refused(cached: dict[str, Any], tmp_path: Path) -> None:
    from conftest import make_llama, make_tokenizer

    make_llama(vocab_size=290).save_pretrained(tmp_path / "other")
    make_tokenizer(290).save_pretrained(tmp_path / "other")
    cached |= {"teacher": {"cache": cached["teacher"]["cache"]}, "student": {"model": str(tmp_path / "other")}}
    with pytest.raises(VocabularyError, match="expected one token -> id map for teacher and student"):
        check(Recipe.parse(cached))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "expected a recipe, or --teacher and --data, got neither"),
        (["--teacher", "t", "--data", "d"], "expected --out DIR"),
        (["--teacher", "t", "--data", "d", "--out", "o", "--shard", "4/4"], "expected I/N with 0 <= I < N"),
        (["--teacher", "t", "--data", "d", "--out", "o", "--top-k", "4"], "expected no --top-k with --codec sampled"),
        (
            ["--teacher", "./nowhere", "--data", "d", "--out", "o", "--stream"],
            "expected a folder with a model, got ./now",
        ),
        (["--teacher", "./nowhere", "--data", "d", "--out", "o"], "expected a folder with a model, got ./nowhere"),
    ],
)
def test_impossible_builds_are_refused(arguments: list[str], expected: str) -> None:
    with pytest.raises(UserError) as caught:
        build(*arguments)
    assert expected in str(caught.value)


@pytest.mark.slow
def test_what_the_page_about_caches_shows_works(
    toys: Path, recipe_values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(toys, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[1] / "docs/cache.md").read_text(encoding="utf-8")
    (shown,) = re.findall(r"```yaml\n(.*?)```", page, flags=re.DOTALL)
    values = yaml.safe_load(shown)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values | {"teacher": {"model": "teacher"}}))
    commands = "".join(re.findall(r"```console\n(.*?)```", page, flags=re.DOTALL))
    for line in commands.splitlines():
        done = CliRunner().invoke(app, shlex.split(line.partition("#")[0])[1:], catch_exceptions=False)
        assert done.exit_code == 0, done.output
    assert run(Recipe.parse(values), console=QUIET).summary["rows"]["teacher"]["loss"] > 0
