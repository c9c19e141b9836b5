"""Arrays as planes of bytes, the lowest byte of every element first, and back."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from potstill.errors import ShapeError


def pack(values: NDArray[Any], planes: int | None = None) -> bytes:
    """Pack elements as planes of bytes, the lowest first."""
    split = values.view("u1").reshape(len(values), values.itemsize)[:, :planes]
    return np.ascontiguousarray(split.T).tobytes()


def pack_floats(values: Tensor) -> bytes:
    """Pack floats of any shape by their bits, because NumPy has no bfloat16."""
    kind = torch.int32 if values.dtype == torch.float32 else torch.int16
    return pack(values.detach().cpu().contiguous().view(kind).numpy().ravel())


class Reader:
    """Reads the arrays of several rows of bytes, one after the other."""

    def __init__(self, rows: Sequence[bytes]) -> None:
        self._rows = rows
        self._offsets = [0] * len(rows)

    def take(self, dtype: str, counts: Iterable[int], planes: int | None = None) -> NDArray[Any]:
        """Read the next array of each row, of as many elements as its count, and join them."""
        kind = np.dtype(dtype)
        planes = planes or kind.itemsize
        arrays = []
        for i, (row, count) in enumerate(zip(self._rows, counts, strict=True)):
            start, end = self._offsets[i], self._offsets[i] + planes * count
            if end > len(row):
                raise ShapeError(f"codec: expected a row of at least {end} bytes, got {len(row)}.")
            elements = np.zeros((count, kind.itemsize), "u1")
            elements[:, :planes] = np.frombuffer(row, "u1")[start:end].reshape(planes, count).T
            arrays.append(elements.view(kind).reshape(count))
            self._offsets[i] = end
        return np.concatenate(arrays)

    def take_floats(self, dtype: str, counts: Iterable[int]) -> Tensor:
        """Read floats of a torch dtype that `pack_floats` packed."""
        bits = self.take("<i4" if dtype == "float32" else "<i2", counts)
        return torch.from_numpy(bits).view(getattr(torch, dtype))

    def close(self) -> None:
        """Check that every row is read to its end."""
        for row, offset in zip(self._rows, self._offsets, strict=True):
            if offset < len(row):
                raise ShapeError(f"codec: expected a row of {offset} bytes, got {len(row)}.")
