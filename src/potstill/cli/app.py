"""What all commands share: the application, the console, the kinds of arguments, and how a failure is told."""

from __future__ import annotations

import sys
import traceback
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from potstill.errors import PotstillError, UserError

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode="rich",
    help="Potstill makes a small model out of a large one: knowledge distillation.\n\n"
    "[bold]potstill demo[/] shows it offline in minutes. [bold]potstill run RECIPE[/] does it with your models "
    "and data; [bold]potstill check RECIPE[/] says first what that needs, and what does not fit.\n\n"
    "Add --debug to any command for a traceback.",
)
console = Console(stderr=True)

RecipePath = Annotated[Path, typer.Argument(help="a YAML file; `potstill schema` describes it", show_default=False)]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="change any key of the recipe, such as train.max_steps=100"),
]


@app.callback(invoke_without_command=True)
def version(
    version: Annotated[bool, typer.Option("--version", help="print the version and stop")] = False,
) -> None:
    """Set for all commands."""
    if version:
        from importlib.metadata import version as installed

        print(installed("potstill"))
        raise typer.Exit


def main() -> None:
    """Run a command. Exit status: 0 done, 1 failed, 2 a mistake of the user's, 130 interrupted."""
    debug = "--debug" in sys.argv
    try:
        app([argument for argument in sys.argv[1:] if argument != "--debug"])
    except SystemExit as stop:
        if stop.code != 130:  # what typer makes of Ctrl-C
            raise
        console.print(
            "interrupted: what was saved is kept; `run`, `sweep` and `generate` with --resume go on, `demo` does so "
            "by itself.",
            highlight=False,
        )
        sys.exit(130)
    except Exception as error:
        if debug:
            traceback.print_exc()
        if isinstance(error, PotstillError):
            text = str(error)
        else:
            kept = (
                "What was saved is kept and --resume goes on. "
                if {"run", "sweep", "generate"} & {*sys.argv[1:2]}
                else ""
            )
            text = f"failed: {type(error).__name__}: {error}. {kept}--debug shows the traceback."
        console.print(text, style="red", highlight=False, markup=False, soft_wrap=True)
        sys.exit(2 if isinstance(error, UserError) else 1)
