"""The running Python's own standard library as a corpus: real text that exists on every machine."""

from __future__ import annotations

import hashlib
import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from potstill.errors import DataError

Split = Literal["teacher", "transfer", "dev", "heldout"]

# Shares of the files. dev is for choosing hyperparameters; heldout is for reported figures only.
_SHARES: tuple[tuple[Split, float], ...] = (
    ("heldout", 0.06),
    ("dev", 0.04),
    ("transfer", 0.10),
    ("teacher", 0.80),
)

_LEFT_OUT = {
    "site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__",
    # Generated: 120 near-copies of one code-page table, and one 750 kB string of prose. By file they would
    # put copies of the training text among the held-out files.
    "encodings", "pydoc_data",
}  # fmt: skip


def split_of(name: str) -> Split:
    """The split of a file, from its path inside the library alone: the same on every machine and Python version."""
    position = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64
    for split, share in _SHARES:
        if position < share:
            return split
        position -= share
    return "teacher"


def documents(split: Split, root: Path | None = None) -> Iterator[tuple[str, str]]:
    """Yield (path inside the library, text) of one split, in an order that a hash of the path fixes.

    Args:
        split: which part.
        root: a library other than the running Python's.

    Raises:
        DataError: the library's source is not on this machine.
    """
    root = root or Path(sysconfig.get_paths()["stdlib"])
    names = [
        path.relative_to(root).as_posix()
        for path in root.rglob("*.py")
        if not _LEFT_OUT.intersection(path.relative_to(root).parts)
    ]
    if len(names) < 100:
        raise DataError(
            f"demo corpus: expected the standard library's source in {root}, got {len(names)} files. "
            "Use a Python that ships its source (python.org, Debian, conda, pyenv and uv builds do)."
        )
    chosen = [name for name in names if split_of(name) == split]
    for name in sorted(chosen, key=lambda name: hashlib.sha256(b"order" + name.encode()).digest()):
        text = (root / name).read_text(encoding="utf-8", errors="replace")
        if text.strip():
            yield name, text


def write_jsonl(path: Path, split: Split, max_characters: int | None = None, root: Path | None = None) -> int:
    """Write one split as JSON Lines with the fields `name` and `text`; return the number of characters.

    Args:
        path: the file to write.
        split: which part.
        max_characters: stop after the file that passes this many, and cut that file there.
        root: a library other than the running Python's.
    """
    written = 0
    with path.open("w", encoding="utf-8") as file:
        for name, text in documents(split, root):
            if max_characters is not None:
                text = text[: max_characters - written]
            if not text:
                break
            file.write(json.dumps({"name": name, "text": text}, ensure_ascii=False) + "\n")
            written += len(text)
    return written
