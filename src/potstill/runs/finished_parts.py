"""Results of the finished parts of a measurement, kept in a file until all are there."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from potstill.files import write_json
from potstill.models.checksums import with_checksum, without_checksum
from potstill.models.loading import adapter_base


class FinishedParts:
    """Computes each part once: what an earlier attempt at the same measurement finished is read from its file.

    Args:
        path: of the file; None keeps nothing.
        request: all that decides the results, as JSON. The file of another request is not used.
    """

    def __init__(self, path: Path | None, request: Any) -> None:
        self.path = path
        self._request = hashlib.sha256(json.dumps(request, default=str).encode()).hexdigest()
        self._results: dict[str, Any] = {}
        with suppress(OSError, ValueError, KeyError, TypeError):
            content = {} if path is None else without_checksum(json.loads(path.read_text(encoding="utf-8")))
            if content["request"] == self._request:
                self._results = content["parts"]

    def get(self, name: str, compute: Callable[[], Any], *, keep: Callable[[Any], bool]) -> Any:
        """The result of a part; it is computed if it is not there, and saved if `keep` says so."""
        if name in self._results:
            return self._results[name]
        result = compute()
        if keep(result) and self.path is not None:
            self._results[name] = result
            write_json(self.path, with_checksum({"request": self._request, "parts": self._results}))
        return result

    def remove(self) -> None:
        """Delete the file, once the results are complete elsewhere."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)


def fingerprint(name: str) -> list[Any]:
    """A file, or the files of a folder and of an adapter's base, by name, size and time; of others the name alone."""
    path = Path(name).expanduser()
    files = sorted(file for file in (path.rglob("*") if path.is_dir() else [path]) if file.is_file())
    base = adapter_base(name)
    stamps = ((str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files)
    return [name, *stamps, *([fingerprint(base)] if base else [])]
