"""Arrays as planes of bytes, the lowest byte of every element first, and back."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from potstill.errors import ShapeError


def pack(values: NDArray[Any], planes: int | None = None) -> bytes:
    """Elements as planes of bytes, the lowest first."""
    split = values.view("u1").reshape(len(values), values.itemsize)[:, :planes]
    return np.ascontiguousarray(split.T).tobytes()


class Reader:
    """Takes arrays off a row of bytes, one after the other."""

    def __init__(self, row: bytes) -> None:
        self._bytes = np.frombuffer(row, "u1")
        self._at = 0

    def take(self, dtype: str, count: int, planes: int | None = None) -> NDArray[Any]:
        kind = np.dtype(dtype)
        planes = planes or kind.itemsize
        end = self._at + planes * count
        if end > len(self._bytes):
            raise ShapeError(f"codec: expected a row of at least {end} bytes, got {len(self._bytes)}.")
        split = self._bytes[self._at : end].reshape(planes, count)
        self._at = end
        whole = np.zeros((count, kind.itemsize), "u1")
        whole[:, :planes] = split.T
        return whole.view(kind).reshape(count)

    def take_floats(self, dtype: str, count: int) -> Tensor:
        """What `pack_floats` made of floats of a dtype of torch: [count]."""
        taken = self.take("<i4" if dtype == "float32" else "<i2", count)
        return torch.from_numpy(taken).view(getattr(torch, dtype))

    @property
    def left(self) -> int:
        """How many bytes have not been taken."""
        return len(self._bytes) - self._at

    def close(self) -> None:
        if self._at != len(self._bytes):
            raise ShapeError(f"codec: expected a row of {self._at} bytes, got {len(self._bytes)}.")


def pack_floats(values: Tensor) -> bytes:
    """Floats of any shape as planes of their bytes, by their bits, because NumPy has no bfloat16."""
    kind = torch.int32 if values.dtype == torch.float32 else torch.int16
    return pack(values.detach().cpu().contiguous().view(kind).numpy().ravel())
