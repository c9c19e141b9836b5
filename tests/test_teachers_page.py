"""Every block of docs/teachers.md runs."""

from __future__ import annotations

import json
import re
import runpy
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from conftest import make_llama
from potstill.runs.config.run import Recipe
from potstill.runs.run import run

PAGE = (Path(__file__).parent.parent / "docs/teachers.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.DOTALL)


@pytest.fixture
def workplace(toys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as the page's reader has it."""
    shutil.copytree(toys, tmp_path, dirs_exist_ok=True)
    shutil.copytree(toys / "teacher", tmp_path / "other")
    make_llama(seed=2).save_pretrained(tmp_path / "other")
    make_llama(hidden_size=8, layers=2).save_pretrained(tmp_path / "student")
    rows = [
        {"prompt": f"{i} + {i} =", "hint": f"{i} + {i} is {2 * i}. {i} + {i} =", "completion": f" {2 * i}"}
        for i in range(8)
    ]
    (tmp_path / "hinted.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    return tmp_path


RECIPES = [yaml.safe_load(block) for block in blocks("yaml")]
WHOLE = next(recipe for recipe in RECIPES if recipe.get("name") == "two-teachers")


@pytest.mark.parametrize("number", range(len(RECIPES)))
def test_the_recipes_run(number: int, workplace: Path) -> None:
    values: dict[str, Any] = WHOLE | {"evaluate": {"continuations": 0}} | RECIPES[number]
    values["train"] = {"max_steps": 2, "per_device_train_batch_size": 4}
    summary = run(Recipe.parse(values), console=Console(quiet=True)).summary
    assert summary["rows"]["student"]["loss"] > 0
    learned = values["teacher"].get("weights") == "learned"
    assert ("teacher" in summary["rows"]) == ("ema" not in values["teacher"])
    if "ensemble" in values["teacher"]:
        assert list(summary["teacher_weights"]) == ["teacher", "other"]
        given = WHOLE["teacher"]["ensemble"][0]["weight"]
        assert (summary["teacher_weights"]["teacher"] == pytest.approx(given)) == (not learned)
        assert "an ensemble" in (Path(values["output"]) / "report.html").read_text()
    if learned:
        lines = [json.loads(line) for line in (Path(values["output"]) / "metrics.jsonl").read_text().splitlines()]
        last = [line for line in lines if "teacher_weight/teacher" in line][-1]
        assert last["teacher_weight/teacher"] == pytest.approx(summary["teacher_weights"]["teacher"])


@pytest.mark.parametrize("number", range(len(blocks("python"))))
def test_the_python_runs(number: int, workplace: Path) -> None:
    (workplace / "example.py").write_text(blocks("python")[number])
    runpy.run_path(str(workplace / "example.py"))
