"""The files that a recipe names: a training is resumed with those that it began with."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

from potstill.files import write_json
from potstill.models.checksums import digest

INPUTS = "inputs.json"  # in a run directory: the sha256 of each file
_NO_INPUTS = {"name", "output"}


def write_inputs(directory: Path, recipe: Mapping[str, Any]) -> None:
    """Write the checksums of the files that a recipe names into a run directory."""
    write_json(directory / INPUTS, _digests(recipe))


def changed_inputs(directory: Path, recipe: Mapping[str, Any]) -> list[str]:
    """The files that have another content than when `write_inputs` read them, by their paths in the recipe."""
    try:
        before = dict(json.loads((directory / INPUTS).read_bytes()))
    except (OSError, ValueError, TypeError):  # missing or damaged
        return []
    return [path for path, now in _digests(recipe).items() if before.get(path, now) != now]


def _digests(recipe: Mapping[str, Any]) -> dict[str, str]:
    """Compute the sha256 of each file, by its path in the recipe; folders and data of the hub are not read."""
    digests = {}
    for text in _texts({key: value for key, value in recipe.items() if key not in _NO_INPUTS}):
        with suppress(OSError):  # a text that is too long for a path
            path = Path(text).expanduser()
            # A word alone, such as the name of a field, is no path, though a file may have the name.
            if (path.suffix or len(path.parts) > 1) and path.is_file():
                stamp = path.stat()
                digests[text] = _digest(path.absolute(), stamp.st_size, stamp.st_mtime_ns)
    return digests


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str | Path):
        yield str(value)
    elif isinstance(value, Mapping | list | tuple):
        for inner in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(inner)


@lru_cache
def _digest(path: Path, size: int, modified: int) -> str:
    """Read a file once in a process, as long as it stays the same."""
    return digest(path)
