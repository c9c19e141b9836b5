"""The command `potstill demo`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Literal

import typer

from potstill.cli.app import Sets, app, console, show
from potstill.cli.run import show_result

TEACHERS = {
    "stdlib": "A 5.3M-parameter teacher that comes with Potstill",
    "smollm2": "SmolLM2-135M-Instruct",
}


@app.command()
def demo(
    out: Annotated[
        Path | None, typer.Option(help="run directory; default: runs/demo, or another by the options")
    ] = None,
    model: Annotated[
        Literal["stdlib", "smollm2"],
        typer.Option(help="teacher: the one that comes with Potstill, or SmolLM2-135M-Instruct of a package on PyPI"),
    ] = "stdlib",
    fast: Annotated[bool, typer.Option("--fast", help="a quarter of the text: a first look")] = False,
    set_: Sets = None,
) -> None:
    """Distil a teacher offline, on the source of Python's standard library.

    An interrupted demo continues; a finished one is evaluated again.
    """
    from potstill.demo.recipe import cache_signals, demo_recipe
    from potstill.runs.run import run

    options = ["demo", *(["smollm2"] if model == "smollm2" else []), *(["fast"] if fast else [])]
    out = out or Path("runs") / "-".join(options)
    recipe = demo_recipe(out, set_ or (), model=model, fast=fast)
    console.print(
        f"{TEACHERS[model]}, a student made of its parts, the same student trained on labels alone, and one from "
        f"random weights.\n{recipe.name}"
    )
    console.print(f"The recipe: {out / 'recipe.yaml'}", style="dim")
    cache_signals(recipe, console)
    show_result(run(recipe, resume=True, console=console))
    show(f"next    potstill export {shlex.quote(str(out))} --to gguf", wrap=False)
