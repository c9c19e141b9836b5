"""Small models that are known to work: shapes to compare a design with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import CONFIG_MAPPING, PretrainedConfig


@dataclass(frozen=True)
class Reference:
    """A published model's shape.

    Args:
        name: as people call it.
        family: the model_type of its config.
        fields: what differs from the family's defaults.
        origin: how it was made.
    """

    name: str
    family: str
    fields: dict[str, Any]
    origin: str

    def config(self) -> PretrainedConfig:
        """The model's config; the fields are those of its published config.json."""
        config: PretrainedConfig = CONFIG_MAPPING[self.family](**self.fields)
        return config


def _llama(vocabulary: int, hidden: int, ffn: int, layers: int, heads: int, kv: int, **fields: Any) -> dict[str, Any]:
    return {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        **fields,
    }


_TIED = {"tie_word_embeddings": True}

REFERENCES = (
    Reference(
        "TinyBERT 4", "bert", {"hidden_size": 312, "num_hidden_layers": 4, "intermediate_size": 1200}, "from BERT"
    ),
    Reference(
        "MiniLM L6", "bert", {"hidden_size": 384, "num_hidden_layers": 6, "intermediate_size": 1536}, "from BERT"
    ),
    Reference("DistilBERT", "distilbert", {}, "every second layer of BERT"),
    Reference("DistilGPT2", "gpt2", {"n_layer": 6}, "every second layer of GPT-2"),
    Reference("GPT-2", "gpt2", {}, "from scratch"),
    Reference("SmolLM2 135M", "llama", _llama(49152, 576, 1536, 30, 9, 3, **_TIED), "from scratch"),
    Reference("SmolLM2 360M", "llama", _llama(49152, 960, 2560, 32, 15, 5, **_TIED), "from scratch"),
    Reference("Qwen2.5 0.5B", "qwen2", _llama(151936, 896, 4864, 24, 14, 2, **_TIED), "from scratch"),
    Reference("Qwen3 0.6B", "qwen3", _llama(151936, 1024, 3072, 28, 16, 8, head_dim=128, **_TIED), "from larger Qwen3"),
    Reference("TinyLlama 1.1B", "llama", _llama(32000, 2048, 5632, 22, 32, 4), "from scratch"),
    Reference("Llama 3.2 1B", "llama", _llama(128256, 2048, 8192, 16, 32, 8, **_TIED), "pruned from Llama 3.1 8B"),
    Reference("Gemma 2 2B", "gemma2", _llama(256000, 2304, 9216, 26, 8, 4, head_dim=256), "from a larger Gemma"),
    Reference("Llama 3.2 3B", "llama", _llama(128256, 3072, 8192, 28, 24, 8, **_TIED), "pruned from Llama 3.1 8B"),
    Reference(
        "Llama 3.1 Minitron 4B",
        "llama",
        _llama(128256, 3072, 9216, 32, 32, 8, head_dim=128),
        "pruned in width from Llama 3.1 8B",
    ),
)
