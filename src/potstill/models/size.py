"""What a model takes, counted on the model itself: built from its config, on a device where weights are only shapes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    MODEL_MAPPING,
)
from transformers.pytorch_utils import Conv1D

from potstill.errors import ModelError
from potstill.models.shape import shape_of

HALF = 2  # bytes of a number in bfloat16 or float16
TRAINED = 4 * 4  # bytes of a parameter in training: weight, gradient and Adam's two moments, in float32


@dataclass(frozen=True)
class Size:
    """What a model takes.

    Args:
        parameters: all of them; tied ones once.
        flops_per_token: a forward pass, for the average token of a row of `context` tokens: two for each number in a
            matrix product, and those of attention (a sliding window is counted as if it saw the whole row).
        kv_cache_bytes_per_token: keys and values of one token in half precision; 0 for an encoder.
        train_bytes: weights, gradients and Adam's moments in float32, without activations.
        serve_bytes: the weights in half precision, and the cache of one row of `context` tokens.
        context: see above.
    """

    parameters: int
    flops_per_token: int
    kv_cache_bytes_per_token: int
    train_bytes: int
    serve_bytes: int
    context: int


def build(config: PretrainedConfig, device: str = "cpu") -> PreTrainedModel:
    """The model of a config with random weights in float32.

    What the config's `architectures` says, where that is a classifier or a model without a head; else a language model:
    a masked one for encoders, a causal one for all others.

    Raises:
        ModelError: no model can be made from the config.
    """
    auto: Any = AutoModelForMaskedLM if is_encoder(config) else AutoModelForCausalLM
    for kind, classes in (
        (AutoModelForSequenceClassification, MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING),
        (AutoModel, MODEL_MAPPING),
    ):
        known = classes.get(type(config), None)
        if isinstance(known, type) and known.__name__ in (config.architectures or [])[:1]:
            auto = kind
    try:
        with torch.device(device):
            model: PreTrainedModel = auto.from_config(config, dtype=torch.float32)
    except Exception as error:  # each architecture has its own words for a shape that cannot be
        raise ModelError(f"student.design: expected a shape that a model can have, got: {last_line(error)}") from None
    return model


def is_encoder(config: PretrainedConfig) -> bool:
    """Whether every token of the model sees all others."""
    return type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False)


def count_parameters(config: PretrainedConfig) -> int:
    """The number of parameters of a config's model; tied ones count once."""
    return sum(parameter.numel() for parameter in build(config, "meta").parameters())


def size_of(config: PretrainedConfig, context: int) -> Size:
    """What the model of a config takes.

    Args:
        config: of a family whose layers are all alike.
        context: tokens in a row, for the cost of attention and of the cache.
    """
    model, shape, encoder = build(config, "meta"), shape_of(config), is_encoder(config)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    products = sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear | Conv1D))
    # Queries meet keys, and probabilities values; under a causal mask the average token sees half of the row.
    seen = context if encoder else (context + 1) / 2
    attention = 2 * 2 * seen * shape.layers * shape.heads * shape.head_size
    cache = 0 if encoder else 2 * HALF * shape.layers * shape.kv_heads * shape.head_size
    return Size(
        parameters=parameters,
        flops_per_token=round(2 * products + attention),
        kv_cache_bytes_per_token=cache,
        train_bytes=TRAINED * parameters,
        serve_bytes=HALF * parameters + cache * context,
        context=context,
    )


def last_line(error: Exception) -> str:
    """The last line of an error's text, where libraries put the reason, not longer than can be read."""
    line = (str(error).strip() or type(error).__name__).splitlines()[-1].strip()
    return line if len(line) <= 300 else line[:300] + "..."
