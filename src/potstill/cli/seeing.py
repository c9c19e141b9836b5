"""The commands that look at many runs, or closely at one: sweep, diagnose."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from potstill.cli.app import RecipePath, Sets, app, console
from potstill.cli.embedding import kind_of
from potstill.errors import RunError, UserError


@app.command()
def sweep(
    recipe: RecipePath,
    more: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE,VALUE]...", show_default=False)] = None,
    vary: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE,VALUE", help="a key and its values, several with spaces between them"),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="the sweep's directory; default: the recipe's output-sweep")] = None,
    max_parameters: Annotated[str | None, typer.Option(help="of the student to recommend, such as 100M")] = None,
    max_megabytes: Annotated[float | None, typer.Option(help="its weights on disk")] = None,
    max_latency_ms: Annotated[float | None, typer.Option(help="one row, one forward pass")] = None,
    min_quality: Annotated[float | None, typer.Option(help="share of the teacher's, such as 0.8", min=0)] = None,
    engine: Annotated[
        Literal["process", "ray"], typer.Option(help="this process, or a process of Ray's for each run")
    ] = "process",
    set_: Sets = None,
    resume: Annotated[bool, typer.Option("--resume", help="finished runs stay, a stopped one goes on")] = False,
) -> None:
    """Run a recipe once for each combination of values: a table, a Pareto front, and the student to take.

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
    from potstill.evaluate.tradeoff import Limits
    from potstill.models.budget import parse_count
    from potstill.runs.sweep import read_axes
    from potstill.runs.sweep import sweep as sweep_recipe

    limits = Limits(
        max_parameters=None if max_parameters is None else parse_count(max_parameters),
        max_bytes=None if max_megabytes is None else round(max_megabytes * 1e6),
        max_latency_ms=max_latency_ms,
        min_quality=min_quality,
    )
    directory = out or Path(f"{values['output']}-sweep")
    axes = read_axes([*(vary or ()), *(more or ())])
    try:
        result = sweep_recipe(
            values, axes, directory, limits=limits, resume=resume, engine=engine, origin=str(recipe), console=console
        )
    except RunError:
        _show(directory)
        raise
    _show(result.directory)


@app.command()
def diagnose(
    target: Annotated[Path, typer.Argument(help="a run directory, or a recipe before it runs", show_default=False)],
    rows: Annotated[int, typer.Option(help="held-out rows that are looked at", min=1)] = 64,
    out: Annotated[
        Path | None, typer.Option(help="a recipe's: the folder to write to; default: the recipe's output-diagnosis")
    ] = None,
    set_: Sets = None,
) -> None:
    """Say why a run went as it did, or what speaks against a recipe: temperature, gradients, distributions, labels."""
    from potstill.runs.config.run import Recipe

    run = target if target.is_dir() else None
    if run is not None and (set_ or out):
        raise UserError(
            "diagnose: expected neither --set nor --out with a run directory, got one. It is looked at as it is."
        )
    path = target / "recipe.yaml" if run is not None else target
    if kind_of(path) != "distillation":
        raise UserError(f"diagnose: expected a distillation recipe, got kind {kind_of(path)} in {path}.")
    recipe = Recipe.load(path, set_ or ())
    from potstill.evaluate.report.diagnosis import write_diagnosis_page
    from potstill.evaluate.report.page import write_report
    from potstill.runs.diagnose import diagnose as look_closely
    from potstill.runs.diagnose import write_diagnosis

    found = look_closely(recipe, run=run, rows=rows)
    folder = run or out or Path(f"{recipe.output}-diagnosis")
    write_diagnosis(found, folder / "diagnose.json")
    finished = run is not None and (run / "summary.json").exists()
    page = write_report(folder) if finished else write_diagnosis_page(folder)
    _tell(found, page)


def _tell(found: dict[str, Any], page: Path) -> None:
    """The teacher at each temperature, all findings, the last word, and where the pictures are."""
    from potstill.evaluate import formatting as words

    out = Console()
    if found["temperature"] is not None:
        rows = found["temperature"]["rows"]
        table = Table(title="the teacher", title_justify="left", box=box.SIMPLE_HEAD)
        for column in ("temperature", "entropy, nats", "effective support", *(f"top {k}" for k in rows[0]["mass"])):
            table.add_column(column, justify="right", no_wrap=True)
        for row in rows:
            mass = [words.percent(share, 1) for share in row["mass"].values()]
            cells = [f"{row['temperature']:g}", words.nats(row["entropy"]), f"{row['support']:,.1f}", *mass]
            chosen = row["temperature"] == found["temperature"]["recommended"]
            table.add_row(*cells, style="bold" if chosen else None)
        out.print(table, highlight=False)
    styles = {"alarm": "red", "warning": "yellow", "note": "dim"}
    for finding in found["findings"]:
        out.print(finding["text"], style=styles[finding["level"]], highlight=False, markup=False)
    out.print(found["conclusion"], style="bold", highlight=False, markup=False)
    out.print(f"report  {page}", highlight=False)


def _show(directory: Path) -> None:
    """The table, the student to take, and where everything is."""
    from accelerate import PartialState

    from potstill.evaluate.report.sweep import read_sweep

    if PartialState().is_main_process:
        summary = read_sweep(directory)
        table = _table(summary)
        out = Console()
        out.print(table, highlight=False)
        out.print(summary["recommended"]["why"], highlight=False, markup=False)
        out.print(f"report  {directory / 'sweep.html'}", highlight=False)


def _table(summary: dict[str, Any]) -> Table:
    from potstill.evaluate import formatting as words
    from potstill.evaluate.report.sweep import COSTS

    table = Table(title=summary["name"], title_justify="left", box=box.SIMPLE_HEAD)
    for column in ("", "loss", "quality", "parameters", "size", "latency", "on a front"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for place, row in enumerate(summary["runs"]):
        fronts = ", ".join(COSTS[key] for key, places in summary["fronts"].items() if place in places)
        chosen = place == summary["recommended"]["place"]
        table.add_row(
            row["label"],
            words.nats(row["loss"]),
            words.percent(row["quality"], 1),
            words.count(row["parameters"]),
            words.size(row["bytes"]),
            words.milliseconds(row["latency_ms"]),
            fronts,
            style="bold" if chosen else None,
        )
    return table
