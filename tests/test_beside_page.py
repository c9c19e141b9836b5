"""Every block of docs/beside.md runs."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from pages import blocks, run_commands, run_python

PAGE = "docs/beside.md"


@pytest.mark.slow
def test_its_recipe_its_commands_and_its_code_run(toys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("bitsandbytes")
    shutil.copytree(toys, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(blocks(PAGE, "yaml")[0])
    run_commands(*blocks(PAGE, "console"))
    run_python(*blocks(PAGE, "python"))
