"""The blocks of docs/sweeps.md and docs/diagnose.md run, on the demo's teacher."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path

import pytest
import yaml

from conftest import TEXT
from pages import blocks, run_commands, run_python, text


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


@pytest.mark.slow
def test_the_sweep(capsys: pytest.CaptureFixture[str]) -> None:
    run_commands(*blocks("docs/sweeps.md", "console"), only=True)
    found = json.loads(Path("runs/how-small/sweep.json").read_text())
    assert len(found["runs"]) == 3
    assert found["limits"]["min_quality"] == 0.5
    assert len(list(Path("runs/how-small").glob("*/student"))) == 3
    capsys.readouterr()
    run_python(*blocks("docs/sweeps.md", "python"))
    assert capsys.readouterr().out.startswith("[1, 0]\nThe smallest with at least 70% of the teacher's quality: narrow")


@pytest.mark.slow
def test_the_diagnosis() -> None:
    run_commands(*blocks("docs/diagnose.md", "console"), only=True)
    assert Path("runs/before/diagnose.html").exists()
    assert "A closer look" in Path("runs/mine/report.html").read_text()


def test_the_page_has_the_thresholds_of_the_rules() -> None:
    from potstill.evaluate import diagnosis as diagnose
    from potstill.evaluate import findings

    page = " ".join(text("docs/diagnose.md").split())
    assert f"leaves {findings.SOFT_MASS:.0%} of its probability" in page
    assert f"100 most likely tokens keep {findings.TOP_100_MASS:.0%}" in page
    assert f"below {diagnose.UNLIKELY:.1%}" in page
    assert f"above {diagnose.CONFIDENT:.0%}" in page
