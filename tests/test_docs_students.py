"""The blocks of docs/students.md run, on the demo's teacher."""

from __future__ import annotations

import json
import re
import runpy
import shlex
import shutil
from importlib.resources import files
from pathlib import Path

import pytest
from typer.testing import CliRunner

from conftest import TEXT
from potstill.cli import app

PAGE = (Path(__file__).parent.parent / "docs/students.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.DOTALL)


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(str(files("potstill.demo") / "teacher"), tmp_path / "teacher")
    for name, texts in (("train", TEXT[:20]), ("eval", TEXT[40:44])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(block: str) -> None:
    for line in block.splitlines():
        done = CliRunner().invoke(app, shlex.split(line)[1:], catch_exceptions=False)
        assert done.exit_code == 0, (line, done.output)


def test_designs_and_estimates(workplace: Path) -> None:
    run(blocks("console")[0])
    assert json.loads((workplace / "student/config.json").read_text())["vocab_size"] == 2048
    (workplace / "example.py").write_text(blocks("python")[0])
    found = runpy.run_path(str(workplace / "example.py"))
    assert found["student"].hidden_size < found["teacher"].hidden_size


def test_the_recipe_and_its_evaluation(workplace: Path) -> None:
    (recipe,) = blocks("yaml")
    (workplace / "recipe.yaml").write_text(recipe.replace("max_steps: 500", "max_steps: 2"))
    run(blocks("console")[1])
    summary = json.loads((workplace / "runs/pruned/summary.json").read_text())
    assert any("the most active" in note for note in summary["notes"])
    assert "within compression 7" in summary["models"]["student"]
    figures = json.loads((workplace / "figures.json").read_text())["models"]["student"]
    assert figures["quality"]["loss"] == pytest.approx(summary["rows"]["student"]["loss"], rel=1e-4)
