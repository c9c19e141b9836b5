"""A model with an adapter: saved, loaded, merged and counted. It is a PeftModel; peft is an extra."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from potstill.errors import ModelError, UserError

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
QUANTIZATION = "quantization_config.json"  # beside both: the base's, where it was quantised when it was loaded


def require_peft(key: str) -> Any:
    """The package peft.

    Raises:
        UserError: it is not there.
    """
    try:
        import peft
    except ImportError:
        raise UserError(
            f"{key}: expected the package peft, which makes adapters, got none. "
            "Install it with pip install 'potstill[adapters]'."
        ) from None
    return peft


@contextmanager
def suppress_peft_warnings() -> Iterator[None]:
    """Without what peft and bitsandbytes remark at each call on what is meant here, or on transformers' future."""
    bits = logging.getLogger("bitsandbytes")  # "inputs will be cast", at every product
    level = bits.level
    bits.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".is_gradient_checkpointing. is deprecated")  # asked for by peft
            warnings.filterwarnings("ignore", message="Position ids are not supported")  # its prompts, in generate()
            warnings.filterwarnings("ignore", message="Merge lora module to [48]-bit")
            warnings.filterwarnings("ignore", message="MatMul8bitLt")
            yield
    finally:
        bits.setLevel(level)


def is_adapter(where: str) -> bool:
    """Whether a path is a folder with an adapter."""
    return (Path(where).expanduser() / CONFIG).exists()


def is_adapted(model: Any) -> bool:
    """Whether a model is a PeftModel, without an import of peft."""
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")


def is_quantized(model: Any) -> bool:
    """Whether a model's weights are rounded to a few bits, which cannot be trained."""
    return getattr(model.config, "quantization_config", None) is not None


def judging(model: PreTrainedModel) -> list[str]:
    """The names of what makes a judgement of a body's last states: trained whole, because it may be random yet. None
    where a head is one of tokens, or there is none.
    """
    body = model.base_model
    if model.get_output_embeddings() is not None or body is model:
        return []
    heads = [name for name, child in model.named_children() if child is not body and [*child.parameters()]]
    pooler = getattr(body, "pooler", None)
    return heads + ([f"{model.base_model_prefix}.pooler"] if heads and isinstance(pooler, nn.Module) else [])


def virtual_tokens(model: Any) -> int:
    """How many positions prompt and prefix tuning take in front of a row; 0 for all else."""
    if not is_adapted(model):
        return 0
    return int(getattr(model.active_peft_config, "num_virtual_tokens", None) or 0)


class Count(NamedTuple):
    """Parameters of a model: those that are trained, and all."""

    trained: int
    all: int


def count(model: Any) -> Count:
    """How many parameters a model has: tied ones once, quantised ones as many as before, an adapter's too."""
    if is_adapted(model):
        trained, every = model.get_nb_trainable_parameters()
        replaced = [module.original_module for module in model.modules() if hasattr(module, "original_module")]
        return Count(trained, every - sum(x.numel() for kept in replaced for x in kept.parameters()))
    return Count(model.num_parameters(only_trainable=True), model.num_parameters())


def save_adapter(model: Any, folder: str | Path, state_dict: Mapping[str, Tensor] | None = None) -> None:
    """Write the adapter of a model, how its base was quantised, and the classes of a head that is trained with it."""
    with suppress_peft_warnings():
        model.save_pretrained(folder, state_dict=state_dict, save_embedding_layers=False)
    if model.active_peft_config.modules_to_save:
        config = copy.deepcopy(model.config)
        if is_quantized(model):
            del config.quantization_config
        config.to_json_file(Path(folder) / "config.json")
    if is_quantized(model):
        model.config.quantization_config.to_json_file(Path(folder) / QUANTIZATION)


def save_student(model: Any, folder: str | Path, state_dict: Mapping[str, Tensor] | None = None) -> None:
    """Write what is trained of a model: its adapter, or all of it."""
    if is_adapted(model):
        save_adapter(model, folder, state_dict)
    else:
        model.save_pretrained(folder, state_dict=state_dict)


def load_adapter(model: Any, folder: str | Path) -> None:
    """Give the adapter of a model the weights that `save_adapter` wrote.

    Raises:
        ModelError: they are not there, or are not its own.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    weights, own = adapter_weights(folder, "train"), get_peft_model_state_dict(model)
    if {name: x.shape for name, x in weights.items()} != {name: x.shape for name, x in own.items()}:
        raise ModelError(
            f"train: expected the weights of this adapter in {folder}, got those of another. The recipe's adapter is "
            "not the one that they were made with."
        )
    set_peft_model_state_dict(model, weights)


def adapter_weights(folder: str | Path, key: str) -> dict[str, Tensor]:
    """The weights of an adapter on disk.

    Raises:
        ModelError: they are not there as safetensors.
    """
    file = Path(folder) / WEIGHTS
    if not file.exists():
        raise ModelError(f"{key}: expected an adapter with {WEIGHTS} in {folder}, got none.")
    return load_file(file)


def merged(model: Any) -> PreTrainedModel:
    """The plain model that computes what base and adapter compute, in the base's precision; the adapter is used up.

    A quantised base is dequantised first. In 4 bits that is exact; in 8 bits its products also round activations, which
    no plain model does.
    """
    peft = require_peft("student.adapter.merge")
    with suppress_peft_warnings():
        if is_quantized(model):
            (config,) = model.peft_config.values()
            weights = peft.get_peft_model_state_dict(model)
            base = model.unload().dequantize()
            model = peft.get_peft_model(base, config)
            peft.set_peft_model_state_dict(model, weights)
        whole: PreTrainedModel = model.merge_and_unload(safe_merge=True)
    return whole
