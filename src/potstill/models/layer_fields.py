"""Fields of a config that say of which kind each layer is: lists by layer, numbers of layers, counts and periods."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from transformers import PretrainedConfig

NUMBERED = ("mlp_only_layers", "moe_layers", "attn_layer_indices", "hybrid_layer_ids")  # the numbers of some layers
COUNTED = ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index")  # how many of the first layers
# Every so many layers there is one of a kind: the period, and the layer within it.
PERIODIC = {"attn_layer_period": "attn_layer_offset", "expert_layer_period": "expert_layer_offset"}


def layer_fields(config: PretrainedConfig, layers: Sequence[int]) -> dict[str, Any]:
    """Return the fields of a config that differ by layer, for a model of these layers."""
    known, depth = config.to_dict(), config.num_hidden_layers
    layers = [layer for layer in layers if layer < depth]
    lists = {name: x for name, x in known.items() if isinstance(x, list) and len(x) == depth and _by_layer(name)}
    fields: dict[str, Any] = {name: [values[layer] for layer in layers] for name, values in lists.items()}
    if by_layer := known.get("per_layer_config"):
        own = {int(layer): values for layer, values in by_layer.items()}
        fields["per_layer_config"] = {i: own[layer] for i, layer in enumerate(layers) if layer in own}
    if shared := known.get("num_kv_shared_layers"):  # the last layers take keys and values of earlier ones
        fields["num_kv_shared_layers"] = sum(layer >= depth - shared for layer in layers)
    if "attention_types" in known:  # GPT Neo's, as patterns that are repeated
        fields["attention_types"] = [[[config.attention_layers[layer] for layer in layers], 1]]
    return fields | dict(_by_number(known, layers))


def _by_layer(name: str) -> bool:
    parts = ("layer", "block", "pattern", "intermediate_size", "heads", "window")
    return name not in NUMBERED and any(part in name for part in parts)


def _by_number(known: dict[str, Any], layers: Sequence[int]) -> Iterator[tuple[str, Any]]:
    """The fields that name a kind of layers by their numbers."""
    for name in (name for name in COUNTED if known.get(name)):
        yield name, sum(layer < known[name] for layer in layers)
    numbered = {name: [*known[name]] for name in NUMBERED if known.get(name) is not None}
    if "mlp_only_layers" in numbered and (step := known.get("decoder_sparse_step", 1)) > 1:
        numbered["mlp_only_layers"] += [layer for layer in layers if (layer + 1) % step]
        yield "decoder_sparse_step", 1
    for name, numbers in numbered.items():
        yield name, [i for i, layer in enumerate(layers) if layer in numbers]
    for name, offset in PERIODIC.items():
        if own := known.get(name):
            kinds = [layer % own == known[offset] for layer in layers]
            others = ((period, i) for period in range(1, len(kinds) + 2) for i in range(period))
            for period, first in ((own, known[offset]), *others):
                if kinds == [i % period == first for i in range(len(kinds))]:  # else the student is of other kinds
                    yield from ((name, period), (offset, first))
                    break
