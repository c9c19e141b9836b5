"""The offline demonstration: a small teacher, its tokenizer, a recipe, and the standard library's source as data."""

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
    "data.max_length=64",  # shorter rows and smaller batches: in a minute, more steps teach more than larger ones
    "train.per_device_train_batch_size=4",
    "train.max_steps=200",
    "train.warmup_steps=30",
    "evaluate.continuations=1",
    "evaluate.curve_rows=16",
)


def demo_recipe(out: Path, sets: Iterable[str] = (), *, fast: bool = False) -> Recipe:
    """Write the demo's data beside the run and return its recipe, ready for `pipeline.run`.

    Args:
        out: the run directory.
        sets: changes to the recipe, as `Recipe.load` takes them.
        fast: a minute in place of a quarter of an hour, for a first look; its name says so, and so does its report.
    """
    here = Path(str(files("potstill.demo")))
    data = out / "data"
    data.mkdir(parents=True, exist_ok=True)
    write_jsonl(data / "train.jsonl", "transfer", FAST_CHARACTERS["transfer"] if fast else TRANSFER_CHARACTERS)
    write_jsonl(data / "eval.jsonl", "heldout", FAST_CHARACTERS["heldout"] if fast else None)
    places = [
        f"teacher.model={here / 'teacher'}",
        f"data.train.path={data / 'train.jsonl'}",
        f"data.eval.path={data / 'eval.jsonl'}",
        f"output={out}",
    ]
    return Recipe.load(here / "recipe.yaml", [*places, *(FAST if fast else ()), *sets])
