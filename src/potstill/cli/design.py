"""The command `potstill design`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer
from rich.console import Console
from rich.table import Table

from potstill.cli.app import app, comparison_table, console, show
from potstill.errors import UserError

if TYPE_CHECKING:
    from potstill.models.budget import Budget

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
    params: Annotated[str | None, typer.Option(help="number of parameters: 100M, 1.5B")] = None,
    compression: Annotated[float | None, typer.Option(help="how many times smaller than the teacher")] = None,
    memory_gb: Annotated[float | None, typer.Option(help="to serve one row of --context in half precision")] = None,
    latency_ms: Annotated[float | None, typer.Option(help="forward pass over a row of --context, timed here")] = None,
    target: Annotated[str | None, typer.Option(help="kind of device: browser, edge, mobile, server")] = None,
    min_share: Annotated[float | None, typer.Option(help="of the teacher's score, by published results: 0.9")] = None,
    task: Annotated[str, typer.Option(help="kind of task: general, classification, generation, ...")] = "general",
    keep: Annotated[str, typer.Option(help="what to keep from the teacher: depth, width or balanced")] = "balanced",
    context: Annotated[int | None, typer.Option(help="tokens in a row; default: at most 2048", min=1)] = None,
    out: Annotated[Path | None, typer.Option(help="folder to write config.json to")] = None,
    list_: Annotated[bool, typer.Option("--list", help="list published small models instead")] = False,
) -> None:
    """Design a student of the teacher's family within all given limits, and print its cost and a recipe to begin with.

    Nothing is trained and no weights are read; --latency-ms builds and times models with random weights.
    """
    from potstill.evaluate.speed import latency_ms as measure_latency
    from potstill.models.budget import Budget, parse_count
    from potstill.models.design import Keep
    from potstill.models.loading import load_config, suppress_warnings
    from potstill.models.shapes import position_limit, text_config
    from potstill.models.size import build

    def seconds(config: Any) -> float:
        return measure_latency(build(config), tokens, repeats=3) / 1000

    with suppress_warnings():
        if list_:
            return _list(context or CONTEXT)
        if teacher is None:
            raise UserError("design: expected --teacher DIR, got none. The student is of the teacher's family.")
        if keep not in get_args(Keep):
            raise UserError(f"--keep: expected {', '.join(get_args(Keep))}, got {keep}.")
        config = load_config(teacher, "--teacher")
        positions = position_limit(config) or context or CONTEXT
        tokens = context or min(CONTEXT, positions)
        if tokens > positions:
            raise UserError(
                f"--context: expected at most {positions}, the teacher's number of positions, got {tokens}."
            )
        limits: dict[str, Any] = {"params": None if params is None else parse_count(params), "compression": compression}
        limits |= {"memory_gb": memory_gb, "latency_ms": latency_ms, "target": target, "min_share": min_share}
        budget = Budget(**limits, task=task, keep=keep, context=tokens)  # type: ignore[arg-type]
        student = budget.student(config, seconds=seconds)
        _compare(text_config(config), student, budget)
    if out is not None:
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--out: expected a writable folder, got {out}: {error.strerror}.") from None
        student.save_pretrained(out)
        console.print(f"config  {out / 'config.json'}", highlight=False)
    return None


def _compare(teacher: Any, student: Any, budget: Budget) -> None:
    """Print the shape and the cost of both models, the quality that published results suggest, and rules of thumb."""
    from potstill.evaluate import formatting
    from potstill.models.capacity import Capability, expected_share
    from potstill.models.compression import plan_compression
    from potstill.models.shapes import design_shape
    from potstill.models.size import size_of

    configs, context = (teacher, student), budget.context
    shapes, sizes = [design_shape(config) for config in configs], [size_of(config, context) for config in configs]
    table = comparison_table(("teacher", "student"), title=f"a student of {teacher.model_type}")
    for name, field in SHAPE.items():
        if getattr(shapes[0], field):
            table.add_row(name, *(f"{getattr(shape, field):,}" for shape in shapes))
    table.add_row("vocabulary", *(f"{config.vocab_size:,}" for config in configs))
    table.add_row("parameters", *(f"{size.parameters:,}" for size in sizes))
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
        Console().print(f"    [dim]{share.source}[/]", highlight=False, soft_wrap=True)
    plan = plan_compression(sizes[0].parameters, sizes[1].parameters, target=budget.target, task=budget.task)
    show(f"Rules of thumb for {budget.task} tasks, to begin with:")
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
