"""The examples run: every notebook as a reader runs it, every script by the command that it opens with."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from pages import ROOT, text

NOTEBOOKS = sorted(ROOT.glob("examples/*.ipynb"))
SCRIPTS = sorted(ROOT.glob("examples/*.py"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_a_notebook_shows_is_kept_and_clean(path: Path) -> None:
    cells = nbformat.read(path, as_version=4).cells
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    kinds = {kind for output in outputs for kind in output.get("data", {})}
    assert "image/png" in kinds
    assert any(output.get("name") == "stdout" for output in outputs)
    for output in outputs:
        assert output.output_type != "error"
        assert output.get("name") != "stderr", output
        assert not re.search(r"/(home|root|tmp|work|usr)/", output.get("text", "")), output
    assert "\nassert " in "\n" + cells[-1].source, "what it claims is held to it at its end"
    assert text("docs/examples.md").count(f"../examples/{path.name})") == 1


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_its_claims_hold(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()


@pytest.mark.slow
@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_runs_by_its_command(path: Path, tmp_path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    assert len(source.splitlines()) < 60
    (command,) = re.findall(r"^(python examples/.*)$", source, flags=re.MULTILINE)
    program, *words = shlex.split(command)
    assert program == "python" and words[0] == f"examples/{path.name}"
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *words], cwd=tmp_path, env=environment, check=True, capture_output=True, text=True
    )
    first, last = (float(value) for value in re.findall(r"held out: (\S+) nats", done.stdout))
    assert last < first
