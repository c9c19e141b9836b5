"""Every block of docs/tokenizers.md runs."""

from __future__ import annotations

import re
import runpy
import shlex
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from potstill.cli import app
from reference_across import byte_level

PAGE = (Path(__file__).parent.parent / "docs/tokenizers.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.DOTALL)


def test_the_page_runs(toys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(toys, tmp_path, dirs_exist_ok=True)
    byte_level(258).save_pretrained(tmp_path / "bytes")
    monkeypatch.chdir(tmp_path)
    (recipe,), (code,), (commands,) = (blocks(language) for language in ("yaml", "python", "console"))
    (tmp_path / "bytes.yaml").write_text(recipe)
    for line in commands.splitlines():
        done = CliRunner().invoke(app, shlex.split(line)[1:], catch_exceptions=False)
        assert done.exit_code == 0, done.output
    (tmp_path / "example.py").write_text(code)
    runpy.run_path("example.py")
