"""Which start and objective bring a cut model back soonest: .venv/bin/python benchmarks/objectives.py

Students of models/smollm2 (--teacher; `python ../shared/tools/real_models.py models` makes it) with the same first
weights learn the same batches in the same order, each by an objective of its own; the teacher runs once a batch for all
of them, and products of matrices are in bfloat16 where the machine has instructions for it. Held-out loss and KL, at
the start and at evenly spaced steps, go to OUT/rows.jsonl as they are measured; what is in there already is not trained
again.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from potstill import Distiller, ForwardKL, Hidden, Labels, LayerMap, Logits, SkewReverseKL
from potstill.data.batches import in_batches
from potstill.evaluate.sequence import measure
from potstill.losses.alignment import Alignment
from potstill.losses.schedule import Linear
from potstill.models.loading import has_bfloat16
from potstill.runs.build import BuiltRun, build_run
from potstill.runs.config.run import Recipe
from potstill.teachers.model import ModelTeacher
from potstill.teachers.teacher import Teacher, TeacherOutput

TEACHER, DATA = Path("models/smollm2"), Path("../shared/data/gsm8k-train.jsonl")
KL = ForwardKL()


def objectives(pairs: LayerMap, steps: int) -> dict[str, list[Any]]:
    """What is compared, by name; `pairs` are the student's layers and those of the teacher that they stand for."""
    half = [Logits(KL, weight=0.5), Labels(weight=0.5)]
    return {
        "labels": [Labels()],
        "skew": [Logits(SkewReverseKL(0.1))],
        "kl": [Logits(KL)],
        "half": half,
        "quarter": [Logits(KL, weight=0.25), Labels(weight=0.75)],
        "labels-first": [
            Logits(KL, weight=Linear(0.0, 1.0, steps=steps)),
            Labels(weight=Linear(1.0, 0.0, steps=steps)),
        ],
        "labels-last": [
            Logits(KL, weight=Linear(0.75, 0.0, steps=steps)),
            Labels(weight=Linear(0.25, 1.0, steps=steps)),
        ],
        "anneal": [Logits(KL, weight=Linear(0.5, 0.0, steps=steps)), Labels(weight=Linear(0.5, 1.0, steps=steps))],
        "hidden-cosine": [*half, Hidden(pairs, "cosine", weight=1.0)],
        "hidden-cosine-5": [*half, Hidden(pairs, "cosine", weight=5.0)],
        "labels+hidden-cosine": [Labels(), Hidden(pairs, "cosine", weight=1.0)],
    }


class OnceTeacher(ModelTeacher):
    """A model that runs once for all the students that learn a batch."""

    batch: Tensor | None = None
    output: TeacherOutput

    def __call__(self, batch: Mapping[str, Tensor], alignment: Alignment) -> TeacherOutput:
        if self.batch is not batch["input_ids"]:
            self.batch, self.output = batch["input_ids"], super().__call__(batch, alignment)
        return self.output


def recipe(args: argparse.Namespace, out: Path) -> Recipe:
    """The run whose teacher, data and student are compared on."""
    paths = {}
    for name, rows in split(args).items():
        paths[name] = str(out / f"{name}.jsonl")
        Path(paths[name]).write_text("".join(json.dumps(row) + "\n" for row in rows))
    student: dict[str, Any] = {"design": json.loads(args.design)}
    dtype = "bfloat16" if has_bfloat16() else "float32"
    if args.start != "random":
        student["initialize"] = {"method": args.start, "fit": args.fit, "calibration_rows": args.calibration_rows}
        student["initialize"] |= {"layers": args.layers} if args.layers else {}
    return Recipe.parse({
        "name": "objectives", "teacher": {"model": str(args.teacher), "dtype": dtype}, "student": student,
        "data": {"train": {"path": paths["train"]}, "eval": {"path": paths["dev"]}, "max_length": args.max_length,
                 "packing": args.text == "plain"},
        "objective": [{"term": "logits"}], "output": str(out / "run"),
        "train": {"num_train_epochs": args.epochs, "per_device_train_batch_size": args.batch, "learning_rate": 1e-3},
    })  # fmt: skip


def split(args: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Rows to train on and rows to choose by."""
    lines = [json.loads(line) for line in args.data.read_text(encoding="utf-8").splitlines()]
    lines = lines[: args.rows + args.dev_rows]
    if args.text == "chat":
        question, answer = ("question", "answer") if "question" in lines[0] else ("prompt", "completion")
        lines = [
            {"messages": [{"role": "user", "content": row[question]}, {"role": "assistant", "content": row[answer]}]}
            for row in lines
        ]
    elif args.text == "instructions":
        lines = [{"prompt": row["question"] + "\n", "completion": row["answer"]} for row in lines]
    return {"train": lines[: args.rows], "dev": lines[args.rows :]}


def schedule(step: int, steps: int, kind: str) -> float:
    """Of the rate: 5% of warm-up, then as named."""
    warmup = max(1, round(0.05 * steps))
    if step < warmup:
        return (step + 1) / warmup
    along = (step - warmup) / max(1, steps - warmup)
    return {"cosine": 0.5 * (1 + float(torch.cos(torch.tensor(torch.pi * along)))), "constant": 1.0}[kind]


class Rows:
    """The results, one line each."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(row, flush=True)


def train(built: BuiltRun, names: dict[str, list[Any]], rate: float, args: argparse.Namespace, rows: Rows) -> None:
    """Train students of several objectives side by side."""
    assert isinstance(built.teacher, ModelTeacher)
    teacher: Teacher = OnceTeacher(built.teacher.model)
    students = {name: built.new_student() for name in names}
    distillers = {
        name: Distiller(students[name], teacher, terms, vocabulary=built.vocabulary) for name, terms in names.items()
    }
    adam = {
        name: torch.optim.AdamW((x for x in distiller.parameters() if x.requires_grad), lr=rate, weight_decay=0.0)
        for name, distiller in distillers.items()
    }
    steps, spent = built.plan.steps, dict.fromkeys(names, 0.0)
    marks = {round(steps * (i + 1) / args.marks) for i in range(args.marks)}
    tokens = 0

    def note(step: int) -> None:
        batches = list(in_batches(built.eval.dataset, built.tokenizer, 4))
        quality: Any = measure("causal", built.teacher.model, students, batches, vocabulary=built.vocabulary)
        for name in ("teacher", *names) if step == 0 else names:
            of = quality[name]
            rows.add({
                "start": args.start, "fit": args.fit, "text": args.text, "rate": rate, "objective": name, "step": step,
                "of": steps, "tokens": tokens, "loss": round(of.loss, 4), "kl": of.kl and round(of.kl, 4),
                "seconds": round(spent.get(name, 0.0)),
            })  # fmt: skip

    note(0)
    order: list[int] = []
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        if len(order) < args.batch:
            order += torch.randperm(len(built.train.dataset), generator=generator).tolist()
        chosen, order = order[: args.batch], order[args.batch :]
        (batch,) = in_batches(built.train.dataset.select(chosen), built.tokenizer, args.batch)
        tokens += int(batch["attention_mask"].sum())
        for name, distiller in distillers.items():
            began = time.process_time()
            for group in adam[name].param_groups:
                group["lr"] = rate * schedule(step, steps, args.schedule)
            distiller.train()
            with torch.autocast("cpu", torch.bfloat16, enabled=has_bfloat16()):
                loss = distiller.step(batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(distiller.parameters(), 1.0)
            adam[name].step()
            adam[name].zero_grad()
            spent[name] += time.process_time() - began
        if step + 1 in marks:
            note(step + 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/bench-objectives"))
    parser.add_argument("--teacher", type=Path, default=TEACHER)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--text", choices=["chat", "instructions", "plain"], default="chat")
    parser.add_argument("--design", default='{"num_hidden_layers": 15}')
    parser.add_argument("--start", choices=["copy", "prune", "random"], default="copy")
    parser.add_argument("--fit", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--layers", choices=["uniform", "importance"])
    parser.add_argument("--calibration-rows", type=int, default=128)
    parser.add_argument("--objectives", nargs="+", default=["labels", "half"])
    parser.add_argument("--rates", type=float, nargs="+", default=[3e-4])
    parser.add_argument("--schedule", choices=["cosine", "constant"], default="cosine")
    parser.add_argument("--rows", type=int, default=208)
    parser.add_argument("--dev-rows", type=int, default=24)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--marks", type=int, default=4, help="measurements on the way")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    rows = Rows(args.out / "rows.jsonl")
    built = build_run(recipe(args, args.out))
    print(*built.notes, sep="\n", flush=True)
    print(f"student: {built.size.all:,} parameters; {built.plan.steps} steps", flush=True)
    for rate in args.rates:
        keys = {"start": args.start, "fit": args.fit, "text": args.text, "rate": rate, "of": built.plan.steps}
        done = {row["objective"] for row in rows.rows if keys.items() <= row.items() and row["step"] == row["of"]}
        all_of_them = objectives(LayerMap.uniform(), built.plan.steps)
        names = {name: all_of_them[name] for name in args.objectives if name not in done}
        if names:
            train(built, names, rate, args, rows)


if __name__ == "__main__":
    main()
