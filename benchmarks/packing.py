"""Training steps on packed rows against padded ones, on chats: .venv/bin/python benchmarks/packing.py

Worked solutions of GSM8K as chats, in the template of MODEL. One step is forward and backward of a student, and forward
of a teacher, by KL and labels: of random rows that are padded, and of bins with about as many tokens that are packed.
`small` are two models of 4 layers with a width of 256 and the vocabulary of MODEL, `model` is MODEL as both. Steps take
turns, and their CPU time is appended to OUT as it is measured: a run that was stopped goes on. Prints tokens per second
(without padding) as Markdown.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

from potstill.data.batches import PaddingCollator, encode, pad_token_id
from potstill.data.packing import PackedRows
from potstill.data.sources import Source
from potstill.losses.divergences import ForwardKL
from potstill.models.loading import load_model, load_tokenizer
from potstill.train.distiller import Distiller
from potstill.train.terms.logits import Labels, Logits

# (models, tokens of a packed row, rows of a padded batch)
CASES = [("small", 512, 8), ("small", 512, 32), ("small", 1024, 8), ("model", 512, 8), ("model", 512, 16)]


def chats(path: Path, tokenizer: Any, folder: Path) -> Any:
    """The rows of GSM8K as encoded chats."""
    file = folder / "chats.jsonl"
    with file.open("w", encoding="utf-8") as out:
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            turns = [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}]
            out.write(json.dumps({"messages": turns}) + "\n")
    return encode(Source(file), tokenizer, max_length=512).dataset


def two_models(kind: str, name: str, tokenizer: Any, dtype: str) -> tuple[Any, Any]:
    """A student and a teacher."""
    if kind == "model":
        return tuple(load_model(name, "model", dtype) for _ in range(2))  # type: ignore[return-value]
    set_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 4}
    config, precision = LlamaConfig(vocab_size=len(tokenizer), **sizes), getattr(torch, dtype)
    return LlamaForCausalLM(config).to(precision), LlamaForCausalLM(config).to(precision)


def of_case(lines: list[Any], case: tuple[str, int, int], packed: int, dtype: str) -> list[Any]:
    """The steps of a case that were timed."""
    return [x for x in lines if (x["case"], x["packed"], x["dtype"]) == ([*case], packed, dtype)]


def measure(case: tuple[str, int, int], rows: Any, tokenizer: Any, args: argparse.Namespace, done: list[Any]) -> None:
    """Time the steps of a case that have not been timed yet, padded and packed ones in turn."""
    kind, length, batch_rows = case
    bins, random = PackedRows(rows, length), np.random.default_rng(0)
    num_bins = max(1, round(batch_rows * bins.lengths.mean() / (bins.lengths.sum() / len(bins))))
    orders = random.permutation(len(rows)), random.permutation(len(bins))
    timed = [len(of_case(done, case, packed, args.dtype)) for packed in (0, 1)]
    if min(timed) >= args.steps:
        return
    student, teacher = two_models(kind, args.model, tokenizer, args.dtype)
    objective, collate = [Logits(ForwardKL()), Labels()], PaddingCollator(pad_token_id(tokenizer)[0])
    distiller = Distiller(student, teacher, objective, vocabulary=len(tokenizer), packed_length=length).train()
    for step in range(-1, args.steps):  # the first is not counted
        for packed in (False, True):
            if 0 <= step < timed[packed]:
                continue
            size, data = (num_bins, bins) if packed else (batch_rows, rows)
            batch = collate([data[int(i)] for i in orders[packed][(step + 1) * size : (step + 2) * size]])
            distiller.packed_length = length if packed else None
            start = time.process_time()
            distiller.step(batch).loss.backward()
            seconds = time.process_time() - start
            tokens = int(batch["attention_mask"].sum())
            line = {"case": case, "packed": int(packed), "tokens": tokens, "seconds": round(seconds, 3)}
            line |= {"dtype": args.dtype}
            if step >= 0:
                with args.out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")
            student.zero_grad()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="a folder or a name on the hub")
    parser.add_argument("--data", type=Path, default=Path("../shared/data/gsm8k-train.jsonl"))
    parser.add_argument("--models", nargs="+", choices=["small", "model"], default=["small", "model"])
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--steps", type=int, default=4, help="of each kind, beside a first one that is not counted")
    parser.add_argument("--out", type=Path, default=Path("runs/bench-packing/steps.jsonl"))
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    tokenizer = load_tokenizer(args.model, "model")
    rows = chats(args.data, tokenizer, args.out.parent)
    print("| models | packed row | padded batch | tokens among positions | padded | packed | ratio |")
    print("|---" * 7 + "|")
    for case in [case for case in CASES if case[0] in args.models]:
        done = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out.exists() else []
        measure(case, rows, tokenizer, args, done)
        done = [json.loads(line) for line in args.out.read_text().splitlines()]
        shares = PackedRows(rows, case[1]).shares(case[2])
        speeds = []
        for packed in (0, 1):
            steps = of_case(done, case, packed, args.dtype)
            speeds.append(sum(row["tokens"] for row in steps) / sum(row["seconds"] for row in steps))
        filled = " → ".join(f"{share:.0%}" for share in shares)
        cells = [case[0], f"{case[1]} tokens", f"{case[2]} rows", filled, *(f"{speed:,.0f}" for speed in speeds)]
        print(f"| {' | '.join(cells)} | {speeds[1] / speeds[0]:.2f} |", flush=True)


if __name__ == "__main__":
    main()
