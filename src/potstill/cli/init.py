"""The command that writes a first recipe: init."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from potstill.cli.app import app, console
from potstill.errors import UserError
from potstill.losses.alignment import Task


@app.command()
def init(
    recipe: Annotated[Path, typer.Argument(help="the file to write")] = Path("recipe.yaml"),
    teacher: Annotated[
        str | None, typer.Option(help="a folder with a model, a name on the hub, or a file of vectors")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="what is learnt from: .jsonl, .json, .csv, .parquet, .txt")] = None,
    eval_: Annotated[Path | None, typer.Option("--eval", help="what is held out: no row of --data")] = None,
    kind: Annotated[
        Literal["distillation", "embedding", "generate"] | None,
        typer.Option(help="of recipe; default: embedding for an embedding teacher, else distillation"),
    ] = None,
    task: Annotated[Task | None, typer.Option(help="default: what the teacher was made for")] = None,
    student: Annotated[str | None, typer.Option(help="a model that is there, in place of a budget")] = None,
    params: Annotated[str | None, typer.Option(help="of a new student: 100M, 1.5B")] = None,
    compression: Annotated[float | None, typer.Option(help="so many times fewer parameters than the teacher")] = None,
    memory_gb: Annotated[float | None, typer.Option(help="to serve one row in half precision")] = None,
    target: Annotated[str | None, typer.Option(help="a kind of device: browser, edge, mobile, server")] = None,
    keep: Annotated[str | None, typer.Option(help="what stays as in the teacher: balanced, depth, width")] = None,
    context: Annotated[int | None, typer.Option(help="tokens in a row, for --memory-gb", min=1)] = None,
    adapter: Annotated[
        Literal["lora", "qlora", "ia3", "prompt", "prefix"] | None, typer.Option(help="trained on --student")
    ] = None,
    field: Annotated[str | None, typer.Option(help="the column of texts, or of questions")] = None,
    prompt: Annotated[str | None, typer.Option(help="the column of prompts")] = None,
    completion: Annotated[str | None, typer.Option(help="the column of completions")] = None,
    messages: Annotated[str | None, typer.Option(help="the column of chats")] = None,
    pair: Annotated[str | None, typer.Option(help="the column of second texts")] = None,
    label: Annotated[str | None, typer.Option(help="the column of classes or numbers")] = None,
    max_length: Annotated[int | None, typer.Option(help="tokens in a row; default: what the rows need", min=2)] = None,
    dimensions: Annotated[int | None, typer.Option(help="of an embedding student", min=1)] = None,
    name: Annotated[str | None, typer.Option(help="of the run; default: by the teacher's")] = None,
    output: Annotated[str | None, typer.Option(help="the run directory; default: runs/NAME")] = None,
    force: Annotated[bool, typer.Option("--force", help="overwrite the file")] = False,
) -> None:
    """Write a commented recipe for your models and data. On a terminal it asks for what is not given.

    It reads the teacher's config and the data's first rows to choose columns, lengths and where numbers begin.
    """
    if recipe.exists() and not force:
        raise UserError(
            f"init: expected a file that is not there, got {recipe}. Name another, or overwrite it with --force."
        )
    if not recipe.parent.is_dir():
        raise UserError(f"init: expected a folder for the recipe, got {recipe.parent}, which is not there. Make it.")
    budget = {"params": params, "compression": compression, "memory_gb": memory_gb, "target": target}
    budget |= {"keep": keep, "context": context}
    columns = {"field": field, "prompt": prompt, "completion": completion, "messages": messages}
    columns |= {"pair": pair, "label": label}
    given: dict[str, Any] = {"teacher": teacher, "data": data, "eval": eval_, "student": student}
    given |= {"budget": _given(budget), "kind": kind, "adapter": adapter, "output": output}
    if _on_a_terminal():
        _ask_for_the_rest(given)
    if given["teacher"] is None:
        raise UserError("init: expected --teacher, got none. It is a folder with a model, or a name on the hub.")
    from potstill.data.files import write_text
    from potstill.runs.init import Wish, draft

    wish = Wish(**given, task=task, columns=_given(columns), max_length=max_length, dimensions=dimensions, name=name)
    write_text(recipe, draft(wish))
    then = "generate" if wish.made == "generate" else "run"
    console.print(f"recipe  {recipe}\nnext    potstill check {recipe}, then potstill {then} {recipe}", highlight=False)


def _on_a_terminal() -> bool:
    return sys.stdin.isatty()


def _given(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _ask_for_the_rest(given: dict[str, Any]) -> None:
    """Ask for what is not given, in place; an answer that cannot be is told, and asked for again."""
    from potstill.models.loading import suppress_warnings
    from potstill.runs.init import Wish
    from potstill.runs.init.models import VECTORS, is_embedder, look_at_model
    from potstill.runs.init.rows import table_of

    def teacher(text: str) -> str:
        if not is_embedder(text):
            with suppress_warnings():
                look_at_model(text, "teacher")
        return text

    def file(text: str) -> Path:
        table_of(Path(text))
        return Path(text)

    if given["teacher"] is None:
        given["teacher"] = _ask("Teacher: a folder with a model, or a file of vectors", teacher)
    embeds = given["kind"] == "embedding" or (given["kind"] is None and is_embedder(given["teacher"]))
    if given["data"] is None and not given["teacher"].endswith(VECTORS):
        given["data"] = _ask("Data to learn from: a .jsonl, .csv, .parquet or .txt file", file)
    if embeds or given["kind"] == "generate":
        return
    if given["eval"] is None:
        given["eval"] = _ask("Data held out, with other rows", file)
    if given["student"] is None and not given["budget"]:
        question = "Student: 100M parameters, 4x smaller, 0.5GB, edge, a folder with a model; or half of the layers"
        given |= _ask(question, _size, "half")
    if given["student"] is not None and given["adapter"] is None:
        question = "An adapter on it: lora, qlora, ia3, prompt, prefix; or all of its weights"
        given["adapter"] = _ask(question, _adapter, "all")
    if given["output"] is None:
        given["output"] = _ask("Run directory", str, Wish(given["teacher"], given["data"]).directory)


def _ask(question: str, read: Callable[[str], Any], default: str | None = None) -> Any:
    while True:
        answer = typer.prompt(question, default=default)
        try:
            return read(answer)
        except UserError as error:
            console.print(str(error), style="red", highlight=False, markup=False, soft_wrap=True)


def _size(text: str) -> dict[str, Any]:
    """A student in one answer.

    >>> _size("4x"), _size("0.5GB"), _size("100M"), _size("edge"), _size("half")
    ({'budget': {'compression': 4.0}}, {'budget': {'memory_gb': 0.5}}, {'budget': {'params': '100M'}}, \
{'budget': {'target': 'edge'}}, {})
    """
    from potstill.models.budget import TARGETS, parse_count

    if text == "half":
        return {}
    if text in TARGETS:
        return {"budget": {"target": text}}
    if Path(text).expanduser().is_dir():
        return {"student": text}
    if match := re.fullmatch(r"([\d.]+) ?(x|GB)", text):
        return {"budget": {"compression" if match[2] == "x" else "memory_gb": float(match[1])}}
    parse_count(text)
    return {"budget": {"params": text}}


def _adapter(text: str) -> str | None:
    from potstill.models.adapters import Adapter

    if text not in (*Adapter.kinds, "all"):
        raise UserError(f"adapter: expected {', '.join(Adapter.kinds)} or all, got {text}.")
    return None if text == "all" else text
