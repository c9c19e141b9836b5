"""The command that measures models: evaluate."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from potstill.cli.app import app, console
from potstill.errors import UserError, nearest
from potstill.losses.alignment import TASKS, Task


@app.command()
def evaluate(
    student: Annotated[str, typer.Argument(help="a folder with a model and its tokenizer", show_default=False)],
    data: Annotated[str, typer.Option(help="held-out data: .jsonl, .csv, .parquet, .txt")],
    out: Annotated[Path, typer.Option(help="the JSON file that everything is written to")],
    teacher: Annotated[str | None, typer.Option(help="the model to compare with")] = None,
    field: Annotated[str | None, typer.Option(help="the column of plain text")] = None,
    task: Annotated[str, typer.Option(help="causal, masked, classification, regression or encoder")] = "causal",
    pair: Annotated[str | None, typer.Option(help="the column of second texts, where rows are judged")] = None,
    label: Annotated[str | None, typer.Option(help="the column of classes or numbers, where rows are judged")] = None,
    max_length: Annotated[int, typer.Option(help="tokens in a row at most", min=2)] = 512,
    packing: Annotated[bool, typer.Option("--packing", help="join plain text into rows of --max-length")] = False,
    generations: Annotated[int, typer.Option(help="rows that are continued, for ROUGE and BLEU", min=0)] = 0,
    new_tokens: Annotated[int, typer.Option(help="tokens of each continuation", min=1)] = 64,
    lm_eval: Annotated[str | None, typer.Option(help="tasks of lm-eval with commas, or their YAML files")] = None,
    lm_eval_limit: Annotated[int | None, typer.Option(help="examples of each task", min=1)] = None,
    batch_size: Annotated[str, typer.Option(help="batch sizes to time, with commas")] = "1,8",
    length: Annotated[str, typer.Option(help="lengths of rows to time, with commas")] = "128,512",
) -> None:
    """Measure a student on held-out data, beside its teacher: quality, calibration, agreement, speed, memory, size."""
    from potstill.data.sources import Source
    from potstill.runs.evaluate import EvaluationOptions
    from potstill.runs.evaluate import evaluate as measure

    options = EvaluationOptions(
        generations=generations,
        new_tokens=new_tokens,
        lm_eval=[task.strip() for task in lm_eval.split(",")] if lm_eval else (),
        lm_eval_limit=lm_eval_limit,
        batch_sizes=_numbers("--batch-size", batch_size),
        lengths=_numbers("--length", length),
    )
    if not out.absolute().parent.is_dir():
        raise UserError(f"--out: expected a file in a folder that is there, got {out}. Make its folder first.")
    if task not in TASKS:
        raise UserError(f"--task: expected one of {', '.join(sorted(TASKS))}, got {task}.{nearest(task, TASKS)}")
    source = Source(data, field=field, pair=pair, label=label)
    found = measure(student, teacher, source, max_length=max_length, packing=packing, options=options, task=task)
    from potstill.data.files import write_text

    write_text(out, json.dumps(found, indent=2, ensure_ascii=False) + "\n")
    _show(found, task)
    console.print(f"figures {out}", highlight=False)


def _numbers(option: str, text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() and int(part) > 0 for part in parts):
        raise UserError(f"{option}: expected whole numbers above 0 with commas between them, got {text}.")
    return [int(part) for part in parts]


def _show(found: dict[str, Any], task: Task) -> None:
    """A table with a column for each model."""
    from potstill.evaluate import formatting as words
    from potstill.evaluate.measures import FURTHER, QUALITY

    models = found["models"]
    table = Table(box=box.SIMPLE_HEAD)
    for column in ("", *models):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for measure in (*QUALITY[task], *FURTHER[task]):
        values = [model["quality"].get(measure.key) for model in models.values()]
        if None not in values:
            table.add_row(measure.name, *(measure.write(value) for value in values))
    if found["data"]["bytes"]:
        table.add_row("bits per byte", *(words.nats(model["bits_per_byte"]) for model in models.values()))
    for key, name in (("rouge1", "ROUGE-1"), ("rouge2", "ROUGE-2"), ("rouge_l", "ROUGE-L"), ("bleu", "BLEU")):
        if all("text" in model for model in models.values()):
            table.add_row(name, *(f"{model['text'][key]:.3f}" for model in models.values()))
    for task, scores in next(iter(models.values())).get("lm_eval", {}).items():
        for metric in scores:
            table.add_row(f"{task} {metric}", *(f"{model['lm_eval'][task][metric]:.4g}" for model in models.values()))
    table.add_row("parameters", *(words.count(model["parameters"]) for model in models.values()))
    table.add_row("size in memory", *(words.size(model["bytes"]) for model in models.values()))
    for i, one in enumerate(next(iter(models.values()))["speed"]):
        at = f"{one['rows']} x {one['length']}"
        speeds = [model["speed"][i] for model in models.values()]
        table.add_row(f"latency, {at}", *(words.milliseconds(each["latency_ms"]) for each in speeds))
        table.add_row(f"tokens a second, {at}", *(words.count(each["tokens_per_second"]) for each in speeds))
        for key, name in (("first_token_ms", "first token"), ("next_token_ms", "next token")):
            if None not in (times := [each[key] for each in speeds]):
                table.add_row(f"{name}, {at}", *(words.milliseconds(time) for time in times))
        if None not in (peaks := [each["peak_bytes"] for each in speeds]):
            table.add_row(f"peak memory, {at}", *(words.size(peak) for peak in peaks))
    Console().print(table, highlight=False)
    for note in found["notes"]:
        console.print(note, highlight=False)
