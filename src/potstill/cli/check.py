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
    from potstill.evaluate import formatting
    from potstill.runs.check import check as check_recipe
    from potstill.runs.config.run import Recipe

    needs = check_recipe(Recipe.load(recipe, set_ or ()))
    print_facts(_facts(needs))
    if needs.disk_bytes > needs.disk_free_bytes:
        raise UserError(
            f"output: expected {formatting.size(needs.disk_bytes)} of free disk, got "
            f"{formatting.size(needs.disk_free_bytes)}. Choose another directory with --set output=DIR."
        )
    return None


def _facts(needs: Any) -> Iterator[tuple[str, str]]:
    from potstill.evaluate import formatting

    student = f"{needs.student_parameters:,} parameters"
    if needs.trained_parameters < needs.student_parameters:
        share = formatting.percent(needs.trained_parameters / needs.student_parameters, 2)
        student += f", {needs.trained_parameters:,} of them trained ({share})"
    if needs.teacher_parameters is not None:
        student += f", {needs.teacher_parameters / needs.student_parameters:.1f} times smaller"
        yield "teacher", f"{needs.teacher_parameters:,} parameters"
    yield "student", student
    if needs.vocabulary:
        shared = "the student's own: compared by bytes" if needs.by_bytes else "the same for both"
        yield "vocabulary", f"{needs.vocabulary:,} tokens, {shared}"
        yield "train", f"{needs.train_tokens:,} target tokens in {needs.train_rows:,} rows"
        yield "eval", f"{needs.eval_tokens:,} target tokens"
    else:
        yield "train", f"{needs.train_rows:,} rows"
        yield "eval", f"{needs.eval_tokens:,} rows"
    yield "steps", f"{needs.steps:,}"
    batch = (
        f"{formatting.size(needs.batch_bytes)} of it for one batch" if needs.batch_measured else "without activations"
    )
    yield "memory", f"about {formatting.size(needs.memory_bytes)}, {batch}"
    yield "disk", f"about {formatting.size(needs.disk_bytes)} of {formatting.size(needs.disk_free_bytes)} free"
    yield "time", f"about {formatting.duration(needs.seconds)} of training on this machine"
    for note in needs.notes:
        yield "note", note
