"""A matrix of vectors, in memory or on disk: read in blocks, so that memory stays bounded whatever its length."""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from potstill.errors import DataError, nearest

CHECK = 8192  # rows read at a time when all are
_POOL = 2**26  # numbers in the shuffled pool: 256 MB
_RUNS = 64  # pieces from all over the file that a pool is made of
_KEYS = ("embeddings", "vectors", "X")  # what a matrix among several tensors is usually called


class Vectors(ABC):
    """N rows of H numbers."""

    name: str
    rows: int
    dimensions: int

    @abstractmethod
    def read(self, start: int, stop: int) -> Tensor:
        """[stop - start, H] float32, of its own."""

    def sample(self, most: int) -> Tensor:
        """At most so many rows, in up to 64 pieces evenly spread over all."""
        if self.rows <= most:
            return self.read(0, self.rows)
        pieces = min(_RUNS, most)
        long = most // pieces
        starts = [i * (self.rows - long) // max(pieces - 1, 1) for i in range(pieces)]
        return torch.cat([self.read(start, start + long) for start in starts])

    def blocks(self) -> Iterator[Tensor]:
        """All rows in their order."""
        for start in range(0, self.rows, CHECK):
            yield self.read(start, min(start + CHECK, self.rows))

    def batches(self, size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """All rows once in an order that the seed decides: (row numbers [B], vectors [B, H]).

        Rows are drawn from a pool of pieces from all over the file; one that holds all makes it a plain shuffle. What
        is left over at the end of a pool is put at the beginning of the next; a last batch of one row is left out.
        """
        generator = torch.Generator().manual_seed(seed)
        pool = max(_POOL // self.dimensions, size)
        piece = max(pool // _RUNS, 1) if pool < self.rows else self.rows
        starts = torch.arange(0, self.rows, piece)[torch.randperm(math.ceil(self.rows / piece), generator=generator)]
        left: list[tuple[Tensor, Tensor]] = []
        for first in range(0, len(starts), _RUNS):
            spans = [(int(s), min(int(s) + piece, self.rows)) for s in starts[first : first + _RUNS]]
            numbers = torch.cat([n for n, _ in left] + [torch.arange(*span) for span in spans])
            vectors = torch.cat([v for _, v in left] + [self.read(*span) for span in spans])
            order = torch.randperm(len(numbers), generator=generator)
            whole = len(order) - len(order) % size
            for at in range(0, whole, size):
                chosen = order[at : at + size]
                yield numbers[chosen], vectors[chosen]
            left = [(numbers[order[whole:]], vectors[order[whole:]])]
        if left and len(left[0][0]) > 1:
            yield left[0]


class Matrix(Vectors):
    """Vectors in memory, or a part of a tensor that is mapped from disk."""

    def __init__(self, values: Any, name: str = "vectors") -> None:
        tensor = torch.as_tensor(values)
        _must_be_matrix(name, tensor.shape, str(tensor.dtype), tensor.is_floating_point())
        self.tensor, self.name = tensor, name
        self.rows, self.dimensions = tensor.shape

    def read(self, start: int, stop: int) -> Tensor:
        return self.tensor[start:stop].to(torch.float32, copy=True)


class FileMatrix(Vectors):
    """A matrix that lies row after row in a file. Read and not mapped: a mapped file counts as memory in use."""

    def __init__(self, path: Path, name: str, shape: Sequence[int], dtype: torch.dtype, offset: int) -> None:
        _must_be_matrix(name, shape, str(dtype), dtype.is_floating_point)
        self.path, self.name, self.dtype, self.offset = path, name, dtype, offset
        self.rows, self.dimensions = shape
        self.row_bytes = self.dimensions * dtype.itemsize
        if path.stat().st_size < offset + self.rows * self.row_bytes:
            raise DataError(f"{name}: expected {self.rows} rows, got a file that ends before. Write it again.")

    def read(self, start: int, stop: int) -> Tensor:
        with self.path.open("rb") as file:
            file.seek(self.offset + start * self.row_bytes)
            raw = bytearray(file.read((stop - start) * self.row_bytes))
        return torch.frombuffer(raw, dtype=self.dtype).view(-1, self.dimensions).to(torch.float32)


@dataclass(frozen=True)
class Part(Vectors):
    """Rows `start` to `stop` of other vectors."""

    whole: Vectors
    start: int
    stop: int

    @property
    def name(self) -> str:  # type: ignore[override]
        return self.whole.name

    @property
    def rows(self) -> int:  # type: ignore[override]
        return self.stop - self.start

    @property
    def dimensions(self) -> int:  # type: ignore[override]
        return self.whole.dimensions

    def read(self, start: int, stop: int) -> Tensor:
        return self.whole.read(self.start + start, self.start + stop)


def open_vectors(path: str | Path, key: str | None = None) -> Vectors:
    """Vectors from a file.

    Args:
        path: .npy, .safetensors, or .pt, a matrix or a checkpoint with `embeddings` (or with a matrix in its
            `model_state`). A checkpoint is read by `torch.load(weights_only=True)`: code in it is refused.
        key: which tensor, where there are several.

    Raises:
        DataError: the file is missing, is none of these, or holds no matrix of floating-point numbers.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise DataError(f"vectors: expected a file, got {path}, which is not one.{nearest(path.name, beside)}")
    openers = {".npy": _open_npy, ".safetensors": _open_safetensors, ".pt": _open_torch, ".pth": _open_torch}
    if path.suffix.lower() not in openers:
        raise DataError(
            f"vectors: expected a file that ends in {', '.join(openers)}, got {path.name}. "
            "Save the matrix with numpy.save, or as safetensors."
        )
    try:
        return openers[path.suffix.lower()](path, key)
    except DataError:
        raise
    except Exception as error:  # each format has its own exceptions for a broken file
        said = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise DataError(
            f"vectors: expected {path.name} to be readable as {path.suffix} without running code, got: {said} "
            "Write it again, as plain tensors."
        ) from None


def _open_npy(path: Path, key: str | None) -> Vectors:
    with path.open("rb") as file:
        version = np.lib.format.read_magic(file)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, by_column, dtype = read_header(file)
        offset = file.tell()
    if by_column or dtype.byteorder == ">" or dtype.hasobject:
        raise DataError(
            f"vectors: expected rows one after the other in {path.name}, got {dtype}"
            f"{' in columns' if by_column else ''}. Save numpy.ascontiguousarray of it."
        )
    return FileMatrix(path, path.name, shape, torch.as_tensor(np.empty(0, dtype)).dtype, offset)


_SAFETENSORS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def _open_safetensors(path: Path, key: str | None) -> Vectors:
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if not 2 <= size <= min(path.stat().st_size, 10**8):
            raise DataError(f"vectors: expected safetensors in {path.name}, got something else. Write it again.")
        header = json.loads(file.read(size))
    header.pop("__metadata__", None)
    chosen = _choose(list(header), key, path)
    entry = header[chosen]
    dtype = _SAFETENSORS.get(entry["dtype"], torch.int64)
    return FileMatrix(path, f"{path.name}[{chosen}]", entry["shape"], dtype, 8 + size + entry["data_offsets"][0])


def _open_torch(path: Path, key: str | None) -> Vectors:
    content = torch.load(path, weights_only=True, mmap=True, map_location="cpu")
    if isinstance(content, Tensor):
        return Matrix(content, path.name)
    state = content.get("model_state") if isinstance(content, dict) else None
    tensors = {**(state if isinstance(state, dict) else {}), **(content if isinstance(content, dict) else {})}
    tensors = {str(name): value for name, value in tensors.items() if isinstance(value, Tensor) and value.ndim == 2}
    chosen = _choose(list(tensors), key, path)
    return Matrix(tensors[chosen], f"{path.name}[{chosen}]")


def _choose(names: list[str], key: str | None, path: Path) -> str:
    if key is not None:
        if key not in names:
            raise DataError(
                f"vectors: expected a matrix {key} in {path.name}, got {', '.join(names[:12]) or 'none'}."
                f"{nearest(key, names)}"
            )
        return key
    usual = [name for name in _KEYS if name in names] or names
    if not names or (len(usual) > 1 and usual is names):
        raise DataError(
            f"vectors: expected a matrix called embeddings in {path.name}, got {', '.join(names[:12]) or 'none'}. "
            "Name one with `key`."
        )
    return usual[0]


def _must_be_matrix(name: str, shape: Sequence[int], dtype: str, floating: bool) -> None:
    if len(shape) != 2 or not floating or not shape[1]:
        raise DataError(
            f"{name}: expected a matrix of floating-point numbers, a row a vector, got shape {list(shape)} of "
            f"{dtype.removeprefix('torch.')}."
        )


def check_vectors(vectors: Vectors, dimensions: int) -> list[str]:
    """Read all rows once, and refuse what no student can be made of.

    Args:
        vectors: the teacher's.
        dimensions: the student's.

    Returns:
        What is to be said but is no mistake.

    Raises:
        DataError: one row, fewer than the student has dimensions, not a number, a row of zeros, all rows the same, or
            a student that is not smaller.
    """
    name, rows = vectors.name, vectors.rows
    if rows < 2:
        raise DataError(f"{name}: expected at least two rows, got {rows}. Similarity needs pairs.")
    if dimensions >= vectors.dimensions:
        raise DataError(
            f"{name}: expected more than the student's {dimensions} dimensions, got {vectors.dimensions}. "
            "Choose fewer with student.dimensions."
        )
    if rows <= dimensions:
        raise DataError(
            f"{name}: expected more rows than the student's {dimensions} dimensions, got {rows}. "
            "Give more vectors, or choose fewer dimensions."
        )
    odd = np.random.default_rng(0).integers(0, 2**63, vectors.dimensions, dtype=np.uint64) | np.uint64(1)
    marks, first = [], 0
    for block in vectors.blocks():
        for bad, what in ((~block.isfinite().all(1), "a value that is not a number"), (~block.any(1), "only zeros")):
            if bad.any():
                row = first + int(bad.nonzero()[0, 0])
                raise DataError(
                    f"{name}: expected finite numbers that are not all 0 in each row, got {what} in row {row + 1} "
                    f"of {rows}. Remove the row, here and in its text."
                )
        bits = block.numpy().view(np.uint32)
        marks.append((bits * odd).sum(1, dtype=np.uint64))
        first += len(block)
    distinct = len(np.unique(np.concatenate(marks)))
    if distinct == 1:
        raise DataError(f"{name}: expected different rows, got the same {rows} times. There is nothing to learn.")
    notes = []
    if distinct < rows:
        notes.append(f"{name}: {rows - distinct:,} of {rows:,} rows repeat an earlier one; they count as often.")
    if rows < vectors.dimensions:
        notes.append(
            f"{name}: fewer rows ({rows:,}) than dimensions ({vectors.dimensions:,}): directions that no row shows "
            "cannot be learnt."
        )
    return notes
