"""The command `potstill data show`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from potstill.cli.app import Imports, RecipePath, Sets, app
from potstill.cli.embedding import kind_of
from potstill.errors import UserError
from potstill.runs.terminal import Terminal

if TYPE_CHECKING:
    from potstill.data.show import ShownRow, ShownToken

data = typer.Typer(no_args_is_help=True, help="Look at data as a model reads it.")
app.add_typer(data, name="data")


@data.command()
def show(
    recipe: RecipePath,
    rows: Annotated[int, typer.Option(help="number of rows", min=1)] = 3,
    held_out: Annotated[bool, typer.Option("--eval", help="rows of the held-out data")] = False,
    ids: Annotated[bool, typer.Option("--ids", help="also print token ids")] = False,
    json_: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
    set_: Sets = None,
    import_: Imports = None,
) -> None:
    """Show what a recipe trains on: tokens, and which of them are targets. No model is loaded.

    Tokens have | between them. Targets are green, or stand in « » where there is no terminal.
    """
    if kind_of(recipe) != "distillation":
        raise UserError(f"data show: expected a distillation recipe, got kind {kind_of(recipe)} in {recipe}.")
    from potstill.runs.config.run import Recipe
    from potstill.runs.show import show_data

    shown = show_data(Recipe.load(recipe, set_ or ()), rows, held_out=held_out)
    if json_:
        print(json.dumps({**shown._asdict(), "rows": [asdict(row) for row in shown.rows]}))
        return
    out = Terminal()
    for row in shown.rows:
        for part in _row(row, ids, out.is_terminal):
            out.print(part, soft_wrap=True)
    for note in (*shown.notes, f"a text ends at {' or '.join(shown.ends)}" if shown.ends else ""):
        if note:
            out.print(Text(note, "dim"), soft_wrap=True)


def _row(row: ShownRow, ids: bool, colour: bool) -> Iterator[Text]:
    yield Text(row.title, "bold")
    yield from _tokens(row.tokens, ids, colour)
    if row.teacher is not None:
        yield Text(f"  the teacher reads {len(row.teacher)} tokens:", "bold")
        yield from _tokens(row.teacher, ids, colour)
    yield Text("")


def _tokens(tokens: Sequence[ShownToken], ids: bool, colour: bool) -> Iterator[Text]:
    from potstill.data.show import marked_text

    yield _coloured(tokens) if colour else Text(marked_text(tokens))
    if ids:
        yield Text(" ".join(str(token.id) for token in tokens), "dim")


def _coloured(tokens: Sequence[ShownToken]) -> Text:
    from potstill.data.show import runs

    text = Text()
    for target, weight, texts in runs(tokens):
        if target and weight != 1:
            text.append(f"{weight:g}:", "yellow")
        for part in texts:
            text.append(part, "bold green" if target else "")
            text.append("|", "dim")
    return text
