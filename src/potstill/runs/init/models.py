"""What a model's config and tokenizer say about it; no weights are read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from potstill.errors import ModelError
from potstill.losses.alignment import Task
from potstill.models.heads import max_positions
from potstill.models.loading import ADAPTER_CONFIG, AUTO_CLASSES, is_adapter, load_config, load_tokenizer
from potstill.models.size import build
from potstill.models.structure import find_structure

VECTORS = (".npy", ".safetensors", ".pt")


class ModelInfo(NamedTuple):
    """A model's properties without its weights; the config is its base model's if it is an adapter."""

    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    task: Task
    max_length: int  # of a row, in tokens
    parameters: int
    can_initialize: bool  # whether a student of the same family can start from its weights


def inspect_model(path: str, key: str, task: Task | None = None) -> ModelInfo:
    """Read the config and the tokenizer of a model, to use for a task; default: the one it was trained for.

    Raises:
        ModelError: there is no such model, or it is not for this task.
    """
    base = path
    if is_adapter(path):
        adapter = json.loads((Path(path).expanduser() / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        base = adapter.get("base_model_name_or_path") or path
    config, tokenizer = load_config(base, key), load_tokenizer(path, f"{key}: its tokenizer")
    model = build(config, "meta")
    try:
        find_structure(model)
        can_initialize = True
    except ModelError:
        can_initialize = False
    limits = [limit for limit in (max_positions(model), tokenizer.model_max_length) if limit and limit < 10**9]
    max_length = min(limits, default=2048)  # 10^30 means no limit
    return ModelInfo(
        config, tokenizer, _task(config, path, key, task), max_length, model.num_parameters(), can_initialize
    )


def is_embedder(path: str) -> bool:
    """Whether a path is a file of vectors or a sentence-transformers folder."""
    return path.endswith(VECTORS) or (Path(path).expanduser() / "modules.json").exists()


def _task(config: PretrainedConfig, path: str, key: str, requested: Task | None) -> Task:
    """Find the task that the class in a config's `architectures` is for, and check it against the requested one."""
    architecture = (config.architectures or [""])[0]
    trained: Task | None = None
    for task, (auto_class, _) in AUTO_CLASSES.items():
        classes = auto_class._model_mapping.get(type(config), ())
        if architecture in [each.__name__ for each in (classes if isinstance(classes, tuple) else (classes,))]:
            trained = "regression" if task == "classification" and config.num_labels == 1 else task
            break
    if trained is None and (requested is None or architecture):
        raise ModelError(
            f"{key}: expected a causal or masked language model, a sequence classifier or an encoder in {path}, got "
            f"{architecture or 'a config without architectures'}. Name another, or give its task with --task."
        )
    if trained is not None and requested not in (None, trained, "encoder"):  # any model has hidden states
        raise ModelError(
            f"{key}: expected a model for the task {requested} in {path}, got {architecture}, which is for {trained}."
        )
    return requested or trained or "encoder"
