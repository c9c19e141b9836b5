"""Parameters, FLOPs and memory of a model, counted on the model itself: built from its config on the meta device."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Size
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto as auto

from potstill.errors import ModelError
from potstill.models.shapes import (
    active_experts,
    attention_layers,
    cache_width,
    head_size,
    model_shape,
    text_config,
    value_size,
)
from potstill.models.structure import is_linear, layer_lists

HALF_BYTES = 2  # of a number in bfloat16 or float16
TRAIN_BYTES = 4 * 4  # of a parameter in training: weight, gradient and Adam's two moments, in float32


@dataclass(frozen=True)
class ModelSize:
    """Size and cost of a model.

    `flops_per_token` are those of a forward pass for the average token of a row of `context` tokens: two for each
    number in a matrix product, and those of attention (a sliding window is counted as if it saw the full row). A token
    is multiplied with the experts that it is sent to alone.
    """

    parameters: int  # tied ones once
    active_parameters: int  # of these, those that a token passes through: of routed experts, its own alone
    token_parameters: int  # of these, those of the embeddings of tokens and the head
    flops_per_token: int
    kv_cache_bytes_per_token: int  # in half precision; 0 for an encoder, or where no layer attends
    train_bytes: int  # weights, gradients and Adam's moments in float32, without activations
    serve_bytes: int  # the weights in half precision, and the cache of one row of `context` tokens
    context: int


def build(config: PretrainedConfig, device: str = "cpu") -> PreTrainedModel:
    """Build the model of a config with random weights in float32.

    A sequence classifier or a model without a head where `architectures` names one; else a masked language model for
    encoders, and a causal one for all others.
    """
    auto_class: Any = auto.AutoModelForMaskedLM if is_encoder(config) else language_model_class(config)
    for other, classes in (
        (auto.AutoModelForSequenceClassification, auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING),
        (auto.AutoModel, auto.MODEL_MAPPING),
    ):
        model_class = classes.get(type(config), None)
        if isinstance(model_class, type) and model_class.__name__ in (config.architectures or [])[:1]:
            auto_class = other
    if type(config) not in auto_class._model_mapping:
        raise ModelError(
            f"students: expected a family with a model for text alone, got {config.model_type}, for which transformers "
            "has none. Name a student with student.model."
        )
    try:
        with torch.device(device):
            # A copy, because a Trainer changes the config of its model.
            return auto_class.from_config(copy.deepcopy(config), dtype=torch.float32)
    except Exception as error:
        raise invalid_config(config.model_type, error) from None


def language_model_class(config: PretrainedConfig) -> Any:
    """Return the auto class of causal language models, or that of models which also read images.

    The latter where a family has no other, or one that transformers could not load again after it is saved.
    """
    causal, images = auto.MODEL_FOR_CAUSAL_LM_MAPPING, auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    complete = type(config) in causal and type(text_config(config)) in causal
    reads_images = type(config) in images and not config.is_encoder_decoder
    return auto.AutoModelForImageTextToText if reads_images and not complete else auto.AutoModelForCausalLM


def config_of(family: PretrainedConfig, values: dict[str, Any]) -> PretrainedConfig:
    """Make a config of a family, whose constructor checks that the fields fit together."""
    try:
        config: PretrainedConfig = type(family).from_dict(values)
    except Exception as error:
        raise invalid_config(family.model_type, error) from None
    return config


def invalid_config(family: str, error: Exception) -> ModelError:
    """Turn an architecture's own error about sizes that do not fit together into one line."""
    line = (str(error).strip() or type(error).__name__).splitlines()[-1].strip()  # libraries put the reason last
    line = line.removesuffix(".") if len(line) <= 300 else line[:300] + "..."
    return ModelError(
        f"student.design: expected a shape that a model of the family {family} can have, got: {line}. Change "
        "student.design, or name a student with student.model."
    )


def is_encoder(config: PretrainedConfig) -> bool:
    """Whether every token of the model attends to all others."""
    return type(config) in auto.MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False)


def count_parameters(config: PretrainedConfig) -> int:
    """Count the parameters of a config's model; tied ones once."""
    return sum(parameter.numel() for parameter in build(config, "meta").parameters())


def layer_parameters(model: PreTrainedModel) -> list[dict[str, Size]]:
    """Return the shapes of parameters by name: of those outside of the layers first, then of each layer.

    A shared parameter is where the model has it first.
    """
    parts: list[dict[str, Size]] = [{}, *({} for _ in range(text_config(model.config).num_hidden_layers))]
    places = {f"{path}.": len(layers) for path, layers in layer_lists(model)}
    for name, parameter in model.named_parameters():
        path = next((path for path in places if name.startswith(path)), None)
        number, _, rest = name.removeprefix(path or "").partition(".")
        place, key = (0, name) if path is None else (int(number) + 1, path + rest)
        parts[place][key] = parameter.shape
    return parts


def size_of(config: PretrainedConfig, context: int) -> ModelSize:
    """Compute size and cost of a config's model for rows of `context` tokens, or of its text part."""
    config = text_config(config)
    model, encoder = build(config, "meta"), is_encoder(config)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    layers = attention_layers(config)
    cache = 0 if encoder or not layers else HALF_BYTES * layers * cache_width(config)
    train, serve = TRAIN_BYTES * parameters, HALF_BYTES * parameters + cache * context
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    of_tokens = {id(p): p.numel() for end in ends if end is not None for p in end.parameters()}
    flops = round(forward_flops(model, context))
    return ModelSize(
        parameters,
        parameters - inactive_parameters(model),
        sum(of_tokens.values()),
        flops,
        cache,
        train,
        serve,
        context,
    )


def inactive_parameters(model: Any) -> int:
    """Count the parameters that a token does not pass through: of the routed experts that it is not sent to."""
    of_experts = sum(x.numel() for name, x in model.named_parameters() if _is_of_expert(name))
    return round((1 - active_experts(text_config(model.config))) * of_experts)


def _is_of_expert(path: str) -> bool:
    return "experts" in path.split(".")


def forward_flops(model: PreTrainedModel, context: int) -> float:
    """Count the operations of a forward pass for the average token of a row of `context` tokens; see `ModelSize`."""
    config: Any = text_config(model.config)
    # Two products in attention: with keys and with values. Under a causal mask the average token sees half of the row.
    visible = context if is_encoder(config) else (context + 1) / 2
    layers = attention_layers(config)
    width = head_size(config) + value_size(config) if layers else 0
    return 2 * _products(model) + 2 * visible * layers * model_shape(config).heads * width


def _products(model: PreTrainedModel) -> float:
    """Count the numbers in the matrices that a token is multiplied with: of the experts, those that it is sent to."""
    share, total = active_experts(text_config(model.config)), 0.0
    for path, module in model.named_modules():
        of_expert = _is_of_expert(path)
        if is_linear(module):
            sizes = (
                getattr(module, "in_features", 0),
                getattr(module, "out_features", 0),
            )  # a quantized weight is packed
            total += (math.prod(sizes) or cast(Any, module).weight.numel()) * (share if of_expert else 1)
        elif of_expert:
            total += share * sum(x.numel() for x in module.parameters(recurse=False) if x.ndim == 3)
    return total
