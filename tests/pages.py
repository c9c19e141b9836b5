"""The blocks of a page of the docs, and how its reader runs them: in the folder where one is."""

from __future__ import annotations

import re
import runpy
import shlex
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from potstill.cli import app

ROOT = Path(__file__).parents[1]


def text(page: str) -> str:
    """A page by its path from the repository's root."""
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str, language: str) -> list[str]:
    """A page's blocks in a language, in their order."""
    return re.findall(rf"^```{language}\n(.*?)^```", text(page), flags=re.DOTALL | re.MULTILINE)


def run_commands(block: str, *more: str) -> str:
    """Run each line of a block that is a command of Potstill's, with more arguments; what the last has said."""
    output = ""
    for line in block.splitlines():
        words = shlex.split(line, comments=True)
        if words[:1] == ["potstill"]:
            done = CliRunner().invoke(app, [*words[1:], *more], catch_exceptions=False)
            assert done.exit_code == 0, (line, done.output)
            output = done.output
    return output


def run_python(code: str) -> dict[str, Any]:
    """Run a block as a file of its own; the names that it leaves."""
    Path("example.py").write_text(code, encoding="utf-8")
    return runpy.run_path("example.py")
