"""Shapes of small models, to compare a design with: published ones, and two that only have a name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import CONFIG_MAPPING, PretrainedConfig


@dataclass(frozen=True)
class ReferenceModel:
    """Shape of a model."""

    name: str
    family: str  # the model_type of its config
    fields: dict[str, Any]  # of its published config.json, where they differ from the family's defaults
    origin: str  # what its weights came from

    def config(self) -> PretrainedConfig:
        return CONFIG_MAPPING[self.family](**self.fields)


def _llama(name: str, sizes: str, origin: str, *, family: str = "llama", **fields: Any) -> ReferenceModel:
    """Make a model of Llama's fields from vocabulary, width, feed-forward width, layers, heads, key and value heads."""
    names = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads"
    return ReferenceModel(name, family, dict(zip(names.split(), map(int, sizes.split()), strict=True)) | fields, origin)


_TIED: dict[str, Any] = {"tie_word_embeddings": True}
_PRUNED = "Llama 3.1 8B"
_SHAPE = "no weights"  # no model of it is published; their names are older than their counts, 303M and 1.2B
_TINYBERT = {"hidden_size": 312, "num_hidden_layers": 4, "intermediate_size": 1200}
_MINILM = {"hidden_size": 384, "num_hidden_layers": 6, "intermediate_size": 1536}

REFERENCES = (
    ReferenceModel("TinyBERT 4", "bert", _TINYBERT, "BERT"),
    ReferenceModel("MiniLM L6", "bert", _MINILM, "BERT"),
    ReferenceModel("DistilBERT", "distilbert", {}, "BERT's layers"),
    ReferenceModel("DistilGPT2", "gpt2", {"n_layer": 6}, "GPT-2's layers"),
    ReferenceModel("GPT-2", "gpt2", {}, "scratch"),
    _llama("SmolLM2 135M", "49152 576 1536 30 9 3", "scratch", **_TIED),
    _llama("SmolLM2 360M", "49152 960 2560 32 15 5", "scratch", **_TIED),
    _llama("Qwen2.5 0.5B", "151936 896 4864 24 14 2", "scratch", family="qwen2", **_TIED),
    _llama("Qwen3 0.6B", "151936 1024 3072 28 16 8", "larger Qwen3", family="qwen3", head_dim=128, **_TIED),
    _llama("TinyLlama 1.1B", "32000 2048 5632 22 32 4", "scratch"),
    _llama("Llama 3.2 1B", "128256 2048 8192 16 32 8", _PRUNED, **_TIED),
    _llama("Gemma 2 2B", "256000 2304 9216 26 8 4", "a larger Gemma", family="gemma2", head_dim=256),
    _llama("Llama 3.2 3B", "128256 3072 8192 28 24 8", _PRUNED, **_TIED),
    _llama("tiny-500m", "32000 1024 2816 24 16 4", _SHAPE, **_TIED),
    _llama("small-1b", "32000 2048 5504 24 16 8", _SHAPE, **_TIED),
    _llama("Llama 3.1 Minitron 4B", "128256 3072 9216 32 32 8", _PRUNED, head_dim=128),
)
