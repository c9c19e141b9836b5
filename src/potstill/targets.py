"""What a teacher says at every position, and which positions count.

A teacher and a student meet only here: any teacher gives Targets over N counting positions, any loss takes them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from potstill.divergence import LOG_ZERO
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
        size: how many of the first rows are real tokens, where padding follows them; None for all. The rows behind
            them are never multiplied, and their gradient is 0.

    Raises:
        ShapeError: weight and bias do not fit together, or softcap is not positive.
    """

    weight: Tensor
    bias: Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None
    size: int | None = None

    def __post_init__(self) -> None:
        if self.weight.ndim != 2:
            raise ShapeError(f"LMHead: expected weight of shape [V, H], got {list(self.weight.shape)}.")
        rows = self.weight.shape[0]
        if self.bias is not None and self.bias.shape != (rows,):
            raise ShapeError(f"LMHead: expected bias of shape [{rows}], got {list(self.bias.shape)}.")
        if self.softcap is not None and self.softcap <= 0:
            raise ShapeError(f"LMHead: expected softcap > 0 or None, got {self.softcap}.")

    @property
    def vocabulary(self) -> int:
        """V, the number of tokens: rows of the weight without the padding behind them."""
        return self.weight.shape[0] if self.size is None else self.size

    def slice(self, size: int) -> LMHead:
        """The head over the first `size` tokens, without a copy: for vocabularies padded with unused rows.

        Raises:
            VocabularyError: there are fewer rows than that.
        """
        if not 0 < size <= self.vocabulary:
            raise VocabularyError(f"LMHead.slice: expected a size in 1..{self.vocabulary}, got {size}.")
        return replace(self, size=size)

    def logits(self, hidden: Tensor) -> Tensor:
        """The logits [..., V] of hidden states [..., H]."""
        if hidden.shape[-1] != self.weight.shape[1]:
            raise ShapeError(f"LMHead: expected hidden of width {self.weight.shape[1]}, got {hidden.shape[-1]}.")
        dtype = torch.promote_types(hidden.dtype, self.weight.dtype)
        weight = self.weight[: self.vocabulary].to(dtype)
        bias = None if self.bias is None else self.bias[: self.vocabulary].to(dtype)
        logits = torch.nn.functional.linear(hidden.to(dtype), weight, bias)
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

    @property
    def leading(self) -> torch.Size:
        """The shape without V."""
        return self.logits.shape[:-1]

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

    @property
    def leading(self) -> torch.Size:
        """The shape without V."""
        return self.hidden.shape[:-1]

    def dense(self) -> Tensor:
        """The logits [..., V]."""
        return self.head.logits(self.hidden)

    def slice(self, size: int) -> HeadTargets:
        """The targets over the first `size` tokens; see `LMHead.slice`."""
        return HeadTargets(self.hidden, self.head.slice(size))


@dataclass(frozen=True)
class SparseTargets:
    """K of the teacher's probabilities at every position, and one event for all other tokens: K + 1 events.

    kind says what log_probs are and what is left for the other tokens:
        bucket: the teacher's own, of its likeliest tokens; the others have what is missing to 1. The divergence is
            the dense one at K = V, and below it at a smaller K (alpha-beta divergences may be above).
        sampled: log(count / draws) of draws from the teacher; the others have 0. Unbiased for divergences that are
            linear in the teacher (forward KL, soft cross-entropy), and refused for all else.
        renormalized: any; they are divided by their sum, the others have 0. Biased: the student is taught to give
            those nothing.

    Args:
        ids: [..., K] token ids, all different within a position.
        log_probs: [..., K] at `temperature`, nats; -inf in slots that are not used, whose id does not matter.
        kind: see above.
        temperature: the softmax temperature they were taken at. A bucket or a sample holds for it alone, because
            nobody knows its rest at another one; "renormalized" can be re-tempered.

    Raises:
        ShapeError: the shapes differ, or there is no such kind or temperature.

    References:
        Anshumann et al. 2025 (random sampling distillation), arXiv 2503.16870, for "sampled".
    """

    ids: Tensor
    log_probs: Tensor
    kind: Literal["bucket", "sampled", "renormalized"] = "bucket"
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.ids.shape != self.log_probs.shape or not self.ids.ndim or not self.ids.shape[-1]:
            raise ShapeError(
                "SparseTargets: expected ids and log_probs of one shape [..., K], "
                f"got {list(self.ids.shape)} and {list(self.log_probs.shape)}."
            )
        if self.kind not in ("bucket", "sampled", "renormalized"):
            raise ShapeError(f"SparseTargets: expected kind bucket, sampled or renormalized, got {self.kind!r}.")
        if not 0 < self.temperature < math.inf:
            raise ShapeError(f"SparseTargets: expected temperature > 0, got {self.temperature}.")

    @property
    def leading(self) -> torch.Size:
        """The shape without K."""
        return self.ids.shape[:-1]

    def used(self) -> Tensor:
        """[..., K] bool: the slots that hold a token."""
        return self.log_probs > -math.inf

    def events(self, temperature: float) -> Tensor:
        """The log-probabilities [..., K + 1] of the K tokens and of all others together, at a temperature.

        Raises:
            ShapeError: they were taken at another temperature and cannot be re-tempered.
        """
        log_probs = self.log_probs.to(torch.promote_types(self.log_probs.dtype, torch.float32))
        if self.kind == "renormalized":
            scaled = log_probs.clamp_min(LOG_ZERO) * (self.temperature / temperature)
            kept, others = torch.log_softmax(scaled, -1), torch.full_like(scaled[..., :1], LOG_ZERO)
        elif temperature != self.temperature:
            raise ShapeError(
                f"SparseTargets: expected the temperature {self.temperature:g} that the {self.kind} targets were "
                f"taken at, got {temperature:g}. What the other tokens would have at another one is not known. Take "
                'the targets at that temperature, or use kind="renormalized".'
            )
        elif self.kind == "sampled":
            kept, others = log_probs, torch.full_like(log_probs[..., :1], LOG_ZERO)
        else:
            # The rest is known to the rounding of a sum near 1 and no better; 0 would make reverse KL infinite.
            missing = 1 - log_probs.exp().sum(-1, keepdim=True)
            kept, others = log_probs, missing.clamp_min(torch.finfo(log_probs.dtype).eps).log()
        return torch.cat([kept, others], -1).clamp_min(LOG_ZERO)

    def slice(self, size: int) -> SparseTargets:
        """The same targets, after a look that they speak of the first `size` tokens only.

        Raises:
            VocabularyError: they do not.
        """
        ids = self.ids[self.used()]
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < size:
            raise VocabularyError(
                f"SparseTargets: expected token ids in 0..{size - 1}, got {int(ids.min())}..{int(ids.max())}. "
                "They were taken over another vocabulary."
            )
        return self


Targets = DenseTargets | HeadTargets | SparseTargets


@dataclass(frozen=True)
class Alignment:
    """The positions of a batch whose prediction counts, and what should have been predicted there.

    Args:
        positions: [N] into the flattened [B * T].
        labels: [N] token ids.
        length: T.
        weights: [N] how much each counts in means over tokens; None where all count the same.
    """

    positions: Tensor
    labels: Tensor
    length: int
    weights: Tensor | None = None

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


def causal_alignment(labels: Tensor, weights: Tensor | None = None) -> Alignment:
    """The counting positions of a batch of unshifted labels [B, T]; see `counting`.

    Args:
        labels: [B, T].
        weights: [B, T], not shifted either: weights[t] is how much the token at t counts; None for all the same.
    """
    rows, columns = counting(labels).nonzero(as_tuple=True)
    said = (rows, columns + 1)
    positions = rows * labels.shape[1] + columns
    return Alignment(positions, labels[said], labels.shape[1], None if weights is None else weights[said])


def attended(batch: Mapping[str, Tensor]) -> Tensor:
    """Which positions of a batch have hidden states and attention to learn from: [B, T] bool.

    All that are no padding, prompts too: what a token's states are depends on nothing that comes after it. In a row
    without a counting position none is: such rows only fill up batches.

    Args:
        batch: attention_mask and labels, [B, T] each.
    """
    return batch["attention_mask"].bool() & counting(batch["labels"]).any(1, keepdim=True)
