"""Faults at scale: .venv/bin/python benchmarks/faults.py [PART ...]

Each part tries one kind of fault many times: kills, full disks, flipped bytes, malformed input. What each case showed
goes to OUT/PART.jsonl as it is tried, and is not tried again; what is drawn comes from --seed. Prints a Markdown table:
cases, and those in which the program did what docs/reliability.md promises. The exit status is 1 if any did not.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import faults_corruption
import faults_disk
import faults_fuzz
import faults_kills
import faults_memory
import faults_ranks
import faults_servers
from drill import Drill

MODULES = (faults_kills, faults_ranks, faults_disk, faults_memory, faults_corruption, faults_fuzz, faults_servers)
PARTS: dict[str, Callable[[Drill], None]] = {name: part for module in MODULES for name, part in module.PARTS.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", default=[*PARTS], help=", ".join(PARTS))
    parser.add_argument("--out", type=Path, default=Path("runs/bench-faults"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, help="cases of each part; by default as many as docs/reliability.md has")
    parser.add_argument("--jobs", type=int, default=1, help="parts at a time")
    args = parser.parse_args()
    if unknown := [name for name in args.parts if name not in PARTS]:
        parser.error(f"no part {unknown[0]}: expected {', '.join(PARTS)}")
    drills = [Drill(name, args.out, args.seed, args.count) for name in args.parts]
    if args.jobs == 1:
        for drill in drills:
            PARTS[drill.name](drill)
    else:
        with ThreadPoolExecutor(args.jobs) as pool:
            list(pool.map(lambda drill: PARTS[drill.name](drill), drills))
    print("| part | cases | held |\n|---|---|---|")
    for drill in drills:
        print(f"| {drill.name} | {len(drill.rows)} | {sum(row['held'] for row in drill.rows)} |")
    sys.exit(any(not row["held"] for drill in drills for row in drill.rows))


if __name__ == "__main__":
    main()
