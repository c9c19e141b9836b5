"""The commands `potstill cache build`, `info` and `verify`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import typer

from potstill.cli.app import Engine, Imports, Sets, app, console, print_facts
from potstill.errors import UserError

cache = typer.Typer(no_args_is_help=True, help="Precompute teacher signals on disk.")
app.add_typer(cache, name="cache")

Directory = Annotated[Path, typer.Argument(help="directory of a cache", show_default=False)]
CODEC_OPTIONS = {"sampled": ("draws", "temperature"), "top_k": ("top_k", "temperature"), "dense": (), "hidden": ()}


@cache.command()
def build(
    recipe: Annotated[Path | None, typer.Argument(help="recipe with a teacher and both data files")] = None,
    teacher: Annotated[str | None, typer.Option(help="folder with a model, instead of a recipe")] = None,
    data: Annotated[list[Path] | None, typer.Option(help="data file, instead of a recipe; may be repeated")] = None,
    out: Annotated[Path | None, typer.Option(help="cache directory; default: the recipe's teacher.cache")] = None,
    codec: Annotated[
        Literal["sampled", "top_k", "dense", "hidden"],
        typer.Option(
            help="sampled: random draws, smallest, forward KL only. top_k: the likeliest tokens and the mass of the "
            "rest. dense: all tokens, for small vocabularies. hidden: last hidden states and the head, lossless."
        ),
    ] = "sampled",
    draws: Annotated[int | None, typer.Option(help="draws per position, for sampled; default 50")] = None,
    top_k: Annotated[int | None, typer.Option(help="tokens per position, for top_k; default 64")] = None,
    temperature: Annotated[
        float | None, typer.Option(help="for sampled and top_k, as in training; default: the recipe's, or 1")
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option(help="also store hidden states of these layers: 1,3,-1, and of embeddings and last_hidden_state"),
    ] = None,
    attention_layers: Annotated[
        str | None, typer.Option(help="also store attention maps of these layers: 1,-1")
    ] = None,
    field: Annotated[str | None, typer.Option(help="column of plain text, with --data")] = None,
    max_length: Annotated[int, typer.Option(help="most tokens in a row, with --data")] = 512,
    packing: Annotated[bool, typer.Option("--packing", help="join plain text into full rows, with --data")] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="rows in a batch of the teacher")] = 8,
    dtype: Annotated[str, typer.Option(help="precision of the teacher, with --teacher")] = "auto",
    device: Annotated[str | None, typer.Option(help="device of the teacher, with --teacher")] = None,
    shard: Annotated[str, typer.Option(metavar="I/N", help="build part I of N (from 0), for any scheduler")] = "0/1",
    stream: Annotated[
        bool,
        typer.Option("--stream", help="run the teacher one layer at a time over all rows: it need not fit into memory"),
    ] = False,
    engine: Engine = "process",
    set_: Sets = None,
    import_: Imports = None,
) -> None:
    """Run a teacher over data and store its signals. An interrupted build continues; a finished cache is kept."""
    from potstill.data.sources import Source, in_parts
    from potstill.models.layer_map import STATES
    from potstill.runs.cache import CacheRequest
    from potstill.runs.cache import build as build_cache
    from potstill.runs.config.run import Recipe
    from potstill.teachers.model import ModelSource

    options = CODEC_OPTIONS[codec]
    given = {"draws": draws, "top_k": top_k, "temperature": temperature}
    wrong = [name for name, value in given.items() if value is not None and name not in options]
    if wrong:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in wrong)
        raise UserError(f"cache build: expected no {flags} with --codec {codec}, got it. Leave it out.")
    tokenizer, settings = None, dict[str, Any]()
    if recipe is not None:
        if teacher is not None or data:
            raise UserError("cache build: expected a recipe, or --teacher with --data, got both.")
        loaded = Recipe.load(recipe, set_ or ())
        if loaded.student.vocabulary is not None:
            raise UserError(
                "cache build: expected a recipe without student.vocabulary, got one. A cache holds the teacher's own "
                "tokens: leave student.vocabulary out, or train with the live teacher."
            )
        config, sources, tokenizer = (
            loaded.teacher,
            [*in_parts(loaded.data.train), loaded.data.eval],
            loaded.student.model,
        )
        max_length, packing = loaded.data.max_length, loaded.data.packing
        settings = {name: getattr(loaded.data, name) for name in ("chat_template", "chat_template_kwargs")}
        if out is None and config.cache_path is not None:
            out = Path(config.cache_path)
        if temperature is None and "temperature" in options:
            given["temperature"] = _temperature(loaded)
    elif teacher is not None and data:
        config = ModelSource(teacher, cast(Any, dtype), device)
        sources = [Source(str(path), field) for path in data]
    else:
        raise UserError("cache build: expected a recipe, or --teacher and --data, got neither.")
    if out is None:
        raise UserError("cache build: expected --out DIR, or teacher.cache in the recipe, got neither.")
    if codec == "top_k" and top_k is None:
        given["top_k"] = config.max_top_k
    parameters = {"k" if name == "top_k" else name: value for name, value in given.items() if value is not None}
    settings["layers"] = _layers("--layers", layers, STATES)
    settings["attentions"] = _layers("--attention-layers", attention_layers)
    request = CacheRequest(
        config, sources, max_length, packing, codec, parameters, out, batch_size, tokenizer, stream=stream, **settings
    )
    manifest = build_cache(request, part=_part(shard), engine=engine, console=console)
    if manifest is None:
        console.print(f"part {shard} of {out} is built; other parts are still missing", highlight=False)
    else:
        print_facts(_lines(out))


@cache.command()
def info(directory: Directory, json_: Annotated[bool, typer.Option("--json", help="print JSON")] = False) -> None:
    """Print what a cache holds."""
    if json_:
        print(json.dumps(_facts(directory), indent=2))
    else:
        print_facts(_lines(directory))


@cache.command()
def verify(directory: Directory) -> None:
    """Read every byte of a cache and compare it with its checksums."""
    from potstill.teachers.cache.store import Cache

    manifest = Cache(directory).manifest
    print(f"{directory}: {len(manifest.shards)} shards, {manifest.tokens:,} tokens, as they were written")


def _facts(directory: Path) -> dict[str, Any]:
    from potstill.teachers.cache.store import Cache

    manifest = Cache(directory, verify=False).manifest
    plan, shown = manifest.plan, ("codec", "sources", "shard_rows", "batch_rows", "layers")
    size = sum(path.stat().st_size for path in (directory / "shards").iterdir())
    return {
        "codec": plan.codec["name"],
        "parameters": {name: value for name, value in plan.codec.items() if name not in ("name", "vocabulary")},
        "tokens": manifest.tokens,
        "rows": manifest.rows,
        "bytes": size,
        "bytes_per_token": size / max(manifest.tokens, 1),
        "layers": None if plan.layers is None else asdict(plan.layers),
        "shards": len(manifest.shards),
        "sources": [{"path": path, "rows": rows, "tokens": tokens} for path, rows, tokens, _ in plan.sources],
        **{name: value for name, value in asdict(plan).items() if name not in shown},
    }


def _lines(directory: Path) -> Iterator[tuple[str, str]]:
    from potstill.evaluate import formatting

    facts = _facts(directory)
    parameters = ", ".join(f"{name} {value}" for name, value in facts["parameters"].items())
    yield "cache", str(directory)
    yield "codec", facts["codec"] + (f" ({parameters})" if parameters else "")
    yield "tokens", f"{facts['tokens']:,} target tokens in {facts['rows']:,} rows and {facts['shards']} shards"
    yield "size", f"{formatting.size(facts['bytes'])}, {facts['bytes_per_token']:.1f} bytes a token"
    layers = facts["layers"] or {}
    for kind, name in (("hidden states", "kept"), ("attention maps", "attentions")):
        if layers.get(name):
            stored = ", ".join(map(str, layers[name]))
            yield "layers", f"{stored} of {layers['depth']}: {kind} in {layers['dtype']}"
    yield "teacher", facts["teacher"]
    yield "vocabulary", f"{facts['vocabulary']:,} tokens"
    for source in facts["sources"]:
        yield "data", f"{source['path']}: {source['tokens']:,} tokens"


def _temperature(recipe: Any) -> float | None:
    """Find the temperature of the recipe's first logits term, unless it is a schedule."""
    temperatures = [term.temperature for term in recipe.objective if term.name == "logits"]
    return temperatures[0] if temperatures and isinstance(temperatures[0], float) else None


def _layers(option: str, text: str | None, names: Sequence[str] = ()) -> list[Any]:
    try:
        return [layer if layer in names else int(layer) for layer in text.split(",")] if text else []
    except ValueError:
        examples = ",".join(["1,3,-1", *names])
        raise UserError(f"{option}: expected layers from 0, such as {examples}, got {text}.") from None


def _part(text: str) -> tuple[int, int]:
    index, _, count = text.partition("/")
    if not (index.isdigit() and count.isdigit() and int(index) < int(count)):
        raise UserError(f"--shard: expected I/N with 0 <= I < N, such as 0/4, got {text}.")
    return int(index), int(count)
