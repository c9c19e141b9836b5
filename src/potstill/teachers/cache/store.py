"""A cache on disk: shards of packed rows, a manifest with checksums, random access by content.

    manifest.json          contents and origin; written last, when everything else is there
    teacher/               the teacher's config and tokenizer, to check the student against
    head.safetensors       the teacher's head, where hidden states are stored
    shards/00000.arrow     Arrow IPC files: key (16 bytes), tokens (uint32), signal (binary), layers (binary)

A signal is packed by a codec (`teachers/cache/codec.py`) and compressed with Zstandard; layers are the hidden states of
chosen layers, compressed likewise. A row's key is a hash of its token ids and target positions, so that a row is found
in whatever order and file it comes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from potstill.data.files import atomic_path, digest, write_text
from potstill.errors import DataError

T = TypeVar("T")

FORMAT = 2  # raised with every change that a reader must know of
MANIFEST = "manifest.json"
PLAN = "plan.json"
KEY_BYTES = 16
COMPRESSION = pa.Codec("zstd", compression_level=3)
SCHEMA = pa.schema(
    {
        "key": pa.binary(KEY_BYTES),
        "tokens": pa.uint32(),
        "size": pa.uint32(),
        "signal": pa.large_binary(),
        "layers_size": pa.uint32(),
        "layers": pa.large_binary(),
    }
)


class _Record:
    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}


@dataclass(frozen=True)
class Shard(_Record):
    """One file of a cache: its name in shards/, its rows and target tokens, and its checksum."""

    name: str
    rows: int
    tokens: int
    sha256: str


@dataclass(frozen=True)
class CachedLayers(_Record):
    """Hidden states that are stored beside the targets.

    Args:
        kept: layer indices from 0, ascending.
        depth: number of the teacher's layers; width, heads and narrowest as in `potstill.models.capture.ModelShape`.
        dtype: float32, bfloat16 or float16.
    """

    kept: list[int]
    depth: int
    width: int
    heads: int
    narrowest: int
    dtype: str


@dataclass(frozen=True)
class CachePlan(_Record):
    """What a cache is made from: the same for every process that builds a part of it.

    Args:
        weights: sha256 over the teacher's weights, or the address of a server.
        tokenizer: sha256 over the token -> id map and the chat template.
        vocabulary: V, without padding rows of the head.
        codec: name and parameters.
        sources: the data files in order, as (path, rows, tokens, sha256 over the keys of their rows).
        shard_rows: rows in a shard; a shard has rows of one source.
        batch_rows: rows in a batch of the teacher; rounding depends on it.
    """

    format: int
    teacher: str
    weights: str
    tokenizer: str
    vocabulary: int
    codec: dict[str, int | float | str]
    alignment: str
    sources: list[tuple[str, int, int, str]]
    shard_rows: int
    batch_rows: int
    versions: dict[str, str]
    layers: CachedLayers | None = None

    def differs(self, other: CachePlan) -> list[str]:
        """The fields in which two plans would make other signals; paths do not count."""
        plans = [asdict(plan) for plan in (self, other)]
        for plan in plans:
            plan["sources"] = [source[1:] for source in plan["sources"]]
        return [name for name in plans[0] if name != "teacher" and plans[0][name] != plans[1][name]]


@dataclass(frozen=True)
class Manifest(_Record):
    """A finished cache: its plan, its files and their checksums."""

    plan: CachePlan
    shards: list[Shard]
    files: dict[str, str]

    @property
    def tokens(self) -> int:
        """Target tokens."""
        return sum(shard.tokens for shard in self.shards)

    @property
    def rows(self) -> int:
        """Rows of data."""
        return sum(shard.rows for shard in self.shards)


class CachedRow(NamedTuple):
    """One row of data as it is stored."""

    key: bytes
    tokens: int
    signal: bytes
    layers: bytes = b""


def parse_record(kind: type[T], values: Any) -> T:
    """Make a record of values from JSON.

    Raises:
        ValueError: they do not fit.
    """
    from pydantic import TypeAdapter

    return TypeAdapter(kind).validate_python(values)


def row_key(input_ids: NDArray[np.integer[Any]], counts: NDArray[np.bool_]) -> bytes:
    """Compute the key of a row.

    Args:
        input_ids: [T] without padding.
        counts: [T - 1] the target positions; see `potstill.losses.alignment.target_positions`.
    """
    ids = np.ascontiguousarray(input_ids, "<i4")
    return hashlib.blake2b(ids.tobytes() + np.packbits(counts).tobytes(), digest_size=KEY_BYTES).digest()


def write_shard(path: Path, rows: Iterable[CachedRow]) -> Shard:
    """Write a shard atomically."""
    keys, tokens, signals, layers = map(list, zip(*rows, strict=True))
    columns = [
        pa.array(keys, pa.binary(KEY_BYTES)),
        pa.array(tokens, pa.uint32()),
        pa.array(map(len, signals), pa.uint32()),
        pa.array([COMPRESSION.compress(signal, asbytes=True) for signal in signals], pa.large_binary()),
        pa.array(map(len, layers), pa.uint32()),
        pa.array([COMPRESSION.compress(x, asbytes=True) if x else b"" for x in layers], pa.large_binary()),
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    with (
        atomic_path(path) as partial,
        pa.OSFile(str(partial), "wb") as sink,
        pa.ipc.new_file(sink, SCHEMA) as writer,
    ):
        writer.write_batch(pa.record_batch(columns, schema=SCHEMA))
    return Shard(path.name, len(keys), sum(tokens), digest(path))


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write the manifest with a checksum of its own: from then on the cache is finished."""
    write_text(directory / MANIFEST, _with_checksum(asdict(manifest)))


def read_manifest(directory: Path) -> Manifest:
    """Read the manifest of a finished cache.

    Raises:
        DataError: there is none, it has changed since it was written, or another version of potstill wrote it.
    """
    try:
        text = (directory / MANIFEST).read_text(encoding="utf-8")
        body = json.loads(text)
        version = body["plan"]["format"]
    except FileNotFoundError:
        raise _missing(directory) from None
    except (OSError, ValueError, KeyError, TypeError):
        raise _damaged(directory, MANIFEST) from None
    if version != FORMAT:
        raise DataError(
            f"cache: expected format {FORMAT} in {directory}, got {version!r:.20}. Another version of potstill wrote "
            "it. Install that version, or build the cache again."
        )
    body.pop("sha256", None)
    if text != _with_checksum(body):
        raise _damaged(directory, MANIFEST)
    try:
        return parse_record(Manifest, body)
    except ValueError:
        raise _damaged(directory, MANIFEST) from None


class Cache:
    """A finished cache, memory-mapped: opening it reads the keys, and signals only when they are needed.

    Args:
        directory: where it is.
        verify: read every byte first and compare it with the checksums.

    Raises:
        DataError: it is not finished, or a file has changed since it was written.
    """

    def __init__(self, directory: str | Path, *, verify: bool = True) -> None:
        self.directory = Path(directory)
        self.manifest = read_manifest(self.directory)
        if verify:
            self._verify()
        self._shards = [self._open(shard) for shard in self.manifest.shards]
        self._keys = np.concatenate(
            [np.zeros(0, "V16"), *(np.frombuffer(table["key"].buffers()[1], "V16") for table in self._shards)]
        )
        # Searched by their first half as numbers, compared as a whole.
        halves = self._keys.view("<u8")[::2]
        self._order = np.argsort(halves, kind="stable")
        self._sorted = halves[self._order]
        self._starts = np.cumsum([0, *(len(table) for table in self._shards)])

    def find(self, keys: Sequence[bytes]) -> NDArray[np.int64]:
        """The row number of each key, -1 where there is none."""
        wanted = np.frombuffer(b"".join(keys), "V16")
        if not len(self._keys):
            return np.full(len(wanted), -1)
        places = np.searchsorted(self._sorted, wanted.view("<u8")[::2]).clip(max=len(self._sorted) - 1)
        rows = self._order[places]
        return np.where(self._keys[rows] == wanted, rows, -1)

    def signals(self, rows: NDArray[np.int64]) -> tuple[list[bytes], list[int]]:
        """The packed targets of some rows, and their numbers of tokens."""
        tokens = [table["tokens"][i].as_py() for table, i in self._places(rows)]
        return [_unpack(table, "signal", "size", i) for table, i in self._places(rows)], tokens

    def layers(self, rows: NDArray[np.int64]) -> list[bytes]:
        """The packed hidden states of some rows."""
        return [_unpack(table, "layers", "layers_size", i) for table, i in self._places(rows)]

    def _places(self, rows: NDArray[np.int64]) -> Iterator[tuple[pa.RecordBatch, int]]:
        """The shard of each row, and its number in it."""
        shards = np.searchsorted(self._starts, rows, side="right") - 1
        for row, shard in zip(rows.tolist(), shards.tolist(), strict=True):
            yield self._shards[shard], row - int(self._starts[shard])

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
        except (pa.ArrowException, OSError):
            raise _damaged(self.directory, name) from None
        if batch.schema != SCHEMA or len(batch) != shard.rows:
            raise _damaged(self.directory, name)
        return batch


def _unpack(table: pa.RecordBatch, column: str, size: str, row: int) -> bytes:
    values: bytes = COMPRESSION.decompress(table[column][row].as_buffer(), table[size][row].as_py(), asbytes=True)
    return values


def _with_checksum(body: dict[str, Any]) -> str:
    """A manifest's text, with a checksum of itself."""
    checksum = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    return json.dumps({**body, "sha256": checksum}, indent=1) + "\n"


def _missing(directory: Path) -> DataError:
    if (directory / PLAN).exists():
        return DataError(
            f"cache: expected a finished cache in {directory}, got one that is being built. "
            "Continue with the same `potstill cache build` command."
        )
    return DataError(
        f"cache: expected a cache in {directory}, got no {MANIFEST} there. "
        "Check the path, or build it with `potstill cache build`."
    )


def _damaged(directory: Path, file: str) -> DataError:
    return DataError(
        f"cache: expected {file} in {directory} as it was written, got something else: it is damaged, truncated or "
        "replaced. Copy the cache again, or build it again."
    )
