"""The command `potstill design`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer
from rich.table import Table

from potstill.cli.app import app, comparison_table, console, show
from potstill.errors import UserError
from potstill.runs.terminal import Terminal

if TYPE_CHECKING:
    from potstill.models.capacity import TaskKind

CONTEXT = 2048  # default number of tokens in a row
SHAPE = {  # rows of the table: fields of `DesignShape`
    "layers": "layers",
    "width": "hidden",
    "heads": "heads",
    "key and value heads": "kv_heads",
    "width of a head": "head_size",
    "feed-forward width": "ffn",
}


@app.command()
def design(
    teacher: Annotated[str | None, typer.Option(help="folder with a config.json; weights are not needed")] = None,
    params: Annotated[str | None, typer.Option(help="number of parameters, with all experts: 100M, 1.5B")] = None,
    active_params: Annotated[str | None, typer.Option(help="at most so many that a token passes through")] = None,
    compression: Annotated[float | None, typer.Option(help="how many times smaller than the teacher")] = None,
    memory_gb: Annotated[float | None, typer.Option(help="to serve one row of --context in half precision")] = None,
    latency_ms: Annotated[float | None, typer.Option(help="forward pass over a row of --context, timed here")] = None,
    target: Annotated[str | None, typer.Option(help="kind of device: browser, edge, mobile, server")] = None,
    min_share: Annotated[float | None, typer.Option(help="of the teacher's score, by published results: 0.9")] = None,
    task: Annotated[str, typer.Option(help="kind of task: general, classification, generation, ...")] = "general",
    keep: Annotated[
        str | None, typer.Option(help="depth, width, attention or balanced; default: attention where it can be kept")
    ] = None,
    context: Annotated[int | None, typer.Option(help="tokens in a row; default: at most 2048", min=1)] = None,
    vocabulary: Annotated[
        str | None, typer.Option(help="tokens to keep: data (those of --data), a number, or auto")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="text of the use, for --vocabulary and --search")] = None,
    search: Annotated[int | None, typer.Option(help="prune the teacher to so many shapes, and compare", min=2)] = None,
    out: Annotated[Path | None, typer.Option(help="folder to write config.json to")] = None,
    list_: Annotated[bool, typer.Option("--list", help="list published small models instead")] = False,
) -> None:
    """Design a student of the teacher's family within all given limits, and print its cost and a recipe to begin with.

    Nothing is trained and no weights are read; --latency-ms builds and times models with random weights. With
    --vocabulary and no limit, it is the teacher with fewer tokens. With --search, shapes of the same size
    are pruned from the teacher and measured on --data, and the best trained for a few steps; with --vocabulary auto
    students with fewer and fewer tokens are. Files of both go to --out.
    """
    from potstill.evaluate.speed import forward_seconds
    from potstill.models.budget import Budget, parse_count
    from potstill.models.design import Keep, student_config
    from potstill.models.loading import load_config, suppress_warnings
    from potstill.models.shapes import position_limit, text_config

    with suppress_warnings():
        if list_:
            return _list(context or CONTEXT)
        if teacher is None:
            raise UserError("design: expected --teacher DIR, got none. The student is of the teacher's family.")
        if keep is not None and keep not in get_args(Keep):
            raise UserError(f"--keep: expected {', '.join(get_args(Keep))}, got {keep}.")
        config = load_config(teacher, "--teacher")
        positions = position_limit(config) or context or CONTEXT
        tokens = context or min(CONTEXT, positions)
        if tokens > positions:
            raise UserError(
                f"--context: expected at most {positions}, the teacher's number of positions, got {tokens}."
            )
        counts = {"params": params, "active_params": active_params}
        limits: dict[str, Any] = {n: None if count is None else parse_count(count) for n, count in counts.items()}
        limits |= {
            "compression": compression,
            "memory_gb": memory_gb,
            "latency_ms": latency_ms,
            "target": target,
            "min_share": min_share,
        }
        part = _vocabulary_part(vocabulary, data, search)
        if search is not None or vocabulary == "auto":
            assert data is not None, "it is checked"
            return _search(teacher, search, data, limits | {"keep": keep, "context": tokens}, part, out)
        size = None if part is None else _count_kept(teacher, part)
        if size is not None and not any(limit is not None for limit in limits.values()):
            student = student_config(config, {}, size)
        else:
            budget = Budget(**limits, task=task, keep=keep, context=tokens)  # type: ignore[arg-type]
            student = budget.student(config, vocabulary=size, seconds=forward_seconds)
        _compare(text_config(config), student, tokens, target, task)  # type: ignore[arg-type]  # it is a known task
        if part is not None:
            _print_student(text_config(config), student, teacher, part)
    if out is not None:
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--out: expected a writable folder, got {out}: {error.strerror}.") from None
        student.save_pretrained(out)
        console.print(f"config  {out / 'config.json'}", highlight=False)
    return None


def _search(
    teacher: str,
    number: int | None,
    data: Path,
    limits: dict[str, Any],
    vocabulary: dict[str, Any] | None,
    out: Path | None,
) -> None:
    """Search tokens and shape within a budget, and print what was compared and the recipe's `student` of the best."""
    import yaml

    from potstill.runs.config.run import Recipe
    from potstill.runs.init.draft import DraftRequest, draft
    from potstill.runs.run import settle_student

    budget = {name: limit for name, limit in limits.items() if limit is not None}
    if not budget.keys() - {"keep", "context"}:
        raise UserError("design: expected a limit such as --params 80M with --search and --vocabulary auto, got none.")
    directory = out or Path("runs") / f"{Path(teacher).name}-search"
    request = DraftRequest(teacher, data, data, budget=budget, name=directory.name, output=str(directory))
    values = yaml.safe_load(draft(request))
    values["student"] = {"design": budget | {"search": number}, "initialize": "prune", "vocabulary": vocabulary}
    found, notes = settle_student(Recipe.parse(values, "design"), directory, console, resume=True)
    if number is None:
        show(*notes)
    else:
        _print_search(directory)
    student = found.student.model_dump(mode="json", include={"design", "vocabulary"}, exclude_none=True)
    show("In a recipe:")
    show(_dump_student({"design": student["design"], "initialize": "prune"}, student.get("vocabulary")))
    if number is not None:
        show(f"report  {directory / 'search.html'}")


def _print_search(directory: Path) -> None:
    from potstill.evaluate import formatting
    from potstill.evaluate.report.search import read_search

    record = read_search(directory)
    steps = sorted({step for row in record["shapes"] for step, _ in row["losses"]})
    losses = [f"{step} steps" if step else "pruned" for step in steps]
    table = comparison_table(("layers", "width", "heads", "ffn", "params", *losses), title="loss by shape")
    for place, row in enumerate(record["shapes"]):
        heads, by_step = f"{row['heads']}/{row['kv_heads']}", dict(row["losses"])
        sizes = (str(row["layers"]), str(row["hidden"]), heads, str(row["ffn"]), formatting.count(row["parameters"]))
        cells = (formatting.nats(by_step[step]) if step in by_step else "" for step in steps)
        chosen = place == record["chosen"]
        table.add_row(f"{place + 1}{', chosen' if chosen else ''}", *sizes, *cells, style="bold" if chosen else None)
    show(table, f"Loss on {record['rows']} rows; number 1 is the shape of the fixed rule.")


def _dump_student(start: dict[str, Any], vocabulary: dict[str, Any] | None) -> str:
    import yaml

    student = start | ({"vocabulary": vocabulary} if vocabulary else {})
    return yaml.safe_dump({"student": student}, sort_keys=False, default_flow_style=None)


def _vocabulary_part(vocabulary: str | None, data: Path | None, search: int | None) -> dict[str, Any] | None:
    """Make a recipe's student.vocabulary of the options; None where all tokens are kept."""
    if data is None and (vocabulary, search) != (None, None):
        raise UserError("design: expected --data FILE with --vocabulary and --search, the text of the use, got none.")
    if data is not None and (vocabulary, search) == (None, None):
        raise UserError("design: expected --vocabulary or --search with --data, got neither. Leave --data out.")
    if vocabulary is None:
        return None
    named = vocabulary in ("data", "auto")
    if not named and not (vocabulary.isdecimal() and int(vocabulary)):
        raise UserError(f"--vocabulary: expected data, auto or a number of tokens such as 32000, got {vocabulary}.")
    return {"keep": vocabulary if named else int(vocabulary), "text": {"path": str(data)}}


def _count_kept(teacher: str, part: dict[str, Any]) -> int:
    """Count the tokens that a student keeps, with the teacher's tokenizer."""
    from potstill.data.sources import Source
    from potstill.models.loading import load_tokenizer
    from potstill.runs.vocabulary import tokens_of, whole_text

    tokenizer = load_tokenizer(teacher, "--teacher")
    text, options = whole_text(Source(**part["text"]))
    kept = tokens_of(text, tokenizer, part["keep"], "--vocabulary", **options)
    return len(kept)


def _print_student(teacher: Any, student: Any, path: str, vocabulary: dict[str, Any]) -> None:
    """Print the recipe's `student` of this design."""
    from potstill.models.shapes import config_fields, design_shape

    fields = config_fields(design_shape(student), teacher)
    smaller = any(value != getattr(teacher, name) for name, value in fields.items())
    start: dict[str, Any] = {"design": fields, "initialize": "prune"} if smaller else {"model": path}
    show("In a recipe; potstill check then tells what the tokens cost the teacher, in bits a byte:")
    show(_dump_student(start, vocabulary))


def _compare(teacher: Any, student: Any, context: int, target: str | None, task: TaskKind) -> None:
    """Print the shape and the cost of both models, the quality that published results suggest, and rules of thumb."""
    from potstill.evaluate import formatting
    from potstill.models.capacity import Capability, expected_share
    from potstill.models.compression import plan_compression
    from potstill.models.shapes import design_shape
    from potstill.models.size import size_of

    configs = (teacher, student)
    shapes, sizes = [design_shape(config) for config in configs], [size_of(config, context) for config in configs]
    table = comparison_table(("teacher", "student"), title=f"a student of {teacher.model_type}")
    for name, field in SHAPE.items():
        if getattr(shapes[0], field):
            table.add_row(name, *(f"{getattr(shape, field):,}" for shape in shapes))
    table.add_row("vocabulary", *(f"{config.vocab_size:,}" for config in configs))
    table.add_row("parameters", *(f"{size.parameters:,}" for size in sizes))
    if any(size.active_parameters < size.parameters for size in sizes):
        table.add_row("active for a token", *(f"{size.active_parameters:,}" for size in sizes))
    table.add_row("of embeddings and head", *(f"{size.token_parameters:,}" for size in sizes))
    table.add_row("FLOPs a token, forward", *(formatting.count(size.flops_per_token) for size in sizes))
    table.add_row("KV cache a token", *(formatting.size(size.kv_cache_bytes_per_token) for size in sizes))
    table.add_row(f"memory to serve {context:,} tokens", *(formatting.size(size.serve_bytes) for size in sizes))
    table.add_row("memory to train, without activations", *(formatting.size(size.train_bytes) for size in sizes))
    ratio = sizes[0].parameters / sizes[1].parameters
    show(table, f"{ratio:.2f} times smaller. Estimated share of the teacher's score, by published results:")
    for task in get_args(Capability):
        share = expected_share(ratio, task)
        caveat = ", beyond published sizes" if share.extrapolated else ""
        show(f"  {task}: {share.value:.0%}, from {share.low:.0%} to {share.high:.0%}{caveat}")
        Terminal().print(f"    {share.source}", style="dim", soft_wrap=True)
    plan = plan_compression(sizes[0].parameters, sizes[1].parameters, target=target, task=task)
    show(f"Rules of thumb for {task} tasks, to begin with:")
    show(f"  objective: {plan.method}, temperature {plan.temperature:g}")
    show(f"  data: {'; '.join(plan.data)}")
    show(f"  serve in {plan.precision}; measure alternatives with potstill sweep")


def _list(context: int) -> None:
    """Print published small models and their sizes."""
    from potstill.evaluate import formatting
    from potstill.models.references import REFERENCES
    from potstill.models.shapes import design_shape
    from potstill.models.size import size_of

    table = Table(box=None, padding=(0, 1, 0, 0))
    for column in ("", "params", "layers", "width", "heads", "ffn", "cache", "from"):
        table.add_column(column, justify="left" if column in ("", "from") else "right", no_wrap=True)
    for reference in REFERENCES:
        config = reference.config()
        shape, size = design_shape(config), size_of(config, context)
        heads = f"{shape.heads}/{shape.kv_heads}" if shape.kv_heads != shape.heads else str(shape.heads)
        sizes = (formatting.count(size.parameters), str(shape.layers), str(shape.hidden), heads, str(shape.ffn))
        cache = formatting.size(size.kv_cache_bytes_per_token) if size.kv_cache_bytes_per_token else "none"
        table.add_row(reference.name, *sizes, cache, reference.origin)
    show(table, "heads: of queries / of keys and values; cache: keys and values of a token")
