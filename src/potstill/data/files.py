"""Write files atomically, and explain a full disk."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
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
    partial = temporary_path(path)
    try:
        yield partial
        if partial.is_dir() and path.is_dir():  # a folder does not replace another one
            old = temporary_path(path)
            path.rename(old)
            partial.rename(path)
            shutil.rmtree(old, ignore_errors=True)
        else:
            partial.replace(path)
    finally:
        remove(partial)


def temporary_path(path: Path) -> Path:
    """Name a file or folder beside `path` for what is unfinished; remove those that killed processes left there.

    The name holds the machine and the process that writes it: others may write the same path at the same time.
    """
    for left in path.parent.glob(f"*.{_machine()}-*-*.partial"):
        process = left.name.split("-")[-2]
        if process.isdecimal() and not _is_alive(int(process)):
            with suppress(OSError):
                remove(left)
    return path.with_name(f"{path.name}.{_machine()}-{os.getpid()}-{uuid.uuid4().hex[:8]}.partial")


@cache
def _machine() -> str:
    """Name this machine, or this container: a process has its number in one of them alone."""
    namespace = Path("/proc/self/ns/pid")
    facts = [platform.node(), uuid.getnode(), namespace.stat().st_ino if namespace.exists() else 0]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:8]


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it is of another user
        pass
    return True


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
