"""A teacher with another tokenizer, on the demo's task: .venv/bin/python benchmarks/crosstok.py

The demo's teacher (2,048 tokens of byte-level BPE) teaches two students with tokenizers of their own, made on the
transfer set: one whose tokens are bytes, and one with 1,024 tokens. Each student is trained by chunks (ALM) alone, by
chunks and labels, by ULD and labels, by mapped logits and labels, and by labels alone, from the same first weights, for
as many steps and on the same text. Prints bits per byte on the held-out files as Markdown.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from potstill.demo.corpus import write_jsonl
from potstill.runs.config.run import Recipe
from potstill.runs.run import run
from task import stdlib_task

LABELS = {"term": "labels"}
OBJECTIVES: dict[str, list[dict[str, Any]]] = {
    "chunks + labels": [{"term": "chunks"}, LABELS],  # the run whose baseline is labels alone
    "chunks": [{"term": "chunks"}],
    "chunks + labels, biased chunks merged": [{"term": "chunks", "biased": "merge"}, LABELS],
    "chunks + labels, biased chunks kept": [{"term": "chunks", "bias_threshold": 1.0}, LABELS],
    "ULD + labels": [{"term": "uld", "weight": 1.5}, LABELS],
    "mapped logits + labels": [{"term": "mapped_logits", "top_k": 1024}, LABELS],
}
# name -> tokens of the tokenizer (two are special), rows in a step, tokens in a row: about 1 kB of text a step
STUDENTS = {"bytes": (258, 4, 256), "BPE 1,024": (1024, 4, 100)}


def make_tokenizer(texts: list[str], size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE with so many tokens; with 258 of them none is longer than a byte."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<|endoftext|>", "<|pad|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|pad|>")


def one_run(student: str, objective: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """The summary of one student."""
    size, rows, length = STUDENTS[student]
    words = f"{student}-{objective}-seed{seed}".replace(" ", "").replace(",", "")
    out = args.out / words
    recipe = stdlib_task(out, [f"seed={seed}"])
    held_out = out / "heldout.jsonl"
    write_jsonl(held_out, args.split, args.characters)
    folder = out / "tokenizer"
    if not folder.exists():
        lines = Path(recipe.data.train.path).read_text(encoding="utf-8").splitlines()
        make_tokenizer([json.loads(line)["text"] for line in lines], size).save_pretrained(folder)
    values = recipe.model_dump(exclude_none=True)
    values["student"]["tokenizer"] = str(folder)
    values["data"] |= {"eval": {"path": str(held_out), "field": "text"}, "max_length": length}
    values["objective"] = OBJECTIVES[objective]
    values["train"] |= {
        "max_steps": args.steps,
        "warmup_steps": args.steps // 6,
        "per_device_train_batch_size": rows,
        "eval_strategy": "no",
    }
    values["evaluate"] = {"baseline": objective == "chunks + labels", "continuations": 0, "curve_rows": 16}
    return run(Recipe.parse(values), resume=True).summary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--students", nargs="+", choices=[*STUDENTS], default=[*STUDENTS], metavar="STUDENT")
    parser.add_argument("--objectives", nargs="+", choices=[*OBJECTIVES], default=[*OBJECTIVES], metavar="OBJECTIVE")
    parser.add_argument("--split", choices=["heldout", "dev"], default="heldout")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--characters", type=int, default=100_000, help="of held-out text")
    parser.add_argument("--out", type=Path, default=Path("runs/bench-crosstok"))
    args = parser.parse_args()
    print("| student | trained with | " + " | ".join(f"seed {seed}" for seed in args.seeds) + " | mean |")
    print("|---|---|" + "---|" * (len(args.seeds) + 1))
    for student in args.students:
        for objective in args.objectives:
            found = [one_run(student, objective, seed, args)["rows"] for seed in args.seeds]
            named = {"student": objective, "baseline": "labels", "teacher": "(the teacher)"}
            for model, words in named.items():
                if model in found[0] and (model == "student" or "baseline" in found[0]):
                    bits = [rows[model]["bits_per_byte"] for rows in found]
                    cells = " | ".join(f"{value:.3f}" for value in bits)
                    print(f"| {student} | {words} | {cells} | {statistics.mean(bits):.3f} |", flush=True)


if __name__ == "__main__":
    main()
