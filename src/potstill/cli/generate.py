"""The command that has a teacher write data."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from potstill.cli.app import RecipePath, Sets, app, console


@app.command()
def generate(
    recipe: RecipePath,
    set_: Sets = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on with the texts that are there")] = False,
) -> None:
    """Have a teacher write training data: reasoning, programs, instructions, responses; checked and filtered."""
    from potstill.generation import generate as generate_rows
    from potstill.recipe.generate import GenerateRecipe

    made = generate_rows(GenerateRecipe.load(recipe, set_ or ()), resume=resume, console=console)
    table = Table(show_header=False, box=None)
    for name, count in made.counts.items():
        table.add_row(name, f"{count:,}")
        if name == "dropped":
            for reason, many in made.dropped.items():
                table.add_row(f"  {reason}", f"{many:,}")
    out = Console()
    out.print(table, highlight=False)
    out.print(f"rows    {made.rows}\ncard    {made.directory / 'README.md'}", highlight=False)
