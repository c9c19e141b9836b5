"""Losses as pure functions of tensors. They import torch alone and work in anyone's training loop."""

from potstill.losses.linear import FusedLoss, linear_cross_entropy, linear_divergence
from potstill.losses.reduce import token_mean
from potstill.losses.token import token_cross_entropy, token_divergence

__all__ = [
    "FusedLoss",
    "linear_cross_entropy",
    "linear_divergence",
    "token_cross_entropy",
    "token_divergence",
    "token_mean",
]
