"""The student of a recipe: its config, its first weights and its adapter."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, set_seed

from potstill.data.batches import in_batches, pad_token_id
from potstill.errors import RecipeError
from potstill.evaluate.speed import forward_seconds
from potstill.losses.alignment import Task
from potstill.models.adapted import is_adapted, is_quantized, merged
from potstill.models.adapters import adapt
from potstill.models.budget import Budget, parse_count
from potstill.models.chat import end_token_ids, set_end_tokens
from potstill.models.design import student_config
from potstill.models.generation_settings import take_settings
from potstill.models.heads import set_pad_id
from potstill.models.initialize import Initialization, plan_initialization, random_student
from potstill.models.loading import has_bfloat16, is_adapter, load_model, vocabulary_size
from potstill.models.placement import move
from potstill.models.precision import as_dtype, saved_dtype
from potstill.models.pruning import Importance
from potstill.models.shapes import count_experts, text_config
from potstill.models.size import language_model_class
from potstill.models.spacing import evenly_spaced
from potstill.models.trimming import trim_model
from potstill.runs.config.run import Recipe
from potstill.runs.config.student import BudgetPart, StudentPart
from potstill.teachers.source import LoadedTeacher

CALIBRATION_BATCH = 8  # rows
CALIBRATION_TOKENS = 2**15  # in about as many tokens, long rows say what more of them would


@dataclass(frozen=True)
class StudentBuilder:
    """Makes the recipe's student, with its first weights and its adapter: the same at every call."""

    recipe: Recipe
    teacher: LoadedTeacher
    tokenizer: PreTrainedTokenizerBase  # the student's
    design: PretrainedConfig | None  # of a new student; None for a model that exists
    source: PreTrainedModel | None  # what a designed student is cut from: student.model, else the teacher
    kept: tuple[int, ...] | None = None  # ids of the tokens of an existing model that the tokenizer has; None for all
    initialization: Initialization | None = None  # what a new student takes from its teacher; None for random weights

    @property
    def save_dtype(self) -> torch.dtype | None:
        """The precision to save the student in; None for that of training.

        auto is that of the checkpoint that it starts from, else its teacher's. Adapters stay in that of training.
        """
        part = self.recipe.student
        if part.quantize is not None:
            return None
        if part.save_dtype != "auto":
            return as_dtype(part.save_dtype)
        if (part.adapter is not None and not part.merges) or (part.model is not None and is_adapter(part.model)):
            return None
        if part.model is not None:
            return saved_dtype(part.model)
        return None if self.teacher.config is None else as_dtype(self.teacher.config.dtype)

    def __call__(self) -> Any:
        model = self._new()
        if self.recipe.task == "causal":
            self._set_generation(model)
            set_end_tokens(model, self._end_tokens(model), self.tokenizer.eos_token_id)
        return model

    def _set_generation(self, model: Any) -> None:
        """Let a designed student generate as its source does, and pad with its tokenizer's token where that has none.

        A config that a training has saved may say `use_cache: false`, which is of the training.
        """
        generation = getattr(model, "generation_config", None)
        if self.design is None or generation is None:
            return
        of_source = getattr(self.source, "generation_config", None)
        generation.use_cache = None
        if of_source is not None:
            take_settings(generation, of_source, tokens=self.recipe.student.tokenizer is None)
        if generation.pad_token_id is None:
            generation.pad_token_id = self.tokenizer.pad_token_id

    def _end_tokens(self, model: Any) -> frozenset[int]:
        """Find the tokens that end a text: the student's own, its source's, and a teacher's of the same tokens."""
        same = self.teacher.tokenizer.get_vocab() == self.tokenizer.get_vocab()
        ends = end_token_ids(self.tokenizer, model) | (end_token_ids(None, self.teacher.model) if same else frozenset())
        own_source = self.source is not self.teacher.model  # it has the student's tokenizer
        return ends | (end_token_ids(None, self.source) if own_source else frozenset())

    def _new(self) -> Any:
        recipe, adapter = self.recipe, self.recipe.student.adapter
        model: Any
        if self.initialization is not None:
            assert self.source is not None
            model = self.initialization.student(self.source, recipe.seed)
        elif self.design is not None:
            model = random_student(self.design, recipe.seed)
        else:
            assert recipe.student.model is not None
            set_seed(recipe.seed)  # a head that is missing is random; a classifier has the teacher's classes
            dtype, bits = ("float32", None) if adapter is None else (adapter.dtype, adapter.base_bits)
            options: dict[str, Any] = {"bits": bits, "labels_of": self.teacher.config, "trainable": adapter is None}
            options["may_miss"] = True
            model = load_model(recipe.student.model, "student.model", dtype, recipe.task, **options)
            _check_reloads(model, recipe.task)
            if self.kept is not None:
                trim_model(model, self.kept)
        if adapter is not None:
            return adapt(model, adapter, seed=recipe.seed, tokenizer=self.tokenizer)
        if is_quantized(model) and not is_adapted(model):
            raise RecipeError(
                "student.model: expected weights that can be trained, got a quantized model. Train an adapter on it "
                "(student.adapter: qlora), or name the model in full precision."
            )
        return model


def _check_reloads(model: Any, task: Task) -> None:
    """Check that the saved student can be loaded: some families keep the config of a text part that has no class."""
    if task == "causal" and type(model.config) not in language_model_class(model.config)._model_mapping:
        raise RecipeError(
            f"student.model: expected a model that can be saved and loaded, got {type(model).__name__}, for whose "
            f"config ({model.config.model_type}) transformers has no class. Name another student."
        )


def load_source(recipe: Recipe, loaded: LoadedTeacher, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel | None:
    """Load what a designed student is cut from: student.model, or a teacher whose adapter has to be merged for that.

    None where it is cut from its teacher as it is, or not cut.
    """
    name = recipe.student.model
    if recipe.student.design is None:
        return None
    if name is None:
        if recipe.student.initialize.method == "random" or not is_adapted(loaded.model):
            return None
        return merged(load_model(str(recipe.teacher.model_path), "teacher.model", "float32", recipe.task))
    if is_adapter(name):
        raise RecipeError(
            f"student.model: expected a whole model, to be cut to the design, got an adapter, {name}. Merge it with "
            "its model first."
        )
    set_seed(recipe.seed)  # a head that is missing is random
    options: dict[str, Any] = {"labels_of": loaded.config, "may_miss": True}
    model = load_model(name, "student.model", "float32", recipe.task, **options)
    set_pad_id([model], pad_token_id(tokenizer)[0])
    return model


def design_of(
    student: StudentPart,
    source: PretrainedConfig | None,
    tokenizer: PreTrainedTokenizerBase,
    whole: PretrainedConfig | None = None,
) -> PretrainedConfig | None:
    """Derive the config of a new student, without padding rows in its head; None for a model that exists.

    `source` is the config that the design changes, and `whole` what it was before its vocabulary was cut: a budget's
    shares are of that size.
    """
    if student.design is None:
        return None
    if source is None:
        raise RecipeError(
            "student.design: expected a teacher with a local config, which the design changes, got none. "
            "Name a student with student.model instead."
        )
    vocabulary, design = vocabulary_size(tokenizer), student.design
    if student.tokenizer is not None:  # the teacher's special tokens have other ids, or none
        source = copy.deepcopy(text_config(source))
        for role in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(source, role, getattr(tokenizer, role))
    if not isinstance(design, BudgetPart):
        return student_config(source, design, vocabulary)
    if whole is not None:
        source = copy.deepcopy(text_config(source))
        source.vocab_size = text_config(whole).vocab_size
    return budget_config(design, source, vocabulary)


def budget_config(design: BudgetPart, source: PretrainedConfig, vocabulary: int) -> PretrainedConfig:
    """Derive the config of the student of a budget with so many tokens; ModelError where the family has none."""
    return budget_of(design).student(source, vocabulary=vocabulary, seconds=forward_seconds)


def budget_of(design: BudgetPart) -> Budget:
    counts = {name: getattr(design, name) for name in ("params", "active_params")}
    limits = design.model_dump(exclude={"search"})
    return Budget(**limits | {name: None if count is None else parse_count(count) for name, count in counts.items()})


def initialization_of(
    builder: StudentBuilder, train: Dataset, importance: Importance | None = None
) -> Initialization | None:
    """Plan what a new student takes from its source, by evenly spaced rows of data; None for random weights.

    `importance` is that of the source's parts where it was measured before.
    """
    recipe, source, part = builder.recipe, builder.source, builder.recipe.student.initialize
    if builder.design is None or part.method == "random":
        return None
    if source is None:
        raise RecipeError(
            f"student.initialize: expected a teacher that is a local model for {part.method}, got none. Name it with "
            "teacher.model, without shard, or a model of the teacher's tokens with student.model, or start from random "
            "weights."
        )
    if getattr(source, "is_quantized", False):
        hint = "Leave teacher.dtype out"
        if recipe.student.model is not None or vars(recipe.teacher).get("dtype") not in ("int4", "int8"):
            hint = "It was saved so: name the model that it was made from"
        raise RecipeError(
            f"student.initialize: expected a model in full precision for {part.method}, got a quantized one. {hint}, "
            "or start from random weights."
        )
    calibration = partial(calibration_batches, builder, train)
    options: dict[str, Any] = {"layers": part.layers, "fit": part.fit, "importance": importance}
    options["merge"] = part.experts == "merge"
    with calibration_precision(builder):
        return plan_initialization(source, builder.design, part.method, calibration=calibration, **options)


def calibration_precision(builder: StudentBuilder) -> torch.autocast:
    """Forward passes in the precision of the training, but for experts, whose outputs are compared.

    Weights are fitted between passes, so none are cached.
    """
    assert builder.source is not None
    device = torch.device(builder.recipe.teacher.model_device or PartialState().device)
    bf16 = bool(builder.recipe.train.get("bf16")) and has_bfloat16()
    bf16 = bf16 and not count_experts(text_config(builder.source.config))
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16, cache_enabled=False)


def calibration_batches(builder: StudentBuilder, train: Dataset) -> Iterator[dict[str, Tensor]]:
    """Evenly spaced rows of training data, for a source on the teacher's device."""
    recipe, source = builder.recipe, builder.source
    assert source is not None
    move(source, recipe.teacher.model_device or PartialState().device)
    rows = calibration_rows(recipe.student.initialize.calibration_rows, train)
    return in_batches((train[i] for i in rows), builder.tokenizer, CALIBRATION_BATCH)


def calibration_rows(number: int, train: Dataset) -> list[int]:
    """Choose so many evenly spaced rows, or as many as have about CALIBRATION_TOKENS."""
    rows = evenly_spaced(number, len(train))
    tokens = sum(len(train[i]["input_ids"]) for i in rows)
    if tokens > CALIBRATION_TOKENS:
        fewer = max(2 * CALIBRATION_BATCH, len(rows) * CALIBRATION_TOKENS // tokens)
        rows = evenly_spaced(min(fewer, len(rows)), len(train))
    return rows


def calibrated_quickly(recipe: Recipe) -> Recipe:
    """Return the recipe with one calibration row and no fit: for where a student's first weights do not matter."""
    quick = recipe.student.initialize.model_copy(update={"calibration_rows": 1, "fit": False})
    return recipe.model_copy(update={"student": recipe.student.model_copy(update={"initialize": quick})})
