"""Vectors of tokens that are fitted to texts: a map for all tokens, a weight of each token, a change of each vector."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Self

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, normalize

from potstill.embedding.static import TokenTable, spread_tokens, token_ids

# Strengths of the pull towards the start, relative to the mean diagonal of the least squares. Chosen on dev data, as
# docs/benchmarks.md says. A token that is rare in the texts is pulled more strongly, and one that they lack stays.
MAP_RIDGE = 1e-2
WEIGHT_RIDGE = 1.0
CHANGE_RIDGE = 1.0
_STEPS = 15  # of conjugate gradients: later ones change the figures by less than 0.001


class TokenTexts(NamedTuple):
    """Which tokens M texts have, and which texts have each of N tokens."""

    tokens: Tensor  # rows of all texts, one text after the other
    text_starts: Tensor  # [M]
    texts: Tensor  # of all tokens, one token after the other
    token_starts: Tensor  # [N]

    @classmethod
    def of(cls, tokens: TokenTable, texts: Sequence[str]) -> Self:
        """Split texts into tokens; those that the table lacks are left out."""
        ids, lengths = token_ids(tokens.tokenizer, texts)
        row = torch.full((tokens.size,), -1).scatter_(0, tokens.ids, torch.arange(len(tokens.ids)))[ids]
        text = torch.arange(len(texts)).repeat_interleave(lengths)[row >= 0]
        row = row[row >= 0]
        return cls(row, _starts(text, len(texts)), text[row.argsort(stable=True)], _starts(row, len(tokens.ids)))

    def sum_tokens(self, rows: Tensor) -> Tensor:
        """Sum rows of tokens, [N, d], over the tokens of each text: [M, d]."""
        return embedding_bag(self.tokens, rows, self.text_starts, mode="sum")

    def sum_texts(self, rows: Tensor) -> Tensor:
        """Sum rows of texts, [M, d], over the texts of each token: [N, d]."""
        return embedding_bag(self.texts, rows, self.token_starts, mode="sum")


def _starts(groups: Tensor, number: int) -> Tensor:
    counts = torch.bincount(groups, minlength=number)
    return counts.cumsum(0) - counts


def fit_tokens(tokens: TokenTable, texts: Sequence[str], vectors: Tensor) -> Tensor:
    """Fit vectors of tokens, [N, H], so that the means of texts come near the teacher's vectors of them, [M, H].

    Three ridge regressions onto the centred unit vectors of the texts, each pulled towards where it starts: one linear
    map of all tokens, so that those which the texts lack learn with the others; a weight for each token; and, after the
    map once more, a change of each token's vector.
    """
    unit = normalize(vectors.float(), dim=-1)
    target = normalize(unit - unit.mean(0), dim=-1)
    bags, x = TokenTexts.of(tokens, texts), spread_tokens(tokens).float()
    weights = _fit_weights(bags, _map(bags, x, target), target)
    x = _map(bags, x * weights[:, None], target)
    return x + _fit_changes(bags, x, target)


def _text_scales(bags: TokenTexts, x: Tensor) -> Tensor:
    """Compute the factors [M, 1] by which the sums of texts become unit vectors; 0 for a text without tokens."""
    norms = bags.sum_tokens(x).norm(dim=1, keepdim=True)
    return torch.where(norms > 0, 1 / norms.clamp_min(1e-12), 0.0)


def _map(bags: TokenTexts, x: Tensor, target: Tensor) -> Tensor:
    means = normalize(bags.sum_tokens(x), dim=-1).double()
    gram, identity = means.T @ means, torch.eye(x.shape[1], dtype=torch.float64)
    ridge = MAP_RIDGE * gram.trace().clamp_min(1e-6) / len(gram) * identity
    change = torch.linalg.solve(gram + ridge, means.T @ (target.double() - means))
    return (x.double() @ (identity + change)).float()


def _fit_weights(bags: TokenTexts, x: Tensor, target: Tensor) -> Tensor:
    """Fit a factor >= 0 of each row of `x`, [N], which is pulled towards 1."""
    scales = _text_scales(bags, x)
    diagonal = bags.sum_texts(scales.square())[:, 0] * x.square().sum(1)
    ridge = WEIGHT_RIDGE * diagonal.sum() / (diagonal > 0).sum().clamp_min(1)

    def project(texts: Tensor) -> Tensor:
        return (bags.sum_texts(scales * texts) * x).sum(1)

    change = _solve(
        lambda weights: project(scales * bags.sum_tokens(weights[:, None] * x)) + ridge * weights,
        project(target - scales * bags.sum_tokens(x)),
    )
    return (1 + change).clamp_min(0)


def _fit_changes(bags: TokenTexts, x: Tensor, target: Tensor) -> Tensor:
    """Fit what is added to each row of `x`, [N, H], which is pulled towards 0."""
    scales = _text_scales(bags, x)
    diagonal = bags.sum_texts(scales.square())[:, 0]
    ridge = CHANGE_RIDGE * diagonal.sum() / (diagonal > 0).sum().clamp_min(1)
    return _solve(
        lambda rows: bags.sum_texts(scales.square() * bags.sum_tokens(rows)) + ridge * rows,
        bags.sum_texts(scales * (target - scales * bags.sum_tokens(x))),
    )


def _solve(multiply: Callable[[Tensor], Tensor], right: Tensor) -> Tensor:
    """Solve multiply(x) = right for a positive definite matrix, by some steps of conjugate gradients from 0."""
    x, residual, direction = torch.zeros_like(right), right, right
    square = (residual * residual).sum()
    for _ in range(_STEPS):
        product = multiply(direction)
        step = square / (direction * product).sum().clamp_min(torch.finfo(right.dtype).tiny)
        x, residual = x + step * direction, residual - step * product
        previous, square = square, (residual * residual).sum()
        direction = residual + square / previous.clamp_min(torch.finfo(right.dtype).tiny) * direction
    return x
