"""What a recipe's task asks of its models and data."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from accelerate import PartialState
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from potstill.data.batches import Examples, encode, pad_token_id
from potstill.data.masking import MaskedRows
from potstill.data.sources import Source
from potstill.errors import RecipeError
from potstill.losses.alignment import Task
from potstill.runs.config.run import Recipe


class Rows(NamedTuple):
    """What is learnt from, and what is held out."""

    train: Examples
    eval: Examples


def encode_data(recipe: Recipe, student: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Rows:
    """The recipe's data for its task. The masks of training rows change with the epoch, those of held-out rows do not.

    Raises:
        DataError: the data are not usable.
    """

    def encoded(source: Source) -> Examples:
        return encode(
            source,
            tokenizer,
            max_length=recipe.data.max_length,
            packing=recipe.data.packing,
            task=recipe.task,
            classes=classes_of(student.config) if recipe.task == "classification" else None,
        )

    with PartialState().main_process_first():  # the other ranks then find what it has encoded
        rows = Rows(encoded(recipe.data.train), encoded(recipe.data.eval))
    if recipe.task != "masked":
        return rows
    masked = [MaskedRows(each.dataset, tokenizer, share=recipe.data.masked_share, seed=recipe.seed) for each in rows]
    return Rows(replace(rows.train, dataset=masked[0]), replace(rows.eval, dataset=masked[1].fixed()))


def token_rows(model: PreTrainedModel, with_head: bool) -> int:
    """How many tokens a model's head has rows for, or its embeddings where the head is none of tokens."""
    embeddings = model.get_output_embeddings() if with_head else model.get_input_embeddings()
    rows: int = embeddings.weight.shape[0]  # type: ignore[index, assignment]  # it is an nn.Module of rows
    return rows


def classes_of(config: PretrainedConfig) -> dict[str, int]:
    """The numbers of a classifier's classes by their names."""
    return {str(name): int(number) for name, number in (config.label2id or {}).items()}


def positions_of(model: PreTrainedModel) -> int | None:
    """How many tokens of a row a model has positions for; RoBERTa's begin behind that of the padding."""
    limit: int | None = getattr(model.config, "max_position_embeddings", None)
    for name, module in model.named_modules():
        if limit and name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            return limit - int(module.padding_idx) - 1
    return limit


def match_heads(task: Task, models: dict[str, PreTrainedModel], tokenizer: PreTrainedTokenizerBase) -> None:
    """See that heads which judge rows have the same classes, or one number, and know what pads.

    Raises:
        RecipeError: they do not.
    """
    sizes = {name: model.config.num_labels for name, model in models.items()}
    if task == "regression" and set(sizes.values()) != {1}:
        name, size = next(each for each in sizes.items() if each[1] != 1)
        raise RecipeError(
            f"{name}: expected num_labels 1 in its config for the task regression, got {size}. "
            "Name a model with one number as its answer, or use the task classification."
        )
    for model in models.values():
        if model.config.pad_token_id is None:
            model.config.pad_token_id = pad_token_id(tokenizer)[0]  # where a decoder's last token is
    if task != "classification" or "teacher" not in models:
        return
    if sizes["teacher"] != sizes["student"]:
        raise RecipeError(
            f"student.model: expected the teacher's {sizes['teacher']} classes, got {sizes['student']}. "
            "Name a model without a classifier, which then gets the teacher's, or one with the same classes."
        )
    of_teacher, of_student = (classes_of(models[name].config) for name in ("teacher", "student"))
    if of_teacher != of_student and not any(_is_unnamed(each) for each in (of_teacher, of_student)):
        raise RecipeError(
            f"student.model: expected the teacher's classes {of_teacher}, got {of_student}. "
            "A class must be at the same place in both. Change label2id in its config.json, with the rows of its head."
        )


def _is_unnamed(classes: dict[str, int]) -> bool:
    return all(name == f"LABEL_{number}" for name, number in classes.items())
