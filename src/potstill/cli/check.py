"""The command `potstill check`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from potstill.cli.app import Imports, RecipePath, Sets, app, console, print_facts
from potstill.cli.embedding import check_embedding, kind_of
from potstill.cli.generate import check_generate
from potstill.cli.schema import KINDS
from potstill.errors import UserError

if TYPE_CHECKING:
    from potstill.models.adapted import ParameterCount


@app.command()
def check(recipe: RecipePath, set_: Sets = None, import_: Imports = None) -> None:
    """Validate a recipe with its data and models, try every step of its run, and estimate its cost. Nothing is kept."""
    kind = kind_of(recipe, KINDS)
    if kind != "distillation":
        return (check_embedding if kind == "embedding" else check_generate)(recipe, set_ or ())
    from potstill.evaluate import formatting
    from potstill.runs.check import check as check_recipe
    from potstill.runs.config.run import Recipe

    needs = check_recipe(Recipe.load(recipe, set_ or ()), console)
    print_facts(_facts(needs))
    if needs.disk_bytes > needs.disk_free_bytes:
        raise UserError(
            f"output: expected {formatting.size(needs.disk_bytes)} of free disk, got "
            f"{formatting.size(needs.disk_free_bytes)}. Choose another directory with --set output=DIR."
        )
    return None


def _parameters(size: ParameterCount) -> str:
    active = f", {size.active:,} of them active for a token" if size.active < size.all else ""
    return f"{size.all:,} parameters{active}"


def _facts(needs: Any) -> Iterator[tuple[str, str]]:
    from potstill.evaluate import formatting
    from potstill.models.adapted import parameter_count

    built = needs.built
    size, train_rows = built.size, len(built.train.dataset)
    student = _parameters(size)
    if size.trained < size.all:
        student += f", {size.trained:,} of them trained ({formatting.percent(size.trained / size.all, 2)})"
    if built.loaded.model is not None:
        teacher = parameter_count(built.loaded.model)
        student += f", {teacher.all / size.all:.1f} times smaller"
        yield "teacher", _parameters(teacher)
    yield "student", student
    if built.vocabulary:
        shared = "the same for both" if built.alignment_stats is None else "the student's own: compared by bytes"
        yield "vocabulary", f"{built.vocabulary:,} tokens, {shared}"
        yield "train", f"{built.train.tokens:,} target tokens in {train_rows:,} rows"
        yield "eval", f"{built.eval.tokens:,} target tokens"
    else:
        yield "train", f"{train_rows:,} rows"
        yield "eval", f"{built.eval.tokens:,} rows"
    yield "steps", f"{built.plan.steps:,}"
    one_batch = f"{formatting.size(needs.batch_bytes)} of it for one batch"
    batch = one_batch if needs.batch_measured else "without activations"
    yield "memory", f"about {formatting.size(needs.memory_bytes)}, {batch}"
    if needs.placement is not None:
        yield "teacher", needs.placement
    yield "disk", f"about {formatting.size(needs.disk_bytes)} of {formatting.size(needs.disk_free_bytes)} free"
    measured = f", within a factor of 2: from {needs.batch.measured:,} of a batch's {needs.batch.tokens:,} tokens"
    estimated = measured if needs.batch.measured < needs.batch.tokens else ""
    yield "time", f"about {formatting.duration(needs.seconds)} of training on this machine{estimated}"
    if needs.fit_seconds > 0:
        yield "start", f"about {formatting.duration(needs.fit_seconds)} to fit its layers, before that"
    if needs.search is not None:
        yield "search", f"{needs.search}, before that; about {formatting.duration(needs.search_seconds)} in all"
    compute = ", ".join(f"{run} {formatting.flops(number)}" for run, number in needs.flops.items())
    sampling = "" if built.recipe.rollout is None else ", without sampling"
    yield "compute", f"about {compute} of forward and backward passes{sampling}"
    yield from (("warning", warning) for warning in built.duplicates.warnings)
    yield from (("note", note) for note in built.notes)
