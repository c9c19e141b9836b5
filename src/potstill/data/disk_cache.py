"""Arrow files under `datasets.config.HF_DATASETS_CACHE`, each named after all that it was made of.

The name is a hash of content and options, never of a path or a time: what is found there cannot be stale. The
folder may be deleted whenever nothing runs.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from datasets.fingerprint import Hasher

from potstill.data.files import atomic_path

BATCH = 256  # rows read, tokenised and written at a time
FORMAT = 1  # to be raised whenever the same input is kept in another form


def cache_path(made_of: list[Any]) -> Path:
    """The file for something made of these values; tokenizers are hashed by all that they hold."""
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "potstill"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{Hasher.hash([FORMAT, *made_of])}.arrow"


def write_arrow(path: Path, schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> None:
    """Write batches to an Arrow file, whole or not at all."""
    with (
        atomic_path(path) as partial,
        pa.OSFile(str(partial), "wb") as sink,
        pa.ipc.new_stream(sink, schema) as writer,
    ):
        for batch in batches:
            writer.write_batch(batch)
