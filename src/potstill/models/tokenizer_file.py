"""Whether a loaded tokenizer splits text as its tokenizer.json says: its class may have rules of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

SAMPLE = "Hello  world\n\n  def f(x):\n\treturn 12345 + x  # it's 2+2=4, h\u00e9llo \u4f60\u597d"


def tokenizer_notes(tokenizer: PreTrainedTokenizerBase, folder: Path, key: str) -> tuple[str, ...]:
    """Report a class whose rules give other tokens than those of tokenizer.json, with which the model was trained."""
    file, backend = folder / "tokenizer.json", getattr(tokenizer, "backend_tokenizer", None)
    if not file.exists() or backend is None or _rules(backend) == _saved_rules(file):
        return ()
    saved = Tokenizer.from_file(str(file)).encode(SAMPLE, add_special_tokens=False).ids
    if tokenizer(SAMPLE, add_special_tokens=False)["input_ids"] == saved:
        return ()
    return (
        f"{key}: the class {type(tokenizer).__name__} splits text otherwise than tokenizer.json in {folder}. If the "
        "model was trained with the file, set tokenizer_class to TokenizersBackend in tokenizer_config.json.",
    )


def _rules(backend: Any) -> list[Any]:
    """What a tokenizer does before it looks words up; quicker to compare than to load a second tokenizer."""
    parts = (backend.normalizer, backend.pre_tokenizer)
    return [None if part is None else json.loads(part.__getstate__()) for part in parts]


def _saved_rules(file: Path) -> list[Any]:
    content = json.loads(file.read_text(encoding="utf-8"))
    return [content.get("normalizer"), content.get("pre_tokenizer")]
