"""Policy gradients on the student's own text: on-policy distillation by sampled tokens, and MiniLLM."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from potstill.errors import ShapeError
from potstill.losses.divergences import ReverseKL
from potstill.losses.linear import linear_cross_entropy
from potstill.losses.targets import DenseTargets, HeadTargets
from potstill.losses.token import token_cross_entropy
from potstill.teachers.teacher import TeacherOutput
from potstill.train.objective import Number, Own, Signals, Term

MOST_NATS = 100.0  # a reward is held within this, so that a token that the teacher rules out stays a number


@dataclass(frozen=True)
class PolicyGradient(Term):
    """The reverse KL of whole texts, KL(q || p), lowered through the tokens that the student has drawn.

        loss = -mean over own tokens of  w_t min(rho_t A_t, clip(rho_t, 1 - clip, 1 + clip) A_t)
        r_t  = log p(y_t) - log q(y_t),   A_t = sum_{s >= t} discount^(s - t) r_s     (both without gradient)
        rho_t = q(y_t) / q_then(y_t),     w_t = q_then(y_t) / sampler(y_t)

    With discount 0 a token answers for itself alone: on-policy distillation as of Thinking Machines, which needs only
    the teacher's log-probability of each token that was drawn. With discount 1 the expectation is the exact gradient of
    KL(q || p) over texts. MiniLLM is discount 1 with everything below switched on.

    Args:
        weight: >= 0.
        discount: of later rewards, in [0, 1].
        single_step: the reward of the token itself is not sampled but summed over the vocabulary: the gradient of
            KL(q || p) at that position. A_t then holds later rewards alone. It needs the teacher's distribution.
        length_normalization: A_t is the weighted mean of the rewards and not their sum: texts are not shortened to
            escape bad ones.
        whiten: A_t minus its mean, divided by its standard deviation, over the own tokens of a batch. With accumulation
            it is of each of its batches.
        clip: how far rho_t may be from 1, as in PPO; None for any. rho_t is 1 but for texts that are used again.
        importance: weigh by w_t; False for 1. It is 1 where the student alone writes at temperature 1.

    References:
        Gu et al. 2023 (MiniLLM), arXiv 2306.08543, equations 2 to 8.
        Thinking Machines Lab 2025, On-Policy Distillation.
    """

    weight: Number = 1.0
    discount: float = 0.0
    single_step: bool = False
    length_normalization: bool = False
    whiten: bool = False
    clip: float | None = None
    importance: bool = True
    name = "policy"
    needs_teacher = True
    tasks = frozenset({"causal"})

    def __post_init__(self) -> None:
        if not 0 <= self.discount <= 1:
            raise ShapeError(f"PolicyGradient: expected discount in [0, 1], got {self.discount}.")
        if self.clip is not None and not self.clip > 0:
            raise ShapeError(f"PolicyGradient: expected clip > 0 or None, got {self.clip}.")

    def __call__(self, signals: Signals) -> Tensor:
        own = signals.own
        assert signals.teacher is not None
        if own is None or not own.tokens.any():
            return 0.0 * signals.mean(_student_log_probs(signals)[:0])
        log_probs = _student_log_probs(signals)
        rewards = label_log_probs(signals.teacher, signals.labels) - log_probs.detach()
        rewards = rewards.clamp(-MOST_NATS, MOST_NATS).masked_fill(~own.tokens, 0.0)
        advantages = self._whitened(self._returns(rewards, own), own.tokens)
        if self.importance and own.sampler_log_probs[own.tokens].isnan().any():
            raise ShapeError(
                "policy: expected to know what each token was drawn from, got a server's texts, drawn otherwise than "
                "the student gives them. Draw with sampling_temperature 1, top_p 1 and top_k 0, or without importance."
            )
        then = own.log_probs.where(own.tokens, log_probs.detach())
        weights = (then - own.sampler_log_probs).exp() if self.importance else torch.ones_like(then)
        weights = weights.where(own.tokens, 0.0).to(log_probs.dtype)
        ratio = (log_probs - then).exp()
        gained = ratio * advantages
        if self.clip is not None:
            gained = torch.minimum(gained, ratio.clamp(1 - self.clip, 1 + self.clip) * advantages)
        loss = -signals.mean(weights * gained)
        if self.single_step:
            loss = loss + signals.compare(ReverseKL(), token_weights=weights).loss
        return loss

    def _returns(self, rewards: Tensor, own: Own) -> Tensor:
        """A_t before it is whitened, [N]: own tokens of a row follow each other, the last of the row first."""
        first = 1 if self.single_step else 0
        grid, places = _by_row(rewards, own.rows)
        present, _ = _by_row(own.tokens.to(rewards.dtype), own.rows)
        sums, counts = torch.zeros_like(grid), torch.zeros_like(grid)
        total, count = torch.zeros_like(grid[:, 0]), torch.zeros_like(grid[:, 0])
        for t in reversed(range(grid.shape[1])):
            if first:  # later rewards alone
                sums[:, t], counts[:, t] = self.discount * total, self.discount * count
            total = grid[:, t] + self.discount * total
            count = present[:, t] + self.discount * count
            if not first:
                sums[:, t], counts[:, t] = total, count
        found = sums / counts.clamp_min(torch.finfo(counts.dtype).tiny) if self.length_normalization else sums
        return found.flatten()[places]

    def _whitened(self, advantages: Tensor, own: Tensor) -> Tensor:
        if not self.whiten or int(own.sum()) < 2:
            return advantages
        seen = advantages[own]
        return (advantages - seen.mean()) / seen.std().clamp_min(1e-8)


def label_log_probs(teacher: TeacherOutput, labels: Tensor) -> Tensor:
    """What a teacher gives the labels, [N] nats, without gradient.

    Raises:
        ShapeError: it gives a few tokens of each distribution, and does not tell.
    """
    told = teacher.of_labels(labels)
    if told is None:
        raise ShapeError(
            "policy: expected a teacher that tells the log-probability of each token that the student drew, got a few "
            "likely tokens of each distribution. Use a model or a server that scores prompts."
        )
    return told.detach()


def _student_log_probs(signals: Signals) -> Tensor:
    return _log_probs(signals.student, signals.labels)


def _log_probs(said: HeadTargets | DenseTargets, labels: Tensor) -> Tensor:
    """The log-probabilities [N] of the labels, with gradient, without the logits where there is a head."""
    if isinstance(said, HeadTargets):
        return -linear_cross_entropy(said.hidden, said.head, labels, reduction="none").loss
    with torch.autocast(said.logits.device.type, enabled=False):
        return -token_cross_entropy(said.logits, labels)


def _by_row(values: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Values [N], in order, as [R, L] with zeros behind each row; and where each is in the flattened grid, [N]."""
    _, row, counts = torch.unique_consecutive(rows, return_inverse=True, return_counts=True)
    place = torch.arange(len(rows), device=rows.device) - (counts.cumsum(0) - counts)[row]
    length = int(counts.max())
    where = row * length + place
    return values.new_zeros(len(counts) * length).index_copy(0, where, values).view(-1, length), where
