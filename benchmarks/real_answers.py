"""A real student that learns from its own answers: .venv/bin/python benchmarks/real_answers.py

    python benchmarks/real.py smollm2-60                 makes the student that all of them start from

The students go on from one that real.py made, with worked problems that it has not seen, each in one way: from data,
from answers that the teacher wrote, or from data and answers of their own by halves, which the teacher judges. Each
then answers held-out problems greedily. Measured are right answers (the number after ####), tokens in an answer, the
share of answers that end by themselves, the share of an answer's runs of four tokens that stood in it before, and loss
and KL to the teacher on the true answers. What was measured goes to OUT/rows.jsonl as it is measured, and is not
measured again. Prints Markdown.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from measure import Record, table
from potstill import Sampling
from potstill.data.batches import encode, in_batches
from potstill.data.sources import Source
from potstill.engines.decode import generate_tokens
from potstill.evaluate.sequence import measure
from potstill.generation.verify import same_answer
from potstill.models.chat import end_token_ids
from potstill.models.loading import load_model, load_tokenizer
from potstill.runs.build import build_run
from potstill.runs.config.run import Recipe
from potstill.runs.run import settle_student
from potstill.runs.steps import STEPS, walk
from real import DTYPE, read, write

HELD_OUT, FIRST, BATCH = 48, 1000, 8  # problems; real.py learns from fewer than the first thousand
ANSWER, RATE = 200, 5e-5  # tokens at most
DATA = [{"term": "logits", "weight": 0.5}, {"term": "labels", "weight": 0.5}]
OWN = [{"term": "logits", "divergence": {"kind": "skew_reverse_kl", "alpha": 0.1}}]
WAYS: dict[str, tuple[str, list[dict[str, Any]], dict[str, Any]]] = {  # answers of whom, objective, more of the recipe
    "data": ("data", DATA, {}),
    "teacher's answers": ("teacher", DATA, {}),
    "own answers": ("data", OWN, {"rollout": {"on_policy_fraction": 0.5, "max_new_tokens": ANSWER}}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", type=Path, default=Path("models/smollm2"))
    parser.add_argument("--student", type=Path, default=Path("runs/bench-real/smollm2-60/student"))
    parser.add_argument("--problems", type=Path, default=Path("../shared/data/gsm8k-train.jsonl"))
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--out", type=Path, default=Path("runs/bench-real-answers"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    record = Record(args.out / "rows.jsonl")
    rows = [pair(row) for row in read(args.problems)]
    write(args.out / "held_out.jsonl", rows[-HELD_OUT:])
    for name, folder in {"teacher": args.teacher, "start": args.student}.items():
        if not record.has(model=name):
            record.add(model=name, seconds=0, **quality(folder, args))
    for name, (author, objective, more) in WAYS.items():
        if record.has(model=name):
            continue
        began, data = time.process_time(), args.out / f"{author}.jsonl"
        if author == "data":
            write(data, rows[FIRST : FIRST + BATCH * args.steps])
        elif not data.exists():
            write(data, teacher_answers(args.teacher, rows[FIRST : FIRST + BATCH * args.steps]))
        student = train(name, data, objective, more, args)
        record.add(model=name, seconds=round(time.process_time() - began), **quality(student, args))
    keys = ("seconds", "right", "tokens", "ended", "repeated", "loss", "kl")
    print(table(["", *keys], [[line["model"], *(str(line[key]) for key in keys)] for line in record.lines]))


def pair(row: dict[str, str]) -> dict[str, str]:
    """A worked problem as real.py writes it."""
    return {"prompt": f"Question: {row['question']}\nAnswer: ", "completion": row["answer"]}


def teacher_answers(folder: Path, rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """The teacher's answers, sampled at temperature 1 from its likeliest tokens."""
    sampling = Sampling(max_new_tokens=ANSWER, sampling_temperature=1.0, top_p=0.95, seed=0)
    texts = answers(folder, [row["prompt"] for row in rows], sampling)[1]
    return [row | {"completion": text} for row, text in zip(rows, texts, strict=True) if text.strip()]


def answers(folder: Path, prompts: Sequence[str], sampling: Sampling) -> tuple[list[Any], list[str]]:
    """What a model writes after prompts: its tokens, and the texts of them without what ends them."""
    model, tokenizer = load_model(str(folder), "model", DTYPE, "causal"), load_tokenizer(str(folder), "model")
    ids = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    written = generate_tokens(model, ids, sampling, eos_ids=end_token_ids(tokenizer, model), batch_size=24)
    return written, tokenizer.batch_decode([each.ids for each in written], skip_special_tokens=True)


def train(name: str, data: Path, objective: list[dict[str, Any]], more: dict[str, Any], args: Any) -> Path:
    """Train the student in one way, and return where it is."""
    out = args.out / name.replace(" ", "-").replace("'", "")
    pairs = {"prompt": "prompt", "completion": "completion"}
    recipe = Recipe.parse({
        "name": name, "teacher": {"model": str(args.teacher), "dtype": DTYPE}, "student": {"model": str(args.student)},
        "data": {"train": {"path": str(data), **pairs}, "eval": {"path": str(args.out / "held_out.jsonl"), **pairs},
                 "max_length": 512},
        "objective": objective, "output": str(out), **more,
        "train": {"max_steps": args.steps, "per_device_train_batch_size": BATCH, "learning_rate": RATE,
                  "lr_scheduler_type": "cosine", "warmup_steps": 0.05, "bf16": DTYPE == "bfloat16"},
        "evaluate": {"continuations": 0, "curve_rows": 8},
    })  # fmt: skip
    recipe, _ = settle_student(recipe, out, Console(), resume=True)
    walk(STEPS, build_run(recipe), out, Console())
    return out / "student"


def quality(folder: Path, args: Any) -> dict[str, Any]:
    """Measure a model's greedy answers, and its loss and KL on the true ones."""
    rows = read(args.out / "held_out.jsonl")
    written, texts = answers(
        folder, [row["prompt"] for row in rows], Sampling(max_new_tokens=ANSWER, sampling_temperature=0)
    )
    right = [is_right(text, row["completion"]) for text, row in zip(texts, rows, strict=True)]
    model, teacher = (load_model(str(path), "model", DTYPE, "causal") for path in (folder, args.teacher))
    tokenizer = load_tokenizer(str(args.teacher), "teacher")
    source = Source(args.out / "held_out.jsonl", prompt="prompt", completion="completion")
    held_out = encode(source, tokenizer, max_length=512, task="causal").dataset
    batches = list(in_batches(held_out, tokenizer, 8, torch.device("cpu")))
    of: Any = measure("causal", teacher, {"model": model}, batches)["model"]
    return {
        "right": sum(right),
        "tokens": round(statistics.mean(len(each.ids) for each in written), 1),
        "ended": round(statistics.mean(each.ended for each in written), 3),
        "repeated": round(statistics.mean(repeated(each.ids) for each in written), 3),
        "loss": round(of.loss, 4),
        "kl": round(of.kl, 4),
        "texts": texts[:3],
    }


def is_right(text: str, truth: str) -> bool:
    """Whether a text has the number of the truth after ####."""
    _, mark, answer = text.partition("####")
    words = answer.split()
    return bool(mark and words) and same_answer(words[0], truth.rpartition("#### ")[2])


def repeated(ids: Sequence[int], length: int = 4) -> float:
    """The share of the runs of tokens that stood in the text before."""
    runs = [tuple(ids[i : i + length]) for i in range(len(ids) - length + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


if __name__ == "__main__":
    main()
