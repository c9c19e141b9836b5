"""The source of the running Python's standard library as a corpus: real text that every machine has."""

from __future__ import annotations

import hashlib
import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from potstill.errors import DataError

Split = Literal["teacher", "transfer", "dev", "heldout"]

# Shares of the files. dev is for choosing hyperparameters, heldout for reported figures only; teacher is the rest.
_SHARES: dict[Split, float] = {"heldout": 0.06, "dev": 0.04, "transfer": 0.10}

_EXCLUDED = {
    "site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__",
    # Generated: 120 near-copies of one code-page table, and one 750 kB string of prose. Split by file, they would
    # put copies of the training text among the held-out files.
    "encodings", "pydoc_data",
}  # fmt: skip


def split_of(name: str) -> Split:
    """Choose the split of a file by a hash of its path inside the library, the same on every Python version."""
    position = int.from_bytes(_hash(name)[:8], "big") / 2**64
    for split, share in _SHARES.items():
        if position < share:
            return split
        position -= share
    return "teacher"


def documents(split: Split, root: Path | None = None) -> Iterator[tuple[str, str]]:
    """Yield (path inside the library, text) of each file of a split, in the order of a hash of its path.

    `root` is a library other than the running Python's.
    """
    root = root or Path(sysconfig.get_paths()["stdlib"])
    paths = [path.relative_to(root) for path in root.rglob("*.py")]
    names = [path.as_posix() for path in paths if not _EXCLUDED.intersection(path.parts)]
    if len(names) < 100:
        raise DataError(
            f"demo corpus: expected the standard library's source in {root}, got {len(names)} files. "
            "Use a Python that ships its source (python.org, Debian, conda, pyenv and uv builds do)."
        )
    for name in sorted(names, key=lambda name: _hash(f"order{name}")):
        if split_of(name) == split:
            text = (root / name).read_text(encoding="utf-8", errors="replace")
            if text.strip():
                yield name, text


def write_jsonl(path: Path, split: Split, max_characters: int | None = None, root: Path | None = None) -> int:
    """Write a split, of at most so many characters, as JSON Lines with name and text; return how many it has."""
    num_characters = 0
    with path.open("w", encoding="utf-8") as file:
        for name, text in documents(split, root):
            if max_characters is not None:
                text = text[: max_characters - num_characters]
            if not text:
                break
            file.write(json.dumps({"name": name, "text": text}, ensure_ascii=False) + "\n")
            num_characters += len(text)
    return num_characters


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
