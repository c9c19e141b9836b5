"""A cache on disk: shards of packed rows, a manifest that vouches for them, random access by content.

    manifest.json          what the cache holds and of whom; written last, and only when everything is there
    teacher/               the teacher's config and tokenizer, to check the student against
    head.safetensors       the teacher's head, where hidden states are kept
    shards/00000.arrow     Arrow IPC files: key (16 bytes), tokens (uint32), signal (binary), layers (binary)

A signal is what a codec (`teachers/cache/codec.py`) packed, compressed with Zstandard; layers are the hidden states of
chosen layers, where they are kept, compressed likewise. A key is made of a row's token ids
and of which of them count: a row is found by what it holds, in whatever order and from whatever file it comes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError

from potstill.data.files import atomic_path, digest, write_text
from potstill.errors import DataError

FORMAT = 2  # to be raised with every change of what a reader must know
MANIFEST = "manifest.json"
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


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Shard(_Record):
    """One file of a cache.

    Args:
        name: of the file in shards/.
        rows: in it.
        tokens: that count.
        sha256: of the file.
    """

    name: str
    rows: int
    tokens: int
    sha256: str


class Layers(_Record):
    """The hidden states that are kept beside the targets.

    Args:
        kept: numbers of the layers, from 0, rising.
        depth: how many layers the teacher has; width, heads and narrowest as in `potstill.models.structure.ModelShape`.
        dtype: float32, bfloat16 or float16.
    """

    kept: list[int]
    depth: int
    width: int
    heads: int
    narrowest: int
    dtype: str


class Plan(_Record):
    """What a cache is made of: the same for every process that builds a part of it.

    Args:
        format: of the cache.
        teacher: where it came from.
        weights: sha256 over the teacher's weights, or the address of a server.
        tokenizer: sha256 over the token -> id map and the chat template.
        vocabulary: V, of the real tokens.
        codec: name and parameters.
        alignment: how signals and tokens go together.
        sources: the files of data in order, as (path, rows, tokens, sha256 over the keys of their rows).
        shard_rows: rows in a shard; shards do not go over the end of a source.
        batch_rows: rows in a batch of the teacher; its rounding depends on it.
        versions: of potstill and torch.
        layers: the hidden states that are kept, if any are.
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
    layers: Layers | None = None

    def differs(self, other: Plan) -> list[str]:
        """The fields in which two plans would make other signals; where things lie and what they are called is free."""
        mine, its = (plan.model_dump(exclude={"teacher"}) for plan in (self, other))
        for plan in (mine, its):
            plan["sources"] = [source[1:] for source in plan["sources"]]
        return [name for name in mine if mine[name] != its[name]]


class Manifest(_Record):
    """A finished cache: its plan, its files and their checksums."""

    plan: Plan
    shards: list[Shard]
    files: dict[str, str]

    @property
    def tokens(self) -> int:
        """Counting tokens."""
        return sum(shard.tokens for shard in self.shards)

    @property
    def rows(self) -> int:
        """Rows of data."""
        return sum(shard.rows for shard in self.shards)


class Row(NamedTuple):
    """One row of data as it is kept."""

    key: bytes
    tokens: int
    signal: bytes
    layers: bytes = b""


def row_key(input_ids: NDArray[np.integer[Any]], counts: NDArray[np.bool_]) -> bytes:
    """The key of a row.

    Args:
        input_ids: [T] without padding.
        counts: [T - 1] whether the prediction at each position counts; see `alignment.target_positions`.
    """
    ids = np.ascontiguousarray(input_ids, "<i4")
    return hashlib.blake2b(ids.tobytes() + np.packbits(counts).tobytes(), digest_size=KEY_BYTES).digest()


def write_shard(path: Path, rows: Iterable[Row]) -> Shard:
    """Write a shard, whole or not at all, and say what is in it."""
    rows = list(rows)
    columns = [
        pa.array([row.key for row in rows], pa.binary(KEY_BYTES)),
        pa.array([row.tokens for row in rows], pa.uint32()),
        pa.array([len(row.signal) for row in rows], pa.uint32()),
        pa.array([COMPRESSION.compress(row.signal, asbytes=True) for row in rows], pa.large_binary()),
        pa.array([len(row.layers) for row in rows], pa.uint32()),
        pa.array(
            [COMPRESSION.compress(row.layers, asbytes=True) if row.layers else b"" for row in rows], pa.large_binary()
        ),
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    with (
        atomic_path(path) as partial,
        pa.OSFile(str(partial), "wb") as sink,
        pa.ipc.new_file(sink, SCHEMA) as writer,
    ):
        writer.write_batch(pa.record_batch(columns, schema=SCHEMA))
    return Shard(name=path.name, rows=len(rows), tokens=sum(row.tokens for row in rows), sha256=digest(path))


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write the manifest with a checksum of its own: from then on the cache is finished."""
    write_text(directory / MANIFEST, _text(manifest.model_dump(mode="json")))


def read_manifest(directory: Path) -> Manifest:
    """The manifest of a finished cache.

    Raises:
        DataError: there is none, it is not what was written, or a later version of potstill wrote it.
    """
    path = directory / MANIFEST
    try:
        text = path.read_text(encoding="utf-8")
        body = json.loads(text)
        found = body["plan"]["format"]
    except FileNotFoundError:
        raise DataError(_missing(directory)) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise DataError(_damaged(directory, MANIFEST)) from None
    if found != FORMAT:
        raise DataError(
            f"cache: expected format {FORMAT} in {directory}, got {found!r:.20}. Another version of potstill wrote it. "
            "Install that version, or build the cache again."
        )
    body.pop("sha256", None)
    if text != _text(body):
        raise DataError(_damaged(directory, MANIFEST))
    try:
        return Manifest.model_validate(body)
    except ValidationError:
        raise DataError(_damaged(directory, MANIFEST)) from None


class Cache:
    """A finished cache, memory-mapped: opening reads the keys, and signals only when they are asked for.

    Args:
        directory: where it is.
        verify: read every byte first and compare it with the checksums.

    Raises:
        DataError: it is not finished, or a file is not what was written.
    """

    def __init__(self, directory: str | Path, *, verify: bool = True) -> None:
        self.directory = Path(directory)
        self.manifest = read_manifest(self.directory)
        if verify:
            self._verify()
        self._shards = [self._open(shard) for shard in self.manifest.shards]
        empty = np.zeros(0, "V16")
        self._keys = np.concatenate(
            [empty, *(np.frombuffer(table["key"].buffers()[1], "V16") for table in self._shards)]
        )
        # Searched by their first half as numbers, compared whole.
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
        """What is kept of the targets of some rows, and their numbers of tokens."""
        signals = [_unpacked(table, "signal", "size", at) for table, at in self._places(rows)]
        return signals, [table["tokens"][at].as_py() for table, at in self._places(rows)]

    def layers(self, rows: NDArray[np.int64]) -> list[bytes]:
        """What is kept of the hidden states of some rows."""
        return [_unpacked(table, "layers", "layers_size", at) for table, at in self._places(rows)]

    def _places(self, rows: NDArray[np.int64]) -> Iterator[tuple[pa.RecordBatch, int]]:
        """The shard of each row, and its number in there."""
        shards = np.searchsorted(self._starts, rows, side="right") - 1
        for row, shard in zip(rows.tolist(), shards.tolist(), strict=True):
            yield self._shards[shard], row - int(self._starts[shard])

    def _verify(self) -> None:
        expected = {f"shards/{shard.name}": shard.sha256 for shard in self.manifest.shards} | self.manifest.files
        with ThreadPoolExecutor() as pool:
            for name, same in zip(expected, pool.map(self._is_same, expected.items()), strict=True):
                if not same:
                    raise DataError(_damaged(self.directory, name))

    def _is_same(self, file: tuple[str, str]) -> bool:
        path = self.directory / file[0]
        return path.is_file() and digest(path) == file[1]

    def _open(self, shard: Shard) -> pa.RecordBatch:
        path = self.directory / "shards" / shard.name
        try:
            batch = pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0)
            if batch.schema != SCHEMA or len(batch) != shard.rows:
                raise DataError(_damaged(self.directory, f"shards/{shard.name}"))
            return batch
        except (pa.ArrowException, OSError):
            raise DataError(_damaged(self.directory, f"shards/{shard.name}")) from None


def _unpacked(table: pa.RecordBatch, name: str, size: str, at: int) -> bytes:
    found: bytes = COMPRESSION.decompress(table[name][at].as_buffer(), table[size][at].as_py(), asbytes=True)
    return found


def _text(body: dict[str, Any]) -> str:
    """A manifest as it is written, with a checksum of itself."""
    proof = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    return json.dumps({**body, "sha256": proof}, indent=1) + "\n"


def _missing(directory: Path) -> str:
    if (directory / "plan.json").exists():
        return (
            f"cache: expected a finished cache in {directory}, got one that is being built. "
            "Go on with the same `potstill cache build` command."
        )
    return (
        f"cache: expected a cache in {directory}, got no {MANIFEST} there. "
        "Check the path, or build it with `potstill cache build`."
    )


def _damaged(directory: Path, file: str) -> str:
    return (
        f"cache: expected {file} in {directory} as it was written, got something else: it is damaged, cut short or "
        "exchanged. Copy the cache again, or build it again."
    )
