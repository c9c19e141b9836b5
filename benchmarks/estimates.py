"""What `potstill check` says a training takes, and what it took: memory and seconds a step, for a few sizes.

    python benchmarks/estimates.py [--sizes toy,small] [--steps 12]

Each size is checked and trained in a process of its own. Memory is what the kernel counts beside what Python and its
packages took before any model was loaded, in training alone (no evaluation, no report); seconds are the clock's, and
the machine's other work is in them.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from rich.console import Console
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from potstill.evaluate import formatting as words
from potstill.evaluate.speed import extra_bytes
from potstill.runs.build import build_run
from potstill.runs.check import check
from potstill.runs.config.run import Recipe
from potstill.runs.steps import train_student

FORK = multiprocessing.get_context("fork")  # each measurement in a new process, which has imported everything

# vocabulary, teacher and student as (hidden size, layers), rows and tokens in a row
SIZES: dict[str, tuple[int, tuple[int, int], tuple[int, int], int, int]] = {
    "toy": (1000, (128, 2), (64, 2), 8, 64),
    "small": (8000, (256, 4), (192, 3), 8, 64),
    "wide": (32000, (384, 4), (256, 4), 4, 128),
    "deep": (4000, (384, 8), (320, 8), 4, 128),
}


def make(folder: Path, size: str, steps: int) -> dict[str, Any]:
    """A recipe over models with random weights and random text."""
    vocabulary, teacher, student, rows, length = SIZES[size]
    tokenizer = Tokenizer(models.WordLevel({f"t{i}": i for i in range(vocabulary)}, unk_token="t0"))
    for name, (hidden, layers) in (("teacher", teacher), ("student", student)):
        config = LlamaConfig(
            vocab_size=vocabulary, hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers,
            num_attention_heads=hidden // 64, max_position_embeddings=512,
            bos_token_id=None, eos_token_id=0, pad_token_id=1,
        )  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(folder / name)
        fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="t0", pad_token="t1")
        fast.save_pretrained(folder / name)
    for name, number in (("train", 16 * rows), ("eval", 4)):
        ids = torch.randint(2, vocabulary, (number, length)).tolist()
        Dataset.from_list([{"input_ids": row} for row in ids]).to_json(folder / f"{name}.jsonl")
    return {
        "name": size,
        "teacher": {"model": str(folder / "teacher")},
        "student": {"model": str(folder / "student")},
        "data": {name: {"path": str(folder / f"{name}.jsonl")} for name in ("train", "eval")} | {"max_length": length},
        "objective": [{"term": "logits"}, {"term": "labels"}],
        "train": {"max_steps": steps, "per_device_train_batch_size": rows, "logging_steps": 1}
        | {"eval_strategy": "no", "save_strategy": "no"},
        "evaluate": {"baseline": False, "continuations": 0},
        "output": str(folder / "run"),
    }


def measure(what: str, values: dict[str, Any]) -> dict[str, float]:
    """Bytes and seconds a step, as `check` estimates them or as a training takes them."""
    recipe = Recipe.parse(values)
    if what == "check":
        needs = check(recipe)
        return {"bytes": needs.memory_bytes, "seconds": needs.seconds / needs.built.plan.steps}

    def train() -> None:
        built = build_run(recipe)
        Path(recipe.output).mkdir()
        train_student(built, Path(recipe.output), Console(quiet=True))

    found = extra_bytes(train, torch.device("cpu"))
    lines = [json.loads(line) for line in (Path(recipe.output) / "metrics.jsonl").read_text().splitlines()]
    at = {line["step"]: line["seconds"] for line in lines if "loss" in line}
    first, last = min(at) + 1, max(at)  # without the first step
    return {"bytes": found or 0, "seconds": (at[last] - at[first]) / (last - first)}


def main() -> None:
    """Measure, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default=",".join(SIZES))
    parser.add_argument("--steps", type=int, default=12)
    given = parser.parse_args()
    print("| size | memory: estimated | measured | step: estimated | measured |\n|---|---|---|---|---|")
    for size in given.sizes.split(","):
        with tempfile.TemporaryDirectory() as folder, FORK.Pool(1, maxtasksperchild=1) as alone:
            recipe = alone.apply(make, (Path(folder), size, given.steps))
            estimated, took = (alone.apply(measure, (what, recipe)) for what in ("check", "run"))
        memory = " | ".join(words.size(int(one["bytes"])) for one in (estimated, took))
        seconds = " | ".join(f"{one['seconds']:.2f} s" for one in (estimated, took))
        print(f"| {size} | {memory} | {seconds} |", flush=True)


if __name__ == "__main__":
    main()
