"""Targets: a teacher's distributions over the vocabulary at N positions, the only interface to the student."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from potstill.errors import ShapeError, VocabularyError
from potstill.losses.divergences import LOG_ZERO


@dataclass(frozen=True)
class LMHead:
    """Last linear layer of a language model, with the scaling that real models add.

        logits = softcap * tanh(z / softcap),   z = logit_scale * (hidden @ weight.T + bias)

    Args:
        weight: [V, H].
        bias: [V] or None.
        logit_scale: a factor on the logits (Cohere, Granite: 1 / logits_scaling).
        softcap: > 0, bound of the final soft cap (Gemma 2), or None.
        size: number of leading rows that are real tokens, if padding follows them. Padding rows are not multiplied,
            and their gradient is 0.
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
        return self.weight.shape[0] if self.size is None else self.size

    def slice(self, size: int) -> LMHead:
        """Restrict the head to the first `size` tokens, 1 to V, without a copy: for vocabularies with unused rows."""
        _check_size("LMHead", size, self.vocabulary)
        return replace(self, size=size)

    def logits(self, hidden: Tensor) -> Tensor:
        """Compute the logits [..., V] of hidden states [..., H]."""
        if hidden.shape[-1] != self.weight.shape[1]:
            raise ShapeError(f"LMHead: expected hidden of width {self.weight.shape[1]}, got {hidden.shape[-1]}.")
        dtype, V = torch.promote_types(hidden.dtype, self.weight.dtype), self.vocabulary
        bias = None if self.bias is None else self.bias[:V].to(dtype)
        logits = torch.nn.functional.linear(hidden.to(dtype), self.weight[:V].to(dtype), bias)
        if self.logit_scale != 1.0:
            logits = logits * self.logit_scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


def _check_size(owner: str, size: int, vocabulary: int) -> None:
    if not 0 < size <= vocabulary:
        raise VocabularyError(f"{owner}.slice: expected a size in 1..{vocabulary}, got {size}.")


class _PositionTargets:
    """Base of all targets. Each has `rows`, some of the positions, and `slice`, the first `size` tokens.

    Full distributions have `vocabulary`, V, and `dense`, logits [..., V] whose softmax at a temperature they are.
    """

    @property
    def _values(self) -> Any:
        """The first field, a tensor [..., X]; of a mixture, that of its first member."""
        first = next(iter(vars(self).values()))
        return first if isinstance(first, Tensor) else first[0]._values

    @property
    def device(self) -> torch.device:
        device: torch.device = self._values.device
        return device

    @property
    def leading(self) -> torch.Size:
        return torch.Size(self._values.shape[:-1])

    @property
    def sampled(self) -> bool:
        """Whether these are a sample of the teacher's distribution, or a mixture with one."""
        return False


@dataclass(frozen=True)
class DenseTargets(_PositionTargets):
    """The teacher's logits over the whole vocabulary: [..., V], any float dtype; -inf rules a token out."""

    logits: Tensor

    @property
    def vocabulary(self) -> int:
        return self.logits.shape[-1]

    def dense(self, temperature: float = 1.0) -> Tensor:
        return self.logits

    def rows(self, part: slice | Tensor) -> DenseTargets:
        return DenseTargets(self.logits[part])

    def slice(self, size: int) -> DenseTargets:
        _check_size("DenseTargets", size, self.vocabulary)
        return DenseTargets(self.logits[..., :size])


@dataclass(frozen=True)
class HeadTargets(_PositionTargets):
    """The teacher's last hidden states and its head; logits are computed where they are needed.

    Args:
        hidden: [..., Ht], of the teacher's own width.
        head: the teacher's head, over the student's vocabulary.
    """

    hidden: Tensor
    head: LMHead

    @property
    def vocabulary(self) -> int:
        return self.head.vocabulary

    def dense(self, temperature: float = 1.0) -> Tensor:
        return self.head.logits(self.hidden)

    def rows(self, part: slice | Tensor) -> HeadTargets:
        return HeadTargets(self.hidden[part], self.head)

    def slice(self, size: int) -> HeadTargets:
        return HeadTargets(self.hidden, self.head.slice(size))


@dataclass(frozen=True)
class SparseTargets(_PositionTargets):
    """K of the teacher's probabilities at each position, and one event for all other tokens: K + 1 events.

    The kind says what log_probs are and what probability the other tokens keep:
        bucket: the teacher's probabilities of its top K tokens; the others keep the rest. The divergence equals the
            dense one at K = V and is at most that for a smaller K (alpha-beta divergences may exceed it).
        sampled: log(count / draws) of draws from the teacher; the others keep 0. Unbiased for divergences that are
            linear in the teacher (forward KL, soft cross-entropy), refused for all else (Anshumann et al. 2025,
            random sampling distillation, arXiv 2503.16870).
        renormalized: any probabilities; they are divided by their sum, the others keep 0. Biased: the student is
            trained to give the others nothing.

    Args:
        ids: [..., K] token ids, all different within a position.
        log_probs: [..., K] at `temperature`, nats; -inf in unused slots, whose id does not matter.
        kind: see above.
        temperature: the softmax temperature of log_probs, > 0. "bucket" and "sampled" are valid at that temperature
            only; "renormalized" can be re-tempered.
    """

    ids: Tensor
    log_probs: Tensor
    kind: Literal["bucket", "sampled", "renormalized"] = "bucket"
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.ids.shape != self.log_probs.shape or not self.ids.ndim or not self.ids.shape[-1]:
            got = f"{list(self.ids.shape)} and {list(self.log_probs.shape)}"
            raise ShapeError(f"SparseTargets: expected ids and log_probs of one shape [..., K], got {got}.")
        if self.kind not in ("bucket", "sampled", "renormalized"):
            raise ShapeError(f"SparseTargets: expected kind bucket, sampled or renormalized, got {self.kind!r}.")
        if not 0 < self.temperature < math.inf:
            raise ShapeError(f"SparseTargets: expected temperature > 0, got {self.temperature}.")

    @property
    def sampled(self) -> bool:
        return self.kind == "sampled"

    def used(self) -> Tensor:
        return self.log_probs > -math.inf

    def events(self, temperature: float) -> Tensor:
        """Compute the log-probabilities [..., K + 1] of the K tokens, and of all others together."""
        kept = self.log_probs.to(torch.promote_types(self.log_probs.dtype, torch.float32))
        others = torch.full_like(kept[..., :1], LOG_ZERO)
        if self.kind == "renormalized":
            kept = torch.log_softmax(kept.clamp_min(LOG_ZERO) * (self.temperature / temperature), -1)
        elif temperature != self.temperature:
            raise ShapeError(
                f"SparseTargets: expected the temperature {self.temperature:g} of the {self.kind} targets, got "
                f'{temperature:g}. Compute the targets at that temperature, or use kind="renormalized".'
            )
        elif self.kind == "bucket":
            # The rest is only known up to the rounding of a sum near 1; 0 would make reverse KL infinite.
            others = (1 - kept.exp().sum(-1, keepdim=True)).clamp_min(torch.finfo(kept.dtype).eps).log()
        return torch.cat([kept, others], -1).clamp_min(LOG_ZERO)

    def dense_log_probs(self, vocabulary: int, temperature: float) -> Tensor:
        """Compute the log-probabilities [..., V] of all tokens, for kinds whose other tokens keep 0."""
        assert self.kind != "bucket"
        kept = self.events(temperature)[..., :-1].exp()
        probs = kept.new_zeros(*self.leading, vocabulary)
        # Added, not assigned: unused slots share their id with one that may be used.
        probs.scatter_add_(-1, self.ids.to(torch.int64) * self.used(), kept)
        return probs.log_().clamp_min_(LOG_ZERO)

    def rows(self, part: slice) -> SparseTargets:
        return replace(self, ids=self.ids[part], log_probs=self.log_probs[part])

    def slice(self, size: int) -> SparseTargets:
        """Return the same targets after checking that all ids are among the first `size` tokens."""
        ids = self.ids[self.used()]
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < size:
            got = f"{int(ids.min())}..{int(ids.max())}. They were taken over another vocabulary."
            raise VocabularyError(f"SparseTargets: expected token ids in 0..{size - 1}, got {got}")
        return self


FullTargets = DenseTargets | HeadTargets


@dataclass(frozen=True)
class MixtureTargets(_PositionTargets):
    """Mixture of several teachers.

        of probabilities:   p = sum_i w_i softmax(z_i / T)
        of log_probs:       p = softmax(sum_i w_i z_i / T), the normalised geometric mean

    The first is not softmax(z / T) of any one z for all T. So the members are kept and mixed where logits are computed,
    a few tokens at a time.

    Args:
        members: `DenseTargets` and `HeadTargets` over the same positions and V. A mixture of probabilities also takes
            `SparseTargets` beside one of these: renormalized ones, and sampled ones (the mixture is then a sample too:
            unbiased for divergences that are linear in the teacher, refused for all else).
        weights: [M], >= 0, with sum 1; without gradient.
        of: see above.

    Raises:
        ShapeError: the members' positions or number of weights differ, or a member is not a full distribution over V.
        VocabularyError: the members' vocabularies differ.
    """

    members: tuple[FullTargets | SparseTargets, ...]
    weights: Tensor
    of: Literal["probabilities", "log_probs"] = "probabilities"

    def __post_init__(self) -> None:
        if self.of not in ("probabilities", "log_probs"):
            raise ShapeError(f"MixtureTargets: expected of probabilities or log_probs, got {self.of!r}.")
        if self.weights.shape != (len(self.members),):
            expected = f"a weight for each of {len(self.members)} members"
            raise ShapeError(f"MixtureTargets: expected {expected}, got weights of shape {list(self.weights.shape)}.")
        sparse = {member.kind for member in self.members if isinstance(member, SparseTargets)}
        sizes = [member.vocabulary for member in self.members if not isinstance(member, SparseTargets)]
        if not sizes or "bucket" in sparse or (sparse and self.of == "log_probs"):
            expected, got = f"a mixture of {self.of}", " and ".join(sorted(sparse)) or "none"
            hint = "Use potstill.teachers.ensemble.mix, which knows what can be mixed."
            raise ShapeError(
                f"MixtureTargets: expected members with full distributions for {expected}, got {got}. {hint}"
            )
        positions = [list(member.leading) for member in self.members]
        if positions != positions[:1] * len(positions):
            raise ShapeError(f"MixtureTargets: expected members of the same positions, got {positions}.")
        if len(set(sizes)) > 1:
            hint = "If heads are only padded, slice each to the shared real size with slice(n) first."
            raise VocabularyError(f"MixtureTargets: expected members of one vocabulary, got {sizes}. {hint}")

    @property
    def vocabulary(self) -> int:
        return next(member.vocabulary for member in self.members if not isinstance(member, SparseTargets))

    @property
    def sampled(self) -> bool:
        return any(member.sampled for member in self.members)

    def dense(self, temperature: float = 1.0) -> Tensor:
        """Compute logits [..., V] whose softmax is the mixture; no more than three such tensors exist at a time."""
        total: Tensor | None = None
        for member, weight in zip(self.members, self.weights.tolist(), strict=True):
            if not weight:
                continue
            if isinstance(member, SparseTargets):
                log_p = member.dense_log_probs(self.vocabulary, temperature)
            else:
                logits = member.dense()
                logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
                log_p = torch.log_softmax(logits.clamp_min_(LOG_ZERO), -1)
            if self.of == "log_probs":
                log_p = log_p.clamp_min(LOG_ZERO) * weight
                total = log_p if total is None else total + log_p
            else:
                log_p = log_p + math.log(weight)
                total = log_p if total is None else torch.logaddexp(total, log_p)
        assert total is not None
        return total.clamp_min(LOG_ZERO) * temperature

    def rows(self, part: slice) -> MixtureTargets:
        return replace(self, members=tuple(member.rows(part) for member in self.members))

    def slice(self, size: int) -> MixtureTargets:
        return replace(self, members=tuple(member.slice(size) for member in self.members))


Targets = DenseTargets | HeadTargets | SparseTargets | MixtureTargets
