"""What a teacher says at every position, and which positions count.

A teacher and a student meet only here: any teacher gives Targets over N counting positions, any loss takes them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from potstill.errors import ShapeError, VocabularyError

IGNORE = -100  # a label that does not count, as everywhere in PyTorch


@dataclass(frozen=True)
class LMHead:
    """The last linear layer of a language model, with what real models put around it.

        logits = softcap * tanh(z / softcap),   z = logit_scale * (hidden @ weight.T + bias)

    Args:
        weight: [V, H].
        bias: [V] or None.
        logit_scale: a factor on the logits (Cohere, Granite: 1 / logits_scaling).
        softcap: the bound of Gemma 2's final soft cap, or None.

    Raises:
        ShapeError: weight and bias do not fit together, or softcap is not positive.
    """

    weight: Tensor
    bias: Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None

    def __post_init__(self) -> None:
        if self.weight.ndim != 2:
            raise ShapeError(f"LMHead: expected weight of shape [V, H], got {list(self.weight.shape)}.")
        if self.bias is not None and self.bias.shape != self.weight.shape[:1]:
            raise ShapeError(f"LMHead: expected bias of shape [{self.vocabulary}], got {list(self.bias.shape)}.")
        if self.softcap is not None and self.softcap <= 0:
            raise ShapeError(f"LMHead: expected softcap > 0 or None, got {self.softcap}.")

    @property
    def vocabulary(self) -> int:
        """V, the number of rows."""
        return self.weight.shape[0]

    def slice(self, size: int) -> LMHead:
        """The head over the first `size` tokens, without a copy: for vocabularies padded with unused rows.

        Raises:
            VocabularyError: there are fewer rows than that.
        """
        if not 0 < size <= self.vocabulary:
            raise VocabularyError(f"LMHead.slice: expected a size in 1..{self.vocabulary}, got {size}.")
        bias = None if self.bias is None else self.bias[:size]
        return LMHead(self.weight[:size], bias, self.logit_scale, self.softcap)

    def logits(self, hidden: Tensor) -> Tensor:
        """The logits [..., V] of hidden states [..., H]."""
        if hidden.shape[-1] != self.weight.shape[1]:
            raise ShapeError(f"LMHead: expected hidden of width {self.weight.shape[1]}, got {hidden.shape[-1]}.")
        logits = torch.nn.functional.linear(hidden, self.weight, self.bias)
        if self.logit_scale != 1.0:
            logits = logits * self.logit_scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits


@dataclass(frozen=True)
class DenseTargets:
    """The teacher's logits over the whole vocabulary.

    Args:
        logits: [..., V], any float dtype; -inf rules a token out.
    """

    logits: Tensor

    @property
    def vocabulary(self) -> int:
        """V."""
        return self.logits.shape[-1]

    def dense(self) -> Tensor:
        """The logits [..., V]."""
        return self.logits

    def slice(self, size: int) -> DenseTargets:
        """The targets over the first `size` tokens; see `LMHead.slice`."""
        if not 0 < size <= self.vocabulary:
            raise VocabularyError(f"DenseTargets.slice: expected a size in 1..{self.vocabulary}, got {size}.")
        return DenseTargets(self.logits[..., :size])


@dataclass(frozen=True)
class HeadTargets:
    """The teacher's last hidden states and its head: the logits are made where and when they are needed.

    Args:
        hidden: [..., Ht], of the teacher's own width.
        head: the teacher's head, over the student's vocabulary.
    """

    hidden: Tensor
    head: LMHead

    @property
    def vocabulary(self) -> int:
        """V."""
        return self.head.vocabulary

    def dense(self) -> Tensor:
        """The logits [..., V]."""
        return self.head.logits(self.hidden)

    def slice(self, size: int) -> HeadTargets:
        """The targets over the first `size` tokens; see `LMHead.slice`."""
        return HeadTargets(self.hidden, self.head.slice(size))


Targets = DenseTargets | HeadTargets


@dataclass(frozen=True)
class Alignment:
    """The positions of a batch whose prediction counts, and what should have been predicted there.

    Args:
        positions: [N] into the flattened [B * T].
        labels: [N] token ids.
        length: T.
    """

    positions: Tensor
    labels: Tensor
    length: int

    def __len__(self) -> int:
        return self.positions.shape[0]

    def select(self, states: Tensor) -> Tensor:
        """The rows [N, ...] of states [B, T, ...] at the counting positions."""
        return states.flatten(0, 1).index_select(0, self.positions.to(states.device))

    @property
    def column(self) -> Tensor:
        """[N] the place of each position in its row, 0 to T - 1."""
        return self.positions % self.length


def counting(labels: Tensor) -> Tensor:
    """Which positions of a causal model count: t does when the label at t + 1 is not -100.

    This is the only place that knows the causal shift.

    Args:
        labels: [B, T], -100 where a token does not count. Not shifted: labels[t] is the token at t.

    Returns:
        [B, T - 1] bool, for positions 0 to T - 2.
    """
    return labels[:, 1:] != IGNORE


def causal_alignment(labels: Tensor) -> Alignment:
    """The counting positions of a batch of unshifted labels [B, T]; see `counting`."""
    rows, columns = counting(labels).nonzero(as_tuple=True)
    return Alignment(rows * labels.shape[1] + columns, labels[rows, columns + 1], labels.shape[1])
