"""The demo's teacher in fewer bits: memory, its own loss, and how far it is from itself in float32.

.venv/bin/python benchmarks/precision.py            # a minute on one core
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

from measure import keep, machine, mb, table
from potstill import ForwardKL, ModelTeacher, token_divergence
from potstill.data.batches import encode, in_batches
from potstill.data.sources import Source
from potstill.losses.alignment import causal_alignment
from potstill.losses.targets import DenseTargets
from potstill.models.loading import load_model, load_tokenizer, suppress_warnings
from task import stdlib_task

KINDS: dict[str, tuple[str, int | None]] = {
    "float32": ("float32", None),
    "bfloat16": ("bfloat16", None),
    "int8": ("auto", 8),
    "int4": ("auto", 4),
}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=64, help="held-out rows of 128 tokens")
    parser.add_argument("--out", type=Path, default=Path("runs/bench-precision"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    recipe = stdlib_task(args.out)
    where = str(recipe.teacher.model)
    tokenizer = load_tokenizer(where, "teacher.model")
    rows = encode(Source(recipe.data.eval.path, field="text"), tokenizer, max_length=128, packing=True).dataset
    chosen = rows.select([i * len(rows) // args.rows for i in range(args.rows)])
    exact: list[torch.Tensor] = []
    cells = []
    for name, (dtype, bits) in KINDS.items():
        with suppress_warnings():
            model = load_model(where, "teacher.model", dtype, bits=bits)
            teacher = ModelTeacher(model)
            spent = loss = apart = 0.0
            tokens = 0
            for place, batch in enumerate(in_batches(chosen, tokenizer, 16)):
                alignment = causal_alignment(batch["labels"])
                start = time.process_time()
                logits = teacher(batch, alignment).targets.dense().float()
                spent += time.process_time() - start
                if name == "float32":
                    exact.append(logits)
                loss -= float(logits.log_softmax(-1).gather(-1, alignment.labels[:, None]).sum())
                apart += float(token_divergence(logits, DenseTargets(exact[place]), ForwardKL()).sum())
                tokens += len(alignment)
        size = mb(model.get_memory_footprint())
        cells.append([name, size, f"{loss / tokens:.4f}", f"{apart / tokens:.4f}", f"{tokens / spent:,.0f}"])
    header = ["precision", "MB", "loss", "KL(float32 || it)", "tokens/s of the forward pass, processor time"]
    results = {"machine": machine("cpu"), "rows": [dict(zip(header, row, strict=True)) for row in cells]}
    keep(args.out / "results.json", results)
    print(table(header, cells))


if __name__ == "__main__":
    main()
