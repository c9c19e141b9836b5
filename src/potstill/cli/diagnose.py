"""The command `potstill diagnose`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from potstill.cli.app import Imports, Sets, app, comparison_table, show
from potstill.cli.embedding import kind_of
from potstill.errors import UserError

STYLES = {"alarm": "red", "warning": "yellow", "note": "dim"}


@app.command()
def diagnose(
    target: Annotated[
        Path,
        typer.Argument(help="a run directory, a recipe before its run, or with --data a teacher", show_default=False),
    ],
    rows: Annotated[int, typer.Option(help="number of held-out rows to examine", min=1)] = 64,
    data: Annotated[
        str | None, typer.Option(help="a file: show a teacher's temperatures on it, and the recommended one")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="for a recipe; default: the recipe's output-diagnosis")] = None,
    set_: Sets = None,
    import_: Imports = None,
) -> None:
    """Explain how a run went, or find problems in a recipe: temperature, gradients, distributions, labels."""
    from potstill.runs.config.run import Recipe

    if data is not None:
        if set_ or out:
            raise UserError("diagnose: expected neither --set nor --out with --data, got one. Leave it out.")
        from potstill.runs.diagnose import teacher_temperatures

        temperature = teacher_temperatures(str(target), data, rows=rows)
        _show_temperatures(temperature)
        sentence = f"Recommended temperature: {temperature['recommended']:g}. {temperature['why']}"
        show(Text(sentence, style="bold"))
        return
    run = target if target.is_dir() else None
    if run is not None and (set_ or out):
        raise UserError("diagnose: expected neither --set nor --out with a run directory, got one. Leave it out.")
    path = target / "recipe.yaml" if run is not None else target
    if run is not None and not path.exists() and (run / "config.json").exists():
        raise UserError(f"diagnose: expected --data FILE with a teacher, got {target} alone. Add it.")
    if kind_of(path) != "distillation":
        raise UserError(f"diagnose: expected a distillation recipe, got kind {kind_of(path)} in {path}.")
    recipe = Recipe.load(path, set_ or ())
    from potstill.evaluate.report.diagnosis import write_diagnosis_page
    from potstill.evaluate.report.page import write_report
    from potstill.evaluate.summary import is_finished
    from potstill.files import lock_folder
    from potstill.runs.diagnose import diagnose as diagnose_recipe
    from potstill.runs.diagnose import write_diagnosis

    diagnosis = diagnose_recipe(recipe, run=run, rows=rows)
    folder = run or out or Path(f"{recipe.output}-diagnosis")
    write_diagnosis(diagnosis, folder / "diagnose.json")
    if run is not None and is_finished(run):
        with lock_folder(run, "run", wait=True):  # of an export, which the report shows too
            page = write_report(run)
    else:
        page = write_diagnosis_page(folder)
    _show(diagnosis, page)


def _show(diagnosis: dict[str, Any], page: Path) -> None:
    if diagnosis["temperature"] is not None:
        _show_temperatures(diagnosis["temperature"])
    findings = [Text(finding["text"], STYLES[finding["level"]]) for finding in diagnosis["findings"]]
    show(*findings, Text(diagnosis["conclusion"], style="bold"), f"report  {page}")


def _show_temperatures(temperature: dict[str, Any]) -> None:
    from potstill.evaluate import formatting

    rows = temperature["rows"]
    columns = ("entropy", "support", "above 1/V", *(f"top {k}" for k in rows[0]["mass"]))
    table = comparison_table(columns, title="the teacher at temperature T, entropy in nats")
    table.columns[0].header, table.columns[0].justify = "T", "right"
    for row in rows:
        mass = [formatting.percent(share, 1) for share in row["mass"].values()]
        support = [f"{row[key]:,.{0 if row[key] >= 999.95 else 1}f}" for key in ("support", "counted")]
        recommended = row["temperature"] == temperature["recommended"]
        cells = [f"{row['temperature']:g}", formatting.nats(row["entropy"]), *support, *mass]
        table.add_row(*cells, style="bold" if recommended else None)
    show(table)
