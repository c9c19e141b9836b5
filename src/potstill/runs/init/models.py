"""What a model's config and tokenizer tell; no weights are read."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from transformers import PretrainedConfig, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    MODEL_MAPPING,
)

from potstill.errors import ModelError
from potstill.losses.alignment import Task
from potstill.models.loading import ADAPTER_CONFIG, is_adapter, load_config, load_tokenizer
from potstill.models.size import build
from potstill.models.structure import find_structure
from potstill.runs.build_task import positions_of

VECTORS = (".npy", ".safetensors", ".pt")
HEADS: dict[Task, object] = {
    "causal": MODEL_FOR_CAUSAL_LM_MAPPING,
    "masked": MODEL_FOR_MASKED_LM_MAPPING,
    "classification": MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    "encoder": MODEL_MAPPING,
}


@dataclass(frozen=True)
class Model:
    """A model, as far as it is known without its weights.

    Args:
        config: its config, or its base's where it is an adapter.
        tokenizer: its tokenizer.
        task: what it was made for.
        positions: tokens in a row at most.
        parameters: all of them.
        copies: whether a student of its kind can begin with its weights.
    """

    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    task: Task
    positions: int
    parameters: int
    copies: bool


def look_at_model(where: str, key: str, task: Task | None = None) -> Model:
    """What a folder, or a name on the hub, tells of its model.

    Args:
        where: the folder or the name.
        key: how it is called in errors.
        task: what it is asked for; default: what it was made for.

    Raises:
        ModelError: there is no model, or none that can be distilled.
    """
    of = where
    if is_adapter(where):
        kept = json.loads((Path(where).expanduser() / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        of = kept.get("base_model_name_or_path") or where
    config, tokenizer = load_config(of, key), load_tokenizer(where, f"{key}: its tokenizer")
    skeleton = build(config, "meta")
    limits = [positions_of(skeleton), tokenizer.model_max_length]
    try:
        find_structure(skeleton)
        copies = True
    except ModelError:
        copies = False
    return Model(
        config,
        tokenizer,
        _task(config, where, key, task),
        min((limit for limit in limits if limit and limit < 10**9), default=2048),  # tokenizers say 10^30 for any
        skeleton.num_parameters(),
        copies,
    )


def is_embedder(where: str) -> bool:
    """Whether it is a file of vectors or a folder of sentence-transformers."""
    path = Path(where).expanduser()
    return path.suffix in VECTORS or (path / "modules.json").exists()


def speak_alike(teacher: Model, student: Model) -> bool:
    """Whether two models cut text into the same tokens."""
    return teacher.tokenizer.get_vocab() == student.tokenizer.get_vocab()


def _task(config: PretrainedConfig, where: str, key: str, asked: Task | None) -> Task:
    """What is asked for, where the model can be asked for it; else what it was made for."""
    made = (config.architectures or [""])[0]
    fit: Task | None = None
    for task, heads in HEADS.items():
        found = heads.get(type(config), None)  # type: ignore[attr-defined]  # a lazy mapping of transformers
        if made in [each.__name__ for each in (found if isinstance(found, tuple) else (found,)) if each]:
            fit = "regression" if task == "classification" and config.num_labels == 1 else task
            break
    if fit is None and (asked is None or made):
        raise ModelError(
            f"{key}: expected a causal or masked language model, a sequence classifier or an encoder in {where}, got "
            f"{made or 'a config without architectures'}. Name another, or say what it is with --task."
        )
    if asked not in (None, fit, "encoder") and fit is not None:  # layers can be heard of any model
        raise ModelError(f"{key}: expected a model for the task {asked} in {where}, got {made}, which is for {fit}.")
    return asked or fit or "encoder"
