"""A cache on disk: shards of packed rows, a manifest with checksums, random access by content; see docs/cache.md."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import TypeAdapter

from potstill.errors import DataError
from potstill.files import atomic_path
from potstill.losses.declared import Record
from potstill.models.checksums import digest, with_checksum
from potstill.models.layer_map import Layer

FORMAT = 2  # raised with every change that a reader must know of
MANIFEST = "manifest.json"
PLAN = "plan.json"
KEY_BYTES = 16
COMPRESSION = pa.Codec("zstd", compression_level=3)
COUNT, BYTES = pa.uint32(), pa.large_binary()
FIELDS = ("key", "tokens", "size", "signal", "layers_size", "layers")
SCHEMA = pa.schema(zip(FIELDS, (pa.binary(KEY_BYTES), COUNT, COUNT, BYTES, COUNT, BYTES), strict=True))


@dataclass(frozen=True)
class Shard(Record):
    name: str  # in shards/
    rows: int
    tokens: int  # target tokens
    sha256: str


@dataclass(frozen=True)
class CachedLayers(Record):
    """Activations that are stored beside the targets; the teacher's sizes are as in `ModelShape`."""

    kept: list[Layer]  # whose hidden states are stored: numbers from 0, ascending, then names
    depth: int
    width: int
    heads: int
    narrowest: int
    dtype: str  # float32, bfloat16 or float16
    attentions: list[int] = field(default_factory=list)  # whose attention maps are stored, ascending

    def bytes_of_row(self, tokens: int) -> int:
        """Count the bytes of a row before compression, without the zeros of causal attention."""
        hidden = len(self.kept) * tokens * self.width
        maps = len(self.attentions) * self.heads * tokens * (tokens + 1) // 2
        return (hidden + maps) * (4 if self.dtype == "float32" else 2)


@dataclass(frozen=True)
class CachePlan(Record):
    """What a cache is made from: the same for every process that builds a part of it."""

    format: int
    teacher: str
    weights: str  # sha256 over the teacher's weights, or the address of a server
    tokenizer: str  # sha256 over the token -> id map and the chat template
    vocabulary: int  # V, without padding rows of the head
    codec: dict[str, int | float | str]  # name and parameters
    alignment: str
    sources: list[tuple[str, int, int, str]]  # data files: path, rows, tokens, sha256 over the keys of their rows
    shard_rows: int  # rows in a shard, all of one source
    batch_rows: int  # rows in a batch of the teacher; rounding depends on it
    versions: dict[str, str]
    layers: CachedLayers | None = None

    def differs(self, other: CachePlan) -> list[str]:
        """The fields in which two plans would make other signals; paths do not count."""
        plans = [asdict(plan) for plan in (self, other)]
        for plan in plans:
            plan["sources"] = [source[1:] for source in plan["sources"]]
        return [name for name in plans[0] if name != "teacher" and plans[0][name] != plans[1][name]]


@dataclass(frozen=True)
class Manifest(Record):
    """What a finished cache holds."""

    plan: CachePlan
    shards: list[Shard]
    files: dict[str, str]  # checksums of the others

    @property
    def tokens(self) -> int:
        return sum(shard.tokens for shard in self.shards)

    @property
    def rows(self) -> int:
        return sum(shard.rows for shard in self.shards)


class CachedRow(NamedTuple):
    key: bytes
    tokens: int
    signal: bytes
    layers: bytes = b""


def row_key(input_ids: NDArray[np.integer[Any]], counts: NDArray[np.bool_]) -> bytes:
    """Compute the key of a row without padding, input_ids [T] and its `target_positions` [T - 1]."""
    ids = np.ascontiguousarray(input_ids, "<i4")
    return hashlib.blake2b(ids.tobytes() + np.packbits(counts).tobytes(), digest_size=KEY_BYTES).digest()


def write_shard(path: Path, rows: Iterable[CachedRow]) -> Shard:
    keys, tokens, signals, layers = map(list, zip(*rows, strict=True))
    columns = {"key": keys, "tokens": tokens}
    for name, size, values in (("signal", "size", signals), ("layers", "layers_size", layers)):
        columns[size] = [len(value) for value in values]
        columns[name] = [COMPRESSION.compress(value, asbytes=True) if value else b"" for value in values]
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as partial, pa.ipc.new_file(str(partial), SCHEMA) as writer:
        writer.write_batch(pa.RecordBatch.from_pydict(columns, SCHEMA))
    return Shard(path.name, len(keys), sum(tokens), digest(path))


def manifest_text(body: dict[str, Any]) -> str:
    return json.dumps(with_checksum(body), indent=1) + "\n"


def read_manifest(directory: Path) -> Manifest:
    """Read the manifest of a finished cache, which has not changed since this version of potstill wrote it."""
    try:
        text = (directory / MANIFEST).read_text(encoding="utf-8")
        body = json.loads(text)
        version = body["plan"]["format"]
        body.pop("sha256", None)
        if version == FORMAT and text == manifest_text(body):
            manifest = TypeAdapter(Manifest).validate_python(body)
            names = [*(f"shards/{shard.name}" for shard in manifest.shards), *manifest.files]
            if not any(Path(name).is_absolute() or ".." in Path(name).parts for name in names):
                return manifest
    except FileNotFoundError:
        if (directory / PLAN).exists():
            raise DataError(
                f"cache: expected a finished cache in {directory}, got one that is being built. "
                "Continue with the same `potstill cache build` command."
            ) from None
        raise DataError(
            f"cache: expected a cache in {directory}, got no {MANIFEST} there. "
            "Check the path, or build it with `potstill cache build`."
        ) from None
    except (OSError, ValueError, KeyError, TypeError):
        version = FORMAT
    if version == FORMAT:
        raise _damaged(directory, MANIFEST)
    raise DataError(
        f"cache: expected format {FORMAT} in {directory}, got {version!r:.20}. Another version of potstill wrote "
        "it. Install that version, or build the cache again."
    )


class Cache:
    """A finished cache, memory-mapped: opening it reads the keys, and signals only when they are needed.

    A DataError where it is not finished, or where `verify`, which reads every byte, finds a file that has changed.
    """

    def __init__(self, directory: str | Path, *, verify: bool = True) -> None:
        self.directory = Path(directory)
        self.manifest = read_manifest(self.directory)
        if verify:
            self._verify()
        self._table = pa.Table.from_batches([self._open(shard) for shard in self.manifest.shards], SCHEMA)
        keys = [np.frombuffer(shard.buffers()[1], "V16") for shard in self._table["key"].chunks]
        self._keys = np.concatenate([np.zeros(0, "V16"), *keys])
        # Searched by their first half as numbers, compared as a whole.
        halves = self._keys.view("<u8")[::2]
        self._order = np.argsort(halves, kind="stable")
        self._sorted = halves[self._order]

    def find(self, keys: Sequence[bytes]) -> NDArray[np.int64]:
        """The row number of each key, -1 where there is none."""
        queries = np.frombuffer(b"".join(keys), "V16")
        if not len(self._keys):
            return np.full(len(queries), -1)
        places = np.searchsorted(self._sorted, queries.view("<u8")[::2]).clip(max=len(self._sorted) - 1)
        rows = self._order[places]
        return np.where(self._keys[rows] == queries, rows, -1)

    def signals(self, rows: NDArray[np.int64]) -> tuple[list[bytes], list[int]]:
        """The packed targets of some rows, and their numbers of tokens."""
        tokens = self._table["tokens"]
        return self._unpack(rows, "signal", "size"), [tokens[row].as_py() for row in rows]

    def layers(self, rows: NDArray[np.int64]) -> list[bytes]:
        """The packed activations of some rows."""
        return self._unpack(rows, "layers", "layers_size")

    def _unpack(self, rows: NDArray[np.int64], column: str, size: str) -> list[bytes]:
        packed, sizes = self._table[column], self._table[size]
        return [COMPRESSION.decompress(packed[i].as_buffer(), sizes[i].as_py(), asbytes=True) for i in rows]

    def _verify(self) -> None:
        checksums = {f"shards/{shard.name}": shard.sha256 for shard in self.manifest.shards} | self.manifest.files

        def unchanged(name: str) -> bool:
            path = self.directory / name
            return path.is_file() and digest(path) == checksums[name]

        with ThreadPoolExecutor() as pool:
            for name, same in zip(checksums, pool.map(unchanged, checksums), strict=True):
                if not same:
                    raise _damaged(self.directory, name)

    def _open(self, shard: Shard) -> pa.RecordBatch:
        name = f"shards/{shard.name}"
        try:
            batch = pa.ipc.open_file(pa.memory_map(str(self.directory / name))).get_batch(0)
            if batch.schema == SCHEMA and len(batch) == shard.rows:
                return batch
        except (pa.ArrowException, OSError):
            pass
        raise _damaged(self.directory, name)


def _damaged(directory: Path, file: str) -> DataError:
    return DataError(
        f"cache: expected {file} in {directory} as it was written, got something else: it is damaged, truncated or "
        "replaced. Copy the cache again, or build it again."
    )
