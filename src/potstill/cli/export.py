"""The command `potstill export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from potstill.cli.app import app, comparison_table, console, show
from potstill.errors import UserError


@app.command()
def export(
    student: Annotated[str, typer.Argument(help="a run directory, or a folder with a model", show_default=False)],
    to: Annotated[
        str, typer.Option(help="format: gguf, gguf-adapter (a LoRA adapter beside its base), onnx or openvino")
    ] = "gguf",
    quantize: Annotated[
        str | None,
        typer.Option(
            help="GGUF: f32, f16, bf16, q8_0, q5_1, q5_0, q4_1, q4_0, q6_k, q5_k_m or q4_k_m, by default f16; ONNX, "
            "OpenVINO: f32, int8 or, for ONNX, int4, by default f32; several, comma-separated"
        ),
    ] = None,
    data: Annotated[str | None, typer.Option(help="held-out data to measure a model on; a run has its own")] = None,
    field: Annotated[str | None, typer.Option(help="column of plain text in --data")] = None,
    teacher: Annotated[str | None, typer.Option(help="model to compare a model with; a run has its own")] = None,
    task: Annotated[
        str | None,
        typer.Option(
            help="of a model: causal (default), masked, classification, regression, encoder; none: sentence vectors"
        ),
    ] = None,
    pair: Annotated[str | None, typer.Option(help="column of second texts in --data")] = None,
    label: Annotated[str | None, typer.Option(help="column of classes or numbers in --data")] = None,
    max_length: Annotated[int, typer.Option(help="most tokens in a row of --data", min=2)] = 512,
    tokens: Annotated[int, typer.Option(help="held-out tokens to measure on, about", min=1)] = 2048,
    out: Annotated[Path | None, typer.Option(help="folder for a model's files; default: export/ in its folder")] = None,
) -> None:
    """Write a student for llama.cpp (GGUF), onnxruntime (ONNX) or OpenVINO, and measure each file there.

    A run's files go to its export/, and their figures to its report and model card.
    """
    from potstill.data.sources import Source
    from potstill.runs.export import export as export_student

    if data is None and not field is pair is label is None:
        raise UserError(
            "--field, --pair, --label: expected --data with them, got none. A run has its own held-out data."
        )
    source = None if data is None else Source(data, field=field, pair=pair, label=label)
    kinds: Any = [] if quantize is None else [kind.strip() for kind in quantize.split(",")]
    measured: dict[str, Any] = {
        "data": source,
        "teacher": teacher,
        "task": task,
        "max_length": max_length,
        "tokens": tokens,
    }
    exports = export_student(student, to, kinds, **measured, out=out, console=console)  # type: ignore[arg-type]
    show_exports(exports)


def show_exports(exports: Any) -> None:
    """Print a column for the student and one for each file."""
    from potstill.evaluate.exported import export_table

    columns, rows = export_table(exports)
    names, *measures = zip(*rows, strict=True)
    table = comparison_table(names)
    for name, values in zip(columns[1:], measures, strict=True):
        table.add_row(name, *values)
    show(table)
    for file in exports.files:
        for note in file.notes:
            console.print(f"{file.file}: {note}", highlight=False, markup=False)
