"""From a recipe to the objects that it names, checked to fit together."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from accelerate import PartialState
from datasets import Dataset
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from potstill.data.batches import PACKED_ROWS, Examples, encode, in_batches, pad_token_id
from potstill.data.duplicates import Duplicates, find_duplicates
from potstill.data.masking import MaskedRows
from potstill.data.mixture import encode_mixture
from potstill.data.packing import PackedRows
from potstill.data.vocabulary import checked_vocabulary, shared_vocabulary
from potstill.errors import ModelError, RecipeError
from potstill.losses.alignment import IGNORE, SEQUENCE_TASKS, TOKEN_TASKS, align, causal_alignment
from potstill.losses.divergences import ReverseKL
from potstill.losses.schedule import for_run, value_at
from potstill.losses.targets import DenseTargets, HeadTargets
from potstill.losses.token_losses import token_divergence
from potstill.models.adapted import ParameterCount, parameter_count, virtual_tokens
from potstill.models.capture import ActivationCapture
from potstill.models.chat import set_chat_template
from potstill.models.heads import check_end_tokens, class_ids, match_heads, max_positions, token_rows
from potstill.models.layer_map import Layer, LayerMap
from potstill.models.loading import has_bfloat16, load_tokenizer, loading_notes
from potstill.models.shapes import ModelShape
from potstill.models.spacing import evenly_spaced
from potstill.models.trimming import trim_model
from potstill.runs.build_student import StudentBuilder, design_of, initialization_of, load_source
from potstill.runs.chat_notes import chat_notes
from potstill.runs.config.run import Recipe
from potstill.runs.packing_notes import packing_notes
from potstill.runs.vocabulary import keep_tokens, trim_teacher
from potstill.teachers.byte_alignment import AlignmentStats
from potstill.teachers.cached import CachedOrLiveTeacher, CachedTeacher
from potstill.teachers.crosstok import CrossTokenizerTeacher
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

ALIGNMENT_ROWS = 256  # on which the alignment of two tokenizers is measured
PROBE_ROWS, PROBE_TOKENS, PROBE_TARGETS = 4, 32, 16  # on which the teacher's loss is compared with a uniform guess
NAN_TEACHER = (
    "teacher: expected finite predictions on the training data, got NaN. Check its weights, or set teacher.dtype to "
    "float32: in float16 a model may overflow."
)
SAME_OUTPUT = 1e-4  # nats between predictions that count as the same
MIN_COVERAGE = 0.9  # of the bytes in chunks: below it a note says so


class TrainingPlan(NamedTuple):
    """Batches and optimiser steps of the recipe's `train`."""

    batch_rows: int  # of one batch of one rank, packed rows where rows are packed
    batches: int  # of a step, over accumulation and ranks
    rows_per_step: float  # rows of the data, on average
    steps: int  # of the whole training
    bf16: bool  # as the recipe says, where the device has instructions for it


@dataclass(frozen=True)
class BuiltRun:
    """The objects that a recipe names."""

    recipe: Recipe
    teacher: Teacher  # as the student learns from it; may wrap loaded.teacher
    loaded: LoadedTeacher
    tokenizer: PreTrainedTokenizerBase  # the student's
    new_student: Callable[[], Any]  # the same at every call
    new_random_student: Callable[[], Any]  # of the same design, with random weights
    size: ParameterCount  # of the student
    train: Examples
    packed: PackedRows | None  # the training rows as batches have them, if they are packed
    eval: Examples
    plan: TrainingPlan
    objective: Objective  # with schedules as long as the run
    vocabulary: int  # tokens that both models share; 0 where the task is not one of tokens
    max_positions: int | None  # longest row that both models allow, in tokens; None for any
    writer: ServedWriter | None  # the server that generates the student's samples
    alignment_stats: AlignmentStats | None  # of two tokenizers on the training data; None for one tokenizer
    duplicates: Duplicates  # of held-out and training rows
    save_dtype: torch.dtype | None  # to save the student in; None for that of training
    notes: tuple[str, ...] = ()  # to print

    def new_rollout(self) -> Rollout | None:
        """Make what replaces rows of data by samples of the student, if the recipe has a rollout."""
        if (rollout := self.recipe.rollout) is None:
            return None
        options = {"limit": self.max_positions, "vocabulary": self.vocabulary, "server": self.writer}
        return rollout.build(self.tokenizer, self.loaded.model, steps=self.plan.steps, seed=self.recipe.seed, **options)

    @property
    def needs_whole_rows(self) -> bool:
        """Whether the teacher may know complete rows alone."""
        return self.teacher.needs_trial or self.train.teacher_longest > 0

    @property
    def first_batch(self) -> list[dict[str, Any]]:
        """The rows of one batch of the training."""
        rows: Any = self.train.dataset if self.packed is None else self.packed
        examples = [rows[i] for i in range(min(self.plan.batch_rows, len(rows)))]
        return [row for example in examples for row in example.get(PACKED_ROWS, [example])]

    @property
    def curve(self) -> Dataset:
        """Held-out rows for the learning curves: evenly spaced, the same at every evaluation."""
        return self.eval.dataset.select(evenly_spaced(self.recipe.evaluate.curve_rows, len(self.eval.dataset)))


def build_run(recipe: Recipe) -> BuiltRun:
    """Load the models and the data, and check that they fit together."""
    loaded = recipe.teacher.load(recipe.student.model, recipe.task)
    tokenizer = loaded.tokenizer
    for key in ("tokenizer", "model"):
        if (name := getattr(recipe.student, key)) is not None:
            tokenizer = load_tokenizer(name, f"student.{key}")
    set_chat_template(tokenizer, recipe.data.chat_template, recipe.data.chat_template_kwargs)
    source = load_source(recipe, loaded, tokenizer)
    kept = keep_tokens(recipe, tokenizer, loaded.config)
    whole = copy.deepcopy(source.config if source else loaded.config)
    if kept is not None:
        loaded, vocabulary_note = trim_teacher(recipe, loaded, kept)
        if source is not None:
            trim_model(source, kept.ids)
        tokenizer = kept.tokenizer
    design = design_of(recipe.student, source.config if source else loaded.config, tokenizer, whole)
    new_student = StudentBuilder(recipe, loaded, tokenizer, design, source or loaded.model, kept.ids if kept else None)
    student = new_student()
    models = {**loaded.models, "student": student}
    if any(term.other_tokenizer for term in recipe.objective):
        loaded = _read_own_tokens(recipe, loaded, tokenizer)
        models = {"student": student}  # the teacher's head and positions are those of its own tokens
    vocabulary, vocabulary_notes = _vocabulary(recipe, loaded, tokenizer, models)
    positions = _max_positions(recipe, loaded, models)
    train, held_out, duplicates = encode_data(recipe, student.config, tokenizer)
    if recipe.task in SEQUENCE_TASKS:
        for model, rows in product(models.values(), (train, held_out)):
            check_end_tokens(model, rows.dataset["input_ids"])
    teacher = _trained_on(recipe, loaded, train)
    teacher.attach(student)
    joins = train.joined or not recipe.data.packing
    packed = None if joins else PackedRows(train.dataset, recipe.data.max_length, seed=recipe.seed)
    plan = _training_plan(recipe.train, len(train.dataset), len(packed or train.dataset))
    new_student = replace(new_student, initialization=initialization_of(new_student, train.dataset))
    shape = ActivationCapture(student).shape if any(term.reads_layers for term in recipe.objective) else None
    objective = build_objective(new_student, teacher, train.dataset, plan, shape)
    stats = _alignment_stats(teacher, train.dataset)
    server = recipe.rollout.server if recipe.rollout else None
    writer = server.writer(student, tokenizer, Path(recipe.output)) if server else None
    built = BuiltRun(
        recipe=recipe,
        teacher=teacher,
        loaded=loaded,
        tokenizer=tokenizer,
        new_student=new_student,
        new_random_student=replace(new_student, initialization=None),
        size=parameter_count(student),
        train=train,
        packed=packed,
        eval=held_out,
        plan=plan,
        objective=objective,
        vocabulary=vocabulary if recipe.task in TOKEN_TASKS else 0,
        max_positions=positions,
        writer=writer,
        alignment_stats=stats,
        duplicates=duplicates,
        save_dtype=new_student.save_dtype,
    )
    _check_teacher(built)
    parts = [*loaded.models.values(), *([source] if source else []), student, loaded.tokenizer]
    parts += [] if tokenizer is loaded.tokenizer else [tokenizer]
    notes = [note for part in parts for note in loading_notes(part)]
    notes += [*([vocabulary_note] if kept else ()), *vocabulary_notes, *_notes(built)]
    return replace(built, notes=tuple(notes))


def _notes(built: BuiltRun) -> Iterator[str]:
    """Notes on teacher, data, student and training."""
    recipe, student, rollout = built.recipe, built.new_student, built.new_rollout()
    yield from _teacher_notes(built)
    yield from (*built.train.notes, *built.eval.notes, *built.duplicates.notes)
    yield from filter(None, [pad_token_id(built.tokenizer)[1]])
    if recipe.task == "causal":
        yield from chat_notes(built.loaded, built.tokenizer, built.train.dataset, recipe.data.eval)
    if recipe.train.get("bf16") and not built.plan.bf16:
        yield "train.bf16: this CPU has no bfloat16 instructions; training in float32, which is faster here."
    yield from recipe.student.open_choices
    if isinstance(student, StudentBuilder) and student.initialization:
        yield from student.initialization.notes
    if built.packed is not None:
        yield from packing_notes(built.packed, built.plan.batch_rows, built.loaded)
    if rollout is not None:
        yield from rollout.check_prompts(built.train.dataset)
        if rollout.own_weight is not None and built.plan.rows_per_step <= 1:
            why = "it has no effect on a step of one row, which is a sample or data"
            yield f"rollout.own_weight: {why}. Take more rows."
    if built.alignment_stats:
        yield from _alignment_notes(built.alignment_stats, built.vocabulary)
    if built.teacher.needs_trial and not built.teacher.covers(built.eval.dataset):
        yield "teacher: it does not cover the held-out rows, which learning curves measure by labels alone."


def piece(row: dict[str, Any], length: int) -> dict[str, Any]:
    """At most so many tokens of a row, among them some of its first target tokens."""
    # The first token has no prediction.
    first = next((i for i, label in enumerate(row["labels"]) if i and label != IGNORE), 0)
    end = max(length, first + length // 2)
    return {name: values[max(end - length, 0) : end] for name, values in row.items()}


def _read_own_tokens(recipe: Recipe, loaded: LoadedTeacher, student: PreTrainedTokenizerBase) -> LoadedTeacher:
    """Let the teacher read the student's text in tokens of its own, for terms over bytes."""
    wrong = [term.name for term in recipe.objective if term.needs_teacher and not term.other_tokenizer]
    if wrong:
        raise RecipeError(
            f"objective: expected chunks, mapped_logits and uld without terms over tokens, got {', '.join(wrong)} too. "
            "Use terms over bytes, for a teacher with another tokenizer, or terms over tokens."
        )
    if not recipe.teacher.other_tokenizer:
        raise RecipeError(
            f"teacher: expected a model alone for terms that compare bytes, got {recipe.teacher.title}. Name it with "
            "teacher.model."
        )
    if recipe.rollout is not None and recipe.rollout.guided:
        raise RecipeError(
            "rollout: expected a teacher of the student's tokens for teacher_mix and teacher_top_k, got one that is "
            "compared by bytes. Leave them out: the student samples alone."
        )
    model = loaded.models["teacher"]
    checked_vocabulary(loaded.tokenizer, {"teacher": token_rows(model, "causal")})
    limit = max_positions(model)
    return replace(loaded, teacher=CrossTokenizerTeacher(loaded.teacher, loaded.tokenizer, student, max_length=limit))


def _vocabulary(
    recipe: Recipe, loaded: LoadedTeacher, tokenizer: PreTrainedTokenizerBase, models: Mapping[str, PreTrainedModel]
) -> tuple[int, list[str]]:
    """Check tokens and heads; return the number of shared tokens, and a note where heads have more rows."""
    rows = {name: token_rows(model, recipe.task) for name, model in models.items()}
    own_tokens = loaded.teacher.other_tokenizer
    vocabulary = shared_vocabulary(tokenizer if own_tokens else loaded.tokenizer, tokenizer, rows)
    if recipe.task not in TOKEN_TASKS:
        match_heads(recipe.task, models, pad_token_id(tokenizer)[0])
    padded = [f"{name} {size}" for name, size in rows.items() if size > vocabulary]
    note = f"vocabulary: {vocabulary} tokens; the heads have more rows ({', '.join(padded)}), which are sliced off."
    return vocabulary, [note] if padded else []


def _max_positions(recipe: Recipe, loaded: LoadedTeacher, models: Mapping[str, PreTrainedModel]) -> int | None:
    """Check that rows fit into the models' positions, and return the smallest number of positions."""
    max_length = recipe.data.max_length
    limits = {name: max_positions(model) for name, model in models.items()}
    if loaded.teacher.max_length is not None:
        limits["teacher"] = loaded.teacher.max_length
    for name, limit in limits.items():
        virtual = virtual_tokens(models["student"]) if name == "student" else 0
        if limit and max_length > limit - virtual:
            room = f"{limit - virtual}, what {virtual} virtual tokens leave of" if virtual else f"{limit},"
            raise RecipeError(
                f"data.max_length: expected at most {room} the {name}'s number of positions, got {max_length}."
            )
    return min((limit for limit in limits.values() if limit), default=None)


def encode_data(
    recipe: Recipe, student: PretrainedConfig | None, tokenizer: PreTrainedTokenizerBase
) -> tuple[Examples, Examples, Duplicates]:
    """Encode training and held-out data, and compare them.

    Masks of training rows change with the epoch, held-out ones do not. The student's config has a
    classifier's classes.
    """
    data, task = recipe.data, recipe.task
    classes = class_ids(student) if task == "classification" and student is not None else None
    options: dict[str, Any] = {"max_length": data.max_length, "packing": data.packing, "task": task, "classes": classes}
    with PartialState().main_process_first():  # the other ranks then find what it has encoded
        train = encode_mixture(data.train, tokenizer, **options)
        held_out = encode(data.eval, tokenizer, **options)
    duplicates = find_duplicates(train, held_out, near=data.near_duplicates)
    if task == "masked":
        masks: dict[str, Any] = {"share": data.masked_share, "seed": recipe.seed}
        train = replace(train, dataset=MaskedRows(train.dataset, tokenizer, **masks))
        held_out = replace(held_out, dataset=MaskedRows(held_out.dataset, tokenizer, **masks).fixed())
    return train, held_out, duplicates


def _trained_on(recipe: Recipe, loaded: LoadedTeacher, train: Examples) -> Teacher:
    """Return the teacher for the training data: with its own prompts, and beside a cache for the student's samples."""
    teacher = loaded.teacher
    if train.teacher_longest:
        if (kind := teacher.without_own_prompts) is not None:
            raise RecipeError(
                f"data.train: expected a teacher that reads its own prompts, got {kind}. Name one with teacher.model, "
                "or leave teacher_prompt out."
            )
        limits = [max_positions(model) for model in loaded.models.values()]
        limit = min((limit for limit in [*limits, teacher.max_length] if limit), default=None)
        if limit is not None and train.teacher_longest > limit:
            raise RecipeError(
                f"data.train: expected rows of at most {limit} tokens for the teacher, its number of positions, got "
                f"{train.teacher_longest} with its own prompt. Shorten teacher_prompt, or lower data.max_length."
            )
        teacher = PrivilegedTeacher(teacher)
    if recipe.rollout is not None and loaded.live is not None:
        teacher = CachedOrLiveTeacher(cast(CachedTeacher, teacher), loaded.live)
    return teacher


def _training_plan(values: Mapping[str, Any], num_rows: int, num_packed: int) -> TrainingPlan:
    batch_rows = int(values.get("per_device_train_batch_size", 8))
    batches = int(values.get("gradient_accumulation_steps", 1)) * PartialState().num_processes
    steps = int(values.get("max_steps", -1))
    if steps <= 0:
        steps = math.ceil(math.ceil(num_packed / (batch_rows * batches)) * float(values.get("num_train_epochs", 3.0)))
    rows_per_step = batch_rows * batches * num_rows / num_packed
    return TrainingPlan(batch_rows, batches, rows_per_step, steps, bool(values.get("bf16")) and has_bfloat16())


def build_objective(
    builder: StudentBuilder, teacher: Teacher, train: Dataset, plan: TrainingPlan, student: ModelShape | None
) -> Objective:
    """Build the objective, and prepare the teacher for the layers that its terms read of both models."""
    recipe, model = builder.recipe, builder.teacher.model

    def select(layers: LayerMap, batches: int) -> Mapping[Layer, Tensor]:
        """Find the teacher's most important dimensions for the student's width, on the first batches."""
        if model is None or student is None:
            raise RecipeError("objective: expected a teacher that is a local model for select_batches, got none.")
        of_teacher = [layer for _, layer in layers.pairs(student.layers, teacher.shape.layers)]
        rows = (train[i] for i in range(min(batches * plan.batch_rows, len(train))))
        data = in_batches(rows, builder.tokenizer, plan.batch_rows, model.device)
        return important_dimensions(model, data, of_teacher, student.width, recipe.task)

    objective = Objective([for_run(term, plan.steps).select(select) for term in recipe.objective])
    if student is not None:
        teacher.prepare(objective.fit(student, teacher.shape if objective.reads_teacher_layers else None)[1])
    return objective


def _alignment_stats(teacher: Teacher, dataset: Dataset) -> AlignmentStats | None:
    """Measure the alignment of two tokenizers on evenly spaced rows; None for a teacher of the student's tokens."""
    rows = evenly_spaced(ALIGNMENT_ROWS, len(dataset))
    stats = teacher.alignment_stats(dataset[i] for i in rows)
    if stats is not None and not stats.chunks:
        raise RecipeError(
            f"objective: expected text that both tokenizers can read, got none in {len(rows)} rows of the training "
            "data. Use a teacher whose tokenizer knows these characters."
        )
    return stats


def _check_teacher(built: BuiltRun) -> None:
    """Check that the teacher covers the training data, and that the objective can use its targets at any step."""
    teacher = built.teacher
    if not teacher.needs_trial:
        return
    teacher.require(built.train.dataset)
    (batch,) = in_batches([built.train.dataset[0]], built.tokenizer, 1)
    alignment = causal_alignment(batch["labels"])
    output = teacher(batch, alignment)
    logits = torch.zeros(len(alignment), built.vocabulary)
    for term in built.objective.terms:
        if isinstance(term, DenseTerm):
            term.teacher_logits(output.targets)
        if isinstance(term, PolicyGradient) and not teacher.answers_samples_apart:
            label_log_probs(output, alignment.labels)
            if term.single_step:
                token_divergence(logits, output.targets, ReverseKL())
        if isinstance(term, Logits):
            for step in (0, built.plan.steps // 2, built.plan.steps):
                temperature = value_at(term.temperature, step)
                token_divergence(logits, output.targets, term.divergence, temperature=temperature)


def _teacher_notes(built: BuiltRun) -> Iterator[str]:
    """Report a teacher that is no better than a guess on the first rows, or whose output is the same everywhere."""
    teacher, task = built.teacher, built.recipe.task
    if teacher.other_tokenizer or teacher.changes or task == "encoder":
        return
    of_tokens = task in TOKEN_TASKS
    number = PROBE_ROWS if of_tokens else PROBE_TARGETS
    rows = [built.train.dataset[i] for i in evenly_spaced(number, len(built.train.dataset))]
    if of_tokens and not built.needs_whole_rows:
        rows = [piece(row, PROBE_TOKENS) for row in rows]
    batch = next(in_batches(rows, built.tokenizer, number, PartialState().device))
    alignment = align(batch["labels"], task)
    if len(alignment) < PROBE_TARGETS:
        return
    output, choices = teacher(batch, alignment), built.vocabulary
    if isinstance(output.targets, HeadTargets | DenseTargets):
        dense = output.targets.dense()
        predicted, choices = dense if task == "regression" else dense.log_softmax(-1), choices or dense.shape[-1]
        if bool(predicted.isnan().any()):
            raise ModelError(NAN_TEACHER)
        if float((predicted - predicted[:1]).abs().max()) < SAME_OUTPUT:
            yield (
                "teacher: its predictions are the same whatever it reads. Check that its weights are those of a "
                "trained model."
            )
    log_probs = None if task == "regression" else output.log_probs_of(alignment.labels)
    if log_probs is None:
        return
    if bool(log_probs.isnan().any()):
        raise ModelError(NAN_TEACHER)
    loss, uniform = -float(log_probs.mean()), math.log(choices)
    if loss > uniform:
        unit = "tokens" if of_tokens else "rows"
        yield (
            f"teacher: its loss on {len(log_probs)} {unit} of the training data is {loss:.2f} nats, that of a uniform "
            f"guess {uniform:.2f}. Check that it is trained, and on this kind of text."
        )


def _alignment_notes(stats: AlignmentStats, tokens: int) -> Iterator[str]:
    """Describe the alignment of two tokenizers, for a student of so many tokens."""
    yield (
        f"tokenizers: compared by bytes; {stats.shared:,} of the student's {tokens:,} tokens are the teacher's too. "
        f"{stats.chunks / stats.tokens:.2f} chunks per token cover {stats.covered / max(stats.bytes, 1):.1%} of the "
        f"text; {stats.one_to_one / stats.chunks:.0%} of them are one token for both."
    )
    if stats.covered < MIN_COVERAGE * stats.bytes:
        yield (
            f"tokenizers: the teacher has no targets for {1 - stats.covered / stats.bytes:.0%} of the text: it cannot "
            "read it, or the row is too long for it. Labels alone are learned there."
        )
    yield (
        "tokenizers: agreement and KL are left out, which compare distributions over the same tokens. The teacher's "
        "loss is that of the same text, divided by the student's tokens."
    )
