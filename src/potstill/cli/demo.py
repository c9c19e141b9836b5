"""The command `potstill demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from potstill.cli.app import Sets, app, console
from potstill.cli.run import show_result


@app.command()
def demo(
    out: Annotated[Path | None, typer.Option(help="run directory; default: runs/demo, or runs/demo-fast")] = None,
    fast: Annotated[bool, typer.Option("--fast", help="one minute: fewer steps and less text")] = False,
    set_: Sets = None,
) -> None:
    """Distil the teacher that comes with Potstill, offline, on the source of Python's standard library.

    An interrupted demo continues; a finished one is evaluated again.
    """
    from potstill.demo.recipe import demo_recipe
    from potstill.runs.run import run

    out = out or Path("runs/demo-fast" if fast else "runs/demo")
    recipe = demo_recipe(out, set_ or (), fast=fast)
    console.print(
        "A 5.3M-parameter teacher, a student a sixth of its size, and the same student trained on labels alone.\n"
        f"{recipe.name}\n[dim]The recipe: {out / 'recipe.yaml'}[/]",
        highlight=False,
    )
    show_result(run(recipe, resume=True, console=console))
