"""Checksums of files, folders and JSON: what is not as it was written is found."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

from potstill.errors import ModelError
from potstill.files import write_text

CHECKSUMS = "potstill_checksums.json"  # in a folder: the sha256 of its files
# A user may edit these or leave them out, which a note reports: of all here they decide only where generated text ends.
OPTIONAL = {"generation_config.json"}


def digest(path: Path) -> str:
    """Compute the sha256 of a file, or of the names and content of all files in a folder."""
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
        parts = "\n".join(f"{file.relative_to(path).as_posix()} {digest(file)}" for file in files)
        return hashlib.sha256(parts.encode()).hexdigest()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def with_checksum(content: Mapping[str, Any]) -> dict[str, Any]:
    """Add the sha256 of what is to be written as JSON."""
    return {**content, "sha256": hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()}


def without_checksum(content: Any) -> dict[str, Any]:
    """Take off what `with_checksum` added, or raise ValueError where the content is another."""
    body = {name: value for name, value in content.items() if name != "sha256"} if isinstance(content, dict) else {}
    if content != with_checksum(body):
        raise ValueError("it is not as it was written")
    return body


def write_checksum(path: Path) -> None:
    """Write the sha256 of a file beside it."""
    write_text(_beside(path), digest(path))


def is_whole(path: Path) -> bool:
    """Whether a file is as it was when its sha256 was written beside it."""
    beside = _beside(path)
    return path.exists() and beside.exists() and beside.read_bytes() == digest(path).encode()


def remove_checksum(path: Path) -> None:
    """Remove the sha256 beside a file that is going to be replaced."""
    _beside(path).unlink(missing_ok=True)


def is_changed(path: Path) -> bool:
    """Whether a file is not as it was when its sha256 was written beside it; no where none was."""
    return _beside(path).exists() and not is_whole(path)


def write_checksums(folder: Path) -> None:
    """Write the sha256 of each file of a folder, but for texts that are written anew, into a file beside them."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix not in (".md", ".partial"))
    names = {path.relative_to(folder).as_posix(): path for path in files if path.name != CHECKSUMS}
    with ThreadPoolExecutor() as pool:
        digests = pool.map(digest, names.values())
    write_text(folder / CHECKSUMS, json.dumps(dict(zip(names, digests, strict=True)), indent=1) + "\n")


def check_folder(folder: Path, key: str, advice: str = "Copy the folder again.") -> None:
    """Check that the files of a folder are as `write_checksums` found them; nothing for a folder without its file.

    Raises:
        ModelError: a file has changed, or is gone, that is not optional.
    """
    if name := next((name for name in _changed(folder) if name not in OPTIONAL), None):
        raise ModelError(
            f"{key}: expected {name} in {folder} as it was written, got another or none: it is damaged or was changed. "
            f"{advice} If the change was meant, delete {CHECKSUMS} in it."
        )


def missing_files(folder: Path) -> list[str]:
    """The files that `write_checksums` found in a folder and that are gone; none where its file cannot be read."""
    with suppress(OSError, ValueError, TypeError):
        return [name for name in json.loads((folder / CHECKSUMS).read_bytes()) if not (folder / name).exists()]
    return []


def changed_notes(folder: Path, key: str) -> Iterator[str]:
    """Report optional files that have changed, or are gone."""
    for name in OPTIONAL.intersection(_changed(folder)):
        now = "was changed" if (folder / name).exists() else "is gone"
        yield f"{key}: {name} in {folder} {now} since it was written."


def _changed(folder: Path) -> tuple[str, ...]:
    if not (folder / CHECKSUMS).exists():
        return ()
    files = (file for file in sorted(folder.rglob("*")) if file.is_file())  # a link to nothing is none
    return _changed_files(folder, tuple((str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files))


@lru_cache(maxsize=64)
def _changed_files(folder: Path, stamps: tuple[tuple[str, int, int], ...]) -> tuple[str, ...]:
    """Names of files that have changed; a folder is read once for all that is loaded from it."""
    try:
        checksums = json.loads((folder / CHECKSUMS).read_bytes())
    except ValueError:
        checksums = None
    if not isinstance(checksums, dict):
        return (CHECKSUMS,)
    files = {name: folder / name for name in checksums}
    return tuple(n for n, file in files.items() if not file.is_file() or digest(file) != checksums[n])


def _beside(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")
