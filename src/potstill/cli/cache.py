"""The commands for teacher signals on disk: cache build, cache info, cache verify."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import typer
from rich.console import Console
from rich.table import Table

from potstill.cli.app import Sets, app, console
from potstill.errors import UserError

cache = typer.Typer(no_args_is_help=True, help="Run a teacher once and keep what it says.")
app.add_typer(cache, name="cache")

Directory = Annotated[Path, typer.Argument(help="a cache's directory", show_default=False)]


@cache.command()
def build(
    recipe: Annotated[Path | None, typer.Argument(help="a recipe: its teacher, both of its files")] = None,
    teacher: Annotated[str | None, typer.Option(help="a folder with a model, instead of a recipe")] = None,
    data: Annotated[
        list[Path] | None, typer.Option(help="a file of data, instead of a recipe; may be repeated")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="the cache's directory; default: the recipe's teacher.cache")] = None,
    codec: Annotated[
        Literal["sampled", "top_k", "dense", "hidden"],
        typer.Option(
            help="sampled: draws, smallest, forward KL only. top_k: the likeliest and the mass of the rest. "
            "dense: all, for small vocabularies. hidden: last hidden states and the head, lossless."
        ),
    ] = "sampled",
    draws: Annotated[int | None, typer.Option(help="of sampled; default 50")] = None,
    top_k: Annotated[int | None, typer.Option(help="of top_k; default 64")] = None,
    temperature: Annotated[
        float | None, typer.Option(help="of sampled and top_k; default: the recipe's, or 1; training must use the same")
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option(help="whose hidden states to keep too, for terms that look inside, such as 1,3,-1 (from 0)"),
    ] = None,
    field: Annotated[str | None, typer.Option(help="the column of plain text in --data")] = None,
    max_length: Annotated[int, typer.Option(help="tokens in a row at most, with --data")] = 512,
    packing: Annotated[
        bool, typer.Option("--packing", help="join plain text into rows of max_length, with --data")
    ] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="rows in a batch of the teacher")] = 8,
    dtype: Annotated[str, typer.Option(help="the teacher's precision, with --teacher")] = "auto",
    device: Annotated[str | None, typer.Option(help="where the teacher runs, with --teacher")] = None,
    shard: Annotated[str, typer.Option(metavar="I/N", help="build part I of N (from 0), for any scheduler")] = "0/1",
    engine: Annotated[Literal["process", "ray"], typer.Option(help="this process, or Ray's actors")] = "process",
    set_: Sets = None,
) -> None:
    """Run a teacher over data and keep what it says. What was stopped goes on; a finished cache is left alone."""
    from potstill.runs.cache import CacheRequest
    from potstill.runs.cache import build as build_cache
    from potstill.runs.config.data import SourcePart
    from potstill.runs.config.run import Recipe
    from potstill.runs.config.teacher import ModelSource

    given: dict[str, Any] = {"draws": draws, "k": top_k}
    takes = {"sampled": {"draws", "temperature"}, "top_k": {"k", "temperature"}}.get(codec, set())
    if recipe is not None:
        if teacher is not None or data:
            raise UserError("cache build: expected a recipe, or --teacher with --data, got both.")
        read = Recipe.load(recipe, set_ or ())
        who, sources, out = read.teacher, [read.data.train, read.data.eval], out or _path(read.teacher.cache_path)
        max_length, packing = read.data.max_length, read.data.packing
        if temperature is None and "temperature" in takes:
            temperature = _temperature(read)
    elif teacher is not None and data:
        who = ModelSource(teacher, cast(Any, dtype), device)
        sources = [SourcePart.model_validate({"path": str(path), "field": field}) for path in data]
    else:
        raise UserError("cache build: expected a recipe, or --teacher and --data, got neither.")
    if out is None:
        raise UserError("cache build: expected --out DIR, or teacher.cache in the recipe, got neither.")
    if codec == "top_k":
        given["k"] = top_k or who.max_top_k
    given["temperature"] = temperature
    parameters = {name: value for name, value in given.items() if value is not None}
    if set(parameters) - takes:
        wrong = ", ".join(sorted(f"--{name.replace('k', 'top-k')}" for name in set(parameters) - takes))
        raise UserError(f"cache build: expected no {wrong} with --codec {codec}, got one. Leave it out.")
    tokenizer = None if recipe is None else read.student.model
    kept = _layers(layers)
    request = CacheRequest(who, sources, max_length, packing, codec, parameters, out, batch_size, tokenizer, kept)
    manifest = build_cache(request, part=_part(shard), engine=engine, console=console)
    if manifest is None:
        console.print(f"part {shard} of {out} is there; other parts are missing still", highlight=False)
    else:
        _show(out)


@cache.command()
def info(directory: Directory, json_: Annotated[bool, typer.Option("--json", help="for programs")] = False) -> None:
    """Say what a cache holds."""
    if json_:
        print(json.dumps(_facts(directory), indent=2))
    else:
        _show(directory)


@cache.command()
def verify(directory: Directory) -> None:
    """Read every byte of a cache and compare it with its checksums."""
    from potstill.teachers.cache.store import Cache

    found = Cache(directory).manifest
    print(f"{directory}: {len(found.shards)} shards, {found.tokens:,} tokens, as they were written")


def _facts(directory: Path) -> dict[str, Any]:
    from potstill.teachers.cache.store import Cache

    opened = Cache(directory, verify=False)
    plan = opened.manifest.plan
    size = sum(path.stat().st_size for path in (directory / "shards").iterdir())
    return {
        "codec": plan.codec["name"],
        "parameters": {name: value for name, value in plan.codec.items() if name not in ("name", "vocabulary")},
        "tokens": opened.manifest.tokens,
        "rows": opened.manifest.rows,
        "bytes": size,
        "bytes_per_token": size / max(opened.manifest.tokens, 1),
        "layers": None if plan.layers is None else asdict(plan.layers),
        "shards": len(opened.manifest.shards),
        "vocabulary": plan.vocabulary,
        "teacher": plan.teacher,
        "weights": plan.weights,
        "tokenizer": plan.tokenizer,
        "sources": [{"path": path, "rows": rows, "tokens": tokens} for path, rows, tokens, _ in plan.sources],
        "alignment": plan.alignment,
        "format": plan.format,
        "versions": plan.versions,
    }


def _show(directory: Path) -> None:
    from potstill.evaluate.report import words

    facts = _facts(directory)
    parameters = ", ".join(f"{name} {value}" for name, value in facts["parameters"].items())
    table = Table(show_header=False, box=None)
    table.add_row("cache", str(directory))
    table.add_row("codec", facts["codec"] + (f" ({parameters})" if parameters else ""))
    table.add_row("tokens", f"{facts['tokens']:,} that count, in {facts['rows']:,} rows and {facts['shards']} shards")
    table.add_row("size", f"{words.size(facts['bytes'])}, {facts['bytes_per_token']:.1f} bytes a token")
    if facts["layers"] is not None:
        kept = ", ".join(map(str, facts["layers"]["kept"]))
        table.add_row("layers", f"{kept} of {facts['layers']['depth']}: hidden states in {facts['layers']['dtype']}")
    table.add_row("teacher", facts["teacher"])
    table.add_row("vocabulary", f"{facts['vocabulary']:,} tokens")
    for source in facts["sources"]:
        table.add_row("data", f"{source['path']}: {source['tokens']:,} tokens")
    Console().print(table, highlight=False)


def _path(text: str | None) -> Path | None:
    return None if text is None else Path(text)


def _temperature(recipe: Any) -> float | None:
    """What the recipe's first logits term uses, where that is one number."""
    found = [part.temperature for part in recipe.objective if part.name == "logits"]
    return found[0] if found and isinstance(found[0], float) else None


def _layers(text: str | None) -> list[int]:
    try:
        return [int(each) for each in text.split(",")] if text else []
    except ValueError:
        raise UserError(f"--layers: expected numbers of layers from 0, such as 1,3,-1, got {text}.") from None


def _part(text: str) -> tuple[int, int]:
    first, slash, second = text.partition("/")
    if not (slash and first.isdigit() and second.isdigit() and int(first) < int(second)):
        raise UserError(f"--shard: expected I/N with 0 <= I < N, such as 0/4, got {text}.")
    return int(first), int(second)
