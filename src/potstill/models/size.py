"""Parameters, FLOPs and memory of a model, counted on the model itself: built from its config on the meta device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto as auto

from potstill.errors import ModelError
from potstill.models.structure import design_shape, is_linear

HALF_BYTES = 2  # of a number in bfloat16 or float16
TRAIN_BYTES = 4 * 4  # of a parameter in training: weight, gradient and Adam's two moments, in float32


@dataclass(frozen=True)
class ModelSize:
    """Size and cost of a model.

    `flops_per_token` are those of a forward pass for the average token of a row of `context` tokens: two for each
    number in a matrix product, and those of attention (a sliding window is counted as if it saw the full row).
    """

    parameters: int  # tied ones once
    flops_per_token: int
    kv_cache_bytes_per_token: int  # in half precision; 0 for an encoder
    train_bytes: int  # weights, gradients and Adam's moments in float32, without activations
    serve_bytes: int  # the weights in half precision, and the cache of one row of `context` tokens
    context: int


def build(config: PretrainedConfig, device: str = "cpu") -> PreTrainedModel:
    """Build the model of a config with random weights in float32.

    A sequence classifier or a model without a head where `architectures` names one; else a masked language model for
    encoders, and a causal one for all others.
    """
    auto_class: Any = auto.AutoModelForMaskedLM if is_encoder(config) else auto.AutoModelForCausalLM
    for other, classes in (
        (auto.AutoModelForSequenceClassification, auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING),
        (auto.AutoModel, auto.MODEL_MAPPING),
    ):
        model_class = classes.get(type(config), None)
        if isinstance(model_class, type) and model_class.__name__ in (config.architectures or [])[:1]:
            auto_class = other
    try:
        with torch.device(device):
            return auto_class.from_config(config, dtype=torch.float32)
    except Exception as error:
        raise invalid_config(error) from None


def invalid_config(error: Exception) -> ModelError:
    """Turn an architecture's own error about sizes that do not fit together into one line."""
    line = (str(error).strip() or type(error).__name__).splitlines()[-1].strip()  # libraries put the reason last
    line = line if len(line) <= 300 else line[:300] + "..."
    return ModelError(f"student.design: expected a shape that a model can have, got: {line}")


def is_encoder(config: PretrainedConfig) -> bool:
    """Whether every token of the model attends to all others."""
    return type(config) in auto.MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False)


def count_parameters(config: PretrainedConfig) -> int:
    """Count the parameters of a config's model; tied ones once."""
    return sum(parameter.numel() for parameter in build(config, "meta").parameters())


def size_of(config: PretrainedConfig, context: int) -> ModelSize:
    """Compute size and cost of a config's model for rows of `context` tokens; all layers must have one shape."""
    model, shape, encoder = build(config, "meta"), design_shape(config), is_encoder(config)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    products = sum(int(cast(Any, module).weight.numel()) for module in model.modules() if is_linear(module))
    # Two products in attention: with keys and with values. Under a causal mask the average token sees half of the row.
    visible = context if encoder else (context + 1) / 2
    attention = 2 * 2 * visible * shape.layers * shape.heads * shape.head_size
    cache = 0 if encoder else 2 * HALF_BYTES * shape.layers * shape.kv_heads * shape.head_size
    train, serve = TRAIN_BYTES * parameters, HALF_BYTES * parameters + cache * context
    return ModelSize(parameters, round(2 * products + attention), cache, train, serve, context)
