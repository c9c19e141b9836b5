"""The command `potstill sweep`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from potstill.cli.app import Engine, Imports, RecipePath, Sets, app, comparison_table, console
from potstill.errors import RunError, UserError
from potstill.runs.terminal import Terminal


@app.command()
def sweep(
    recipe: RecipePath,
    more: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE,VALUE]...", show_default=False)] = None,
    vary: Annotated[list[str] | None, typer.Option(metavar="KEY=VALUE,VALUE", help="keys and their values")] = None,
    out: Annotated[Path | None, typer.Option(help="sweep directory; default: the recipe's output-sweep")] = None,
    max_parameters: Annotated[str | None, typer.Option(help="of the recommended student, such as 100M")] = None,
    max_megabytes: Annotated[float | None, typer.Option(help="of its weights on disk")] = None,
    max_memory_gb: Annotated[float | None, typer.Option(help="to serve one row: weights and cache")] = None,
    max_latency_ms: Annotated[float | None, typer.Option(help="of its forward pass over one row")] = None,
    min_quality: Annotated[float | None, typer.Option(help="share of the teacher's, such as 0.8", min=0)] = None,
    engine: Engine = "process",
    set_: Sets = None,
    import_: Imports = None,
    resume: Annotated[bool, typer.Option("--resume", help="keep finished runs and continue interrupted ones")] = False,
) -> None:
    """Run a recipe for each combination of values; print a table and a Pareto front, and recommend a student.

    For example: potstill sweep recipe.yaml --vary student.design.compression=2,4,8 objective.0.temperature=1,2
    """
    from potstill.runs.config.document import apply, read

    values = apply(read(recipe), set_ or (), str(recipe))
    if values.get("kind") is not None:
        raise UserError(
            f"sweep: expected a distillation recipe, got kind {values['kind']} in {recipe}. Run each with potstill run."
        )
    if out is None and not values.get("output"):
        raise UserError("sweep: expected --out DIR, or output in the recipe, got neither.")
    if import_ and engine == "ray":
        raise UserError("sweep: expected no --import with --engine ray, got it. Ray does not import the file.")
    from potstill.evaluate.tradeoff import Limits
    from potstill.models.budget import parse_count
    from potstill.runs.sweep import read_axes
    from potstill.runs.sweep import sweep as sweep_recipe

    most = None if max_parameters is None else parse_count(max_parameters)
    max_bytes = None if max_megabytes is None else round(max_megabytes * 1e6)
    max_memory = None if max_memory_gb is None else round(max_memory_gb * 1e9)
    limits = Limits(most, max_bytes, max_latency_ms, min_quality, max_memory)
    directory = out or Path(f"{values['output']}-sweep")
    axes = read_axes([*(vary or ()), *(more or ())])
    options: dict[str, Any] = {"limits": limits, "resume": resume, "engine": engine, "origin": str(recipe)}
    try:
        sweep_recipe(values, axes, directory, **options, console=console)
    except RunError:  # some runs failed; the others have results
        _show_results(directory)
        raise
    _show_results(directory)


def _show_results(directory: Path) -> None:
    from accelerate import PartialState

    from potstill.evaluate.report.sweep import read_sweep

    if PartialState().is_main_process:
        summary = read_sweep(directory)
        out = Terminal()
        out.print(_table(summary), highlight=False)
        if summary.get("files"):
            out.print(_file_table(summary), highlight=False)
        out.print(summary["recommended"]["why"], highlight=False, markup=False)
        out.print(f"report  {directory / 'sweep.html'}", highlight=False)


def _table(summary: dict[str, Any]) -> Table:
    from potstill.evaluate import formatting
    from potstill.evaluate.report.sweep import COSTS

    columns = ("loss", "quality", "params", "size", "latency", "speed-up", "fronts")
    table = comparison_table(columns, title=summary["name"], wraps=True)
    for place, row in enumerate(summary["runs"]):
        table.add_row(
            row["label"],
            formatting.nats(row["loss"]),
            formatting.percent(row["quality"], 1),
            formatting.count(row["parameters"]),
            formatting.size(row["bytes"]),
            formatting.milliseconds(row["latency_ms"]),
            "" if row.get("speed_up") is None else f"{formatting.times(row['speed_up'])}x",
            " ".join(COSTS[cost][0] for cost, places in summary["fronts"].items() if place in places),
            style="bold" if place == summary["recommended"]["place"] else None,
        )
    table.caption = "fronts: " + ", ".join(f"{name[0]} {name}" for name in COSTS.values())
    return table


def _file_table(summary: dict[str, Any]) -> Table:
    from potstill.evaluate import formatting
    from potstill.evaluate.report.sweep import FILE_COSTS

    table = comparison_table(("quality", "size", "tokens a second", "fronts"), title="exported files", wraps=True)
    for place, file in enumerate(summary["files"]):
        table.add_row(
            f"{summary['runs'][file['run']]['label']}: {file['file']}",
            formatting.percent(file["quality"], 1),
            formatting.size(file["bytes"]),
            formatting.count(1000 / file["ms_per_token"]),
            " ".join(FILE_COSTS[cost][0] for cost, places in summary["file_fronts"].items() if place in places),
        )
    table.caption = "fronts: " + ", ".join(f"{name[0]} {name}" for name in FILE_COSTS.values())
    return table
