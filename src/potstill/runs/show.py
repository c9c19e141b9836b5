"""Show the rows of a recipe as they are encoded, without its models."""

from __future__ import annotations

from typing import Any, NamedTuple

from potstill.data.show import ShownRow, shown_rows
from potstill.losses.alignment import SEQUENCE_TASKS
from potstill.models.chat import end_token_ids, set_chat_template
from potstill.models.loading import load_config, load_tokenizer, suppress_warnings
from potstill.runs.build import encode_data
from potstill.runs.config.run import Recipe
from potstill.runs.vocabulary import keep_tokens


class ShownData(NamedTuple):
    """The first rows of a recipe's data, the notes on it, and the tokens that end a text."""

    rows: list[ShownRow]
    notes: tuple[str, ...]
    ends: list[str]


@suppress_warnings()
def show_data(recipe: Recipe, count: int, *, held_out: bool = False) -> ShownData:
    """Encode the data of a recipe and show the first training rows, or held-out ones."""
    student, teacher_path = recipe.student, recipe.teacher.model_path
    name, key = student.model or student.tokenizer, "student.model" if student.model else "student.tokenizer"
    teacher: Any = load_tokenizer(teacher_path, "teacher.model") if teacher_path else None
    tokenizer = load_tokenizer(name, key) if name else teacher
    if tokenizer is None:
        tokenizer = recipe.teacher.load(student.model, recipe.task).tokenizer
    set_chat_template(tokenizer, recipe.data.chat_template, recipe.data.chat_template_kwargs)
    model = student.model or teacher_path
    config = load_config(model, "student.model") if model and recipe.task in SEQUENCE_TASKS else None
    if (kept := keep_tokens(recipe, tokenizer, config)) is not None:
        teacher = kept.tokenizer if teacher is not None and teacher.get_vocab() == tokenizer.get_vocab() else teacher
        tokenizer = kept.tokenizer
    train, evaluation, _ = encode_data(recipe, config, tokenizer)
    examples = evaluation if held_out else train
    other = teacher if teacher is not None and teacher.get_vocab() != tokenizer.get_vocab() else None
    ends = [str(tokenizer.convert_ids_to_tokens(i)) for i in sorted(end_token_ids(tokenizer))]
    return ShownData(shown_rows(examples.dataset, tokenizer, count, other), examples.notes, ends)
