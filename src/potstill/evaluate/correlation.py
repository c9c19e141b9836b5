"""Pearson's and Spearman's correlation."""

from __future__ import annotations

import torch
from torch import Tensor


def ranks(values: Tensor) -> Tensor:
    """The ranks of [N] values from 0, float64; equal values share their mean rank."""
    _, position, count = torch.unique(values, return_inverse=True, return_counts=True)
    last = count.cumsum(0).double()
    return (last - (count.double() + 1) / 2)[position]


def pearson(x: Tensor, y: Tensor) -> float:
    """Pearson's correlation; of ranks it is Spearman's. 0 if one of them is constant."""
    x, y = x - x.mean(), y - y.mean()
    lengths = x.norm() * y.norm()
    return float(x @ y / lengths) if lengths > 0 else 0.0
