"""Where the vectors of texts come from, a sentence-transformers model or a server; kept once they are there."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from potstill.data.files import atomic_path
from potstill.embedding.vectors import Vectors, open_vectors
from potstill.engines.client import JsonClient
from potstill.errors import DataError, ServerError

BATCH = 64

Encode = Callable[[Sequence[str]], Any]


def model_encoder(model: Any) -> Encode:
    """Texts to vectors by a sentence-transformers model."""
    return lambda texts: model.encode(list(texts), batch_size=BATCH, show_progress_bar=False)


def server_encoder(url: str, model: str) -> Encode:
    """Texts to vectors by an OpenAI-style server: POST <url>/v1/embeddings.

    Args:
        url: where the server is, with or without /v1; the key is taken as `JsonClient` says.
        model: the name that it knows.

    Raises:
        UserError: the address is not http(s), or the server refuses.
        ServerError: it does not answer, or not with a vector for each text.
    """
    client = JsonClient(url, key_variable=None, concurrency=4, timeout_s=120.0, attempts=4)

    def encode(texts: Sequence[str]) -> np.ndarray:
        parts = [list(texts[start : start + BATCH]) for start in range(0, len(texts), BATCH)]
        answers = client.post_all("/v1/embeddings", [{"model": model, "input": part} for part in parts])
        return np.concatenate(
            [_vectors(answer, len(part), client.url) for answer, part in zip(answers, parts, strict=True)]
        )

    return encode


def _vectors(answer: Any, wanted: int, address: str) -> np.ndarray:
    try:
        rows = sorted(answer["data"], key=lambda row: row["index"])
        found = np.asarray([row["embedding"] for row in rows], dtype=np.float32)
    except (KeyError, TypeError, ValueError):
        found = np.empty((0, 0), dtype=np.float32)
    if found.ndim != 2 or len(found) != wanted:
        raise ServerError(
            f"teacher.server: expected {wanted} vectors of one length from {address}, got something else. "
            "Check that the model is one of embeddings."
        )
    return found


def encode_texts(
    texts: Sequence[str], encode: Encode, said_by: str, folder: Path, each: Callable[[int], None] = lambda done: None
) -> Vectors:
    """The teacher's vectors of texts, written to a .npy that is named after the texts and who encodes them.

    Args:
        texts: N of them.
        encode: a batch of texts to [B, H].
        said_by: what the vectors depend on beside the texts.
        folder: where they are kept; found there, they are not made again.
        each: told how many texts are done.

    Raises:
        DataError: the vectors of one batch are not as wide as those of another.
    """
    folder.mkdir(parents=True, exist_ok=True)
    mark = hashlib.sha256(json.dumps([said_by, *texts]).encode()).hexdigest()[:24]
    path = folder / f"{mark}.npy"
    if not path.exists():
        with atomic_path(path) as partial, partial.open("wb") as file:
            _write(file, len(texts), _encoded(texts, encode, each))
    return open_vectors(path)


def _encoded(texts: Sequence[str], encode: Encode, each: Callable[[int], None]) -> Iterator[np.ndarray]:
    for start in range(0, len(texts), 4 * BATCH):
        yield np.asarray(encode(texts[start : start + 4 * BATCH]), dtype=np.float32)
        each(min(start + 4 * BATCH, len(texts)))


def _write(file: Any, rows: int, batches: Iterator[np.ndarray]) -> None:
    width = 0
    for number, batch in enumerate(batches):
        if number == 0:
            width = batch.shape[1]
            header = {"descr": "<f4", "fortran_order": False, "shape": (rows, width)}
            np.lib.format.write_array_header_1_0(file, header)
        if batch.shape[1] != width:
            raise DataError(f"teacher: expected vectors of {width} dimensions, got {batch.shape[1]} in a later batch.")
        file.write(np.ascontiguousarray(batch).tobytes())
