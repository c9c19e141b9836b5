"""Sizes of a model, read from its config: under its family's names, and of the text part where there are others."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from potstill.errors import ModelError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

POSITION_FIELDS = ("max_position_embeddings", "n_positions", "max_seq_len")
DROPOUT_FIELDS = ("attention_dropout", "attention_probs_dropout_prob", "attn_pdrop", "attn_dropout")
# Widths of feed-forward networks. The first that a family has is the one of a design, so that of an expert comes before
# that of a dense layer; all others keep their proportion to it.
FFN_FIELDS = (
    *("moe_intermediate_size", "expert_ffn_hidden_size", "intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size"),
    *("dff", "dim_ff", "feed_forward_size", "shared_expert_intermediate_size", "moe_shared_expert_intermediate_size"),
    *("shared_intermediate_size", "intermediate_size_mlp", "hidden_dim"),
)
EXPERT_FIELDS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
# Families with other heads in layers with a sliding window, and DBRX, which keeps the number of keys elsewhere.
FIXED_HEADS = {"mimo_v2_flash", "inkling_text", "inkling2_text", "dbrx"}
ATTENTION_WIDTHS = ("hidden", "heads", "kv_heads", "head_size")  # of `DesignShape`, that layers share
ACTIVE_FIELDS = ("num_experts_per_tok", "num_experts_per_token", "moe_top_k", "moe_topk", "moe_k", "top_k_experts")


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a model that objective terms depend on."""

    layers: int
    width: int  # of the hidden states
    heads: int  # of a layer; 0 in a family without attention heads
    narrowest: int  # width of a layer's keys, all heads together; its values are as wide
    attention_dropout: float
    experts_per_token: int = 0  # of a layer with a router; 0 where the family has no loss that balances its experts
    family: str = field(default="", compare=False)  # for messages


@dataclass(frozen=True)
class DesignShape:
    """Sizes of a model that a student design changes.

    A number is 0 where a family has none, or not the same in all layers: then it stays the teacher's.
    """

    layers: int
    hidden: int  # width of the hidden states
    heads: int  # query heads of a layer
    kv_heads: int  # key and value heads of a layer; fewer than `heads` with grouped queries
    head_size: int  # of a query
    ffn: int  # width of the feed-forward network, or of one expert


def text_config(config: Any) -> Any:
    """Return the part of a config that is about the text, which most configs are as a whole."""
    return config if config.is_encoder_decoder else config.get_text_config(decoder=True)


def finds_padding_by_id(model: Any) -> bool:
    """Whether a model's head reads the last token that is not the pad id: those of decoders, called score, do."""
    return hasattr(model, "score")


def head_size(config: Any) -> int:
    """Return the width of a query head: of its parts with and without position in multi-head latent attention."""
    latent = getattr(config, "qk_nope_head_dim", None)
    if latent:
        return int(latent + config.qk_rope_head_dim)
    return min(_numbers(config, "head_dim")) or config.hidden_size // _number(config, "num_attention_heads")


def kv_heads(config: Any) -> int:
    return min(_numbers(config, "num_key_value_heads")) or _number(config, "num_attention_heads")


def model_shape(config: PretrainedConfig) -> ModelShape:
    """Read the sizes that terms depend on."""
    text = text_config(config)
    heads = max(_numbers(text, "decoder_attention_heads" if _is_decoder_half(text) else "num_attention_heads"))
    return ModelShape(
        layers=num_layers(text),
        width=text.hidden_size,
        heads=heads,
        narrowest=head_size(text) * kv_heads(text) if heads else 0,
        attention_dropout=max(float(getattr(text, name, 0.0) or 0.0) for name in DROPOUT_FIELDS),
        family=config.model_type,
    )


def num_layers(config: Any) -> int:
    """Return the depth of a model: of the decoder alone for one that was taken out of an encoder-decoder."""
    return _number(config, "decoder_layers" if _is_decoder_half(config) else "num_hidden_layers")


def _is_decoder_half(config: Any) -> bool:
    half = config.attribute_map.get("num_hidden_layers") == "encoder_layers" and not config.is_encoder_decoder
    return half and bool(_number(config, "decoder_layers"))


def position_limit(config: PretrainedConfig) -> int | None:
    """Return the number of positions that a config allows, after the scaling of rotary ones; None for any number."""
    text = text_config(config)
    limit = next((size for name in POSITION_FIELDS if (size := _number(text, name))), None)
    rotary = getattr(text, "rope_parameters", None) or {}
    factor = rotary.get("factor")
    if limit and isinstance(factor, int | float):
        limit = max(limit, round(factor * (rotary.get("original_max_position_embeddings") or limit)))
    return limit


def design_shape(config: PretrainedConfig) -> DesignShape:
    """Read the sizes of a design."""
    text = text_config(config)
    layers, hidden = _number(text, "num_hidden_layers"), _number(text, "hidden_size")
    if config.is_encoder_decoder or _is_decoder_half(text) or not (layers and hidden):
        raise ModelError(
            f"students: expected a transformer with one stack of layers, got {config.model_type}. Give the student's "
            "fields yourself."
        )
    ffn = next(iter(ffn_widths(text).values()), 0)
    of_heads = [{*_numbers(text, name)} for name in ("num_attention_heads", "num_key_value_heads", "head_dim")]
    if of_heads[0] == {0} or text.model_type in FIXED_HEADS or any(len(sizes) > 1 for sizes in of_heads):
        return DesignShape(layers, hidden, 0, 0, 0, ffn)
    return DesignShape(layers, hidden, _number(text, "num_attention_heads"), kv_heads(text), head_size(text), ffn)


def ffn_widths(config: Any) -> dict[str, int]:
    """Return the widths of feed-forward networks by field; None stands for 4 times the hidden width."""
    known = config.to_dict()
    names = [name for name in FFN_FIELDS if name in known and hasattr(type(config), name)]  # Mamba derives one
    widths = {name: 4 * config.hidden_size if known[name] is None else _number(config, name) for name in names}
    return {name: width for name, width in widths.items() if width}


def config_fields(shape: DesignShape, config: PretrainedConfig) -> dict[str, Any]:
    """Return a shape as fields of a config of this family, under the family's own names."""
    known = config.to_dict()
    values = {"num_hidden_layers": shape.layers, "hidden_size": shape.hidden}
    if shape.heads:
        values |= {"num_attention_heads": shape.heads, "num_key_value_heads": shape.kv_heads}
    if shape.heads and "qk_rope_head_dim" not in known:
        values["head_dim"] = shape.head_size
    widths = ffn_widths(config)
    first = next(iter(widths.values()), 0)
    values |= {name: round(width * shape.ffn / first) for name, width in widths.items()}
    named = {config.attribute_map.get(name, name): value for name, value in values.items()}
    return {name: value for name, value in named.items() if name in known or name == "num_hidden_layers"}


def attention_layers(config: Any) -> int:
    """Count the layers in which tokens attend to all earlier ones; others mix them with a state of fixed size."""
    if not any(_numbers(config, "num_attention_heads")):
        return 0
    kinds = getattr(config, "layer_types", None) or ["attention"] * config.num_hidden_layers
    return sum(("attention" in kind and "linear" not in kind) or kind == "hybrid" for kind in kinds)


def check_attention(
    teacher: PretrainedConfig, student: PretrainedConfig, key: str, layers: object, advice: str
) -> None:
    """Refuse a student without attention, where its teacher has some."""
    if attention_layers(teacher) and not attention_layers(student):
        raise ModelError(
            f"{key}: expected a layer with attention, got {layers} of {teacher.model_type}, which have none, and could "
            f"not generate text. {advice}"
        )


def layer_kinds(config: Any) -> list[str]:
    """Return the kind of each layer, such as sliding_attention; none where the config does not give kinds."""
    return getattr(config, "layer_types", None) or getattr(config, "attention_layers", None) or []  # GPT Neo's


def value_size(config: Any) -> int:
    return _number(config, "v_head_dim") or head_size(config)


def cache_width(config: Any) -> int:
    """Count the numbers that a layer caches for a token: keys and values, or what both are computed from."""
    if latent := _number(config, "kv_lora_rank"):
        return latent + int(config.qk_rope_head_dim)
    return kv_heads(config) * (head_size(config) + value_size(config))


def count_experts(config: Any) -> int:
    """Return the number of experts of a layer, without shared ones; 0 for a family without experts."""
    return max(_number(config, name) for name in EXPERT_FIELDS)


def experts_per_token(config: Any) -> int:
    """Return how many experts a token is sent to; 0 for a family without experts."""
    return max(_number(config, name) for name in ACTIVE_FIELDS)


def active_experts(config: Any) -> float:
    """Return the share of a mixture's experts that a token passes through; 1 without experts."""
    experts, active = count_experts(config), experts_per_token(config)
    return active / experts if experts and active else 1.0


def _numbers(config: Any, name: str) -> list[int]:
    """A size in a config, of each layer where they may differ; 0 where it is unknown (missing, None, -1)."""
    try:
        value = getattr(config, name, None)
    except RuntimeError:  # transformers refuses to read what differs by layer
        value = [getattr(layer, name, None) for layer in config.per_layer_config]
    values = value if isinstance(value, list) and value else [value]
    return [x if isinstance(x, int) and not isinstance(x, bool) and x > 0 else 0 for x in values]


def _number(config: Any, name: str) -> int:
    """A size in a config; 0 where it is unknown, or not the same in all layers."""
    values = {*_numbers(config, name)}
    return values.pop() if len(values) == 1 else 0
