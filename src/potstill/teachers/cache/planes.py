"""Arrays as planes of bytes, the lowest byte of every element first, and back."""

from __future__ import annotations

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
    """Reads arrays from a row of bytes, one after the other."""

    def __init__(self, row: bytes) -> None:
        self._bytes = np.frombuffer(row, "u1")
        self._offset = 0

    def take(self, dtype: str, count: int, planes: int | None = None) -> NDArray[Any]:
        kind = np.dtype(dtype)
        planes = planes or kind.itemsize
        end = self._offset + planes * count
        if end > len(self._bytes):
            raise ShapeError(f"codec: expected a row of at least {end} bytes, got {len(self._bytes)}.")
        split = self._bytes[self._offset : end].reshape(planes, count)
        self._offset = end
        elements = np.zeros((count, kind.itemsize), "u1")
        elements[:, :planes] = split.T
        return elements.view(kind).reshape(count)

    def take_floats(self, dtype: str, count: int) -> Tensor:
        """Read floats of a torch dtype that `pack_floats` packed: [count]."""
        bits = self.take("<i4" if dtype == "float32" else "<i2", count)
        return torch.from_numpy(bits).view(getattr(torch, dtype))

    @property
    def left(self) -> int:
        """Number of unread bytes."""
        return len(self._bytes) - self._offset

    def close(self) -> None:
        if self.left:
            raise ShapeError(f"codec: expected a row of {self._offset} bytes, got {len(self._bytes)}.")
