"""Every block of docs/tokenizers.md runs."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from pages import blocks, run_commands, run_python
from reference_across import byte_level

PAGE = "docs/tokenizers.md"


def test_the_page_runs(toys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(toys, tmp_path, dirs_exist_ok=True)
    byte_level(258).save_pretrained(tmp_path / "bytes")
    monkeypatch.chdir(tmp_path)
    (recipe,), (code,), (commands,) = (blocks(PAGE, language) for language in ("yaml", "python", "console"))
    (tmp_path / "bytes.yaml").write_text(recipe)
    run_commands(commands)
    run_python(code)
