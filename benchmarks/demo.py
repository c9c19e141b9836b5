"""What a student from random weights keeps of the demo's teacher, over seeds: .venv/bin/python benchmarks/demo.py

For each seed three students with the same first weights and number of steps: distilled on the transfer set, trained
on its labels alone (the baseline), and trained on the labels of ten times as much data. Prints a Markdown table.
Choose hyperparameters with `--split dev --set KEY=VALUE`; the held-out files are for the figures that are reported.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from potstill.demo.corpus import write_jsonl
from potstill.runs.config.run import Recipe
from potstill.runs.run import run
from task import TRANSFER_CHARACTERS, stdlib_task


def ten_times(path: Path) -> None:
    """The transfer set and nine times as much of the teacher's corpus."""
    parts = [path.with_suffix(f".{split}") for split in ("transfer", "teacher")]
    write_jsonl(parts[0], "transfer", TRANSFER_CHARACTERS)
    write_jsonl(parts[1], "teacher", 9 * TRANSFER_CHARACTERS)
    path.write_text("".join(part.read_text(encoding="utf-8") for part in parts), encoding="utf-8")


def one_seed(seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """The held-out rows of one seed: teacher, student, baseline and ten_times."""
    out = args.out / f"seed{seed}"
    sets = [f"seed={seed}", "evaluate.continuations=0", *args.set]
    distilled = stdlib_task(out / "run", sets)
    held_out = out / "heldout.jsonl"
    write_jsonl(held_out, args.split)
    values = distilled.model_dump(exclude_none=True)
    values["data"]["eval"]["path"] = str(held_out)
    rows: dict[str, Any] = run(Recipe.parse(values), resume=True).summary["rows"]
    if args.ten_times:
        ten_times(out / "ten_times.jsonl")
        values["data"]["train"]["path"] = str(out / "ten_times.jsonl")
        values |= {"objective": [{"term": "labels"}], "output": str(out / "ten_times")}
        values["evaluate"] = {"baseline": False, "continuations": 0}
        rows["ten_times"] = run(Recipe.parse(values), resume=True).summary["rows"]["student"]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--split", choices=["heldout", "dev"], default="heldout")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--out", type=Path, default=Path("runs/bench-demo"))
    parser.add_argument("--no-ten-times", dest="ten_times", action="store_false")
    args = parser.parse_args()
    seeds = {seed: one_seed(seed, args) for seed in args.seeds}
    (args.out / "rows.json").write_text(json.dumps(seeds, indent=2) + "\n")

    print("| model | " + " | ".join(f"seed {seed}" for seed in seeds) + " | mean loss | perplexity | agreement | KL |")
    print("|---|" + "---|" * (len(seeds) + 4))
    means: dict[str, float] = {}
    for name in next(iter(seeds.values())):
        rows = [rows[name] for rows in seeds.values()]
        mean = {key: statistics.mean(row[key] for row in rows) for key in ("loss", "perplexity", "agreement", "kl")}
        means[name] = mean["loss"]
        losses = " | ".join(f"{row['loss']:.3f}" for row in rows)
        print(
            f"| {name} | {losses} | {mean['loss']:.3f} | {mean['perplexity']:.1f} | {mean['agreement']:.1%} "
            f"| {mean['kl']:.3f} |"
        )
    closed = (means["baseline"] - means["student"]) / (means["baseline"] - means["teacher"])
    print(f"\ngap closed, by the mean losses: {closed:.3f}")


if __name__ == "__main__":
    main()
