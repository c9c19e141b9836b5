"""Teachers of embedding students: files of vectors, sentence-transformers models, and servers."""

from __future__ import annotations

import hashlib
import json
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np

from potstill.embedding.by_key import ChosenByKey
from potstill.embedding.encoders import load_embedder
from potstill.embedding.vectors import VectorArray, open_vectors
from potstill.engines.client import JsonClient
from potstill.errors import DataError, ServerError
from potstill.files import atomic_path
from potstill.losses.declared import Declared, Record
from potstill.models.checksums import is_whole, write_checksum

BATCH = 64
Encode = Callable[[Sequence[str]], Any]  # N texts to [N, H]


class TextEncoder(NamedTuple):
    encode: Encode
    identity: str  # what the vectors depend on besides the texts
    model: Any = None  # the sentence-transformers model, if it is one


class EmbeddingTeacher(ChosenByKey, Declared):
    """Source of the vectors that a student learns from."""

    reads_text: ClassVar[bool] = True
    has_vocabulary: ClassVar[bool] = False  # whose single tokens it can encode

    @abstractmethod
    def load(self) -> TextEncoder | None: ...


@dataclass(frozen=True)
class FileTeacher(EmbeddingTeacher):
    """Vectors in a file.

    Args:
        vectors: .npy, .safetensors or .pt; row i is the vector of text i.
        eval_vectors: the held-out vectors; default: the last tenth of the vectors.
        key: which matrix of the file, if it holds several.
    """

    vectors: str
    eval_vectors: str | None = None
    key: str | None = None  # type: ignore[assignment, misc]  # the recipe's key; `Declared.key` is read from the family alone
    name = "vectors"
    reads_text = False

    def load(self) -> None:
        return None

    def open(self) -> tuple[VectorArray, VectorArray | None]:
        held_out = open_vectors(self.eval_vectors, self.key) if self.eval_vectors else None
        return open_vectors(self.vectors, self.key), held_out


@dataclass(frozen=True)
class EmbedderTeacher(EmbeddingTeacher):
    """A sentence-transformers model.

    Args:
        embedder: a folder, or a name on the hub.
    """

    embedder: str
    name = "embedder"
    has_vocabulary = True

    def load(self) -> TextEncoder:
        model = load_embedder(self.embedder, "teacher.embedder")
        return TextEncoder(model_encoder(model), f"model {self.embedder}", model)


@dataclass(frozen=True)
class EmbeddingServer(Record):
    """An OpenAI-style server; its key is taken from POTSTILL_API_KEY or OPENAI_API_KEY.

    Args:
        url: with or without /v1.
        model: the name by which the server knows the model.
    """

    url: str
    model: str


@dataclass(frozen=True)
class ServerTeacher(EmbeddingTeacher):
    """A server with /v1/embeddings."""

    server: EmbeddingServer
    name = "server"

    def load(self) -> TextEncoder:
        identity = f"server url={self.server.url!r} model={self.server.model!r}"
        return TextEncoder(server_encoder(self.server.url, self.server.model), identity)


def model_encoder(model: Any) -> Encode:
    return lambda texts: model.encode(list(texts), batch_size=BATCH, show_progress_bar=False)


def server_encoder(url: str, model: str) -> Encode:
    client = JsonClient(url, key_variable=None, concurrency=4, timeout_s=120.0, attempts=4)

    def encode(texts: Sequence[str]) -> np.ndarray:
        batches = [list(texts[start : start + BATCH]) for start in range(0, len(texts), BATCH)]
        answers = client.post_all("/v1/embeddings", [{"model": model, "input": batch} for batch in batches])
        return np.concatenate([vectors(answer, len(batch)) for answer, batch in zip(answers, batches, strict=True)])

    def vectors(answer: Any, rows: int) -> np.ndarray:
        try:
            data = sorted(answer["data"], key=lambda row: row["index"])
            matrix: np.ndarray = np.asarray([row["embedding"] for row in data], dtype=np.float32)
        except (KeyError, TypeError, ValueError):
            matrix = np.empty(0)
        if matrix.ndim != 2 or len(matrix) != rows:
            expected, hint = f"{rows} vectors of one length", "Check that the model is an embedding model."
            raise ServerError(f"teacher.server: expected {expected} from {client.url}, got something else. {hint}")
        return matrix

    return encode


def encode_texts(
    texts: Sequence[str],
    encoder: TextEncoder,
    folder: Path,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> VectorArray:
    """Encode texts into a .npy file, which is named after the texts and the teacher and reused if it exists."""
    folder.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256(f"[{json.dumps(encoder.identity)}".encode())  # of a JSON list, one text at a time
    for text in texts:
        digest.update(f", {json.dumps(text)}".encode())
    digest.update(b"]")
    path = folder / f"{digest.hexdigest()[:24]}.npy"
    if is_whole(path):
        return open_vectors(path)
    width = None
    with atomic_path(path) as partial, partial.open("wb") as file:
        for start in range(0, len(texts), 4 * BATCH):
            batch = np.ascontiguousarray(encoder.encode(texts[start : start + 4 * BATCH]), dtype=np.float32)
            if width is None:
                width = batch.shape[1]
                header = {"descr": "<f4", "fortran_order": False, "shape": (len(texts), width)}
                np.lib.format.write_array_header_1_0(file, header)
            if batch.shape[1] != width:
                got = batch.shape[1]
                raise DataError(f"teacher: expected vectors of {width} dimensions, got {got} in a later batch.")
            file.write(batch.tobytes())
            on_progress(min(start + 4 * BATCH, len(texts)), len(texts))
    write_checksum(path)
    return open_vectors(path)
