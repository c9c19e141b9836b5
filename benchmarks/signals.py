"""Peak memory and step time of each signal, beside plain logits + labels.

    .venv/bin/python benchmarks/signals.py            # 8 x 512 tokens a step: some minutes and 8 GB on 2 cores
    .venv/bin/python benchmarks/signals.py --quick    # 2 x 128: does it run here?

A student of 4 layers of width 256, a teacher of 6 layers of width 512, 32,000 tokens in the vocabulary, random tokens,
float32, AdamW. Each objective is forward KL + labels and the signal, by a loop over `Distiller.step`, in a process of
its own. The time is that of the median step after the first ones, the peak that of the whole process while it trains
(torch's own count on CUDA); "extra" is what of it came after models and optimiser were there.
"""

from __future__ import annotations

import argparse
import sys
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import torch

import measure
from measure import fresh, keep, machine, table
from step import VOCABULARY, model

SIGNALS = [
    "logits + labels",
    "hidden, mse, uniform, linear",
    "hidden, cosine, last layer",
    "hidden, cka, uniform",
    "attention, mse, uniform",
    "attention, KL, last layer",
    "relations, last layer",
    "similarity, distance",
    "similarity, distribution",
    "tokens by entropy",
    "top-k 64",
    "BiLD in place of logits",
    "adaptive KL in place of logits",
    "TAID in place of logits",
]


def objective(name: str) -> list[Any]:
    """The terms of a row."""
    from potstill import (
        TAID,
        AdaptiveKL,
        Attention,
        BiLD,
        ForwardKL,
        Hidden,
        Labels,
        LayerMap,
        Logits,
        Relations,
        Similarity,
    )

    last = LayerMap.last_k(1)
    more = {
        "logits + labels": [],
        "hidden, mse, uniform, linear": [Hidden()],
        "hidden, cosine, last layer": [Hidden(last, "cosine")],
        "hidden, cka, uniform": [Hidden(distance="cka")],
        "attention, mse, uniform": [Attention()],
        "attention, KL, last layer": [Attention(last, ForwardKL())],
        "relations, last layer": [Relations()],
        "similarity, distance": [Similarity()],
        "similarity, distribution": [Similarity(kind="distribution")],
    }
    instead = {
        "tokens by entropy": Logits(ForwardKL(), tokens="entropy"),
        "top-k 64": Logits(ForwardKL(), top_k=64),
        "BiLD in place of logits": BiLD(),
        "adaptive KL in place of logits": AdaptiveKL(),
        "TAID in place of logits": TAID(0.4),
    }
    return [instead.get(name) or Logits(ForwardKL()), Labels(), *more.get(name, [])]


def train(name: str, device: str, rows: int, length: int, steps: int, skipped: int) -> dict[str, Any]:
    """The median step's seconds, the peak, and what of it came after the start."""
    from potstill import Distiller

    teacher = model((512, 6), 2)
    with torch.no_grad():  # 4 nats a token, about as sure as a trained model: what adaptive KL costs depends on it
        teacher.lm_head.weight.mul_(8)
    distiller = Distiller(model((256, 4), 1), teacher.to(device), objective(name)).to(device)
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(VOCABULARY, (rows, length), generator=generator).to(device) for _ in range(steps)]
    batches = [{"input_ids": x, "attention_mask": torch.ones_like(x), "labels": x} for x in ids]
    return measure.steps(distiller, batches, device, skipped=skipped)


def show(results: dict[str, Any]) -> str:
    """A line by signal, its ratios to the first in brackets."""
    first = next(iter(results.values()))
    cells = []
    for name, result in results.items():
        if isinstance(result, str):
            cells.append([name, result, "", ""])
            continue
        memory = [
            "not measured" if result[key] is None else f"{result[key] / 2**30:.2f} ({result[key] / first[key]:.2f})"
            for key in ("peak_bytes", "extra_bytes")
        ]
        cells.append([name, f"{result['seconds'] * 1000:,.0f} ({result['seconds'] / first['seconds']:.2f})", *memory])
    return table(["forward KL + labels, and", "step, ms", "peak, GB", "extra, GB"], cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--skipped", type=int, default=2, help="first steps that are not timed")
    parser.add_argument("--only", nargs="+", choices=SIGNALS, default=SIGNALS)
    parser.add_argument("--quick", action="store_true", help="batches of 2 x 128")
    parser.add_argument("--out", type=Path, help="also as JSON")
    args = parser.parse_args()
    rows, length = (2, 128) if args.quick else (args.rows, args.length)

    system = machine(args.device)
    setting = {"rows": rows, "length": length, "steps": args.steps, "skipped": args.skipped}
    results: dict[str, Any] = {}
    for name in args.only:
        try:
            results[name] = fresh(train, name, args.device, rows, length, args.steps, args.skipped)
        except BrokenProcessPool:
            results[name] = "out of memory"
        keep(args.out, {"command": " ".join(sys.argv), "machine": system, "setting": setting, "results": results})
        print(name, results[name], file=sys.stderr, flush=True)
    print("\n".join(f"{key}: {value}" for key, value in system.items()))
    print(f"float32, {rows} x {length} tokens, {args.steps} steps, {args.skipped} not timed\n\n{show(results)}")


if __name__ == "__main__":
    main()
