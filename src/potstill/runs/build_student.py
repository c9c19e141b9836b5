"""From a recipe to its student: the shape, and what it begins with."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from accelerate import PartialState
from datasets import Dataset
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, set_seed

from potstill.data.batches import in_batches
from potstill.errors import RecipeError
from potstill.models.adapted import is_adapted, is_quantized
from potstill.models.adapters import adapt
from potstill.models.budget import Budget, parse_count
from potstill.models.design import student_config
from potstill.models.initialize import Initialization, plan_initialization, random_student
from potstill.models.loading import load_model, vocabulary_size
from potstill.models.spacing import evenly_spaced
from potstill.runs.config.run import Recipe
from potstill.runs.config.student import BudgetPart, StudentPart

ROWS = 8  # in a batch, where importance is measured


def design_of(
    part: StudentPart, teacher: PretrainedConfig | None, tokenizer: PreTrainedTokenizerBase
) -> PretrainedConfig | None:
    """The config of a new student, which has the tokenizer's tokens and no padding rows; None for one that is there.

    Raises:
        RecipeError: nothing is known of the teacher's config.
    """
    if part.design is None:
        return None
    if teacher is None:
        raise RecipeError(
            "student.design: expected a teacher whose config is here, got none: it is changed. "
            "Name a student with student.model instead."
        )
    vocabulary = vocabulary_size(tokenizer)
    if part.tokenizer is not None:  # the teacher's special tokens have other ids, or none
        teacher = copy.deepcopy(teacher)
        for role in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(teacher, role, getattr(tokenizer, role))
    if not isinstance(part.design, BudgetPart):
        return student_config(teacher, part.design, vocabulary)
    params = None if part.design.params is None else parse_count(part.design.params)
    return Budget(**{**part.design.model_dump(), "params": params}).student(teacher, vocabulary=vocabulary)


def first_student(
    recipe: Recipe, design: PretrainedConfig | None, teacher: PretrainedConfig | None = None
) -> PreTrainedModel:
    """The recipe's student as it is there, or with random weights. A head that is not there is random, too; a
    classifier has the teacher's classes. Without the recipe's adapter.
    """
    if design is not None:
        return random_student(design, recipe.seed)
    where, adapter = recipe.student.model, recipe.student.adapter
    assert where is not None
    dtype, bits = ("float32", None) if adapter is None else (adapter.dtype, adapter.base_bits)
    set_seed(recipe.seed)
    return load_model(
        where, "student.model", dtype, recipe.task, bits=bits, labels_of=teacher, trainable=adapter is None
    )


def with_adapter(recipe: Recipe, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Any:
    """The student that is trained: a model as it is, or frozen under the recipe's adapter.

    Raises:
        UserError: the adapter does not go with the model, or none is asked for where one must be.
    """
    if recipe.student.adapter is not None:
        return adapt(model, recipe.student.adapter, seed=recipe.seed, tokenizer=tokenizer)
    if is_quantized(model) and not is_adapted(model):
        raise RecipeError(
            "student.model: expected weights that can be trained, got a model that is rounded to a few bits. "
            "Train an adapter on it (student.adapter: qlora), or name the model that it was made of."
        )
    return model


def begin(
    recipe: Recipe,
    teacher: PreTrainedModel | None,
    design: PretrainedConfig,
    train: Dataset,
    tokenizer: PreTrainedTokenizerBase,
) -> Initialization | None:
    """What a new student takes over from its teacher; None where it begins with random weights.

    Importance is measured on rows that are evenly spread over the training data.

    Raises:
        RecipeError: the teacher has no weights here.
    """
    part = recipe.student.initialize
    if part.method == "random":
        return None
    if teacher is None:
        raise RecipeError(
            f"student.initialize: expected a teacher that is a model here for {part.method}, got none. "
            "Its weights are taken over. Name it with teacher.model, or begin with random weights."
        )
    if getattr(teacher, "is_quantized", False):
        raise RecipeError(
            f"student.initialize: expected a teacher in full precision for {part.method}, got one that is "
            f"quantized. Its weights are taken over. Leave teacher.dtype out, or begin at random."
        )
    chosen = evenly_spaced(part.calibration_rows, len(train))

    def calibration() -> Iterator[dict[str, Tensor]]:
        teacher.to(recipe.teacher.model_device or PartialState().device)  # type: ignore[arg-type]  # their wrapper hides it
        return in_batches((train[i] for i in chosen), tokenizer, ROWS)

    return plan_initialization(teacher, design, part.method, layers=part.layers, calibration=calibration)
