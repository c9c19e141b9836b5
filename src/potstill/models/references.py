"""Shapes of published small models, to compare a design with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import CONFIG_MAPPING, PretrainedConfig


@dataclass(frozen=True)
class ReferenceModel:
    """Shape of a published model."""

    name: str
    family: str  # the model_type of its config
    fields: dict[str, Any]  # of its published config.json, where they differ from the family's defaults
    origin: str

    def config(self) -> PretrainedConfig:
        return CONFIG_MAPPING[self.family](**self.fields)


_FIELDS = (
    *("vocab_size", "hidden_size", "intermediate_size"),
    *("num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
)


def _llama(*sizes: int, **fields: Any) -> dict[str, Any]:
    return dict(zip(_FIELDS, sizes, strict=True)) | fields


_TIED = {"tie_word_embeddings": True}
_PRUNED_LLAMA = "pruned from Llama 3.1 8B"
_TINYBERT = {"hidden_size": 312, "num_hidden_layers": 4, "intermediate_size": 1200}
_MINILM = {"hidden_size": 384, "num_hidden_layers": 6, "intermediate_size": 1536}

REFERENCES = (
    ReferenceModel("TinyBERT 4", "bert", _TINYBERT, "from BERT"),
    ReferenceModel("MiniLM L6", "bert", _MINILM, "from BERT"),
    ReferenceModel("DistilBERT", "distilbert", {}, "every second layer of BERT"),
    ReferenceModel("DistilGPT2", "gpt2", {"n_layer": 6}, "every second layer of GPT-2"),
    ReferenceModel("GPT-2", "gpt2", {}, "from scratch"),
    ReferenceModel("SmolLM2 135M", "llama", _llama(49152, 576, 1536, 30, 9, 3, **_TIED), "from scratch"),
    ReferenceModel("SmolLM2 360M", "llama", _llama(49152, 960, 2560, 32, 15, 5, **_TIED), "from scratch"),
    ReferenceModel("Qwen2.5 0.5B", "qwen2", _llama(151936, 896, 4864, 24, 14, 2, **_TIED), "from scratch"),
    ReferenceModel(
        "Qwen3 0.6B", "qwen3", _llama(151936, 1024, 3072, 28, 16, 8, head_dim=128, **_TIED), "from larger Qwen3"
    ),
    ReferenceModel("TinyLlama 1.1B", "llama", _llama(32000, 2048, 5632, 22, 32, 4), "from scratch"),
    ReferenceModel("Llama 3.2 1B", "llama", _llama(128256, 2048, 8192, 16, 32, 8, **_TIED), _PRUNED_LLAMA),
    ReferenceModel("Gemma 2 2B", "gemma2", _llama(256000, 2304, 9216, 26, 8, 4, head_dim=256), "from a larger Gemma"),
    ReferenceModel("Llama 3.2 3B", "llama", _llama(128256, 3072, 8192, 28, 24, 8, **_TIED), _PRUNED_LLAMA),
    ReferenceModel(
        "Llama 3.1 Minitron 4B",
        "llama",
        _llama(128256, 3072, 9216, 32, 32, 8, head_dim=128),
        "pruned in width from Llama 3.1 8B",
    ),
)
