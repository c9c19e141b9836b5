"""Every block of docs/encoders.md runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from pages import blocks, run_commands, run_python
from toy_encoders import make_encoder, save, write_rows

PAGE = "docs/encoders.md"


@pytest.mark.slow
def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(make_encoder("bert", "masked", seed=1), tmp_path / "teacher")
    write_rows(tmp_path / "train.jsonl", 32, seed=0)
    write_rows(tmp_path / "eval.jsonl", 16, seed=7)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.yaml").write_text(*blocks(PAGE, "yaml"))
    assert "Pseudo-perplexity" in run_commands(*blocks(PAGE, "console"))
    run_python(*blocks(PAGE, "python"))
