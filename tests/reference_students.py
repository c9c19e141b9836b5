"""Parameters of published models, and what importance is, written out by hand."""

from __future__ import annotations

import math
from typing import Any

# name -> (family, fields of its config.json, parameters of the language model as published or as its checkpoint has).
LLAMA = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
LLAMA += ("num_key_value_heads",)


def sizes(*values: int, **more: Any) -> dict[str, Any]:
    return {**dict(zip(LLAMA, values, strict=True)), **more}


PUBLIC: dict[str, tuple[str, dict[str, Any], int]] = {
    "Llama 2 7B": ("llama", sizes(32000, 4096, 11008, 32, 32, 32), 6_738_415_616),
    "Llama 3.1 8B": ("llama", sizes(128256, 4096, 14336, 32, 32, 8), 8_030_261_248),
    "Llama 3.2 1B": ("llama", sizes(128256, 2048, 8192, 16, 32, 8, tie_word_embeddings=True), 1_235_814_400),
    "TinyLlama 1.1B": ("llama", sizes(32000, 2048, 5632, 22, 32, 4), 1_100_048_384),
    "Mistral 7B": ("mistral", sizes(32000, 4096, 14336, 32, 32, 8), 7_241_732_096),
    "Qwen2.5 0.5B": ("qwen2", sizes(151936, 896, 4864, 24, 14, 2, tie_word_embeddings=True), 494_032_768),
    "Qwen2.5 7B": ("qwen2", sizes(152064, 3584, 18944, 28, 28, 4), 7_615_616_512),
    "Qwen3 0.6B": (
        "qwen3", sizes(151936, 1024, 3072, 28, 16, 8, head_dim=128, tie_word_embeddings=True), 596_049_920,
    ),
    "Gemma 2B": ("gemma", sizes(256000, 2048, 16384, 18, 8, 1, head_dim=256), 2_506_172_416),
    "Gemma 2 2B": ("gemma2", sizes(256000, 2304, 9216, 26, 8, 4, head_dim=256), 2_614_341_888),
    "GPT-2": ("gpt2", {}, 124_439_808),
    "BERT base": ("bert", {}, 109_514_298),
}  # fmt: skip


def parameters(family: str, shape: Any, vocabulary: int, tied: bool) -> int:
    """The parameters of a language model, added up matrix by matrix."""
    hidden, queries, keys = shape.hidden, shape.heads * shape.head_size, shape.kv_heads * shape.head_size
    if family in ("gpt2", "bert"):
        attention = hidden * 3 * hidden + 3 * hidden + hidden * hidden + hidden
        ffn = hidden * shape.ffn + shape.ffn + shape.ffn * hidden + hidden
        layer = attention + ffn + 2 * 2 * hidden
        if family == "gpt2":
            return vocabulary * hidden + 1024 * hidden + shape.layers * layer + 2 * hidden
        embeddings = vocabulary * hidden + 512 * hidden + 2 * hidden + 2 * hidden
        head = hidden * hidden + hidden + 2 * hidden + vocabulary
        return embeddings + shape.layers * layer + head
    attention = hidden * queries + 2 * hidden * keys + queries * hidden
    attention += queries + 2 * keys if family == "qwen2" else 0  # biases
    attention += 2 * shape.head_size if family == "qwen3" else 0  # the norms of queries and keys
    norms = (4 if family == "gemma2" else 2) * hidden
    layer = attention + 3 * hidden * shape.ffn + norms
    return (1 if tied else 2) * vocabulary * hidden + shape.layers * layer + hidden


def cosine(a: list[float], b: list[float]) -> float:
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return dot / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))
