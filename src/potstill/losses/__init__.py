"""Losses as pure functions of tensors. They import torch alone and work in anyone's training loop."""

from potstill.losses.adaptive import adaptive_kl, interpolated_logits
from potstill.losses.attention import (
    attention_divergence,
    attention_mse,
    head_importance,
    head_overlap,
    match_heads,
    relation_divergence,
)
from potstill.losses.bild import bild
from potstill.losses.chunk import boundary_bias, chunk_divergence, chunk_log_probs, sorted_distance
from potstill.losses.embedding import (
    embedding_divergence,
    matryoshka,
    pair_correlation,
    rank_error,
    reconstruction_error,
    similarity_error,
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
from potstill.losses.relation import rkd_angle, rkd_distance
from potstill.losses.teacher_weights import teacher_confidence, teacher_entropy, top_share, top_tokens
from potstill.losses.token import label_loss, token_cross_entropy, token_divergence

__all__ = [
    "FusedLoss",
    "adaptive_kl",
    "attention_divergence",
    "attention_mse",
    "bild",
    "boundary_bias",
    "chunk_divergence",
    "chunk_log_probs",
    "dimension_importance",
    "embedding_divergence",
    "head_importance",
    "head_overlap",
    "hidden_cosine",
    "hidden_l1",
    "hidden_mse",
    "interpolated_logits",
    "label_loss",
    "linear_cka",
    "linear_cross_entropy",
    "linear_divergence",
    "match_heads",
    "matryoshka",
    "pair_correlation",
    "rank_error",
    "reconstruction_error",
    "relation_divergence",
    "rkd_angle",
    "rkd_distance",
    "select_dimensions",
    "similarity_error",
    "sorted_distance",
    "teacher_confidence",
    "teacher_entropy",
    "token_cross_entropy",
    "token_divergence",
    "token_mean",
    "top_share",
    "top_tokens",
]
