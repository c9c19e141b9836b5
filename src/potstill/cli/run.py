"""The command `potstill run`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from potstill.cli.app import Imports, RecipePath, Sets, app, comparison_table, console, show
from potstill.cli.embedding import kind_of, run_embedding


@app.command()
def run(
    recipe: RecipePath,
    set_: Sets = None,
    import_: Imports = None,
    resume: Annotated[bool, typer.Option("--resume", help="continue an interrupted run")] = False,
) -> None:
    """Train a student as a recipe says. The model, its metrics and report.html go to the recipe's output directory."""
    if kind_of(recipe) == "embedding":
        return run_embedding(recipe, set_ or (), resume)
    from potstill.runs.config.run import Recipe

    loaded = Recipe.load(recipe, set_ or ())  # reports mistakes before the seconds that the next import takes
    from potstill.runs.run import run as run_recipe

    return show_result(run_recipe(loaded, resume=resume, console=console))


def show_result(result: Any) -> None:
    """Print the metrics of all models, the verdict and the paths of the outputs, from the main process alone."""
    from accelerate import PartialState

    from potstill.evaluate import formatting
    from potstill.evaluate.formatting import milliseconds as ms
    from potstill.evaluate.measures import of_run
    from potstill.evaluate.verdict import verdict

    if not PartialState().is_main_process:
        return
    summary, directory = result.summary, result.directory
    rows = summary["rows"]
    table = comparison_table([name.replace("_", " ") for name in rows], title=summary["name"])
    for measure in of_run(summary["task"], "bits_per_byte" in rows["student"]):
        if measure.key == "active_parameters" and measure.key not in rows["student"]:  # no model has experts
            continue
        values = [row.get(measure.key) for row in rows.values()]
        table.add_row(measure.name, *("–" if value is None else measure.write(value) for value in values))
    show(table, verdict(summary))
    spreads = [
        f"{name} {ms(times['median_ms'])} ({ms(times['low_ms'])} to {ms(times['high_ms'])})"
        for name, times in summary["latency"].items()
    ]
    show(f"latency, with the middle half of the passes: {', '.join(spreads)}")
    if adapter := summary["adapter"]:
        trained = f"{adapter['trained']:,} parameters trained, {formatting.percent(adapter['share'], 2)} of all"
        saved = "merged" if adapter["bytes"] is None else f"{formatting.size(adapter['bytes'])} beside its base model"
        show(f"adapter {adapter['title']}: {trained}; {saved}")
    show(f"student {directory / 'student'}\nreport  {directory / 'report.html'}")
