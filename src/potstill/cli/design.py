"""The command that shapes a student: design."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, get_args

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from potstill.cli.app import app, console
from potstill.errors import UserError

CONTEXT = 2048  # tokens in a row, where nothing else is said


@app.command()
def design(
    teacher: Annotated[str | None, typer.Option(help="a folder with a config.json; no weights are needed")] = None,
    params: Annotated[str | None, typer.Option(help="how many parameters: 100M, 1.5B")] = None,
    compression: Annotated[float | None, typer.Option(help="how many times fewer parameters than the teacher")] = None,
    memory_gb: Annotated[float | None, typer.Option(help="to serve one row of --context in half precision")] = None,
    latency_ms: Annotated[
        float | None, typer.Option(help="one forward pass over a row of --context, timed on this machine")
    ] = None,
    target: Annotated[str | None, typer.Option(help="a kind of device: browser, edge, mobile, server")] = None,
    keep: Annotated[str, typer.Option(help="what stays as in the teacher: depth, width, or balanced")] = "balanced",
    context: Annotated[
        int | None,
        typer.Option(help="tokens in a row, for memory, latency and FLOPs; by default 2048, or what it can", min=1),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="the folder that config.json is written to")] = None,
    list_: Annotated[bool, typer.Option("--list", help="show published small models instead")] = False,
) -> None:
    """Find a student's shape within a budget, in the teacher's own family, and say what it costs.

    Nothing is trained, and no weights are read; with --latency-ms models with random weights are built and timed.
    """
    from transformers import PretrainedConfig

    from potstill.evaluate.speed import latency_ms as timed
    from potstill.models.budget import Budget, parse_count
    from potstill.models.design import Keep
    from potstill.models.loading import load_config, suppress_warnings
    from potstill.models.size import build, size_of

    with suppress_warnings():
        if list_:
            return _list(context or CONTEXT)
        if teacher is None:
            raise UserError("design: expected --teacher DIR, got none. A student is of its teacher's family.")
        if keep not in get_args(Keep):
            raise UserError(f"--keep: expected {', '.join(get_args(Keep))}, got {keep}.")
        of = load_config(teacher, "--teacher")
        most = getattr(of, "max_position_embeddings", None) or context or CONTEXT
        tokens = context or min(CONTEXT, most)
        if tokens > most:
            raise UserError(f"--context: expected at most {most}, the teacher's number of positions, got {tokens}.")

        def seconds(config: PretrainedConfig) -> float:
            return timed(build(config), tokens, repeats=3) / 1000

        count = None if params is None else parse_count(params)
        budget = Budget(count, compression, memory_gb, latency_ms, target, keep, tokens)  # type: ignore[arg-type]
        student = budget.student(of, seconds=seconds)
        _compare(of, student, size_of(of, tokens), size_of(student, tokens))
    if out is not None:
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--out: expected a folder to write to, got {out}: {error.strerror}.") from None
        student.save_pretrained(out)
        console.print(f"config  {out / 'config.json'}", highlight=False)
    return None


def _compare(teacher: Any, student: Any, teachers: Any, students: Any) -> None:
    """Both shapes, both costs, and what may be kept."""
    from potstill.evaluate import formatting as words
    from potstill.models.capacity import Capability, expected_share
    from potstill.models.structure import design_shape

    table = Table(title=f"a student of {teacher.model_type}", title_justify="left", box=box.SIMPLE_HEAD)
    for column in ("", "teacher", "student"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    shapes = [design_shape(config) for config in (teacher, student)]
    for name, field in (
        ("layers", "layers"),
        ("width", "hidden"),
        ("heads", "heads"),
        ("key and value heads", "kv_heads"),
        ("width of a head", "head_size"),
        ("feed-forward width", "ffn"),
    ):
        table.add_row(name, *(f"{getattr(shape, field):,}" for shape in shapes))
    table.add_row("vocabulary", *(f"{config.vocab_size:,}" for config in (teacher, student)))
    both = (teachers, students)
    table.add_row("parameters", *(f"{size.parameters:,}" for size in both))
    table.add_row("FLOPs a token, forward", *(words.count(size.flops_per_token) for size in both))
    table.add_row("cache a token", *(words.size(size.kv_cache_bytes_per_token) for size in both))
    table.add_row(f"memory to serve {students.context:,} tokens", *(words.size(size.serve_bytes) for size in both))
    table.add_row("memory to train, without activations", *(words.size(size.train_bytes) for size in both))
    out = Console()
    out.print(table, highlight=False)
    ratio = teachers.parameters / students.parameters
    out.print(
        f"{ratio:.2f} times smaller. Estimated share of the teacher's score, by published results:", highlight=False
    )
    for task in get_args(Capability):
        share = expected_share(ratio, task)
        beyond = ", beyond what is published" if share.extrapolated else ""
        out.print(f"  {task}: {share.value:.0%}, from {share.low:.0%} to {share.high:.0%}{beyond}", highlight=False)
        out.print(f"    [dim]{share.source}[/]", highlight=False, soft_wrap=True)


def _list(context: int) -> None:
    """The published small models, with what they take."""
    from potstill.evaluate import formatting as words
    from potstill.models.references import REFERENCES
    from potstill.models.size import size_of
    from potstill.models.structure import design_shape

    table = Table(box=box.SIMPLE_HEAD)
    for column in ("", "family", "parameters", "layers", "width", "heads", "ffn", "cache a token", "made"):
        words_of_it = column in ("", "family", "made")
        table.add_column(column, justify="left" if words_of_it else "right", no_wrap=column in ("", "parameters"))
    for reference in REFERENCES:
        config = reference.config()
        shape, size = design_shape(config), size_of(config, context)
        heads = f"{shape.heads}/{shape.kv_heads}" if shape.kv_heads != shape.heads else str(shape.heads)
        sizes = (f"{size.parameters:,}", str(shape.layers), str(shape.hidden), heads, str(shape.ffn))
        cache = words.size(size.kv_cache_bytes_per_token)
        table.add_row(reference.name, reference.family, *sizes, cache, reference.origin)
    Console().print(table, highlight=False)
