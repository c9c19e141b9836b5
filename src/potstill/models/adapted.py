"""Save and convert students, and merge and count those with an adapter (PeftModels)."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from potstill.errors import ModelError
from potstill.losses.alignment import Task
from potstill.models.loading import (
    ADAPTER_WEIGHTS,
    QUANTIZATION,
    SAVED_EMBEDDINGS,
    is_adapter,
    load_model,
    suppress_warnings,
)
from potstill.models.locate import require_package, weight_files
from potstill.models.precision import saved_dtype
from potstill.models.size import inactive_parameters


def is_adapted(model: Any) -> bool:
    """Whether a model is a PeftModel; peft is not imported."""
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")


def is_quantized(model: Any) -> bool:
    """Whether a model's weights are quantized, so that they cannot be trained."""
    return getattr(model.config, "quantization_config", None) is not None


def virtual_tokens(model: Any) -> int:
    """The number of positions that prompt and prefix tuning put in front of a row; 0 for other models."""
    return int(getattr(model.active_peft_config, "num_virtual_tokens", None) or 0) if is_adapted(model) else 0


class ParameterCount(NamedTuple):
    trained: int
    all: int
    active: int  # that a token passes through: of a mixture of experts, those of its own alone


def parameter_count(model: Any) -> ParameterCount:
    """Count a model's parameters, adapters included: tied ones once, quantized ones as many as before."""
    if is_adapted(model):
        trained, total = model.get_nb_trainable_parameters()
        replaced = [module.original_module for module in model.modules() if hasattr(module, "original_module")]
        total -= sum(x.numel() for module in replaced for x in module.parameters())
    else:
        trained, total = model.num_parameters(only_trainable=True), model.num_parameters()
    return ParameterCount(trained, total, total - inactive_parameters(model))


def save_adapter(model: Any, folder: str | Path, state_dict: Mapping[str, Tensor] | None = None) -> None:
    """Save the adapter of a model, its base's quantization, and the config of a head that is trained with it."""
    embeddings = getattr(model.get_base_model(), SAVED_EMBEDDINGS, False)
    with suppress_warnings():
        model.save_pretrained(folder, state_dict=state_dict, save_embedding_layers=embeddings)
    if model.active_peft_config.modules_to_save:
        config = copy.deepcopy(model.config)
        if is_quantized(model):
            del config.quantization_config
        config.to_json_file(Path(folder) / "config.json")
    if is_quantized(model):
        model.config.quantization_config.to_json_file(Path(folder) / QUANTIZATION)


def save_student(model: Any, folder: str | Path, state_dict: Mapping[str, Tensor] | None = None) -> None:
    if is_adapted(model):
        save_adapter(model, folder, state_dict)
    else:
        model.save_pretrained(folder, state_dict=state_dict)


def convert_saved(folder: Path, dtype: torch.dtype, task: Task) -> None:
    """Change the precision of a saved student, but for weights that its architecture keeps in float32.

    The file stays as it is where a weight would overflow.
    """
    if saved_dtype(folder) == dtype or _overflows(folder, dtype):
        return
    with tempfile.TemporaryDirectory(dir=folder) as converted, suppress_warnings():
        if is_adapter(str(folder)):
            weights = {name: weight.to(dtype) for name, weight in load_file(folder / ADAPTER_WEIGHTS).items()}
            save_file(weights, Path(converted) / ADAPTER_WEIGHTS, metadata={"format": "pt"})
        else:
            model = load_model(str(folder), "student", str(dtype).removeprefix("torch."), task)
            model.save_pretrained(converted)
        for file in [*weight_files(folder), *folder.glob("*.safetensors.index.json")]:
            file.unlink()
        for file in Path(converted).iterdir():
            file.replace(folder / file.name)


def _overflows(folder: Path, dtype: torch.dtype) -> bool:
    """Whether a saved weight is too large for a precision."""
    largest = torch.finfo(dtype).max
    return any(bool((w.abs() > largest).any()) for file in weight_files(folder) for w in load_file(file).values())


def merged(model: Any) -> PreTrainedModel:
    """Merge an adapter into its base: the plain model that computes the same, in the base's dtype.

    A quantized base is dequantized first. In 4 bits that is exact; in 8 bits the quantized products also round
    activations, which no plain model does. The given model must not be used afterwards.

    Raises:
        ModelError: no weights compute the same.
    """
    check_mergeable(model)
    with suppress_warnings():
        model = over_plain_base(model)
        _untie_adapted(model.get_base_model())
        return model.merge_and_unload(safe_merge=True)


def _untie_adapted(base: Any) -> None:
    """Give the head weights of its own where it, or the embeddings, alone has an adapter: both would be changed."""
    head, embeddings = base.get_output_embeddings(), base.get_input_embeddings()
    if head is None or not (hasattr(head, "base_layer") or hasattr(embeddings, "base_layer")):
        return
    layer = getattr(head, "base_layer", head)
    if layer.weight is getattr(embeddings, "base_layer", embeddings).weight:
        layer.weight = torch.nn.Parameter(layer.weight.detach().clone())
        base.config.tie_word_embeddings = False


def check_mergeable(model: Any) -> None:
    """Refuse an adapter that no weights of its base can replace."""
    config = model.active_peft_config
    if config.is_prompt_learning or getattr(config, "alora_invocation_tokens", None):
        kind = "virtual tokens" if config.is_prompt_learning else "aLoRA, which begins at some tokens"
        raise ModelError(
            f"student: expected an adapter that can be merged into the weights of its base, got {kind}. Train lora or "
            "ia3."
        )


def over_plain_base(model: Any) -> Any:
    """Put the adapter of a quantized base on the dequantized one, in place of that model; others stay as they are."""
    if not is_quantized(model):
        return model
    peft = require_package("peft", "adapters", "student.adapter.merge")
    (config,) = model.peft_config.values()
    weights = peft.get_peft_model_state_dict(model)
    model = peft.get_peft_model(model.unload().dequantize(), config)
    peft.set_peft_model_state_dict(model, weights)
    return model
