"""The files and folders that a recipe names: a training is resumed with those that it began with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

from potstill.data.sources import is_glob
from potstill.files import write_json
from potstill.models.checksums import digest

INPUTS = "inputs.json"  # in a run directory: the sha256 of each file and folder
_NO_INPUTS = {"name", "output", "offload_folder"}
_PATHS = {"path", "model", "tokenizer", "embedder", "cache"}  # of folders and patterns, and of names without a suffix
_NOT_READ = {".md", ".lock"}  # in folders of models and data
SAMPLED_BYTES = 2**26  # of a folder's files larger than this, pieces are read
PIECES, PIECE_BYTES = 64, 2**14


def write_inputs(directory: Path, recipe: Mapping[str, Any]) -> None:
    """Write the checksums of the files and folders that a recipe names into a run directory."""
    write_json(directory / INPUTS, digests(recipe, directory))


def changed_inputs(directory: Path, recipe: Mapping[str, Any]) -> list[str]:
    """What has another content than when `write_inputs` read it, by its path in the recipe."""
    try:
        before = dict(json.loads((directory / INPUTS).read_bytes()))
    except (OSError, ValueError, TypeError):  # missing or damaged
        return []
    return [path for path, now in digests(recipe, directory).items() if before.get(path, now) != now]


def digests(recipe: Mapping[str, Any], directory: Path) -> dict[str, str]:
    """Compute the sha256 of each file, folder and pattern, by its path in the recipe; not of what is on the hub."""
    found = {}
    for key, text in _texts(recipe):
        with suppress(OSError):  # a text that is too long for a path
            path, is_path = Path(text).expanduser(), key in _PATHS
            if path.is_file() and (is_path or path.suffix or len(path.parts) > 1):  # a field may have a file's name
                found[text] = _digest(path)
            elif is_path and (files := _files(path, directory.absolute())):
                found[text] = hashlib.sha256("\n".join(map(_line, files)).encode()).hexdigest()
    return found


def _texts(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Find all texts, each with the key that it is under."""
    if isinstance(value, str | Path):
        yield key, str(value)
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            if name not in _NO_INPUTS:
                yield from _texts(inner, name)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _texts(inner, key)


def _files(path: Path, directory: Path) -> list[Path]:
    """Find the files of a pattern or a folder, except those of the run directory."""
    found = Path(path.anchor).glob(str(path.relative_to(path.anchor))) if is_glob(path) else path.rglob("*")
    files = (file.absolute() for file in found if file.is_file() and file.suffix not in _NOT_READ)
    return sorted(file for file in files if file.name[0] != "." and directory not in file.parents)


def _line(file: Path) -> str:
    return f"{file.name} {_digest(file, SAMPLED_BYTES)}"


def _digest(path: Path, sampled: int | None = None) -> str:
    stamp = path.stat()
    return _read(path.absolute(), stamp.st_size, stamp.st_mtime_ns, sampled is not None and stamp.st_size > sampled)


@lru_cache(4096)
def _read(path: Path, size: int, modified: int, sampled: bool) -> str:
    """Read a file once in a process, as long as it stays the same: all of it, or pieces that are equally far apart."""
    if not sampled:
        return digest(path)
    sha = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for piece in range(PIECES):
            file.seek(piece * (size - PIECE_BYTES) // (PIECES - 1))
            sha.update(file.read(PIECE_BYTES))
    return sha.hexdigest()
