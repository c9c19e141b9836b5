"""Correlation of two series, and of their ranks."""

from __future__ import annotations

import torch
from torch import Tensor


def ranks(values: Tensor) -> Tensor:
    """Compute the ranks of [N] values from 0, float64; ties share their mean rank."""
    _, index, count = torch.unique(values, return_inverse=True, return_counts=True)
    last = count.cumsum(0).double()
    return (last - (count.double() + 1) / 2)[index]


def pearson(x: Tensor, y: Tensor) -> float:
    """Compute Pearson's correlation (of ranks: Spearman's); 0 if x or y is constant."""
    x, y = x - x.mean(), y - y.mean()
    norms = x.norm() * y.norm()
    return float(x @ y / norms) if norms > 0 else 0.0
