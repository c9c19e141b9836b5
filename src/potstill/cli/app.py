"""The Typer application, and the options, output and error handling that all commands share."""

from __future__ import annotations

import logging
import os
import signal
import sys
import traceback
from collections.abc import Iterable
from pathlib import Path
from types import FrameType
from typing import Annotated, Literal, NoReturn

import typer
from rich import box
from rich.table import Table

from potstill.errors import PotstillError, UserError, one_line, remedy, shortened
from potstill.runs.terminal import Terminal

RESUMABLE = {"run", "sweep", "generate"}  # commands with --resume

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode="rich",
    help="Potstill distils a large model into a small one.\n\n"
    "[bold]potstill demo[/] trains a small model offline in minutes. [bold]potstill check RECIPE[/] validates a "
    "recipe for your own models and data and estimates its cost; [bold]potstill run RECIPE[/] trains it.\n\n"
    "Add --debug to any command for a traceback.",
)
console = Terminal(stderr=True)


def _import_files(paths: list[Path] | None) -> list[Path] | None:
    from potstill.runs.config.imports import import_file

    for path in paths or ():
        import_file(path)
    return paths


RecipePath = Annotated[Path, typer.Argument(help="YAML file; `potstill schema` describes it", show_default=False)]
Sets = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="override a key, such as train.max_steps=100")
]
IMPORT_HELP = "Python file to import before the recipe is read, for divergences and terms of your own"
Imports = Annotated[  # the callback runs while arguments are parsed, which is before a command reads its recipe
    list[Path] | None, typer.Option("--import", metavar="FILE", callback=_import_files, help=IMPORT_HELP)
]
Engine = Annotated[Literal["process", "ray"], typer.Option(help="work in this process, or in processes of Ray")]


@app.callback(invoke_without_command=True)
def version(version: Annotated[bool, typer.Option("--version", help="print the version and exit")] = False) -> None:
    """Handle the options that come before a command."""
    if version:
        from importlib.metadata import version as installed_version

        print(installed_version("potstill"))
        raise typer.Exit


def main() -> None:
    """Run the command line. Exit status: 0 success, 1 failure, 2 the user's mistake, 130 or 143 interrupted."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it advises optional packages
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL and "WORLD_SIZE" not in os.environ:
        signal.signal(signal.SIGTERM, _terminate)  # a rank that waits for others in C would not run it
    try:
        app([argument for argument in sys.argv[1:] if argument != "--debug"])
    except SystemExit as stop:
        if stop.code not in (130, 143):  # Typer's status for Ctrl-C, and SIGTERM's
            raise
        console.print(
            "interrupted: saved work is kept. `run`, `sweep` and `generate` continue with --resume, `demo` and "
            "`cache build` by themselves.",
            highlight=False,
            soft_wrap=True,
        )
        raise
    except Exception as error:
        if "--debug" in sys.argv:
            traceback.print_exc()
        if isinstance(error, PotstillError):
            message = str(error)
        else:
            hint = "Saved work is kept; continue with --resume. " if RESUMABLE & {*sys.argv[1:2]} else ""
            advice = "" if (found := remedy(error)) is None else f"{found} "
            message = f"failed: {type(error).__name__}: {one_line(error)}. {advice}{hint}--debug shows the traceback."
        console.print(shortened(message), style="red", soft_wrap=True)
        sys.exit(2 if isinstance(error, UserError) else 1)


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    """End as an error does, so that unfinished files are removed."""
    sys.exit(128 + number)


def show(*parts: object, wrap: bool = True) -> None:
    """Print tables and lines to stdout; without `wrap`, a line is never broken, as of a command to copy."""
    out = Terminal()
    for part in parts:
        out.print(part, highlight=False, soft_wrap=not wrap)


def print_facts(rows: Iterable[tuple[str, ...]]) -> None:
    """Print names and values in two columns."""
    table = Table(show_header=False, box=None)
    for row in rows:
        table.add_row(*row, style="bold red" if row[0] == "warning" else None)
    show(table)


def comparison_table(columns: Iterable[str], title: str | None = None, *, wraps: bool = False) -> Table:
    """Make a table with a column of names and a right-aligned column for each of `columns`.

    Where a line is too short, cells wrap: Rich leaves out whole columns of those that may not.

    Args:
        wraps: the names alone wrap.
    """
    table = Table(title=title, title_justify="left", caption_justify="left", box=box.SIMPLE_HEAD, pad_edge=not wraps)
    table.add_column("", overflow="fold")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=wraps, overflow="fold")
    return table
