"""The commands for a run: run, demo, check, report, schema."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from potstill.cli.app import RecipePath, Sets, app, console
from potstill.cli.embedding import check_embedding, kind_of, run_embedding
from potstill.cli.generate import check_generate
from potstill.errors import UserError, nearest

KINDS = ("distillation", "embedding", "generate")


@app.command()
def run(
    recipe: RecipePath,
    set_: Sets = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on with a run that was stopped")] = False,
) -> None:
    """Distil as a recipe says. The student, its figures and report.html go to the recipe's output."""
    from potstill.runs.config.run import Recipe

    if kind_of(recipe) == "embedding":
        return run_embedding(recipe, set_ or (), resume)
    asked = Recipe.load(recipe, set_ or ())  # a mistake is told before seconds of imports
    from potstill.runs.run import run as run_recipe

    return _finish(run_recipe(asked, resume=resume, console=console))


@app.command()
def demo(
    out: Annotated[
        Path | None, typer.Option(help="the run directory; default: runs/demo, or runs/demo-fast", show_default=False)
    ] = None,
    fast: Annotated[bool, typer.Option("--fast", help="a first look in a minute: fewer steps, less text")] = False,
    set_: Sets = None,
) -> None:
    """Distil the teacher that comes with Potstill, offline, on the source of Python's standard library.

    A demo that was stopped goes on; one that is finished is measured again.
    """
    from potstill.demo import demo_recipe
    from potstill.runs.run import run as run_recipe

    out = out or Path("runs/demo-fast" if fast else "runs/demo")
    recipe = demo_recipe(out, set_ or (), fast=fast)
    console.print(
        "A 5.3M-parameter teacher and a student a sixth of its size: taught by it once, trained on labels once.\n"
        f"{recipe.name}\n[dim]The recipe: {out / 'recipe.yaml'}[/]",
        highlight=False,
    )
    _finish(run_recipe(recipe, resume=True, console=console))


@app.command()
def check(recipe: RecipePath, set_: Sets = None) -> None:
    """Say what a recipe of any kind will need, and whether its data and models fit. Nothing is trained or written."""
    kind = kind_of(recipe, KINDS)
    if kind == "embedding":
        return check_embedding(recipe, set_ or ())
    if kind == "generate":
        return check_generate(recipe, set_ or ())
    from potstill.evaluate import formatting as words
    from potstill.runs.check import check as check_recipe
    from potstill.runs.config.run import Recipe

    found = check_recipe(Recipe.load(recipe, set_ or ()))
    table = Table(show_header=False, box=None)
    student = f"{found.student_parameters:,} parameters"
    if found.trained_parameters < found.student_parameters:
        share = words.percent(found.trained_parameters / found.student_parameters, 2)
        student += f", {found.trained_parameters:,} of them trained ({share})"
    if found.teacher_parameters is not None:
        student += f", {found.teacher_parameters / found.student_parameters:.1f} times smaller"
        table.add_row("teacher", f"{found.teacher_parameters:,} parameters")
    table.add_row("student", student)
    if found.vocabulary:
        same = "the student's own: compared by bytes" if found.by_bytes else "the same for both"
        table.add_row("vocabulary", f"{found.vocabulary:,} tokens, {same}")
        table.add_row("train", f"{found.train_tokens:,} tokens that count, in {found.train_rows:,} rows")
        table.add_row("eval", f"{found.eval_tokens:,} tokens that count")
    else:
        table.add_row("train", f"{found.train_rows:,} rows")
        table.add_row("eval", f"{found.eval_tokens:,} rows")
    table.add_row("steps", f"{found.steps:,}")
    batch = f"{words.size(found.batch_bytes)} of it for one batch" if found.batch_measured else "without activations"
    table.add_row("memory", f"about {words.size(found.memory_bytes)}, {batch}")
    table.add_row("disk", f"about {words.size(found.disk_bytes)} of {words.size(found.disk_free_bytes)} free")
    table.add_row("time", f"about {words.duration(found.seconds)} of training on this machine")
    for note in found.notes:
        table.add_row("note", note)
    Console().print(table, highlight=False)
    if found.disk_bytes > found.disk_free_bytes:
        raise UserError(
            f"output: expected {words.size(found.disk_bytes)} of free disk, got {words.size(found.disk_free_bytes)}. "
            "Choose another directory with --set output=DIR."
        )
    return None


@app.command()
def report(directory: Annotated[Path, typer.Argument(help="a run directory", show_default=False)]) -> None:
    """Write report.html again from the records of a run, or sweep.html from those of a sweep."""
    from potstill.evaluate.report.page import write_report

    write = write_report
    if (directory / "sweep.json").exists():
        from potstill.evaluate.report.sweep import write_sweep_report as write
    elif kind_of(directory / "recipe.yaml") == "embedding":
        from potstill.evaluate.report.embedding import write_embedding_report as write
    console.print(f"report  {write(directory)}", highlight=False)


@app.command()
def schema(
    kind: Annotated[str, typer.Argument(help="of recipe: distillation, embedding, or generate")] = "distillation",
) -> None:
    """Print the JSON Schema of a kind of recipe, for editors and for reading."""
    from potstill.runs.config.document import Document
    from potstill.runs.config.embedding import EmbeddingRecipe
    from potstill.runs.config.generate import GenerateRecipe
    from potstill.runs.config.run import Recipe

    documents: dict[str, type[Document]] = {
        "distillation": Recipe,
        "embedding": EmbeddingRecipe,
        "generate": GenerateRecipe,
    }
    if kind not in documents:
        raise UserError(f"schema: expected one of {', '.join(documents)}, got {kind}.{nearest(kind, documents)}")
    print(json.dumps(documents[kind].model_json_schema(), indent=2))


def _finish(result: Any) -> None:
    """Show the table, the verdict and where everything is; once, whatever the number of ranks."""
    from accelerate import PartialState

    from potstill.evaluate.measures import of_run
    from potstill.evaluate.verdict import verdict

    if not PartialState().is_main_process:
        return
    rows = result.summary["rows"]
    table = Table(title=result.summary["name"], title_justify="left", box=box.SIMPLE_HEAD)
    for column in ("", *rows):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for measure in of_run(result.summary["task"], "bits_per_byte" in rows["student"]):
        values = [row[measure.key] for row in rows.values()]
        table.add_row(measure.name, *("–" if value is None else measure.write(value) for value in values))
    out = Console()
    out.print(table, highlight=False)
    out.print(verdict(result.summary), highlight=False)
    if adapter := result.summary["adapter"]:
        from potstill.evaluate import formatting as words

        trained = f"{adapter['trained']:,} parameters trained, {words.percent(adapter['share'], 2)} of all"
        saved = "merged" if adapter["bytes"] is None else f"{words.size(adapter['bytes'])} beside its base"
        out.print(f"adapter {adapter['title']}: {trained}; {saved}", highlight=False)
    out.print(f"student {result.directory / 'student'}\nreport  {result.directory / 'report.html'}", highlight=False)
