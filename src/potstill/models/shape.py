"""The sizes that make the shape of a transformer, read from the config of any family."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import PretrainedConfig

from potstill.errors import ModelError

FFN_NAMES = ("intermediate_size", "n_inner", "hidden_dim")  # most families, GPT-2, DistilBERT


@dataclass(frozen=True)
class Shape:
    """The sizes of a transformer whose layers are all alike.

    Args:
        layers: how many.
        hidden: width of the residual stream.
        heads: query heads of a layer.
        kv_heads: key and value heads of a layer: as many as heads, or fewer with grouped queries.
        head_size: width of a head.
        ffn: width of the feed-forward network.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_size: int
    ffn: int

    @property
    def heads_fill_hidden(self) -> bool:
        """Whether the heads together are as wide as the residual stream."""
        return self.heads * self.head_size == self.hidden


def shape_of(config: PretrainedConfig) -> Shape:
    """The shape that a config describes.

    Raises:
        ModelError: it is not that of a transformer whose layers are all alike.
    """
    known = config.to_dict()
    ffn = next((known[name] for name in FFN_NAMES if name in known), None)
    hidden, heads = getattr(config, "hidden_size", None), getattr(config, "num_attention_heads", None)
    if ffn is None and "n_inner" in known and isinstance(hidden, int):
        ffn = 4 * hidden  # what GPT-2 makes of n_inner: null
    layers = getattr(config, "num_hidden_layers", None)
    found = {"layers": layers, "hidden": hidden, "heads": heads, "feed-forward width": ffn}
    strange = [f"{name} {value}" for name, value in found.items() if not isinstance(value, int)]
    if strange or getattr(config, "is_encoder_decoder", False):
        raise ModelError(
            f"students: expected a transformer with one stack of layers that are all alike, got {config.model_type}"
            f"{' with ' + ', '.join(strange) if strange else ''}. Give the student's fields yourself."
        )
    assert isinstance(layers, int) and isinstance(hidden, int) and isinstance(heads, int) and isinstance(ffn, int)
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_size = getattr(config, "head_dim", None) or hidden // heads
    return Shape(layers, hidden, heads, kv_heads, head_size, ffn)


def fields_of(shape: Shape, config: PretrainedConfig) -> dict[str, Any]:
    """The shape as fields of a config of this family, under the family's own names."""
    known = config.to_dict()
    values = {
        "num_hidden_layers": shape.layers,
        "hidden_size": shape.hidden,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_size,
        next(name for name in FFN_NAMES if name in known): shape.ffn,
    }
    named = {config.attribute_map.get(name, name): value for name, value in values.items()}
    return {name: value for name, value in named.items() if name in known}
