"""From the recipe's `teacher` to who speaks."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from transformers import AutoConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from potstill.engines.server import ModelServer
from potstill.errors import RecipeError, VocabularyError
from potstill.losses.alignment import TOKEN_TASKS, Task
from potstill.models.loading import load_model, load_tokenizer
from potstill.runs.config.teacher import MemberPart, ServerPart, SpeakerPart, TeacherPart
from potstill.teachers.cached import COMPANIONS, CachedTeacher
from potstill.teachers.ensemble import EnsembleTeacher
from potstill.teachers.model import ModelTeacher
from potstill.teachers.self_taught import BaseModelTeacher, EMATeacher
from potstill.teachers.served import ServedTeacher
from potstill.teachers.teacher import Teacher


class Speaker(NamedTuple):
    """The teacher, its model where it is one that is here, and what else is known of it.

    `models` are all that are here, by what they are called.
    """

    teacher: Teacher
    model: PreTrainedModel | None
    config: PretrainedConfig | None
    tokenizer: PreTrainedTokenizerBase
    models: Mapping[str, PreTrainedModel] = {}


def load_teacher(part: TeacherPart, student: str | None, task: Task = "causal") -> Speaker:
    """Load the teacher that a recipe names.

    Args:
        part: the recipe's teacher.
        student: where the student's model and tokenizer are: the tokenizer with which a server is asked.
        task: what the teacher is asked for.

    Raises:
        UserError: it is not there, or not usable.
    """
    if part.ensemble is not None:
        return _ensemble(part, part.ensemble, student, task)
    if part.ema is not None or part.adapter_off:
        key = "ema" if part.ema is not None else "adapter_off"
        if student is None:
            raise RecipeError(
                f"teacher.{key}: expected student.model, got a design: its config is changed from a teacher's, and "
                "there is none. Name a student with student.model instead."
            )
        own = BaseModelTeacher() if part.ema is None else EMATeacher(part.ema.decay, part.ema.warmup_steps)
        return Speaker(own, None, None, load_tokenizer(student, "student.model"))
    return _one(part, student, "teacher", task)


def _one(part: SpeakerPart, student: str | None, key: str, task: Task) -> Speaker:
    """A model, a cache or a server; `key` is where the recipe says so."""
    if part.server is not None:
        return _served(part.server, student)
    bits = {"int8": 8, "int4": 4}.get(part.dtype)
    dtype = part.dtype if bits is None else "auto"
    model = None if part.model is None else load_model(part.model, f"{key}.model", dtype, task, bits=bits)
    models = {} if model is None else {key: model}
    if part.cache is not None:
        kept = Path(part.cache) / COMPANIONS
        cached = CachedTeacher(part.cache)
        known = (kept / "config.json").exists()  # a server tells none
        config = AutoConfig.from_pretrained(kept, trust_remote_code=False) if known else None
        return Speaker(cached, model, config, load_tokenizer(str(kept), f"{key}.cache"), models)
    assert model is not None and part.model is not None
    tokenizer = load_tokenizer(part.model, f"{key}.model")
    return Speaker(ModelTeacher(model, device=part.device), model, _whole(model.config), tokenizer, models)


def _ensemble(part: TeacherPart, members: Sequence[MemberPart], student: str | None, task: Task) -> Speaker:
    """Several as one; a designed student's config is changed from the first that is known."""
    speakers = [_one(member, student, f"teacher.ensemble.{i}", task) for i, member in enumerate(members)]
    vocabulary = speakers[0].tokenizer.get_vocab()
    for i, one in enumerate(speakers):
        if one.tokenizer.get_vocab() != vocabulary:
            raise VocabularyError(
                f"teacher.ensemble.{i}: expected the token -> id map of {members[0].title}, got another of "
                f"{members[i].title}. Distributions over different tokens have no mean. Leave one of them out."
            )
    given = [member.weight for member in members if member.weight is not None]
    ensemble = EnsembleTeacher(
        [one.teacher for one in speakers],
        given or None,
        of=part.of,
        learned=part.weights == "learned",
        names=_names([member.title for member in members]),
        vocabulary=max(vocabulary.values()) + 1 if task in TOKEN_TASKS else None,
    )
    config = next((one.config for one in speakers if one.config is not None), None)
    models = {key: model for one in speakers for key, model in one.models.items()}
    return Speaker(ensemble, None, config, speakers[0].tokenizer, models)


def _names(titles: Sequence[str]) -> list[str]:
    """What the members are called in logs: the last part of each title, with its place where that is not its own."""
    short = [title.rstrip("/").rpartition("/")[2] for title in titles]
    return [name if short.count(name) == 1 else f"{name}_{i}" for i, name in enumerate(short)]


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
