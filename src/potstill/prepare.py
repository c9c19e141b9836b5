"""From a recipe to the objects that it names, checked to fit together; nothing is trained here."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from accelerate import PartialState
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from potstill.data import Examples, Source, encode, pad_token_id
from potstill.data.vocabulary import shared_vocabulary
from potstill.errors import RecipeError
from potstill.loading import load_model, load_tokenizer
from potstill.recipe import LabelsPart, LogitsPart, Recipe, SchedulePart, SourcePart
from potstill.students.design import student_config
from potstill.students.initialize import random_student
from potstill.teachers import ModelTeacher, Teacher
from potstill.train import Labels, Logits, Objective


@dataclass(frozen=True)
class Parts:
    """The objects that a recipe names.

    Args:
        recipe: the recipe itself.
        teacher: who speaks.
        teacher_model: the teacher's model, where it sits here and can be measured.
        tokenizer: the student's.
        train: what is learnt from.
        eval: what is held out.
        vocabulary: the number of tokens that both models share.
        notes: what the run should say.
    """

    recipe: Recipe
    teacher: Teacher
    teacher_model: PreTrainedModel | None
    tokenizer: PreTrainedTokenizerBase
    train: Examples
    eval: Examples
    vocabulary: int
    notes: tuple[str, ...]

    def new_student(self) -> PreTrainedModel:
        """The student with its first weights: the same at every call."""
        return _new_student(self.recipe, self.teacher_model, self.vocabulary)

    def objective(self) -> Objective:
        """The recipe's objective, its schedules as long as the run."""
        return _objective(self.recipe, self.steps)

    @property
    def curve(self) -> Dataset:
        """Held-out rows for the learning curves: evenly spread, the same at every evaluation."""
        rows = len(self.eval.dataset)
        wanted = min(self.recipe.evaluate.curve_rows, rows)
        return self.eval.dataset.select([i * rows // wanted for i in range(wanted)])

    @property
    def batch_rows(self) -> int:
        """Rows in one batch of one rank."""
        return int(self.recipe.train.get("per_device_train_batch_size", 8))

    @property
    def rows_per_step(self) -> int:
        """Rows in one optimiser step, over accumulation and ranks."""
        accumulated = int(self.recipe.train.get("gradient_accumulation_steps", 1))
        return self.batch_rows * accumulated * PartialState().num_processes

    @property
    def steps(self) -> int:
        """Optimiser steps of the whole training."""
        if self.recipe.train.get("max_steps", -1) > 0:
            return int(self.recipe.train["max_steps"])
        epochs = float(self.recipe.train.get("num_train_epochs", 3.0))
        return math.ceil(math.ceil(len(self.train.dataset) / self.rows_per_step) * epochs)


def prepare(recipe: Recipe) -> Parts:
    """Load the models and the data, and check that they fit together.

    Raises:
        UserError: they do not.
    """
    teacher_model = load_model(recipe.teacher.model, "teacher.model", recipe.teacher.dtype)
    teacher_tokenizer = load_tokenizer(recipe.teacher.model, "teacher.model")
    tokenizer = teacher_tokenizer
    if recipe.student.model is not None:
        tokenizer = load_tokenizer(recipe.student.model, "student.model")
    student = _new_student(recipe, teacher_model, max(tokenizer.get_vocab().values()) + 1)
    models = {"student": student} if teacher_model is None else {"teacher": teacher_model, "student": student}
    rows = {name: _head_rows(model) for name, model in models.items()}
    vocabulary = shared_vocabulary(teacher_tokenizer, tokenizer, rows)

    max_length = recipe.data.max_length
    for name, model in models.items():
        limit = getattr(model.config, "max_position_embeddings", None) or max_length
        if max_length > limit:
            raise RecipeError(
                f"data.max_length: expected at most {limit}, the {name}'s number of positions, got {max_length}."
            )
    with PartialState().main_process_first():  # the other ranks then find what it has encoded
        train, held_out = (
            encode(_source(part), tokenizer, max_length=max_length, packing=recipe.data.packing)
            for part in (recipe.data.train, recipe.data.eval)
        )
    notes = [*train.notes, *held_out.notes]
    _, pad_note = pad_token_id(tokenizer)
    if pad_note:
        notes.append(pad_note)
    padded = [f"{name} {size}" for name, size in rows.items() if size > vocabulary]
    if padded:
        notes.append(
            f"vocabulary: {vocabulary} tokens are real, the heads have more rows ({', '.join(padded)}): sliced."
        )
    teacher = ModelTeacher(teacher_model, device=recipe.teacher.device)
    return Parts(recipe, teacher, teacher_model, tokenizer, train, held_out, vocabulary, tuple(notes))


def _new_student(recipe: Recipe, teacher: PreTrainedModel | None, vocabulary: int) -> PreTrainedModel:
    if recipe.student.model is not None:
        return load_model(recipe.student.model, "student.model", "float32")
    assert recipe.student.design is not None
    if teacher is None:
        raise RecipeError(
            "student.design: expected a teacher that is a model here, whose config it changes, got none. "
            "Name a student with student.model instead."
        )
    return random_student(student_config(teacher.config, recipe.student.design, vocabulary), recipe.seed)


def _head_rows(model: PreTrainedModel) -> int:
    return int(model.get_output_embeddings().weight.shape[0])


def _source(part: SourcePart) -> Source:
    return Source(**part.model_dump())


def _objective(recipe: Recipe, steps: int) -> Objective:
    def number(value: float | SchedulePart) -> Any:
        return value.build(steps) if isinstance(value, SchedulePart) else value

    def term(part: LogitsPart | LabelsPart) -> Logits | Labels:
        if isinstance(part, LabelsPart):
            return Labels(weight=number(part.weight))
        return Logits(part.divergence.build(), weight=number(part.weight), temperature=number(part.temperature))

    return Objective([term(part) for part in recipe.objective])
