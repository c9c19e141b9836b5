"""From the recipe's `teacher` to who speaks."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import NamedTuple

from transformers import AutoConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from potstill.engines.server import ModelServer
from potstill.errors import RecipeError
from potstill.loading import load_model, load_tokenizer
from potstill.recipe import TeacherPart
from potstill.recipe.teacher import ServerPart
from potstill.teachers import CachedTeacher, ModelTeacher, ServedTeacher, Teacher
from potstill.teachers.cached import COMPANIONS


class Speaker(NamedTuple):
    """The teacher, its model where that is here, and what else is known of it."""

    teacher: Teacher
    model: PreTrainedModel | None
    config: PretrainedConfig | None
    tokenizer: PreTrainedTokenizerBase


def find_speaker(part: TeacherPart, student: str | None) -> Speaker:
    """Load the teacher that a recipe names.

    Args:
        part: the recipe's teacher.
        student: where the student's model and tokenizer are: the tokenizer with which a server is asked.

    Raises:
        UserError: it is not there, or not usable.
    """
    if part.server is not None:
        return _served(part.server, student)
    bits = {"int8": 8, "int4": 4}.get(part.dtype)
    dtype = part.dtype if bits is None else "auto"
    model = None if part.model is None else load_model(part.model, "teacher.model", dtype, bits=bits)
    if part.cache is not None:
        kept = Path(part.cache) / COMPANIONS
        cached = CachedTeacher(part.cache)
        known = (kept / "config.json").exists()  # a server tells none
        config = AutoConfig.from_pretrained(kept, trust_remote_code=False) if known else None
        return Speaker(cached, model, config, load_tokenizer(str(kept), "teacher.cache"))
    assert model is not None and part.model is not None
    tokenizer = load_tokenizer(part.model, "teacher.model")
    return Speaker(ModelTeacher(model, device=part.device), model, _whole(model.config), tokenizer)


def _whole(config: PretrainedConfig) -> PretrainedConfig:
    """The config without how the model is rounded: students are made after it."""
    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def _served(part: ServerPart, student: str | None) -> Speaker:
    if student is None:
        raise RecipeError(
            "student.design: expected a teacher whose config it changes, got one behind a server, which tells none. "
            "Name a student with student.model instead."
        )
    tokenizer = load_tokenizer(student, "student.model")
    server = ModelServer(**part.model_dump(exclude={"top_k"}))
    return Speaker(ServedTeacher(server, tokenizer, top_k=part.top_k), None, None, tokenizer)
