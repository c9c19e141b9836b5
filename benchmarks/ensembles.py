"""Two unlike teachers into one student, together and each alone: .venv/bin/python benchmarks/ensembles.py

The corpus is the demo's: the source of Python's standard library. One teacher has read files of packages alone
(asyncio, email, tkinter ...), the other single-file modules alone. Students of one shape and one seed learn from the
same text of both kinds, which no teacher has read, by forward KL alone, and are measured on held-out files of both.
Prints a Markdown table; `--out` keeps everything, and what is there already is not done again.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from measure import keep, machine, table
from potstill import (
    DistillationConfig,
    DistillationTrainer,
    EnsembleTeacher,
    ForwardKL,
    Labels,
    Logits,
    ModelTeacher,
    Source,
    encode,
)
from potstill.data.batches import in_batches
from potstill.demo.corpus import Split, documents
from potstill.evaluate.quality import compare
from potstill.losses.alignment import causal_alignment
from potstill.models.design import student_config
from potstill.models.initialize import random_student
from potstill.teachers.teacher import Teacher

DEMO = str(files("potstill.demo").joinpath("teacher"))
KINDS = ("packages", "modules")
TEACHER = {"hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 3, "num_attention_heads": 2}
STUDENT = TEACHER | {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 2}
LENGTH = 128


def rows(out: Path, tokenizer: Any, split: Split, kind: str, characters: int) -> Dataset:
    """Packed rows of one split and one kind of file."""
    path = out / f"{split}-{kind}.jsonl"
    left = characters
    with path.open("w", encoding="utf-8") as file:
        for name, text in documents(split):
            if ("/" in name) == (kind == "packages") and left > 0:
                file.write(json.dumps({"text": text[:left]}) + "\n")
                left -= len(text)
    return encode(Source(path), tokenizer, max_length=LENGTH, packing=True).dataset


def joined(parts: Sequence[Dataset]) -> Dataset:
    return Dataset.from_list([row for part in parts for row in part])


def train(out: Path, shape: dict[str, int], data: Dataset, steps: int, seed: int, teacher: Teacher | None) -> Any:
    """A model with random weights, trained; from the disk where it is there."""
    if not (out / "done").exists():
        tokenizer = AutoTokenizer.from_pretrained(DEMO)
        config = student_config(AutoConfig.from_pretrained(DEMO), shape, len(tokenizer))
        trainer = DistillationTrainer(
            student=random_student(config, seed),
            teacher=teacher,
            objective=[Labels()] if teacher is None else [Logits(ForwardKL())],
            args=DistillationConfig(
                output_dir=str(out),
                max_steps=steps,
                per_device_train_batch_size=8,
                learning_rate=3e-3,
                lr_scheduler_type="cosine",
                warmup_steps=steps // 8,
                weight_decay=0.1,
                save_strategy="no",
                logging_steps=50,
                seed=seed,
                disable_tqdm=True,
            ),
            train_dataset=data,
            processing_class=tokenizer,
        )
        trainer.train()
        trainer.save_model(str(out))
        (out / "done").write_text(json.dumps({} if teacher is None else teacher.logs()))
    return AutoModelForCausalLM.from_pretrained(out)


def losses(model: Any, held_out: dict[str, Dataset], tokenizer: Any) -> dict[str, float]:
    """Nats a token on files of each kind and of both."""
    found = {
        kind: compare(None, {"model": model}, in_batches(part, tokenizer, 16))["model"]
        for kind, part in held_out.items()
    }
    tokens = sum(one.tokens for one in found.values())
    both = sum(one.loss * one.tokens for one in found.values()) / tokens
    return {kind: one.loss for kind, one in found.items()} | {"both": both}


@torch.no_grad()
def losses_of(teacher: Teacher, held_out: dict[str, Dataset], tokenizer: Any) -> dict[str, float]:
    """Losses of several teachers as one, by kind of text."""
    sums = {}
    for kind, part in held_out.items():
        total, tokens = 0.0, 0
        for batch in in_batches(part, tokenizer, 16):
            alignment = causal_alignment(batch["labels"])
            known = teacher(batch, alignment).log_probs_of(alignment.labels)
            assert known is not None
            total, tokens = total - float(known.double().sum()), tokens + len(alignment)
        sums[kind] = (total, tokens)
    both = sum(total for total, _ in sums.values()) / sum(tokens for _, tokens in sums.values())
    return {kind: total / tokens for kind, (total, tokens) in sums.items()} | {"both": both}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--teacher-steps", type=int, default=500)
    parser.add_argument("--student-steps", type=int, default=300)
    parser.add_argument("--out", type=Path, default=Path("runs/bench-ensembles"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(DEMO)

    held_out = {kind: rows(args.out, tokenizer, "heldout", kind, 60_000) for kind in KINDS}
    text = joined([rows(args.out, tokenizer, "transfer", kind, 300_000) for kind in KINDS])
    teachers = {}
    for kind in KINDS:
        data = rows(args.out, tokenizer, "teacher", kind, 1_500_000)
        teachers[kind] = train(args.out / f"teacher-{kind}", TEACHER, data, args.teacher_steps, 0, None)
    of = {f"{kind} teacher": ModelTeacher(model) for kind, model in teachers.items()}
    several = {
        "mixture of both": {},
        "mean of log-probs of both": {"of": "log_probs"},
        "mixture of both, learned weights": {"learned": True},
    }

    def ensemble(options: dict[str, Any]) -> EnsembleTeacher:
        return EnsembleTeacher(list(of.values()), names=KINDS, **options)

    by_teacher = {f"{kind} teacher": losses(model, held_out, tokenizer) for kind, model in teachers.items()}
    by_teacher |= {name: losses_of(ensemble(o), held_out, tokenizer) for name, o in list(several.items())[:2]}
    students: dict[str, list[dict[str, float]]] = {}
    weights = []
    for seed in args.seeds:
        named_teachers = {"labels only": None, **of, **{name: ensemble(options) for name, options in several.items()}}
        for name, teacher in named_teachers.items():
            folder = args.out / f"seed{seed}" / name.replace(" ", "-")
            model = train(folder, STUDENT, text, args.student_steps, seed, teacher)
            students.setdefault(name, []).append(losses(model, held_out, tokenizer))
            print(name, seed, students[name][-1], file=sys.stderr, flush=True)
            weights += [json.loads((folder / "done").read_text())] if "learned" in name else []
    results = {"teachers": by_teacher, "students": students, "weights": weights}
    keep(args.out / "results.json", {"command": " ".join(sys.argv), "machine": machine("cpu"), "results": results})

    cells = [[f"*{name}*", *(f"{found[kind]:.3f}" for kind in (*KINDS, "both"))] for name, found in by_teacher.items()]
    for name, found in students.items():
        means = [sum(one[kind] for one in found) / len(found) for kind in (*KINDS, "both")]
        cells.append([f"student: {name}", *(f"{mean:.3f}" for mean in means)])
    print(table(["held-out loss, nats per token", *KINDS, "both"], cells))
    print(f"\nlearned weights: {weights}")


if __name__ == "__main__":
    main()
