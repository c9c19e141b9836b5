"""What `run` and `report` do with a recipe of kind embedding."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from potstill.cli.app import console
from potstill.errors import RecipeError, nearest

_KINDS = ("distillation", "embedding")


def kind_of(path: Path) -> str:
    """What a recipe's key `kind` says; distillation where it says nothing, or where there is no such file."""
    from potstill.recipe.document import read

    values = read(path) if path.exists() else None
    kind = values.get("kind", _KINDS[0]) if isinstance(values, dict) else _KINDS[0]
    if kind not in _KINDS:
        raise RecipeError(
            f"{path}: expected kind to be one of {', '.join(_KINDS)}, got {kind}.{nearest(str(kind), _KINDS)}"
        )
    return str(kind)


def run_embedding(path: Path, sets: Sequence[str], resume: bool) -> None:
    """Run it, and show the table, the verdict and where everything is."""
    from potstill.embedding.report import embedding_verdict
    from potstill.embedding.run import run_embedding
    from potstill.recipe import EmbeddingRecipe

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
