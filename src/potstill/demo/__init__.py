"""The offline demonstration: a small teacher, its tokenizer, a recipe, and the standard library's source as data."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path

from potstill.demo.corpus import write_jsonl
from potstill.recipe import Recipe

TRANSFER_CHARACTERS = 640_000  # about 200,000 tokens


def demo_recipe(out: Path, sets: Iterable[str] = ()) -> Recipe:
    """Write the demo's data beside the run and return its recipe, ready for `pipeline.run`.

    Args:
        out: the run directory.
        sets: changes to the recipe, as `Recipe.load` takes them.
    """
    here = Path(str(files("potstill.demo")))
    data = out / "data"
    data.mkdir(parents=True, exist_ok=True)
    write_jsonl(data / "train.jsonl", "transfer", TRANSFER_CHARACTERS)
    write_jsonl(data / "eval.jsonl", "heldout")
    places = [
        f"teacher.model={here / 'teacher'}",
        f"data.train.path={data / 'train.jsonl'}",
        f"data.eval.path={data / 'eval.jsonl'}",
        f"output={out}",
    ]
    return Recipe.load(here / "recipe.yaml", [*places, *sets])
