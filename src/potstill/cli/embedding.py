"""What `run` and `check` do with a recipe of kind embedding."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from potstill.cli.app import console
from potstill.errors import RecipeError, nearest

_KINDS = ("distillation", "embedding")


def kind_of(path: Path, kinds: Sequence[str] = _KINDS) -> str:
    """Read the kind of a recipe; distillation if it has none, or if there is no such file.

    Raises:
        RecipeError: it is none of `kinds`.
    """
    from potstill.runs.config.document import read

    values = read(path) if path.exists() else None
    kind = values.get("kind", _KINDS[0]) if isinstance(values, dict) else _KINDS[0]
    if kind not in kinds:
        raise RecipeError(
            f"{path}: expected kind to be one of {', '.join(kinds)}, got {kind}.{nearest(str(kind), kinds)}"
        )
    return str(kind)


def run_embedding(path: Path, sets: Sequence[str], resume: bool) -> None:
    """Run a recipe and show the table, the verdict and where everything is."""
    from potstill.evaluate.report.embedding import embedding_table, embedding_verdict
    from potstill.runs.config.embedding import EmbeddingRecipe
    from potstill.runs.embedding import run_embedding

    result = run_embedding(EmbeddingRecipe.load(path, sets), resume=resume, console=console)
    rows = result.summary["rows"]
    lines = embedding_table(rows)
    table = Table(title=result.summary["name"], title_justify="left", box=box.SIMPLE_HEAD)
    for column in ("", *(line["name"].lower() for line in lines)):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for model, cells in zip(rows, zip(*(line["cells"] for line in lines), strict=True), strict=True):
        table.add_row(model, *cells)
    out = Console()
    out.print(table, highlight=False)
    out.print(embedding_verdict(result.summary), highlight=False)
    out.print(f"student {result.directory / 'student'}\nreport  {result.directory / 'report.html'}", highlight=False)


def check_embedding(path: Path, sets: Sequence[str]) -> None:
    """Show what a recipe will need."""
    from potstill.runs.config.embedding import EmbeddingRecipe
    from potstill.runs.embedding import check

    table = Table(show_header=False, box=None)
    for row in check(EmbeddingRecipe.load(path, sets)):
        table.add_row(*row)
    Console().print(table, highlight=False)
