"""The task that several benchmarks share: a student from random weights learns from the demo's live teacher."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from potstill.demo.corpus import write_jsonl
from potstill.demo.recipe import TEACHER
from potstill.runs.config.run import Recipe

TRANSFER_CHARACTERS = 640_000  # about 200,000 tokens


def stdlib_task(out: Path, sets: Iterable[str] = ()) -> Recipe:
    """Write the task's data into the run directory `out` and load its recipe with the overrides `sets`."""
    data = out / "data"
    data.mkdir(parents=True, exist_ok=True)
    write_jsonl(data / "train.jsonl", "transfer", TRANSFER_CHARACTERS)
    write_jsonl(data / "eval.jsonl", "heldout")
    paths = [
        f"teacher.model={TEACHER}",
        f"data.train.path={data / 'train.jsonl'}",
        f"data.eval.path={data / 'eval.jsonl'}",
        f"output={out}",
    ]
    return Recipe.load(Path(__file__).with_name("stdlib.yaml"), [*paths, *sets])
