"""A cache whose teacher ran one layer at a time is, byte for byte, that of a teacher in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import families
from conftest import make_tokenizer
from potstill.data.sources import Source
from potstill.runs import cache as caching
from potstill.runs.cache import CacheRequest, build
from potstill.teachers.model import ModelSource
from test_cache import CODECS, files

QUIET = Console(quiet=True)


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caching, "SHARD_TOKENS", 900)


def save(folder: Path, family: str, dtype: torch.dtype = torch.bfloat16, **fields: Any) -> Path:
    """A small model of a family with the toys' tokenizer, in several files."""
    model = families.model(family, vocab_size=300, num_hidden_layers=3, **fields).to(dtype)
    model.save_pretrained(folder / family, max_shard_size="20KB")
    make_tokenizer().save_pretrained(folder / family)
    return folder / family


def both(toys: Path, folder: Path, teacher: Path, codec: str = "top_k", **changes: Any) -> list[dict[str, bytes]]:
    """The files of the ordinary cache and of the streamed one."""
    dtype = changes.pop("dtype", "bfloat16")
    values = {
        "teacher": ModelSource(str(teacher), dtype),
        "sources": [Source(str(toys / "train.jsonl"))],
        "max_length": 32,
        "packing": False,
        "codec": codec,
        "parameters": CODECS[codec],
        "batch_rows": 4,
    } | changes
    for name, stream in (("ordinary", False), ("streamed", True)):
        assert build(CacheRequest(**values, out=folder / name, stream=stream), console=QUIET) is not None
    return [files(folder / name) for name in ("ordinary", "streamed")]


FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "gemma3_text": {
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "sliding_window": 8,
    },
    "qwen3": {"tie_word_embeddings": True},
    "mixtral": {},
    "qwen3_moe": {},
    "gpt2": {},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_streamed_cache_is_the_ordinary_one(toys: Path, tmp_path: Path, family: str) -> None:
    ordinary, streamed = both(toys, tmp_path, save(tmp_path, family, **FAMILIES[family]))
    assert sum(name.endswith(".arrow") for name in ordinary) > 1
    assert streamed == ordinary
