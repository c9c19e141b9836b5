"""The directory of a run: whether it is free, its recipe, and the notes on the terminal as it starts."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from rich.console import Console

from potstill.data.files import write_text
from potstill.errors import RecipeError
from potstill.runs.config.document import Document


def check_directory(directory: Path, recipe: Document, resume: bool) -> None:
    """Check that a run directory holds no training, or one of the same recipe to resume.

    Raises:
        RecipeError: it holds another run.
    """
    record = directory / "recipe.yaml"
    if not record.exists() or not (directory / "metrics.jsonl").exists():
        return
    if not resume:
        raise RecipeError(
            f"output: expected an empty or new directory, got {directory}, which holds a run. "
            "Resume it with --resume, or choose another with --set output=DIR."
        )
    earlier = type(recipe).load(record)
    if changed := [key for key, value in recipe if value != getattr(earlier, key)]:
        raise RecipeError(
            f"output: expected the recipe that the run in {directory} began with, got another "
            f"{', '.join(changed)}. Use {record}, or choose another directory with --set output=DIR."
        )


def start_directory(directory: Path, recipe: Document) -> None:
    """Create a run directory with the resolved recipe."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        write_text(directory / "recipe.yaml", recipe.dump())
    except OSError as error:
        raise RecipeError(
            f"output: expected a directory to write to, got {directory}: {error.strerror}. "
            "Choose another with --set output=DIR."
        ) from None


def print_notes(notes: Iterable[str], console: Console) -> None:
    for note in notes:
        console.print(note, style="dim", highlight=False, markup=False)
