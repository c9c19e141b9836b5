"""Write files atomically, and explain a full disk."""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from potstill.errors import PotstillError, RunError


@contextmanager
def explain_disk_full(folder: Path, needed: int) -> Iterator[None]:
    """Raise a RunError for any failure in writing to a folder whose disk has less than `needed` bytes free.

    torch's own message is "unexpected pos 1659136 vs 1659028".
    """
    try:
        yield
    except Exception as error:
        free = shutil.disk_usage(folder).free
        if isinstance(error, PotstillError) or free >= needed:
            raise
        raise RunError(
            f"output: expected room for {needed / 1e6:,.1f} MB on the disk of {folder}, got {free / 1e6:,.1f} MB. What "
            "was saved is kept. Make room, and go on with --resume."
        ) from error


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Give a temporary path, for a file or a folder, that becomes `path` on success and is removed on failure."""
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
    try:
        yield partial
        if partial.is_dir():  # which does not replace another one
            shutil.rmtree(path, ignore_errors=True)
        partial.replace(path)
    finally:
        remove(partial)


def remove(path: Path) -> None:
    """Delete a file, or a folder with all that is in it, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text in UTF-8; half a surrogate pair, which a model may write, becomes a question mark."""
    with atomic_path(path) as partial:
        partial.write_bytes(text.encode("utf-8", errors="replace"))


def write_json(path: Path, content: Any) -> None:
    """Write indented JSON."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
