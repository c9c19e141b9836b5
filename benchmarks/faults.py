"""Faults at scale: .venv/bin/python benchmarks/faults.py [PART ...]

Each part tries one kind of fault many times: kills, full disks, flipped bytes, malformed input. What each case showed
goes to OUT/PART.jsonl as it is tried, and is not tried again; what is drawn comes from --seed. Prints a Markdown table:
cases, and those in which the program did what docs/reliability.md promises. The exit status is 1 if any did not.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import faults_corruption
import faults_disk
import faults_memory
from drill import Drill

PARTS: dict[str, Callable[[Drill], None]] = {
    "disk-full": faults_disk.disk_full,
    "disk-small": faults_disk.disk_small,
    "disk-read-only": faults_disk.disk_read_only,
    "disk-errors": faults_disk.disk_errors,
    "file-handles": faults_disk.file_handles,
    "memory": faults_memory.memory,
    "corrupt-caches": faults_corruption.caches,
    "corrupt-begun-caches": faults_corruption.begun_caches,
    "corrupt-encoded-data": faults_corruption.encoded_data,
    "corrupt-checkpoints": faults_corruption.checkpoints,
    "corrupt-students": faults_corruption.students,
    "corrupt-journals": faults_corruption.journals,
    "corrupt-embedding-checkpoints": faults_corruption.embedding_checkpoints,
    "cut-files": faults_corruption.truncated,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", default=[*PARTS], help=", ".join(PARTS))
    parser.add_argument("--out", type=Path, default=Path("runs/bench-faults"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, help="cases of each part; by default as many as docs/reliability.md has")
    args = parser.parse_args()
    if unknown := [name for name in args.parts if name not in PARTS]:
        parser.error(f"no part {unknown[0]}: expected {', '.join(PARTS)}")
    drills = [Drill(name, args.out, args.seed, args.count) for name in args.parts]
    for drill in drills:
        PARTS[drill.name](drill)
    print("| part | cases | held |\n|---|---|---|")
    for drill in drills:
        print(f"| {drill.name} | {len(drill.rows)} | {sum(row['held'] for row in drill.rows)} |")
    sys.exit(any(not row["held"] for drill in drills for row in drill.rows))


if __name__ == "__main__":
    main()
