"""From values per token to one number: the only place that divides."""

from __future__ import annotations

import torch
from torch import Tensor


def token_mean(values: Tensor, weights: Tensor | None = None, normalizer: Tensor | float | None = None) -> Tensor:
    """The weighted mean over tokens.

        sum_n w_n x_n / normalizer

    Args:
        values: [N], of the positions that count.
        weights: [N] or None for ones.
        normalizer: what to divide by: the number (or weight) of all counting tokens in the optimiser step, over
            ranks and accumulation steps. Default: the sum of the weights here, at least 1.

    Returns:
        A scalar; 0 with a gradient of 0 for N = 0.
    """
    total = (values if weights is None else values * weights).sum()
    if normalizer is None:
        normalizer = max(values.numel(), 1) if weights is None else weights.sum().clamp_min(1)
    if isinstance(normalizer, Tensor):
        normalizer = normalizer.to(total.device, torch.promote_types(total.dtype, torch.float32))
    return total / normalizer
