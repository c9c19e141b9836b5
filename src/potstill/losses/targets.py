"""What a teacher says at every position.

A teacher and a student meet only here: any teacher gives Targets over N counting positions, any loss takes them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from potstill.errors import ShapeError, VocabularyError
from potstill.losses.divergences import LOG_ZERO


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
    def device(self) -> torch.device:
        """Where they are."""
        return self.logits.device

    @property
    def leading(self) -> torch.Size:
        """The shape without V."""
        return self.logits.shape[:-1]

    def dense(self, temperature: float = 1.0) -> Tensor:
        """The logits [..., V]; they are the same for every temperature."""
        return self.logits

    def rows(self, part: slice) -> DenseTargets:
        """The targets of some of the positions."""
        return DenseTargets(self.logits[part])

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
    def device(self) -> torch.device:
        """Where they are."""
        return self.hidden.device

    @property
    def leading(self) -> torch.Size:
        """The shape without V."""
        return self.hidden.shape[:-1]

    def dense(self, temperature: float = 1.0) -> Tensor:
        """The logits [..., V]; they are the same for every temperature."""
        return self.head.logits(self.hidden)

    def rows(self, part: slice) -> HeadTargets:
        """The targets of some of the positions."""
        return HeadTargets(self.hidden[part], self.head)

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
    def device(self) -> torch.device:
        """Where they are."""
        return self.ids.device

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

    def spread(self, vocabulary: int, temperature: float) -> Tensor:
        """The log-probabilities [..., V] of all tokens, of targets that leave nothing to the others."""
        assert self.kind != "bucket"
        kept = self.events(temperature)[..., :-1].exp()
        chances = kept.new_zeros(*self.leading, vocabulary)
        # Added and not written: slots that are not used share their id with one that may be.
        chances.scatter_add_(-1, self.ids.to(torch.int64) * self.used(), kept)
        return chances.log_().clamp_min_(LOG_ZERO)

    def rows(self, part: slice) -> SparseTargets:
        """The targets of some of the positions."""
        return replace(self, ids=self.ids[part], log_probs=self.log_probs[part])

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


Whole = DenseTargets | HeadTargets


@dataclass(frozen=True)
class MixtureTargets:
    """Several teachers that speak as one, at every temperature of the loss.

        of probabilities:   p = sum_i w_i softmax(z_i / T)                          the mixture
        of log_probs:       p = softmax(sum_i w_i z_i / T)                          the normalised geometric mean

    The first is not softmax(z / T) of any one z for all T: that is why the members are kept, and mixed where logits are
    made of them, a few tokens at a time.

    Args:
        members: over the same positions and the same V: `DenseTargets` and `HeadTargets`. In a mixture of
            probabilities also `SparseTargets` of kind sampled (the mixture then is a sample too: unbiased for
            divergences that are linear in the teacher, refused for all else) and renormalized, beside a whole one.
        weights: [M], not negative, whose sum is 1; without gradient.
        of: see above.

    Raises:
        ShapeError: the members' positions or number of weights differ, or a member is no distribution over V.
        VocabularyError: the members' vocabularies differ.
    """

    members: tuple[Whole | SparseTargets, ...]
    weights: Tensor
    of: Literal["probabilities", "log_probs"] = "probabilities"

    def __post_init__(self) -> None:
        if self.of not in ("probabilities", "log_probs"):
            raise ShapeError(f"MixtureTargets: expected of probabilities or log_probs, got {self.of!r}.")
        if self.weights.shape != (len(self.members),):
            raise ShapeError(
                f"MixtureTargets: expected a weight for each of {len(self.members)} members, got weights of shape "
                f"{list(self.weights.shape)}."
            )
        sparse = {one.kind for one in self.members if isinstance(one, SparseTargets)}
        if not self._whole or "bucket" in sparse or (sparse and self.of == "log_probs"):
            raise ShapeError(
                f"MixtureTargets: expected members with whole distributions for a mixture of {self.of}, got "
                f"{' and '.join(sorted(sparse)) or 'none'}. What a few tokens leave out is not known. Use "
                "potstill.teachers.ensemble.mix, which knows what can be mixed."
            )
        if len({one.leading for one in self.members}) > 1:
            places = [[*one.leading] for one in self.members]
            raise ShapeError(f"MixtureTargets: expected members of the same positions, got {places}.")
        if len({one.vocabulary for one in self._whole}) > 1:
            raise VocabularyError(
                f"MixtureTargets: expected members of one vocabulary, got {[one.vocabulary for one in self._whole]}. "
                "If heads are only padded, slice each to the shared real size with slice(n) first."
            )

    @property
    def _whole(self) -> list[Whole]:
        return [one for one in self.members if not isinstance(one, SparseTargets)]

    @property
    def vocabulary(self) -> int:
        """V."""
        return self._whole[0].vocabulary

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return self.members[0].device

    @property
    def leading(self) -> torch.Size:
        """The shape without V."""
        return self.members[0].leading

    @property
    def sampled(self) -> bool:
        """Whether a member is a sample."""
        return any(isinstance(one, SparseTargets) and one.kind == "sampled" for one in self.members)

    def dense(self, temperature: float = 1.0) -> Tensor:
        """Logits [..., V] whose softmax at this temperature is what the members say there together.

        However many members there are, no more than three [..., V] exist at a time.

        Raises:
            ShapeError: a sample was taken at another temperature.
        """
        total: Tensor | None = None
        for member, weight in zip(self.members, self.weights.tolist(), strict=True):
            if not weight:
                continue
            if isinstance(member, SparseTargets):
                log_p = member.spread(self.vocabulary, temperature)
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
        """The targets of some of the positions."""
        return replace(self, members=tuple(one.rows(part) for one in self.members))

    def slice(self, size: int) -> MixtureTargets:
        """The targets over the first `size` tokens; see `LMHead.slice`."""
        return replace(self, members=tuple(one.slice(size) for one in self.members))


Targets = DenseTargets | HeadTargets | SparseTargets | MixtureTargets
