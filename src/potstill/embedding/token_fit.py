"""Vectors of tokens that are fitted to texts: a map for all tokens, a weight of each token, a change of each vector."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, normalize

from potstill.embedding.static import TokenTable, spread_tokens, text_tokenizer, token_ids
from potstill.embedding.vectors import as_vector_array

FIT_TEXTS = 200_000  # at most, from all over the texts
# Strengths of the pull towards the start, relative to the mean diagonal of the least squares. Chosen on dev data, as
# docs/benchmarks.md says. A token that is rare in the texts is pulled more strongly, and one that they lack stays.
MAP_RIDGE = 1e-2
WEIGHT_RIDGE = 1.0
CHANGE_RIDGE = 1.0
_STEPS = 15  # of conjugate gradients: later ones change the figures by less than 0.001


class TextBlock(NamedTuple):
    """Which tokens m texts have, and which of these texts have each of the P tokens that are in them."""

    tokens: Tensor  # rows of all texts, one text after the other
    text_starts: Tensor  # [m]
    present: Tensor  # [P], rows of tokens
    texts: Tensor  # of all present tokens, one token after the other
    token_starts: Tensor  # [P]

    @classmethod
    def of(cls, rows: Tensor, lengths: Tensor) -> Self:
        """Describe texts whose tokens `rows` has one text after the other; those below 0 are left out."""
        text = torch.arange(len(lengths)).repeat_interleave(lengths)[rows >= 0]
        present, place = rows[rows >= 0].unique(return_inverse=True)
        starts = _starts(text, len(lengths)), _starts(place, len(present))
        described = rows[rows >= 0], starts[0], present, text[place.argsort(stable=True)], starts[1]
        return cls(*(part.int() for part in described))

    def sum_tokens(self, rows: Tensor) -> Tensor:
        """Sum rows of tokens, [N, d], over the tokens of each text: [m, d]."""
        return embedding_bag(self.tokens, rows, self.text_starts, mode="sum")

    def add_texts(self, sums: Tensor, rows: Tensor) -> None:
        """Add to each token's row of `sums`, [N, d], the rows of the texts that have it, [m, d]."""
        sums.index_add_(0, self.present, embedding_bag(self.texts, rows, self.token_starts, mode="sum"))


def _starts(groups: Tensor, number: int) -> Tensor:
    counts = torch.bincount(groups, minlength=number)
    return counts.cumsum(0) - counts


class FitTexts:
    """At most `FIT_TEXTS` texts in blocks: their tokens are in memory, the teacher's vectors are read when needed."""

    def __init__(self, tokens: TokenTable, texts: Sequence[str], vectors: Any) -> None:
        self._vectors = as_vector_array(vectors)
        self._spans = [*self._vectors.sample_blocks(FIT_TEXTS)]
        whole = text_tokenizer(tokens.tokenizer)
        row = torch.full((tokens.size,), -1).scatter_(0, tokens.ids, torch.arange(len(tokens.ids)))
        self.blocks = list[TextBlock]()
        total = torch.zeros(self._vectors.dimensions, dtype=torch.float64)
        for start, stop in self._spans:
            ids, lengths = token_ids(whole, texts[start:stop])
            self.blocks.append(TextBlock.of(row[ids], lengths))
            total += normalize(self._vectors.read(start, stop), dim=-1).sum(0)
        self._mean = (total / sum(stop - start for start, stop in self._spans)).float()

    def targets(self) -> Iterator[tuple[TextBlock, Tensor]]:
        """Give each block with the centred unit vectors of its texts, [m, H]."""
        for block, span in zip(self.blocks, self._spans, strict=True):
            yield block, normalize(normalize(self._vectors.read(*span), dim=-1) - self._mean, dim=-1)


def fit_tokens(tokens: TokenTable, texts: Sequence[str], vectors: Any) -> Tensor:
    """Fit vectors of tokens, [N, H], so that the means of texts come near the teacher's vectors of them, [M, H].

    Three ridge regressions onto the centred unit vectors of the texts, each pulled towards where it starts: one linear
    map of all tokens, so that those which the texts lack learn with the others; a weight for each token; and, after the
    map once more, a change of each token's vector. `vectors` is a tensor or a `VectorArray`, of which blocks are read.
    """
    fitted, x = FitTexts(tokens, texts, vectors), spread_tokens(tokens).float()
    x = x * _fit_weights(fitted, _map(fitted, x))[:, None]
    x = _map(fitted, x)
    return x + _fit_changes(fitted, x)


def _map(texts: FitTexts, x: Tensor) -> Tensor:
    identity = torch.eye(x.shape[1], dtype=torch.float64)
    gram, right = torch.zeros_like(identity), torch.zeros_like(identity)
    for block, target in texts.targets():
        means = normalize(block.sum_tokens(x), dim=-1).double()
        gram += means.T @ means
        right += means.T @ (target.double() - means)
    ridge = MAP_RIDGE * gram.trace().clamp_min(1e-6) / len(gram) * identity
    return (x.double() @ (identity + torch.linalg.solve(gram + ridge, right))).float()


class _LeastSquares:
    """Least squares of rows of tokens whose sums, which are unit vectors for rows `x`, are to be the targets."""

    def __init__(self, texts: FitTexts, x: Tensor) -> None:
        self._parts = list[tuple[TextBlock, Tensor]]()
        self.diagonal, self.right = x.new_zeros(len(x), 1), torch.zeros_like(x)  # [N, 1]; [N, H], of the residual
        for block, target in texts.targets():
            sums = block.sum_tokens(x)
            norms = sums.norm(dim=1, keepdim=True)
            scales = torch.where(norms > 0, 1 / norms.clamp_min(1e-12), 0.0)  # [m, 1]; 0 for a text without tokens
            block.add_texts(self.diagonal, scales.square())
            block.add_texts(self.right, scales * (target - scales * sums))
            self._parts.append((block, scales.square()))

    def multiply(self, rows: Tensor) -> Tensor:
        """Multiply rows of tokens, [N, H], by the matrix of the normal equations."""
        product = torch.zeros_like(rows)
        for block, squares in self._parts:
            block.add_texts(product, squares * block.sum_tokens(rows))
        return product


def _fit_weights(texts: FitTexts, x: Tensor) -> Tensor:
    """Fit a factor >= 0 of each row of `x`, [N], which is pulled towards 1."""
    squares = _LeastSquares(texts, x)
    diagonal = squares.diagonal[:, 0] * x.square().sum(1)
    ridge = WEIGHT_RIDGE * diagonal.sum() / (diagonal > 0).sum().clamp_min(1)
    change = _solve(
        lambda weights: (squares.multiply(weights[:, None] * x) * x).sum(1) + ridge * weights,
        (squares.right * x).sum(1),
    )
    return (1 + change).clamp_min(0)


def _fit_changes(texts: FitTexts, x: Tensor) -> Tensor:
    """Fit what is added to each row of `x`, [N, H], which is pulled towards 0."""
    squares = _LeastSquares(texts, x)
    ridge = CHANGE_RIDGE * squares.diagonal.sum() / (squares.diagonal > 0).sum().clamp_min(1)
    return _solve(lambda rows: squares.multiply(rows) + ridge * rows, squares.right)


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
