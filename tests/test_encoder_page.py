"""Every block of docs/encoders.md runs."""

from __future__ import annotations

import re
import runpy
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from potstill.cli import app
from toy_encoders import make_encoder, save, write_rows

PAGE = (Path(__file__).parent.parent / "docs/encoders.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.DOTALL)


def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(make_encoder("bert", "masked", seed=1), tmp_path / "teacher")
    write_rows(tmp_path / "train.jsonl", 32, seed=0)
    write_rows(tmp_path / "eval.jsonl", 16, seed=7)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.yaml").write_text(blocks("yaml")[0])
    for line in blocks("console")[0].splitlines():
        done = CliRunner().invoke(app, shlex.split(line)[1:], catch_exceptions=False)
        assert done.exit_code == 0, done.output
    assert "Pseudo-perplexity" in done.output
    (tmp_path / "loop.py").write_text(blocks("python")[0])
    runpy.run_path(str(tmp_path / "loop.py"))


def test_the_recipes_of_the_page_are_there() -> None:
    for place in re.findall(r"\]\((\.\./[^)]*|[a-z]+\.md)\)", PAGE):
        assert (Path(__file__).parent.parent / "docs" / place).exists()
