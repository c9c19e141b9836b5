"""The command generate."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.table import Table

from potstill.cli.app import RecipePath, Sets, app, console


@app.command()
def generate(
    recipe: RecipePath,
    set_: Sets = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on with the texts that are there")] = False,
    engine: Annotated[
        Literal["process", "ray"], typer.Option(help="this process, or Ray's processes, each with a teacher")
    ] = "process",
) -> None:
    """Generate training data with a teacher: reasoning, programs, instructions, responses; checked and filtered."""
    from potstill.runs.config.generate import GenerateRecipe
    from potstill.runs.generate import generate as generate_rows

    result = generate_rows(GenerateRecipe.load(recipe, set_ or ()), resume=resume, engine=engine, console=console)
    table = Table(show_header=False, box=None)
    for name, count in result.counts.items():
        table.add_row(name, f"{count:,}")
        if name == "dropped":
            for filter_name, dropped in result.dropped.items():
                table.add_row(f"  {filter_name}", f"{dropped:,}")
    out = Console()
    out.print(table, highlight=False)
    out.print(f"rows    {result.rows}\ncard    {result.directory / 'README.md'}", highlight=False)


def check_generate(path: Path, sets: Sequence[str]) -> None:
    """Show what a recipe will generate."""
    from potstill.runs.config.generate import GenerateRecipe
    from potstill.runs.generate import check

    recipe = GenerateRecipe.load(path, sets)
    plan = check(recipe)
    table = Table(show_header=False, box=None)
    table.add_row("teacher", recipe.teacher.name)
    table.add_row("prompts", f"{len(plan.prompts):,}")
    table.add_row(
        "texts",
        f"{len(plan.prompts) * recipe.sampling.samples:,} of at most {recipe.sampling.max_new_tokens:,} new tokens",
    )
    if plan.unusable:
        table.add_row("left out", f"{len(plan.unusable):,} rows that cannot be used")
    table.add_row("rows", f"as {plan.row_format}, to {recipe.output}")
    Console().print(table, highlight=False)
