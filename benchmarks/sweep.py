"""Students of the demo's teacher, how small against how good: .venv/bin/python benchmarks/sweep.py

Four sizes, each with random weights and pruned from the teacher, in a sweep of short runs. What it leaves is what
`potstill sweep` leaves: sweep.html, sweep.json and a run directory for each student. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from potstill.demo.corpus import write_jsonl
from potstill.runs.sweep import read_axes, sweep
from task import stdlib_task


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument(
        "--vary", nargs="+", default=["student.design.compression=2,4,8,16", "student.initialize=random,prune"]
    )
    parser.add_argument("--held-out", type=int, default=120_000, help="characters of the held-out files")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--out", type=Path, default=Path("runs/bench-sweep"))
    args = parser.parse_args()
    sets = [
        "student.design={compression: 2, keep: balanced}",
        f"train.max_steps={args.steps}",
        f"train.warmup_steps={args.steps // 10}",
    ]
    sets += ["evaluate={baseline: false, continuations: 0, curve_rows: 64}", *args.set]
    values = stdlib_task(args.out / "demo", sets).model_dump(mode="json", exclude_none=True)
    write_jsonl(args.out / "demo" / "data" / "eval.jsonl", "heldout", args.held_out)
    found = sweep(values, read_axes(args.vary), args.out, resume=True).summary

    print("| student | parameters | latency | loss | quality | predicted from the others | on the Pareto front of |")
    print("|---|---|---|---|---|---|---|")
    for place, (row, prediction) in enumerate(zip(found["runs"], found["predictions"], strict=True)):
        fitted = prediction["fitted"]
        predicted = f"{fitted['value']:.1%} ({fitted['low']:.1%} to {fitted['high']:.1%})" if fitted else ""
        fronts = ", ".join(key.removesuffix("_ms") for key, places in found["fronts"].items() if place in places)
        figures = f"{row['parameters']:,} | {row['latency_ms']:.1f} ms | {row['loss']:.3f} | {row['quality']:.1%}"
        print(f"| {row['label']} | {figures} | {predicted} | {fronts} |")
    print(f"\n{found['recommended']['why']}")


if __name__ == "__main__":
    main()
