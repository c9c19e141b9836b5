"""Vectors in memory or on disk, read in blocks so that memory stays bounded for any number of rows."""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from potstill.errors import DataError, nearest, one_line

BLOCK_ROWS = 8192
_POOL_NUMBERS = 2**26  # size of the pool that batches are drawn from: 256 MB
_PIECES = 64  # from all over the file, that a pool or a sample is made of


class VectorArray(ABC):
    """N `rows` of H `dimensions`, of which some are read at a time; `name` is for errors, such as the file's name."""

    def __init__(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> None:
        if len(shape) != 2 or not dtype.is_floating_point or not shape[1]:
            got = f"shape {list(shape)} of {str(dtype).removeprefix('torch.')}"
            raise DataError(f"{name}: expected a matrix of floating-point numbers, a row a vector, got {got}.")
        self.name, (self.rows, self.dimensions) = name, shape

    @abstractmethod
    def read(self, start: int, stop: int) -> Tensor:
        """Copy rows into a tensor [stop - start, H], float32."""

    def sample_spans(self, max_rows: int) -> list[tuple[int, int]]:
        """Choose at most `max_rows` rows, in up to 64 evenly spaced pieces: (first row, row behind the last)."""
        if self.rows <= max_rows:
            return [(0, self.rows)]
        pieces = min(_PIECES, max_rows)
        length = max_rows // pieces
        starts = [i * (self.rows - length) // max(pieces - 1, 1) for i in range(pieces)]
        return [(start, start + length) for start in starts]

    def sample(self, max_rows: int) -> Tensor:
        """Read the rows of `sample_spans`."""
        return torch.cat([self.read(start, stop) for start, stop in self.sample_spans(max_rows)])

    def sample_blocks(self, max_rows: int) -> Iterator[tuple[int, int]]:
        """Cut `sample_spans` into blocks of few rows."""
        for start, stop in self.sample_spans(max_rows):
            for first in range(start, stop, BLOCK_ROWS):
                yield first, min(first + BLOCK_ROWS, stop)

    def blocks(self) -> Iterator[Tensor]:
        for start, stop in self.sample_blocks(self.rows):
            yield self.read(start, stop)

    def batches(self, size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Read all rows once in random order: (row numbers [B], vectors [B, H]).

        Rows are drawn from a pool of pieces from all over the file; a pool that holds all rows is a plain shuffle. Rows
        left over at the end of a pool go into the next one. A last batch of a single row is dropped: it has no pair.
        """
        generator = torch.Generator().manual_seed(seed)
        pool = max(_POOL_NUMBERS // self.dimensions, size)
        piece = max(pool // _PIECES, 1) if pool < self.rows else self.rows
        starts = torch.arange(0, self.rows, piece)[torch.randperm(math.ceil(self.rows / piece), generator=generator)]
        numbers, vectors = torch.empty(0, dtype=torch.long), torch.empty(0, self.dimensions)
        for first in range(0, len(starts), _PIECES):
            spans = [(start, min(start + piece, self.rows)) for start in starts[first : first + _PIECES].tolist()]
            numbers = torch.cat([numbers, *(torch.arange(*span) for span in spans)])
            vectors = torch.cat([vectors, *(self.read(*span) for span in spans)])
            order = torch.randperm(len(numbers), generator=generator)
            full = len(order) - len(order) % size
            for begin in range(0, full, size):
                chosen = order[begin : begin + size]
                yield numbers[chosen], vectors[chosen]
            numbers, vectors = numbers[order[full:]], vectors[order[full:]]
        if len(numbers) > 1:
            yield numbers, vectors


class TensorVectors(VectorArray):
    def __init__(self, values: Any, name: str = "vectors") -> None:
        self.tensor = torch.as_tensor(values)
        super().__init__(name, self.tensor.shape, self.tensor.dtype)

    def read(self, start: int, stop: int) -> Tensor:
        return self.tensor[start:stop].to(torch.float32, copy=True)


class FileVectors(VectorArray):
    """Vectors in a file, row after row. They are not mapped: a mapped file counts as memory in use."""

    def __init__(self, path: Path, name: str, shape: Sequence[int], dtype: torch.dtype, offset: int) -> None:
        super().__init__(name, shape, dtype)
        self.path, self.dtype, self.offset = path, dtype, offset
        self.row_bytes = self.dimensions * dtype.itemsize
        if path.stat().st_size < offset + self.rows * self.row_bytes:
            raise DataError(f"{name}: expected {self.rows} rows, got a file that ends earlier. Write it again.")

    def read(self, start: int, stop: int) -> Tensor:
        begin, length = self.offset + start * self.row_bytes, (stop - start) * self.row_bytes
        raw = torch.from_numpy(np.fromfile(self.path, np.uint8, length, offset=begin))
        return raw.view(self.dtype).view(-1, self.dimensions).to(torch.float32)


class VectorSlice(VectorArray):
    def __init__(self, vectors: VectorArray, start: int, stop: int) -> None:
        super().__init__(vectors.name, (stop - start, vectors.dimensions), torch.float32)
        self.vectors, self.start = vectors, start

    def read(self, start: int, stop: int) -> Tensor:
        return self.vectors.read(self.start + start, self.start + stop)


def as_vector_array(vectors: Any) -> VectorArray:
    return vectors if isinstance(vectors, VectorArray) else TensorVectors(vectors)


def open_vectors(path: str | Path, key: str | None = None) -> VectorArray:
    """Open a file of vectors: .npy, .safetensors or .pt; `key` is which tensor, if there are several.

    A .pt holds a matrix, or is a checkpoint with `embeddings` (or with a matrix in its `model_state`), which is read by
    `torch.load(weights_only=True)`: code in it is refused. Raises `DataError` if there is no such matrix.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise DataError(f"vectors: expected a file, got {path}, which is not one.{nearest(path.name, siblings)}")
    openers = {".npy": _open_npy, ".safetensors": _open_safetensors, ".pt": _open_torch, ".pth": _open_torch}
    suffix = path.suffix.lower()
    if suffix not in openers:
        hint = "Save the matrix with numpy.save, or as safetensors."
        raise DataError(f"vectors: expected a file that ends in {', '.join(openers)}, got {path.name}. {hint}")
    try:
        return openers[suffix](path, key)
    except DataError:
        raise
    except Exception as error:  # each format has its own exceptions for a broken file
        expected = f"{path.name} to be readable as {suffix} without running code"
        got = one_line(error, 200) or type(error).__name__
        raise DataError(f"vectors: expected {expected}, got: {got} Write it again, as plain tensors.") from None


def _open_npy(path: Path, key: str | None) -> VectorArray:
    array = np.lib.format.open_memmap(path, mode="r")  # reads the header alone
    by_row = array.flags.c_contiguous
    if not by_row or not array.dtype.isnative:
        expected = f"the rows of {path.name} one after the other in native byte order"
        got = f"{array.dtype}{'' if by_row else ' in columns'}"
        raise DataError(f"vectors: expected {expected}, got {got}. Save numpy.ascontiguousarray of it.")
    dtype = torch.from_numpy(np.empty(0, array.dtype)).dtype
    return FileVectors(path, path.name, array.shape, dtype, array.offset)


def _open_safetensors(path: Path, key: str | None) -> VectorArray:
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(min(header_bytes, 10**8)))
    header.pop("__metadata__", None)
    chosen = _choose(list(header), key, path)
    entry = header[chosen]
    dtypes = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    offset = 8 + header_bytes + entry["data_offsets"][0]
    return FileVectors(path, f"{path.name}[{chosen}]", entry["shape"], dtypes.get(entry["dtype"], torch.int64), offset)


def _open_torch(path: Path, key: str | None) -> VectorArray:
    content = torch.load(path, weights_only=True, mmap=True, map_location="cpu")
    if isinstance(content, Tensor):
        return TensorVectors(content, path.name)
    content = content if isinstance(content, dict) else {}
    state = content.get("model_state")
    named = state | content if isinstance(state, dict) else content
    matrices = {str(name): value for name, value in named.items() if isinstance(value, Tensor) and value.ndim == 2}
    chosen = _choose(list(matrices), key, path)
    return TensorVectors(matrices[chosen], f"{path.name}[{chosen}]")


def _choose(names: list[str], key: str | None, path: Path) -> str:
    usual = ("embeddings", "vectors", "X", *(names if len(names) == 1 else ()))
    for name in usual if key is None else (key,):
        if name in names:
            return name
    hint = " Name one with `key`." if key is None else nearest(key, names)
    got = ", ".join(names[:12]) or "none"
    raise DataError(f"vectors: expected a matrix {key or 'called embeddings'} in {path.name}, got {got}.{hint}")


def check_vectors(vectors: VectorArray, dimensions: int) -> list[str]:
    """Refuse vectors that a student cannot be trained on; return notes about repeated and too few rows."""
    name, rows = vectors.name, vectors.rows
    if rows < 2:
        raise DataError(f"{name}: expected at least two rows, got {rows}. Similarity needs pairs.")
    student = f"the student's {dimensions} dimensions"
    if dimensions >= vectors.dimensions:
        hint = "Choose fewer with student.dimensions."
        raise DataError(f"{name}: expected more than {student}, got {vectors.dimensions}. {hint}")
    if rows <= dimensions:
        hint = "Give more vectors, or choose fewer dimensions."
        raise DataError(f"{name}: expected more rows than {student}, got {rows}. {hint}")
    factors = np.random.default_rng(0).integers(0, 2**63, vectors.dimensions, dtype=np.uint64) | np.uint64(1)
    hashes: list[np.ndarray] = []
    for number, block in enumerate(vectors.blocks()):
        for bad, problem in ((~block.isfinite().all(1), "a NaN or infinite value"), (~block.any(1), "only zeros")):
            if bad.any():
                got = f"{problem} in row {number * BLOCK_ROWS + int(bad.nonzero()[0, 0]) + 1} of {rows}"
                expected = "finite numbers that are not all 0 in each row"
                raise DataError(f"{name}: expected {expected}, got {got}. Remove the row, here and in its text.")
        hashes.append((block.numpy().view(np.uint32) * factors).sum(1, dtype=np.uint64))
    distinct = len(np.unique(np.concatenate(hashes)))
    if distinct == 1:
        raise DataError(f"{name}: expected different rows, got the same {rows} times. There is nothing to learn.")
    notes, counts = [], f"rows ({rows:,}) than dimensions ({vectors.dimensions:,})"
    if distinct < rows:
        notes.append(f"{name}: {rows - distinct:,} of {rows:,} rows repeat an earlier one; each copy is used.")
    if rows < vectors.dimensions:
        notes.append(f"{name}: fewer {counts}: directions that no row has cannot be learnt.")
    return notes
