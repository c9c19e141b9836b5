"""Where the vectors of texts come from, a sentence-transformers model or a server; kept once they are there."""

from __future__ import annotations

import hashlib
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from potstill.atomic import whole_or_nothing
from potstill.embedding.vectors import Vectors, open_vectors
from potstill.errors import DataError, RunError, UserError

BATCH = 64
KEY = "OPENAI_API_KEY"

Encode = Callable[[Sequence[str]], Any]


def model_encoder(model: Any) -> Encode:
    """Texts to vectors by a sentence-transformers model."""
    return lambda texts: model.encode(list(texts), batch_size=BATCH, show_progress_bar=False)


def server_encoder(url: str, model: str, *, tries: int = 4) -> Encode:
    """Texts to vectors by an OpenAI-style server: POST <url>/v1/embeddings.

    The key is taken from the environment variable OPENAI_API_KEY, where there is one, and goes nowhere else.

    Args:
        url: where the server is, with or without /v1.
        model: the name that it knows.
        tries: how often a busy server is asked.

    Raises:
        UserError: the address is not http(s), or the server refuses.
        RunError: it does not answer, or not with a vector for each text.
    """
    if not url.startswith(("http://", "https://")):
        raise UserError(f"teacher.server.url: expected http:// or https://, got {url}.")
    address = url.rstrip("/").removesuffix("/v1") + "/v1/embeddings"
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get(KEY):
        headers["Authorization"] = f"Bearer {key}"

    def encode(texts: Sequence[str]) -> np.ndarray:
        body = json.dumps({"model": model, "input": list(texts), "encoding_format": "float"}).encode()
        request = urllib.request.Request(address, body, headers)
        for attempt in range(tries):
            try:
                with urllib.request.urlopen(request, timeout=120) as response:
                    return _vectors(json.loads(response.read()), len(texts), address)
            except urllib.error.HTTPError as error:
                if error.code not in (429, 500, 502, 503, 504):
                    raise UserError(
                        f"teacher.server: expected vectors from {address}, got status {error.code}. "
                        f"Check the model's name, and the key in {KEY}."
                    ) from None
                reason = f"status {error.code}"
            except (urllib.error.URLError, TimeoutError, ValueError) as error:
                reason = str(getattr(error, "reason", error))
            if attempt + 1 < tries:
                time.sleep(0.5 * 2**attempt)
        raise RunError(f"teacher.server: expected an answer from {address}, got {reason}, {tries} times. Is it up?")

    return encode


def _vectors(answer: Any, wanted: int, address: str) -> np.ndarray:
    try:
        rows = sorted(answer["data"], key=lambda row: row["index"])
        found = np.asarray([row["embedding"] for row in rows], dtype=np.float32)
    except (KeyError, TypeError, ValueError):
        found = np.empty((0, 0), dtype=np.float32)
    if found.ndim != 2 or len(found) != wanted:
        raise RunError(f"teacher.server: expected {wanted} vectors of one length from {address}, got something else.")
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
        with whole_or_nothing(path) as partial, partial.open("wb") as file:
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
