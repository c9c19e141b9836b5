"""What `run`, `check` and `report` do with a recipe of kind embedding."""

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
    """What a recipe's key `kind` says; distillation where it says nothing, or where there is no such file.

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
    """Run it, and show the table, the verdict and where everything is."""
    from potstill.evaluate.report.embedding import embedding_verdict
    from potstill.runs.config.embedding import EmbeddingRecipe
    from potstill.runs.embedding import run_embedding

    result = run_embedding(EmbeddingRecipe.load(path, sets), resume=resume, console=console)
    table = Table(title=result.summary["name"], title_justify="left", box=box.SIMPLE_HEAD)
    measures = {
        "dimensions": "dimensions",
        "scores": "people's scores",
        "all_pairs": "all pairs",
        "recall": "recall at 10",
    }
    rows = result.summary["rows"]
    shown = [key for key in measures if rows["teacher"][key] is not None]
    for column in ("", *(measures[key] for key in shown)):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for name, row in rows.items():
        table.add_row(name, *(f"{row[key]:.3f}" if isinstance(row[key], float) else str(row[key]) for key in shown))
    out = Console()
    out.print(table, highlight=False)
    out.print(embedding_verdict(result.summary), highlight=False)
    out.print(f"student {result.directory / 'student'}\nreport  {result.directory / 'report.html'}", highlight=False)


def check_embedding(path: Path, sets: Sequence[str]) -> None:
    """Show what it will need."""
    from potstill.evaluate import formatting as words
    from potstill.runs.config.embedding import EmbeddingRecipe
    from potstill.runs.embedding_check import check

    recipe = EmbeddingRecipe.load(path, sets)
    found = check(recipe)
    table = Table(show_header=False, box=None)
    table.add_row("teacher", f"{found.teacher_dimensions:,} dimensions")
    table.add_row("student", f"{recipe.student.dimensions:,} dimensions, {found.parameters:,} parameters")
    table.add_row("train", f"{found.rows:,} vectors")
    table.add_row("eval", f"{found.held_out_rows:,} vectors")
    table.add_row("steps", f"{found.steps:,}")
    if found.encoding_seconds:
        table.add_row("encoding", f"about {words.duration(found.encoding_seconds)} of the teacher's work, once")
    table.add_row("time", f"about {words.duration(found.seconds)} of training on this machine, at most")
    for note in found.notes:
        table.add_row("note", note)
    Console().print(table, highlight=False)
