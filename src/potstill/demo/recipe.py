"""The recipe of `potstill demo`."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path

from potstill.demo.corpus import write_jsonl
from potstill.runs.config.run import Recipe

TRANSFER_CHARACTERS = 640_000  # about 200,000 tokens
FAST_CHARACTERS = {"transfer": 160_000, "heldout": 30_000}
FAST = (
    "name=stdlib in a minute (demo --fast), with fewer steps and less text than the figures of the README",
    "data.max_length=64",  # within a minute, more small steps teach more than fewer large ones
    "train.per_device_train_batch_size=4",
    "train.max_steps=200",
    "train.warmup_steps=30",
    "evaluate.continuations=1",
    "evaluate.curve_rows=16",
)


def demo_recipe(out: Path, sets: Iterable[str] = (), *, fast: bool = False) -> Recipe:
    """Write the demo's data into the run directory `out` and load its recipe with the overrides `sets`.

    Fast is one minute in place of a quarter of an hour; the name of the run, and so its report, says so.
    """
    package, data = Path(str(files("potstill.demo"))), out / "data"
    data.mkdir(parents=True, exist_ok=True)
    write_jsonl(data / "train.jsonl", "transfer", FAST_CHARACTERS["transfer"] if fast else TRANSFER_CHARACTERS)
    write_jsonl(data / "eval.jsonl", "heldout", FAST_CHARACTERS["heldout"] if fast else None)
    paths = [
        f"teacher.model={package / 'teacher'}",
        f"data.train.path={data / 'train.jsonl'}",
        f"data.eval.path={data / 'eval.jsonl'}",
        f"output={out}",
    ]
    return Recipe.load(package / "recipe.yaml", [*paths, *(FAST if fast else ()), *sets])
