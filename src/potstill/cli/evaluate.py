"""The command `potstill evaluate`."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from potstill.cli.app import app, comparison_table, console, show
from potstill.errors import UserError, nearest
from potstill.losses.alignment import TASKS, Task


@app.command()
def evaluate(
    student: Annotated[
        str,
        typer.Argument(
            help="folder with a model and its tokenizer; exported file, or folder of them", show_default=False
        ),
    ],
    data: Annotated[str, typer.Option(help="held-out data: .jsonl, .csv, .parquet, .txt")],
    out: Annotated[Path, typer.Option(help="JSON file to write all results to")],
    teacher: Annotated[str | None, typer.Option(help="model to compare with")] = None,
    field: Annotated[str | None, typer.Option(help="column of plain text")] = None,
    task: Annotated[str, typer.Option(help="causal, masked, classification, regression or encoder")] = "causal",
    pair: Annotated[str | None, typer.Option(help="column of second texts, for sequence-level tasks")] = None,
    label: Annotated[str | None, typer.Option(help="column of classes or numbers, for sequence-level tasks")] = None,
    max_length: Annotated[int, typer.Option(help="most tokens in a row", min=2)] = 512,
    packing: Annotated[bool, typer.Option("--packing", help="join plain text into rows of --max-length")] = False,
    generations: Annotated[int, typer.Option(help="rows to generate continuations for, for ROUGE and BLEU", min=0)] = 0,
    new_tokens: Annotated[int, typer.Option(help="tokens of each continuation", min=1)] = 64,
    lm_eval: Annotated[str | None, typer.Option(help="lm-eval tasks or their YAML files, comma-separated")] = None,
    lm_eval_limit: Annotated[int | None, typer.Option(help="examples of each lm-eval task", min=1)] = None,
    batch_size: Annotated[str, typer.Option(help="batch sizes to time, comma-separated")] = "1",
    length: Annotated[str | None, typer.Option(help="row lengths to time; default: 128 or --max-length")] = None,
    time_limit: Annotated[float, typer.Option(help="seconds for all measurements, about", min=1)] = 600,
    tokens: Annotated[int, typer.Option(help="of exported files: held-out tokens to measure on, about", min=1)] = 2048,
) -> None:
    """Evaluate a student on held-out data beside its teacher: quality, calibration, agreement, speed, memory, size.

    Finished parts are kept beside --out until all are there: the same command goes on from them.
    Exported files, GGUF or ONNX, run in their programs, beside the student that they are of where it is there.
    """
    from potstill.data.sources import Source
    from potstill.files import write_text
    from potstill.runs.evaluate import EvaluationOptions
    from potstill.runs.evaluate import evaluate as evaluate_models
    from potstill.runs.formats.table import exported_files

    if not (folder := out.absolute().parent).is_dir():
        raise UserError(f"--out: expected a file in an existing folder, got {out}. Create its folder first.")
    if not os.access(folder, os.W_OK):  # which is known before the models are measured
        raise UserError(f"--out: expected a file in a folder that can be written, got {out}. Choose another folder.")
    if files := exported_files(Path(student).expanduser()):
        if generations or lm_eval or task != "causal" or pair or label or batch_size != "1" or length:
            raise UserError(
                "--generations, --lm-eval, --task, --pair, --label, --batch-size, --length: expected none of them with "
                "exported files, got some. Files are measured on held-out text, and one row at a time."
            )
        _evaluate_files(files, Source(data, field=field), out, teacher, max_length, packing, tokens)
        return
    options = EvaluationOptions(
        generations=generations,
        new_tokens=new_tokens,
        lm_eval=[name.strip() for name in lm_eval.split(",")] if lm_eval else (),
        lm_eval_limit=lm_eval_limit,
        batch_sizes=_numbers("--batch-size", batch_size),
        lengths=_numbers("--length", length or str(min(128, max_length))),
        time_limit=time_limit,
    )
    if task not in TASKS:
        raise UserError(f"--task: expected one of {', '.join(sorted(TASKS))}, got {task}.{nearest(task, TASKS)}")
    source = Source(data, field=field, pair=pair, label=label)
    rows: dict[str, Any] = {"max_length": max_length, "packing": packing}
    shown: dict[str, Any] = {"finished": out.with_name(f"{out.name}.parts"), "console": console}
    results = evaluate_models(student, teacher, source, **rows, options=options, task=task, **shown)
    write_text(out, json.dumps(results, indent=2, ensure_ascii=False) + "\n")
    _show(results, task)
    console.print(f"results {out}", highlight=False)


def _evaluate_files(
    files: list[Path], data: Any, out: Path, teacher: str | None, max_length: int, packing: bool, tokens: int
) -> None:
    from potstill.cli.export import show_exports
    from potstill.files import write_text
    from potstill.runs.export import evaluate_files

    rows: dict[str, Any] = {"max_length": max_length, "packing": packing, "tokens": tokens}
    exports = evaluate_files(files, data, teacher, **rows, console=console)
    write_text(out, exports.model_dump_json(indent=2) + "\n")
    show_exports(exports)
    console.print(f"results {out}", highlight=False)


def _numbers(option: str, text: str) -> list[int]:
    numbers = [number.strip() for number in text.split(",")]
    if not all(number.isdigit() and int(number) > 0 for number in numbers):
        raise UserError(f"{option}: expected whole numbers above 0, separated by commas, got {text}.")
    return [int(number) for number in numbers]


def _show(results: dict[str, Any], task: Task) -> None:
    from potstill.evaluate import formatting
    from potstill.evaluate.measures import FURTHER, QUALITY

    models = [*results["models"].values()]
    table = comparison_table(results["models"])

    def add_row(name: str, values: Iterable[Any], write: Callable[[Any], str]) -> None:
        values = [*values]
        if None not in values:
            table.add_row(name, *map(write, values))

    for measure in (*QUALITY[task], *FURTHER[task]):
        add_row(measure.name, (model["quality"].get(measure.key) for model in models), measure.write)
    if results["data"]["bytes"]:
        add_row("bits per byte", (model["bits_per_byte"] for model in models), formatting.nats)
    for key, name in (("rouge1", "ROUGE-1"), ("rouge2", "ROUGE-2"), ("rouge_l", "ROUGE-L"), ("bleu", "BLEU, 0 to 100")):
        add_row(name, (model.get("text", {}).get(key) for model in models), "{:.3f}".format)
    for lm_eval_task, scores in models[0].get("lm_eval", {}).items():
        for metric in scores:
            values = (model["lm_eval"][lm_eval_task][metric] for model in models)  # all models have it, or none
            add_row(f"{lm_eval_task} {metric}", values, "{:.4g}".format)
    add_row("parameters", (model["parameters"] for model in models), formatting.count)
    add_row("size in memory", (model["bytes"] for model in models), formatting.size)
    for timings in zip(*(model["speed"] for model in models), strict=True):
        for key, name, write in (
            ("latency_ms", "latency", formatting.milliseconds),
            ("tokens_per_second", "tokens a second", formatting.count),
            ("first_token_ms", "first token", formatting.milliseconds),
            ("next_token_ms", "next token", formatting.milliseconds),
            ("peak_bytes", "peak memory", formatting.size),
        ):
            name = f"{name}, {timings[0]['rows']} x {timings[0]['length']}"
            add_row(name, (timing[key] for timing in timings), write)
            if key == "latency_ms" and len(models) > 1:
                ratios = (timings[0][key] / timing[key] for timing in timings)
                add_row(name.replace("latency", "speed-up"), ratios, lambda ratio: f"{formatting.times(ratio)}×")
    show(table)
    for note in results["notes"]:
        console.print(note, highlight=False)
