"""The blocks of docs/students.md run, on the demo's teacher."""

from __future__ import annotations

import json
import shutil
from importlib.resources import files
from pathlib import Path

import pytest

from conftest import TEXT
from pages import blocks, run_commands, run_python

PAGE = "docs/students.md"


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(str(files("potstill.demo") / "teacher"), tmp_path / "teacher")
    for name, texts in (("train", TEXT[:20]), ("eval", TEXT[40:44])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_designs_and_estimates(workplace: Path) -> None:
    run_commands(blocks(PAGE, "console")[0], only=True)
    assert json.loads((workplace / "student/config.json").read_text())["vocab_size"] == 2048
    found = run_python(*blocks(PAGE, "python"))
    assert found["student"].hidden_size < found["teacher"].hidden_size


@pytest.mark.slow
def test_the_recipe_and_its_evaluation(workplace: Path) -> None:
    (recipe,) = (block for block in blocks(PAGE, "yaml") if "output:" in block)
    (workplace / "recipe.yaml").write_text(recipe.replace("max_steps: 500", "max_steps: 2"))
    run_commands(blocks(PAGE, "console")[1], only=True)
    summary = json.loads((workplace / "runs/pruned/summary.json").read_text())
    assert any("the most active" in note for note in summary["notes"])
    assert "within compression 7" in summary["models"]["student"]
    figures = json.loads((workplace / "figures.json").read_text())["models"]["student"]
    assert figures["quality"]["loss"] == pytest.approx(summary["rows"]["student"]["loss"], rel=1e-4)
