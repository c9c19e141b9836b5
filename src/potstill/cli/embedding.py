"""What `run` and `check` do with a recipe of kind embedding."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from potstill.cli.app import comparison_table, console, print_facts, show
from potstill.errors import RecipeError, nearest

_KINDS = ("distillation", "embedding")


def kind_of(path: Path, kinds: Sequence[str] = _KINDS) -> str:
    """Read the kind of a recipe, one of `kinds`; distillation if it has none, or if there is no such file."""
    from potstill.runs.config.document import locate_recipe, read

    values = read(path) if locate_recipe(path).exists() else None
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
    table = comparison_table((line["name"].lower() for line in lines), title=result.summary["name"])
    for model, cells in zip(rows, zip(*(line["cells"] for line in lines), strict=True), strict=True):
        table.add_row(model, *cells)
    paths = f"student {result.directory / 'student'}\nreport  {result.directory / 'report.html'}"
    show(table, embedding_verdict(result.summary), paths)


def check_embedding(path: Path, sets: Sequence[str]) -> None:
    """Show what a recipe will need."""
    from potstill.runs.config.embedding import EmbeddingRecipe
    from potstill.runs.embedding import check

    print_facts(check(EmbeddingRecipe.load(path, sets)))
