"""The blocks of docs/sweeps.md and docs/diagnose.md run, on the demo's teacher."""

from __future__ import annotations

import json
import re
import runpy
import shlex
from importlib.resources import files
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from conftest import TEXT
from potstill.cli import app

DOCS = Path(__file__).parent.parent / "docs"


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), flags=re.DOTALL)


def run(page: str) -> None:
    (commands,) = blocks(page, "console")
    for line in commands.splitlines():
        done = CliRunner().invoke(app, shlex.split(line)[1:], catch_exceptions=False)
        assert done.exit_code == 0, (line, done.output)


@pytest.fixture(autouse=True)
def _workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, texts in (("train", TEXT[:12]), ("eval", TEXT[40:42])):
        Path(f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    recipe = {
        "name": "mine",
        "teacher": {"model": str(files("potstill.demo") / "teacher")},
        "student": {"design": {"compression": 2}},
        "data": {"train": {"path": "train.jsonl"}, "eval": {"path": "eval.jsonl"}, "max_length": 24, "packing": True},
        "objective": [{"term": "logits"}],
        "train": {"max_steps": 1, "per_device_train_batch_size": 2, "save_strategy": "no"},
        "evaluate": {"continuations": 0},
        "output": "runs/mine",
    }
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe))


def test_the_sweep(capsys: pytest.CaptureFixture[str]) -> None:
    run("sweeps.md")
    found = json.loads(Path("runs/how-small/sweep.json").read_text())
    assert len(found["runs"]) == 3
    assert found["limits"]["min_quality"] == 0.5
    assert len(list(Path("runs/how-small").glob("*/student"))) == 3
    (example,) = blocks("sweeps.md", "python")
    Path("example.py").write_text(example)
    capsys.readouterr()
    runpy.run_path("example.py")
    assert capsys.readouterr().out.startswith("[1, 0]\nThe smallest with at least 70% of the teacher's quality: narrow")


def test_the_diagnosis() -> None:
    run("diagnose.md")
    assert Path("runs/before/diagnose.html").exists()
    assert "A closer look" in Path("runs/mine/report.html").read_text()


def test_the_rules_are_as_the_page_says() -> None:
    from potstill.evaluate import diagnose, findings

    page = " ".join((DOCS / "diagnose.md").read_text(encoding="utf-8").split())
    assert f"leaves {findings.SPREAD:.0%} of its probability" in page
    assert f"100 likeliest keep {findings.KEPT:.0%}" in page
    assert f"below {diagnose.UNLIKELY:.1%}" in page
    assert f"above {diagnose.CERTAIN:.0%}" in page
