"""Arrow files under `datasets.config.HF_DATASETS_CACHE`, each named by a hash of its content and options.

Paths and times are not hashed, so that no file can be stale. The folder may be deleted whenever nothing runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from datasets.fingerprint import Hasher

from potstill.errors import DataError
from potstill.files import atomic_path
from potstill.models.checksums import write_checksum

BATCH = 256  # rows read, tokenised and written at a time
FORMAT = 5  # to be raised whenever the same input is encoded differently

_folder: ContextVar[Path | None] = ContextVar("folder", default=None)


@contextmanager
def cached_in(folder: Path) -> Iterator[None]:
    """Put the files into another folder, for parts of a stream, which are read once."""
    token = _folder.set(folder)
    try:
        yield
    finally:
        _folder.reset(token)


def cache_path(inputs: list[Any]) -> Path:
    """Name the file for what these values determine; tokenizers are hashed by all that they hold."""
    folder = _folder.get() or Path(datasets.config.HF_DATASETS_CACHE) / "potstill"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        return folder / f"{Hasher.hash([FORMAT, *inputs])}.arrow"
    except RecursionError:
        nested = "expected options and a tokenizer that can be hashed, got values that are nested too deeply"
        raise DataError(f"data: {nested}. Correct tokenizer_config.json.") from None


def write_arrow(path: Path, schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> None:
    """Write batches to an Arrow file atomically, and its checksum beside it, by which `is_whole` knows it."""
    with (
        atomic_path(path) as partial,
        pa.OSFile(str(partial), "wb") as sink,
        pa.ipc.new_stream(sink, schema) as writer,
    ):
        for batch in batches:
            writer.write_batch(batch)
    write_checksum(path)
