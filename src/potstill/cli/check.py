"""The command `potstill check`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from potstill.cli.app import Imports, RecipePath, Sets, app, print_facts
from potstill.cli.embedding import check_embedding, kind_of
from potstill.cli.generate import check_generate
from potstill.cli.schema import KINDS
from potstill.errors import UserError


@app.command()
def check(recipe: RecipePath, set_: Sets = None, import_: Imports = None) -> None:
    """Validate a recipe with its data and models, and estimate its cost. Nothing is trained or written."""
    kind = kind_of(recipe, KINDS)
    if kind != "distillation":
        return (check_embedding if kind == "embedding" else check_generate)(recipe, set_ or ())
    from potstill.evaluate.report import words
    from potstill.runs.check import check as check_recipe
    from potstill.runs.config.run import Recipe

    found = check_recipe(Recipe.load(recipe, set_ or ()))
    print_facts(_facts(found))
    if found.disk_bytes > found.disk_free_bytes:
        raise UserError(
            f"output: expected {words.size(found.disk_bytes)} of free disk, got {words.size(found.disk_free_bytes)}. "
            "Choose another directory with --set output=DIR."
        )
    return None


def _facts(found: Any) -> Iterator[tuple[str, str]]:
    from potstill.evaluate.report import words

    student = f"{found.student_parameters:,} parameters"
    if found.trained_parameters < found.student_parameters:
        share = words.percent(found.trained_parameters / found.student_parameters, 2)
        student += f", {found.trained_parameters:,} of them trained ({share})"
    if found.teacher_parameters is not None:
        student += f", {found.teacher_parameters / found.student_parameters:.1f} times smaller"
        yield "teacher", f"{found.teacher_parameters:,} parameters"
    yield "student", student
    if found.vocabulary:
        shared = "the student's own: compared by bytes" if found.by_bytes else "the same for both"
        yield "vocabulary", f"{found.vocabulary:,} tokens, {shared}"
        yield "train", f"{found.train_tokens:,} target tokens in {found.train_rows:,} rows"
        yield "eval", f"{found.eval_tokens:,} target tokens"
    else:
        yield "train", f"{found.train_rows:,} rows"
        yield "eval", f"{found.eval_tokens:,} rows"
    yield "steps", f"{found.steps:,}"
    batch = f"{words.size(found.batch_bytes)} of it for one batch" if found.batch_measured else "without activations"
    yield "memory", f"about {words.size(found.memory_bytes)}, {batch}"
    yield "disk", f"about {words.size(found.disk_bytes)} of {words.size(found.disk_free_bytes)} free"
    yield "time", f"about {words.duration(found.seconds)} of training on this machine"
    for note in found.notes:
        yield "note", note
