"""The command that has a teacher write data."""

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
    """Have a teacher write training data: reasoning, programs, instructions, responses; checked and filtered."""
    from potstill.runs.config.generate import GenerateRecipe
    from potstill.runs.generate import generate as generate_rows

    made = generate_rows(GenerateRecipe.load(recipe, set_ or ()), resume=resume, engine=engine, console=console)
    table = Table(show_header=False, box=None)
    for name, count in made.counts.items():
        table.add_row(name, f"{count:,}")
        if name == "dropped":
            for reason, many in made.dropped.items():
                table.add_row(f"  {reason}", f"{many:,}")
    out = Console()
    out.print(table, highlight=False)
    out.print(f"rows    {made.rows}\ncard    {made.directory / 'README.md'}", highlight=False)


def check_generate(path: Path, sets: Sequence[str]) -> None:
    """Show what it will ask for."""
    from potstill.runs.config.generate import GenerateRecipe
    from potstill.runs.generate import check

    recipe = GenerateRecipe.load(path, sets)
    found = check(recipe)
    table = Table(show_header=False, box=None)
    table.add_row("teacher", found.teacher)
    table.add_row("prompts", f"{found.prompts:,}")
    table.add_row("texts", f"{found.texts:,} of at most {recipe.sampling.max_new_tokens:,} new tokens")
    if found.bad:
        table.add_row("left out", f"{found.bad:,} rows that cannot be used")
    table.add_row("rows", f"as {found.form}, to {recipe.output}")
    Console().print(table, highlight=False)
