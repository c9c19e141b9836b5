"""The command `potstill report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from potstill.cli.app import app, console
from potstill.cli.embedding import kind_of


@app.command()
def report(directory: Annotated[Path, typer.Argument(help="a run directory", show_default=False)]) -> None:
    """Write report.html again from the records of a run, or sweep.html from those of a sweep."""
    from potstill.evaluate.report.page import write_report
    from potstill.files import lock_folder

    write = write_report
    if (directory / "sweep.json").exists():
        from potstill.evaluate.report.sweep import write_sweep_report as write
    elif kind_of(directory / "recipe.yaml") == "embedding":
        from potstill.evaluate.report.embedding import write_embedding_report as write
    with lock_folder(directory, "run"):
        path = write(directory)
    console.print(f"report  {path}", highlight=False)
