"""What the parts of `faults.py` share: a folder, cases drawn from a seed, and a line for each case that was tried."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Case:
    """One fault: what is drawn for it comes from its own generator, so that each can be tried again alone."""

    number: int
    folder: Path
    rng: random.Random


class Drill:
    """One part of the faults: `held` is whether the program did what it promises."""

    def __init__(self, name: str, out: Path, seed: int, count: int | None) -> None:
        self.name, self.seed, self.count = name, seed, count
        self.folder, self.path = out / name, out / f"{name}.jsonl"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.read()

    def read(self) -> None:
        """Read the cases that were tried, by other processes too."""
        self.rows = [json.loads(line) for line in self.path.read_text().splitlines()] if self.path.exists() else []

    def cases(self, count: int) -> Iterator[Case]:
        """The cases that were not tried yet, of so many (--count takes fewer); each has an empty folder of its own."""
        tried = {row["case"] for row in self.rows}
        for number in range(min(count, self.count or count)):
            if number not in tried:
                folder = self.folder / f"case-{number}"
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                yield Case(number, folder, random.Random(f"{self.name} {self.seed} {number}"))

    def note(self, case: int, held: bool, **facts: Any) -> None:
        """Write what a case showed; the folder of one that held is removed, that of another is kept to look at."""
        self.rows.append({"case": case, "held": held, **facts})
        with self.path.open("a") as file:
            file.write(json.dumps(self.rows[-1], default=str) + "\n")
        if held:
            shutil.rmtree(self.folder / f"case-{case}", ignore_errors=True)
        else:
            print(f"{self.name}, case {case}: {facts}", flush=True)
