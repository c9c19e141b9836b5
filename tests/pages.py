"""Pages of the documentation, run: their blocks in order, in the folder that is the current one, as a reader would.

A python block knows what those before it have defined. A yaml block begins with a comment that names its file. Each
line of a console block is a `potstill` command that succeeds (a backslash at its end joins two; comments are skipped).
A text block is what the block before it prints, where `...` stands for anything.
"""

from __future__ import annotations

import contextlib
import doctest
import io
import re
import runpy
import shlex
from pathlib import Path
from typing import Any, NamedTuple

from typer.testing import CliRunner

from potstill.cli import app

AS_PRINTED = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


class Block(NamedTuple):
    language: str
    text: str


def blocks(page: str) -> list[Block]:
    """The blocks of a page."""
    return [Block(*found) for found in re.findall(r"^```(\w*)\n(.*?)^```$", page, flags=re.DOTALL | re.MULTILINE)]


def run_blocks(page: str) -> dict[str, Any]:
    """Run a page; what its python blocks have defined."""
    names: dict[str, Any] = {}
    printed = ""
    for place, (language, text) in enumerate(blocks(page)):
        if language == "python":
            printed = run_python(f"block{place}.py", text, names)
        elif language == "yaml":
            (name,) = re.findall(r"\A# (\S+\.yaml)$", text, flags=re.MULTILINE) or [None]
            assert name is not None, f"a yaml block begins with a comment that names its file:\n{text}"
            Path(name).write_text(text)
        elif language == "console":
            printed = run_console(text)
        elif language == "text":
            as_printed = doctest.OutputChecker().check_output(text, printed, AS_PRINTED)
            assert as_printed, f"expected\n{text}\ngot\n{printed}"
        else:
            raise AssertionError(f"expected a block of python, yaml, console or text, got {language!r}:\n{text}")
    return names


def run_python(name: str, code: str, names: dict[str, Any]) -> str:
    """What it prints; what it defines is added to names."""
    Path(name).write_text(code)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        found = runpy.run_path(name, names)
    names |= {name: value for name, value in found.items() if not name.startswith("__")}
    return out.getvalue()


def run_console(text: str) -> str:
    """What the commands print."""
    printed = ""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if not words:
            continue
        assert words[0] == "potstill", f"expected a command of potstill, got {line}"
        done = CliRunner().invoke(app, words[1:], catch_exceptions=False)
        assert done.exit_code == 0, f"{line}\n{done.output}"
        printed += done.stdout
    return printed
