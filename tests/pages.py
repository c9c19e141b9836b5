"""The pages of the documentation: their blocks, and how a reader runs them, in the folder where one is.

Where a page runs as a whole (`run_page`), a python block sees what those before it have defined; a yaml block begins
with a comment that names its file; each line of a console block is a `potstill` command that succeeds (a backslash at
its end joins two; comments are skipped); a text block is what the block before it prints, `...` standing for anything.
"""

from __future__ import annotations

import contextlib
import doctest
import io
import re
import runpy
import shlex
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from potstill.cli import app

ROOT = Path(__file__).parents[1]
AS_PRINTED = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def text(page: str) -> str:
    """A page by its path from the repository's root."""
    return (ROOT / page).read_text(encoding="utf-8")


def all_blocks(page: str) -> list[tuple[str, str]]:
    """A page's blocks in their order: language and text."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", text(page), flags=re.DOTALL | re.MULTILINE)


def blocks(page: str, language: str) -> list[str]:
    """A page's blocks in a language, in their order."""
    return [block for found, block in all_blocks(page) if found == language]


def run_page(page: str) -> dict[str, Any]:
    """Run all blocks of a page; what its python blocks have defined."""
    names: dict[str, Any] = {}
    printed = ""
    for language, block in all_blocks(page):
        if language == "python":
            with contextlib.redirect_stdout(io.StringIO()) as out:
                names |= run_python(block, names)
            printed = out.getvalue()
        elif language == "yaml":
            (name,) = re.findall(r"\A# (\S+\.yaml)$", block, flags=re.MULTILINE) or [None]
            assert name is not None, f"a yaml block begins with a comment that names its file:\n{block}"
            Path(name).write_text(block)
        elif language == "console":
            printed = run_commands(block, only=True)
        elif language == "text":
            as_printed = doctest.OutputChecker().check_output(block, printed, AS_PRINTED)
            assert as_printed, f"expected\n{block}\ngot\n{printed}"
        else:
            raise AssertionError(f"expected a block of python, yaml, console or text, got {language!r}:\n{block}")
    return names


def run_commands(block: str, *more: str, only: bool = False) -> str:
    """Run each line of a block that is a command of Potstill's, with more arguments; what they print.

    Args:
        only: it has no other lines.
    """
    printed = ""
    for line in block.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        assert not only or words[:1] in ([], ["potstill"]), f"expected a command of potstill, got {line}"
        if words[:1] == ["potstill"]:
            done = CliRunner().invoke(app, [*words[1:], *more], catch_exceptions=False)
            assert done.exit_code == 0, f"{line}\n{done.output}"
            printed += done.output
    return printed


def run_python(code: str, names: dict[str, Any] | None = None) -> dict[str, Any]:
    """Run a block as a file of its own, in which some names are defined; the names that it leaves."""
    Path("example.py").write_text(code, encoding="utf-8")
    found = runpy.run_path("example.py", names)
    return {name: value for name, value in found.items() if not name.startswith("__")}
