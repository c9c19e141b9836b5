"""The command `potstill init`."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import typer

from potstill.cli.app import app, console
from potstill.errors import UserError
from potstill.losses.alignment import Task

Kind = Literal["distillation", "embedding", "generate"]
BUDGET = ("params", "active_params", "compression", "memory_gb", "latency_ms", "target", "keep", "context")
COLUMNS = ("field", "prompt", "completion", "messages", "pair", "label")
AdapterName = Literal["lora", "qlora", "ia3", "prompt", "prefix"]  # typer needs them here, where no torch is


@app.command()
def init(
    options: typer.Context,
    recipe: Annotated[Path, typer.Argument(help="file to write")] = Path("recipe.yaml"),
    teacher: Annotated[str | None, typer.Option(help="folder, name on the hub, or file of vectors")] = None,
    data: Annotated[Path | None, typer.Option(help="training data: a file, a folder, or a data set on the hub")] = None,
    eval_: Annotated[Path | None, typer.Option("--eval", help="held-out data: no row of --data")] = None,
    no_data: Annotated[bool, typer.Option("--no-data", help="the teacher writes the data, by a second recipe")] = False,
    split: Annotated[str | None, typer.Option(help="of --data, where it has several; needed for the hub")] = None,
    eval_split: Annotated[str | None, typer.Option(help="of --eval, likewise")] = None,
    config: Annotated[str | None, typer.Option(help="of a data set on the hub")] = None,
    kind: Annotated[Kind | None, typer.Option(help="of recipe; default: by the teacher")] = None,
    task: Annotated[Task | None, typer.Option(help="default: the one the teacher was trained for")] = None,
    student: Annotated[str | None, typer.Option(help="existing model, in place of a budget")] = None,
    params: Annotated[str | None, typer.Option(help="parameters of a new student: 100M, 1.5B")] = None,
    active_params: Annotated[str | None, typer.Option(help="at most so many that a token passes through")] = None,
    compression: Annotated[float | None, typer.Option(help="how many times smaller than the teacher")] = None,
    memory_gb: Annotated[float | None, typer.Option(help="to serve one row in half precision")] = None,
    latency_ms: Annotated[float | None, typer.Option(help="of a forward pass over one row, timed here")] = None,
    target: Annotated[str | None, typer.Option(help="kind of device: browser, edge, mobile, server")] = None,
    keep: Annotated[str | None, typer.Option(help="of the teacher: attention, balanced, depth or width")] = None,
    context: Annotated[int | None, typer.Option(help="tokens in a row, for memory and latency", min=1)] = None,
    adapter: Annotated[AdapterName | None, typer.Option(help="to train on --student")] = None,
    field: Annotated[str | None, typer.Option(help="column of texts, or of questions")] = None,
    prompt: Annotated[str | None, typer.Option(help="column of prompts")] = None,
    completion: Annotated[str | None, typer.Option(help="column of completions")] = None,
    messages: Annotated[str | None, typer.Option(help="column of chats")] = None,
    pair: Annotated[str | None, typer.Option(help="column of second texts")] = None,
    label: Annotated[str | None, typer.Option(help="column of classes or numbers")] = None,
    max_length: Annotated[int | None, typer.Option(help="most tokens in a row; default: by the data", min=2)] = None,
    dimensions: Annotated[int | None, typer.Option(help="of an embedding student", min=1)] = None,
    name: Annotated[str | None, typer.Option(help="name of the run; default: by the teacher's")] = None,
    output: Annotated[str | None, typer.Option(help="run directory; default: runs/NAME")] = None,
    force: Annotated[bool, typer.Option("--force", help="overwrite the file")] = False,
) -> None:
    """Write a commented recipe for your models and data. On a terminal, it asks for missing options.

    Columns, lengths and hyperparameters are chosen from the teacher's config and the first rows of the data.
    """
    texts = recipe.with_name(f"{recipe.stem}-texts{recipe.suffix}")
    for path in (recipe, *([texts] if no_data else [])):
        if path.exists() and not force:
            raise UserError(f"init: expected a new file, got {path}, which exists. Overwrite it with --force.")
    if not recipe.parent.is_dir():
        raise UserError(f"init: expected an existing folder for the recipe, got {recipe.parent}. Create it.")
    given = {key.rstrip("_"): value for key, value in options.params.items() if value is not None}
    del given["recipe"], given["force"]
    given["budget"] = {key: given.pop(key) for key in BUDGET if key in given}
    given["columns"] = {key: given.pop(key) for key in COLUMNS if key in given}
    if _on_a_terminal():
        _ask_for_missing(given)
    if "teacher" not in given:
        raise UserError("init: expected --teacher, got none. Give a folder with a model, or a name on the hub.")
    from potstill.files import write_text
    from potstill.runs.init.draft import DraftRequest, draft

    request = DraftRequest(**{"data": None, **given})
    drafts = {recipe: draft(request)}
    if no_data:
        drafts = {texts: draft(request.texts), **drafts}
    for path, text in drafts.items():
        write_text(path, text)
    if no_data:
        cached = f", then potstill cache build {recipe} --codec top_k" if request.cache else ""
        console.print(
            f"recipes {texts}, {recipe}\nnext    potstill generate {texts}{cached}, then potstill run {recipe}",
            highlight=False,
            soft_wrap=True,
        )
        return
    command = "generate" if request.recipe_kind == "generate" else "run"
    console.print(
        f"recipe  {recipe}\nnext    potstill check {recipe}, then potstill {command} {recipe}", highlight=False
    )


def _on_a_terminal() -> bool:
    return sys.stdin.isatty()


def _ask_for_missing(given: dict[str, Any]) -> None:
    """Ask for missing options and add the answers to those given."""
    from potstill.runs.init.draft import DraftRequest
    from potstill.runs.init.inspection import VECTORS

    if "teacher" not in given:
        given["teacher"] = _ask("Teacher: a folder with a model, or a file of vectors", _teacher)
    if "data" not in given and not given["no_data"] and not given["teacher"].endswith(VECTORS):
        given["data"] = _ask("Training data: a .jsonl, .csv, .parquet or .txt file", _file)
    if DraftRequest(**{"data": None, **given}).recipe_kind != "distillation":
        return
    if "eval" not in given and not given["no_data"]:
        given["eval"] = _ask("Held-out data, with other rows", _file)
    if "student" not in given and not given["budget"]:
        question = "Student: 100M parameters, 4x smaller, 0.5GB, edge, a folder with a model, or half of the layers"
        given |= _ask(question, _size, "half")
    if "student" in given and "adapter" not in given:
        given["adapter"] = _ask(
            f"Adapter: {', '.join(get_args(AdapterName))}, or all to train all weights", _adapter, "all"
        )
    if "output" not in given:
        given["output"] = _ask("Run directory", str, DraftRequest(given["teacher"], None).directory)


def _ask(question: str, read: Callable[[str], Any], default: str | None = None) -> Any:
    """Ask until an answer is valid."""
    while True:
        answer = typer.prompt(question, default=default)
        try:
            return read(answer)
        except UserError as error:
            console.print(str(error), style="red", highlight=False, markup=False, soft_wrap=True)


def _teacher(text: str) -> str:
    from potstill.models.loading import suppress_warnings
    from potstill.runs.init.inspection import inspect_model, is_embedder

    if not is_embedder(text):
        with suppress_warnings():
            inspect_model(text, "teacher")
    return text


def _file(text: str) -> Path:
    from potstill.data.locate import locate
    from potstill.data.sources import Source

    locate(Source(text, limit=1))
    return Path(text)


def _size(text: str) -> dict[str, Any]:
    """Read the answer about a student's size.

    >>> _size("4x"), _size("0.5GB"), _size("100M"), _size("half")
    ({'budget': {'compression': 4.0}}, {'budget': {'memory_gb': 0.5}}, {'budget': {'params': '100M'}}, {})
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
    if text not in (*get_args(AdapterName), "all"):
        raise UserError(f"adapter: expected {', '.join(get_args(AdapterName))} or all, got {text}.")
    return None if text == "all" else text
