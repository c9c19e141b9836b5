"""The command generate."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer

from potstill.cli.app import RecipePath, Sets, app, console, print_facts, show


@app.command()
def generate(
    recipe: RecipePath,
    set_: Sets = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on with the texts that are there")] = False,
    engine: Annotated[
        Literal["process", "ray"], typer.Option(help="this process, or Ray's processes, each with a teacher")
    ] = "process",
) -> None:
    """Generate training data with a teacher: reasoning, programs, instructions, responses, text without any data."""
    from potstill.runs.config.generate import GenerateRecipe
    from potstill.runs.generate import generate as generate_rows

    result = generate_rows(GenerateRecipe.load(recipe, set_ or ()), resume=resume, engine=engine, console=console)
    rows = []
    for name, count in result.counts.items():
        dropped = result.dropped if name == "dropped" else {}
        rows += [(name, f"{count:,}"), *((f"  {filter_name}", f"{x:,}") for filter_name, x in dropped.items())]
    print_facts(rows)
    for note in result.notes:
        show(f"note    {note}")
    held_out = f"\neval    {result.held_out}" if result.held_out else ""
    show(f"rows    {result.rows}{held_out}\ncard    {result.directory / 'README.md'}")


def check_generate(path: Path, sets: Sequence[str]) -> None:
    """Show what a recipe will generate."""
    from potstill.runs.config.generate import GenerateRecipe
    from potstill.runs.generate import check

    recipe = GenerateRecipe.load(path, sets)
    plan = check(recipe)
    texts, sampling = len(plan.prompts) * recipe.sampling.samples, recipe.sampling
    unusable = f"{len(plan.unusable):,} rows that cannot be used"
    print_facts(
        [
            ("teacher", recipe.teacher.name),
            ("prompts", f"{len(plan.prompts):,}"),
            ("texts", f"{texts:,} of at most {sampling.max_new_tokens:,} new tokens"),
            *([("left out", unusable)] if plan.unusable else []),
            ("rows", f"as {plan.reader.row_format}, to {recipe.output}"),
        ]
    )
