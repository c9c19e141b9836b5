"""Losses as pure functions of tensors. They import torch alone and work in anyone's training loop."""

from potstill.losses.attention import (
    attention_divergence,
    attention_mse,
    head_importance,
    head_overlap,
    match_heads,
    relation_divergence,
)
from potstill.losses.hidden import (
    dimension_importance,
    hidden_cosine,
    hidden_l1,
    hidden_mse,
    linear_cka,
    select_dimensions,
)
from potstill.losses.linear import FusedLoss, linear_cross_entropy, linear_divergence
from potstill.losses.reduce import token_mean
from potstill.losses.relation import rkd_angle, rkd_distance, similarity_divergence
from potstill.losses.token import token_cross_entropy, token_divergence

__all__ = [
    "FusedLoss",
    "attention_divergence",
    "attention_mse",
    "dimension_importance",
    "head_importance",
    "head_overlap",
    "hidden_cosine",
    "hidden_l1",
    "hidden_mse",
    "linear_cka",
    "linear_cross_entropy",
    "linear_divergence",
    "match_heads",
    "relation_divergence",
    "rkd_angle",
    "rkd_distance",
    "select_dimensions",
    "similarity_divergence",
    "token_cross_entropy",
    "token_divergence",
    "token_mean",
]
