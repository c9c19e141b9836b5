"""Peak memory of the loss and of a training step by the length of a row: .venv/bin/python benchmarks/long_rows.py

One row of so many random tokens; a student of 2 layers of width 64, a teacher of 2 layers of width 128, 32,000 tokens
in the vocabulary, forward KL and labels, float32, AdamW. The loss is `linear_divergence` alone, forward and backward:
what it takes above the hidden states, the heads and their gradients. A step is one of `Distiller.step` after a short
first one, with and without gradient checkpointing: what it takes above the models. Each figure is measured in a process
of its own (of the whole process; torch's own count on CUDA) and appended to OUT/rows.jsonl: a run that was stopped goes
on.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

import losses
import measure
from measure import Record, fresh, machine, mb, table

WAYS = ("loss", "step", "step, checkpointing")
STUDENT, TEACHER = (64, 2), (128, 2)


def extra(way: str, length: int, device: str) -> dict[str, Any]:
    """Extra bytes and seconds."""
    from step import VOCABULARY, model

    if way == "loss":
        row = losses.Row("long", length, STUDENT[0], TEACHER[0], VOCABULARY, "forward KL", "float32", device)
        size, seconds = losses.once(row, measure.backends(device)[0])
        return {"bytes": size, "seconds": seconds}
    from potstill import Distiller, ForwardKL, Labels, Logits

    teacher = model(TEACHER, 2).to(device)
    distiller = Distiller(model(STUDENT, 1), teacher, [Logits(ForwardKL()), Labels()]).to(device).train()
    if "checkpointing" in way:
        distiller.activation_checkpointing_enable()
    ids = torch.randint(VOCABULARY, (1, length), generator=torch.Generator().manual_seed(0)).to(device)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    short = {name: column[:, :64] for name, column in batch.items()}
    found = measure.steps(distiller, [short, batch], device, skipped=1)
    return {"bytes": found["extra_bytes"], "seconds": found["seconds"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 8192, 32768])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--out", type=Path, default=Path("runs/bench-long-rows"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    record = Record(args.out / "rows.jsonl")
    for length in args.lengths:
        for way in args.ways:
            if not record.has(way=way, length=length):
                record.add(way=way, length=length, **fresh(extra, way, length, args.device))
    print("\n".join(f"{key}: {value}" for key, value in machine(args.device).items()) + "\n")
    found = {(line["way"], line["length"]): line for line in record.lines}
    cells = []
    for length in args.lengths:
        lines = [found[way, length] for way in args.ways]
        cells.append([f"{length:,}", *(mb(line["bytes"]) for line in lines), *(f"{x['seconds']:.1f}" for x in lines)])
    print(table(["tokens", *(f"{way}, MB" for way in args.ways), *(f"{way}, s" for way in args.ways)], cells))


if __name__ == "__main__":
    main()
