"""Write files atomically, lock folders that one process writes, and explain a full disk."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
import shutil
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

from potstill.errors import PotstillError, RecipeError, RunError, remedy

if sys.platform != "win32":
    import fcntl


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
            "was saved is kept. Make room, and run the command again, with --resume if it has that."
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
            with suppress(OSError):
                remove(old)
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
    """Delete a file, or a folder with all that is in it, if it is there.

    One file is open at a time. `shutil.rmtree` opens one for each level, and fails where a process may open few more.
    """
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
        return
    for folder, folders, files in os.walk(path, topdown=False):
        for inner in (Path(folder, name) for name in (*files, *folders)):
            if inner.is_dir() and not inner.is_symlink():
                inner.rmdir()
            else:
                inner.unlink()
    path.rmdir()


def write_text(path: Path, text: str) -> None:
    """Write a text in UTF-8; half a surrogate pair, which a model may write, becomes a question mark."""
    with atomic_path(path) as partial:
        partial.write_bytes(text.encode("utf-8", errors="replace"))


def write_json(path: Path, content: Any) -> None:
    """Write indented JSON."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


# Locks

_held: set[int] = set()  # open files of locks


def _close_held() -> None:
    """Close the locks in a forked child, which else holds them after its parent was killed."""
    for file in _held:
        os.close(file)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_held)


@contextmanager
def lock_folder(
    folder: Path, key: str, name: str = "potstill", *, wait: bool = False, write: bool = True
) -> Iterator[None]:
    """Make a folder, and hold its lock so that no other process writes there; an empty new folder is removed again.

    The kernel holds the lock for as long as this process has a file open: that of a killed process is free at once.
    Windows has no such locks, nor do some network file systems: nothing is locked there.

    Args:
        folder: in which the file `.<name>.lock` is locked, and removed at the end.
        key: of the recipe, or the option, that names the folder; for errors.
        name: of the lock, where several processes may write different parts of the folder.
        wait: for another process to end, instead of an error.
        write: false for a folder that is only read, which is not locked where it cannot be written to.

    Raises:
        RecipeError: another process holds the lock, or the folder cannot be written to.
    """
    if "\0" in str(folder):
        raise RecipeError(f"{key}: expected a path without null characters, got {folder}. Leave them out.")
    path = folder / f".{name}.lock"
    made = [each for each in (folder, *folder.absolute().parents) if not each.exists()]
    file = None
    try:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = _lock(path, wait)
        except OSError as error:
            if write or error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
                advice = remedy(error) or f"Choose another {key}."
                raise RecipeError(
                    f"{key}: expected a directory to write to, got {folder}: {error.strerror}. {advice}"
                ) from None
        else:
            if file is None:
                raise RecipeError(
                    f"{key}: expected a directory that no other process writes to, got {folder}, which another process "
                    f"is writing{_owner(path)}. Wait until it ends, or choose another {key}."
                )
            _held.add(file)
        yield
    finally:
        if file in _held:  # not in a forked child
            with suppress(OSError):
                path.unlink()  # while it is locked: the file of the next owner is another
            _held.remove(file)
            os.close(file)
        with suppress(OSError):
            for each in made:
                each.rmdir()


def _lock(path: Path, wait: bool) -> int | None:
    """Open and lock a file, with a text about this process in it; None where another process has locked it."""
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            if sys.platform != "win32":
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            os.close(file)
            return None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP):  # of a file system without locks
                os.close(file)
                raise
        same = False
        with suppress(FileNotFoundError):  # its owner may have removed it meanwhile
            same = os.path.samestat(os.fstat(file), path.stat())
        if same:
            with suppress(OSError):  # the text is for messages alone
                os.truncate(file, 0)
                text = f" (pid {os.getpid()} on {platform.node()}, since {time.strftime('%Y-%m-%d %H:%M:%S')})"
                os.write(file, text.encode())
            return file
        os.close(file)


def _owner(path: Path) -> str:
    """What the process that holds a lock wrote about itself."""
    with suppress(OSError):
        return path.read_text(encoding="utf-8", errors="replace")
    return ""
