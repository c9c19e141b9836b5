"""How a student should begin, on the demo's task: .venv/bin/python benchmarks/initialize.py

Students of two shapes, one narrower and shallower than the teacher and one as wide with a single layer, begin with
random weights or with the teacher's, and are distilled alike. Prints the held-out loss at the end, and the tokens
that each needed to reach the loss at which the random start of its shape ends, as Markdown.
"""

from __future__ import annotations

import argparse
import json
import statistics
from itertools import pairwise
from pathlib import Path

from potstill.runs.run import run
from task import stdlib_task

NARROW = "{hidden_size: 128, intermediate_size: 344, num_hidden_layers: 3, num_attention_heads: 2}"
SHALLOW = "{num_hidden_layers: 1}"
STARTS = {
    "narrow, random": (NARROW, "random"),
    "narrow, truncated": (NARROW, "truncate"),
    "narrow, pruned": (NARROW, "prune"),
    "shallow, random": (SHALLOW, "random"),
    "shallow, copied": (SHALLOW, "copy"),
}


def curve(name: str, seed: int, args: argparse.Namespace) -> list[tuple[int, float]]:
    """(tokens, held-out loss) of one student at every evaluation; the last is over all held-out rows."""
    shape, method = STARTS[name]
    out = args.out / f"{name.replace(' ', '-').replace(',', '')}-seed{seed}"
    sets = [f"student.design={shape}", f"student.initialize={method}", f"seed={seed}", f"train.max_steps={args.steps}"]
    sets += [
        f"train.warmup_steps={args.steps // 10}",
        "train.eval_strategy=steps",
        f"train.eval_steps={args.steps // 15}",
    ]
    sets += ["evaluate={baseline: false, continuations: 0, curve_rows: 64}", *args.set]
    result = run(stdlib_task(out, sets), resume=True)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    by_step = {line["step"]: line["eval_cross_entropy"] for line in lines if "eval_cross_entropy" in line}
    tokens = result.summary["training"]["tokens_per_step"]
    return [(step * tokens, loss) for step, loss in sorted(by_step.items())]


def reached(points: list[tuple[int, float]], target: float) -> float | None:
    """The tokens at which a curve, straight between its points, first comes down to a loss."""
    for (start, high), (end, low) in pairwise(points):
        if low <= target < high:
            return start + (end - start) * (high - target) / (high - low)
    return float(points[0][0]) if points[0][1] <= target else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--starts", nargs="+", choices=[*STARTS], default=[*STARTS], metavar="START")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--out", type=Path, default=Path("runs/bench-initialize"))
    args = parser.parse_args()
    curves = {name: [curve(name, seed, args) for seed in args.seeds] for name in args.starts}

    print("| start | first evaluation | final loss | tokens to the random start's final loss | of its tokens |")
    print("|---|---|---|---|---|")
    for name, seeds in curves.items():
        randoms = curves[f"{name.split(',')[0]}, random"]
        needed = [reached(one, random[-1][1]) for one, random in zip(seeds, randoms, strict=True)]
        first, last = (statistics.mean(one[place][1] for one in seeds) for place in (0, -1))
        known = [one for one in needed if one is not None]
        tokens = f"{statistics.mean(known):,.0f}" if len(known) == len(needed) else "not reached"
        share = f"{statistics.mean(known) / randoms[0][-1][0]:.0%}" if len(known) == len(needed) else ""
        print(f"| {name} | {first:.3f} | {last:.3f} | {tokens} | {share} |")


if __name__ == "__main__":
    main()
