"""Every block of docs/beside.md runs."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from potstill.cli import app

PAGE = (Path(__file__).parents[1] / "docs/beside.md").read_text(encoding="utf-8")


def test_its_recipe_its_commands_and_its_code_run(toys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("bitsandbytes")
    shutil.copytree(toys, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    blocks = {
        kind: re.findall(rf"```{kind}\n(.*?)```", PAGE, flags=re.DOTALL) for kind in ("yaml", "console", "python")
    }
    (tmp_path / "recipe.yaml").write_text(*blocks["yaml"])
    for line in blocks["console"][0].splitlines():
        done = CliRunner().invoke(app, shlex.split(line)[1:], catch_exceptions=False)
        assert done.exit_code == 0, done.output
    exec(compile(blocks["python"][0], "beside.md", "exec"), {})
