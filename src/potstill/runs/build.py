"""From a recipe to the objects that it names, checked to fit together; nothing is trained here."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import cast

import torch
from accelerate import PartialState
from datasets import Dataset
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from potstill.data.batches import Examples, PaddingCollator, pad_token_id
from potstill.data.vocabulary import checked_vocabulary, shared_vocabulary
from potstill.errors import RecipeError
from potstill.losses.alignment import TOKEN_TASKS, causal_alignment
from potstill.losses.divergences import ReverseKL
from potstill.losses.schedule import for_run, value_at
from potstill.losses.token_losses import token_divergence
from potstill.models.adapted import ParameterCount, parameter_count, virtual_tokens
from potstill.models.capture import ActivationCapture
from potstill.models.initialize import Initialization
from potstill.models.layer_map import LayerMap
from potstill.models.loading import has_bfloat16, load_tokenizer
from potstill.models.spacing import evenly_spaced
from potstill.models.structure import ModelShape
from potstill.runs.build_across import across_tokenizers, measure_alignment
from potstill.runs.build_across import notes as alignment_notes
from potstill.runs.build_student import begin, design_of, first_student, with_adapter
from potstill.runs.build_task import encode_data, match_heads, positions_of, token_rows
from potstill.runs.config.run import Recipe
from potstill.teachers.byte_alignment import AlignmentStats
from potstill.teachers.cached import CachedOrLiveTeacher, CachedTeacher
from potstill.teachers.dimensions import important_dimensions
from potstill.teachers.privileged import PrivilegedTeacher
from potstill.teachers.source import LoadedTeacher
from potstill.teachers.teacher import Teacher
from potstill.train.objective import Objective
from potstill.train.rollout import Rollout
from potstill.train.server_writer import ServedWriter
from potstill.train.terms.dense import DenseTerm
from potstill.train.terms.logits import Logits
from potstill.train.terms.policy import PolicyGradient, label_log_probs


@dataclass(frozen=True)
class Parts:
    """The objects that a recipe names.

    Args:
        recipe: the recipe itself.
        teacher: who speaks.
        teacher_model: the teacher's model, where it sits here and can be measured.
        teacher_config: the teacher's config, where it is known.
        tokenizer: the student's.
        train: what is learnt from.
        eval: what is held out.
        vocabulary: the number of tokens that both models share; 0 where the task is of no tokens.
        size: the student's parameters: those that are trained, and all.
        shape: the student's shape, where a term asks for its layers.
        notes: what the run should say.
        design: the config of a new student; None where it is a model that is there.
        start: what a new student takes over from its teacher; None where it begins with random weights.
        teacher_models: all models that speak, or are measured beside one that does.
        positions: tokens in a row that both models allow, where they tell.
        writer: the server that writes for the student, where there is one.
        meeting: how far both tokenizers meet in the training data, where bytes are compared; the teacher's head and
            positions are then of tokens of its own.
    """

    recipe: Recipe
    teacher: Teacher
    teacher_model: PreTrainedModel | None
    teacher_config: PretrainedConfig | None
    tokenizer: PreTrainedTokenizerBase
    train: Examples
    eval: Examples
    vocabulary: int
    size: ParameterCount
    shape: ModelShape | None
    notes: tuple[str, ...]
    design: PretrainedConfig | None = None
    start: Initialization | None = None
    teacher_models: tuple[PreTrainedModel, ...] = ()
    positions: int | None = None
    writer: ServedWriter | None = None
    meeting: AlignmentStats | None = None

    def new_student(self) -> PreTrainedModel:
        """The student with its first weights, and its adapter: the same at every call."""
        if self.start is not None:
            assert self.teacher_model is not None
            model = self.start.student(self.teacher_model, self.recipe.seed)
        else:
            teacher = None if self.teacher_model is None else self.teacher_model.config
            model = first_student(self.recipe, self.design, teacher)
        return with_adapter(self.recipe, model, self.tokenizer)

    @cached_property
    def objective(self) -> Objective:
        """The recipe's objective, its schedules as long as the run."""
        terms = [for_run(term, self.steps) for term in self.recipe.objective]
        return Objective([term.select(self._important_dimensions) for term in terms])

    def rollout(self) -> Rollout | None:
        """Who puts the student's own text in place of data, where the recipe asks for it."""
        if self.recipe.rollout is None:
            return None
        return self.recipe.rollout.build(
            self.tokenizer,
            self.teacher_model,
            steps=self.steps,
            limit=self.positions,
            vocabulary=self.vocabulary,
            seed=self.recipe.seed,
            server=self.writer,
        )

    def _important_dimensions(self, layers: LayerMap, batches: int) -> dict[int, Tensor]:
        """Those of the teacher for the student's width, picked by the first batches."""
        if self.teacher_model is None or self.shape is None:
            raise RecipeError("objective: expected a teacher that is a model here for select_batches, got none.")
        pairs = layers.pairs(self.shape.layers, self.teacher.shape.layers)
        collate, rows = PaddingCollator(pad_token_id(self.tokenizer)[0]), self.train.dataset
        several = (
            collate([rows[i] for i in range(start, min(start + self.batch_rows, len(rows)))])
            for start in range(0, min(batches * self.batch_rows, len(rows)), self.batch_rows)
        )
        on_device = ({name: x.to(self.teacher_model.device) for name, x in batch.items()} for batch in several)
        return important_dimensions(
            self.teacher_model, on_device, [t for _, t in pairs], self.shape.width, self.recipe.task
        )

    @property
    def curve(self) -> Dataset:
        """Held-out rows for the learning curves: evenly spread, the same at every evaluation."""
        return self.eval.dataset.select(evenly_spaced(self.recipe.evaluate.curve_rows, len(self.eval.dataset)))

    @property
    def bf16(self) -> bool:
        """Whether the student trains in bfloat16: as the recipe says, where that is no detour."""
        return bool(self.recipe.train.get("bf16")) and has_bfloat16()

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
    speaker = recipe.teacher.load(recipe.student.model, recipe.task)
    tokenizer = speaker.tokenizer
    if recipe.student.model is not None:
        tokenizer = load_tokenizer(recipe.student.model, "student.model")
    elif recipe.student.tokenizer is not None:
        tokenizer = load_tokenizer(recipe.student.tokenizer, "student.tokenizer")
    design = design_of(recipe.student, speaker.config, tokenizer)
    student = with_adapter(recipe, first_student(recipe, design, speaker.config), tokenizer)
    models = {**speaker.models, "student": student}
    if any(term.other_tokenizer for term in recipe.objective):
        speaker = across_tokenizers(recipe, speaker, tokenizer)
        models = {"student": student}  # the teacher's head and positions are of tokens of its own
        if recipe.rollout is not None and recipe.rollout.guided:
            raise RecipeError(
                "rollout: expected a teacher of the student's tokens for teacher_mix and teacher_top_k, got one that "
                "is compared by bytes. Leave them out: the student writes alone, and the teacher reads."
            )
    of_tokens = recipe.task in TOKEN_TASKS
    rows = {name: token_rows(model, of_tokens) for name, model in models.items()}
    if speaker.teacher.other_tokenizer:
        vocabulary = checked_vocabulary(tokenizer, rows)
    else:
        vocabulary = shared_vocabulary(speaker.tokenizer, tokenizer, rows)
    if not of_tokens:
        match_heads(recipe.task, models, tokenizer)

    max_length = recipe.data.max_length
    limits = {name: positions_of(model) for name, model in models.items()}
    if speaker.teacher.max_length is not None:
        limits["teacher"] = speaker.teacher.max_length
    taken = virtual_tokens(student)
    for name, limit in limits.items():
        if limit and max_length > limit - taken * (name == "student"):
            room = (
                f"{limit - taken}, what {taken} virtual tokens leave of" if taken and name == "student" else f"{limit},"
            )
            raise RecipeError(
                f"data.max_length: expected at most {room} the {name}'s number of positions, got {max_length}."
            )
    train, held_out = encode_data(recipe, student, tokenizer)
    teacher = _who_reads(recipe, speaker, train)
    if recipe.rollout is not None and speaker.live is not None:
        teacher = CachedOrLiveTeacher(cast(CachedTeacher, teacher), speaker.live)
    teacher.attach(student)
    notes = [*train.notes, *held_out.notes]
    _, pad_note = pad_token_id(tokenizer)
    if pad_note:
        notes.append(pad_note)
    if recipe.train.get("bf16") and not has_bfloat16():
        notes.append("train.bf16: this CPU has no instructions for it: float32, which is faster here.")
    padded = [f"{name} {size}" for name, size in rows.items() if size > vocabulary]
    if padded:
        notes.append(
            f"vocabulary: {vocabulary} tokens are real, the heads have more rows ({', '.join(padded)}): sliced."
        )
    inside = any(term.reads_layers for term in recipe.objective)
    shape = ActivationCapture(student).shape if inside else None
    start = None if design is None else begin(recipe, speaker.model, design, train.dataset, tokenizer)
    server = None if recipe.rollout is None else recipe.rollout.server
    parts = Parts(
        recipe,
        teacher,
        speaker.model,
        speaker.config,
        tokenizer,
        train,
        held_out,
        vocabulary if of_tokens else 0,
        parameter_count(student),
        shape,
        tuple(notes) + (start.notes if start else ()),
        design,
        start,
        tuple(speaker.models.values()),
        min((limit for limit in limits.values() if limit), default=None),
        None if server is None else server.writer(student, tokenizer, Path(recipe.output)),
    )
    if (rollout := parts.rollout()) is not None:
        parts = replace(parts, notes=(*parts.notes, *rollout.check_prompts(train.dataset)))
    if shape is not None:
        of_teacher = teacher.shape if parts.objective.reads_teacher_layers else None
        teacher.prepare(parts.objective.fit(shape, of_teacher)[1])
    if (stats := measure_alignment(teacher, train.dataset)) is not None:
        parts = replace(parts, meeting=stats, notes=(*parts.notes, *alignment_notes(stats, vocabulary)))
    if teacher.needs_trial:
        _try(parts, teacher)
        if not teacher.covers(held_out.dataset):
            parts = replace(
                parts, notes=(*parts.notes, "teacher: it does not know the held-out rows: measured by labels alone.")
            )
    return parts


def _who_reads(recipe: Recipe, speaker: LoadedTeacher, train: Examples) -> Teacher:
    """The teacher, with its own prompts where the training data has them.

    Raises:
        RecipeError: it cannot read them.
    """
    if not train.teacher_longest:
        return speaker.teacher
    if (other := speaker.teacher.without_own_prompts) is not None:
        raise RecipeError(
            f"data.train: expected a teacher that reads its own prompts, got {other}. Name one with teacher.model, or "
            "leave teacher_prompt out."
        )
    limits = [getattr(model.config, "max_position_embeddings", None) for model in speaker.models.values()]
    limit = min((each for each in [*limits, speaker.teacher.max_length] if each), default=None)
    if limit is not None and train.teacher_longest > limit:
        raise RecipeError(
            f"data.train: expected rows of at most {limit} tokens for the teacher, its number of positions, got "
            f"{train.teacher_longest} with its own prompt. Shorten teacher_prompt, or lower data.max_length."
        )
    return PrivilegedTeacher(speaker.teacher)


def _try(parts: Parts, teacher: Teacher) -> None:
    """See that the teacher knows every row and that the objective can use what it says, from beginning to end."""
    teacher.require(parts.train.dataset)
    batch = PaddingCollator(pad_token_id(parts.tokenizer)[0])([parts.train.dataset[0]])
    alignment = causal_alignment(batch["labels"])
    output = teacher(batch, alignment)
    said = output.targets
    for term in parts.objective.terms:
        if isinstance(term, DenseTerm):
            term.teacher_logits(said)
        if isinstance(term, PolicyGradient) and not teacher.answers_samples_apart:
            label_log_probs(output, alignment.labels)
            if term.single_step:
                token_divergence(torch.zeros(len(alignment), parts.vocabulary), said, ReverseKL())
        if isinstance(term, Logits):
            for step in (0, parts.steps // 2, parts.steps):
                temperature = value_at(term.temperature, step)
                token_divergence(
                    torch.zeros(len(alignment), parts.vocabulary), said, term.divergence, temperature=temperature
                )
