"""Heads and position limits of loaded models, and whether two heads are for the same classes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from potstill.errors import DataError, RecipeError
from potstill.losses.alignment import TOKEN_TASKS, Task
from potstill.models.shapes import finds_padding_by_id, position_limit, text_config
from potstill.models.split import run, undisturbed


def token_rows(model: PreTrainedModel, task: Task) -> int:
    """Count the tokens for which a model's head has rows, or its embeddings where the task has no head of tokens."""
    embeddings = model.get_output_embeddings() if task in TOKEN_TASKS else model.get_input_embeddings()
    rows: int = embeddings.weight.shape[0]  # type: ignore[index, assignment]  # it is an nn.Module of rows
    return rows


def class_ids(config: PretrainedConfig) -> dict[str, int]:
    """The ids of a classifier's classes by their names."""
    return {str(name): int(number) for name, number in (config.label2id or {}).items()}


def max_positions(model: PreTrainedModel) -> int | None:
    """Return the longest row, in tokens, for which a model has positions; RoBERTa's start behind the padding's."""
    limit = position_limit(model.config)
    for name, module in model.named_modules():
        if limit and name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            return limit - int(module.padding_idx) - 1
    return limit


def match_heads(task: Task, models: Mapping[str, PreTrainedModel], pad_token_id: int) -> None:
    """Check that sequence-level heads have the same classes, or one number, and that heads know the id that pads."""
    sizes = {name: model.config.num_labels for name, model in models.items()}
    if task == "regression" and set(sizes.values()) != {1}:
        name, size = next(item for item in sizes.items() if item[1] != 1)
        raise RecipeError(
            f"{name}: expected num_labels 1 in its config for the task regression, got {size}. "
            "Name a model that predicts one number, or use the task classification."
        )
    set_pad_id(models.values(), pad_token_id)
    if task != "classification" or "teacher" not in models:
        return
    if sizes["teacher"] != sizes["student"]:
        raise RecipeError(
            f"student.model: expected the teacher's {sizes['teacher']} classes, got {sizes['student']}. "
            "Name a model without a classifier, which then gets the teacher's, or one with the same classes."
        )
    of_teacher, of_student = (class_ids(models[name].config) for name in ("teacher", "student"))
    unnamed = any(all(name == f"LABEL_{i}" for name, i in ids.items()) for ids in (of_teacher, of_student))
    if of_teacher != of_student and not unnamed:
        raise RecipeError(
            f"student.model: expected the teacher's classes {of_teacher}, got {of_student}. "
            "A class needs one id in both. Change label2id in its config.json, with the rows of its head."
        )


def set_pad_id(models: Iterable[Any], pad_token_id: int) -> None:
    """Set the id that pads the data in models that have none, and in all whose head finds the padding by it."""
    for model in models:
        text = text_config(model.config)
        if getattr(text, "pad_token_id", None) is None or finds_padding_by_id(model):
            text.pad_token_id = pad_token_id


def check_end_tokens(model: PreTrainedModel, rows: Iterable[Sequence[int]]) -> None:
    """Check that rows of token ids have the end tokens that the head of BART's or T5's classifier reads."""
    if not model.config.is_encoder_decoder:
        return
    end = int(model.config.eos_token_id)
    another = torch.full((1, 2), (end + 1) % token_rows(model, "classification"), device=model.device)
    try:
        with undisturbed(model):
            run(model, {"input_ids": another, "attention_mask": torch.ones_like(another)})
        return  # it reads the last token, whatever that is
    except ValueError:
        numbers = {ids.count(end) for ids in rows}
    except Exception:
        return  # what fails on any tokens is reported where the model reads its data
    if len(numbers) > 1 or 0 in numbers:
        raise DataError(
            f"data: expected the same number of end tokens (id {end}) in each row, which the head of "
            f"{type(model).__name__} reads, got {', '.join(map(str, sorted(numbers)))}. Use a tokenizer that ends each "
            "text with one, as the model's own does, and remove them from within the texts."
        )
