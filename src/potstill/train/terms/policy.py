"""Policy gradients on on-policy samples: distillation by sampled tokens, and MiniLLM."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from potstill.errors import ShapeError
from potstill.losses.declared import Range
from potstill.losses.divergences import ReverseKL
from potstill.losses.fused_linear import linear_cross_entropy
from potstill.losses.schedule import Weight
from potstill.losses.targets import DenseTargets, HeadTargets
from potstill.losses.token_losses import token_cross_entropy
from potstill.teachers.teacher import TeacherOutput
from potstill.train.signals import Signals
from potstill.train.terms.term import Term

MAX_REWARD_NATS = 100.0  # rewards are clamped: a token that the teacher rules out has an infinite one


@dataclass(frozen=True)
class PolicyGradient(Term):
    """Reverse KL of whole samples, KL(q || p), by policy gradient on the sampled tokens.

        loss = -mean over sampled tokens of  w_t min(rho_t A_t, clip(rho_t, 1 - clip, 1 + clip) A_t)
        r_t  = log p(y_t) - log q(y_t),   A_t = sum_{s >= t} discount^(s - t) r_s     (both without gradient)
        rho_t = q(y_t) / q_old(y_t),      w_t = q_old(y_t) / sampler(y_t)

    With discount 0 each token has its own reward alone: on-policy distillation as of Thinking Machines, which needs
    only the teacher's log-probability of each sampled token. With discount 1 the expectation is the exact gradient of
    KL(q || p) over texts.

    Args:
        discount: of later rewards, in [0, 1].
        single_step: compute the reward of the token itself as a sum over the vocabulary, not from the sample: the
            gradient of KL(q || p) at that position. A_t then holds later rewards alone. Needs the teacher's
            distribution.
        length_normalization: A_t is the weighted mean of the rewards, not their sum, so that short texts gain nothing.
        whiten: advantages with mean 0 and standard deviation 1 over the sampled tokens of each batch.
        clip: maximal distance of rho_t from 1, as in PPO; no limit by default. rho_t is 1 except on replayed samples.
        importance: multiply by w_t, which is 1 where the student alone samples at temperature 1.

    References:
        Gu et al. 2023 (MiniLLM), arXiv 2306.08543, equations 2 to 8.
        Thinking Machines Lab 2025, On-Policy Distillation.
    """

    weight: Weight = 1.0
    discount: Annotated[float, Range(ge=0, le=1)] = 0.0
    single_step: bool = False
    length_normalization: bool = False
    whiten: bool = False
    clip: Annotated[float | None, Range(gt=0)] = None
    importance: bool = True
    name = "policy"
    needs_samples = True
    tasks = frozenset({"causal"})

    @property
    def needs_sampler(self) -> bool:  # type: ignore[override]
        return self.importance

    def __call__(self, signals: Signals) -> Tensor:
        sampled, log_probs = signals.sampled, student_log_probs(signals.student, signals.labels)
        assert signals.teacher is not None
        if sampled is None or not sampled.tokens.any():
            return 0.0 * signals.mean(log_probs[:0])
        rewards = label_log_probs(signals.teacher, signals.labels) - log_probs.detach()
        rewards = rewards.clamp(-MAX_REWARD_NATS, MAX_REWARD_NATS).masked_fill(~sampled.tokens, 0.0)
        advantages = self._advantages(rewards, sampled.tokens, signals.alignment.row)
        if self.importance and sampled.sampler_log_probs[sampled.tokens].isnan().any():
            raise ShapeError(
                "policy: expected the log-probability under which each token was sampled, got samples of a server at "
                "another temperature, top_p or top_k. Sample at 1, 1 and 0, or set importance: false."
            )
        old_log_probs = sampled.log_probs.where(sampled.tokens, log_probs.detach())
        weights = (old_log_probs - sampled.sampler_log_probs).exp() if self.importance else torch.ones_like(log_probs)
        weights = weights.where(sampled.tokens, 0.0).to(log_probs.dtype)
        ratio = (log_probs - old_log_probs).exp()
        surrogate = ratio * advantages
        if self.clip is not None:
            surrogate = torch.minimum(surrogate, ratio.clamp(1 - self.clip, 1 + self.clip) * advantages)
        loss = -signals.mean(weights * surrogate)
        if self.single_step:
            loss = loss + signals.compare(ReverseKL(), token_weights=weights).loss
        return loss

    def _advantages(self, rewards: Tensor, sampled: Tensor, rows: Tensor) -> Tensor:
        """Compute A_t [N], from the last token of each row to its first; sampled [N] is True on sampled tokens."""
        _, row, counts = torch.unique_consecutive(rows, return_inverse=True, return_counts=True)
        length = int(counts.max())
        column = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[row]
        places = row * length + column  # in the grid of rows and their tokens, padded with zeros
        values = torch.stack([rewards, sampled.to(rewards.dtype)])  # the rewards, and their weights in each sum
        grid = values.new_zeros(2, len(counts) * length).index_copy(1, places, values).view(2, -1, length)
        sums, total = torch.zeros_like(grid), torch.zeros_like(grid[..., 0])
        for t in reversed(range(length)):
            later = self.discount * total
            total = grid[..., t] + later
            sums[..., t] = later if self.single_step else total
        returns, lengths = sums
        if self.length_normalization:
            returns = returns / lengths.clamp_min(torch.finfo(lengths.dtype).tiny)
        advantages = returns.flatten()[places]
        if not self.whiten or int(sampled.sum()) < 2:
            return advantages
        mean, deviation = advantages[sampled].mean(), advantages[sampled].std()
        return (advantages - mean) / deviation.clamp_min(1e-8)


@dataclass(frozen=True)
class MiniLLM(PolicyGradient):
    """Reverse KL of whole samples as in MiniLLM; each part can be switched off. Use it with rollout.teacher_mix.

    References:
        Gu et al. 2023 (MiniLLM), arXiv 2306.08543.
    """

    discount: Annotated[float, Range(ge=0, le=1)] = 1.0
    single_step: bool = True
    length_normalization: bool = True
    whiten: bool = True
    clip: Annotated[float | None, Range(gt=0)] = 0.2
    name = "minillm"


def label_log_probs(teacher: TeacherOutput, labels: Tensor) -> Tensor:
    """Return the teacher's log-probabilities of the labels, [N] nats, without gradient, or raise ShapeError."""
    log_probs = teacher.log_probs_of(labels)
    if log_probs is None:
        raise ShapeError(
            "policy: expected a teacher that gives the log-probability of every sampled token, got the most likely "
            "tokens of each distribution. Use a model or a server that scores prompts."
        )
    return log_probs.detach()


def student_log_probs(student: HeadTargets | DenseTargets, labels: Tensor) -> Tensor:
    """Compute log-probabilities [N] of the labels, with gradient; without building logits where there is a head."""
    if isinstance(student, HeadTargets):
        return -linear_cross_entropy(student.hidden, student.head, labels, reduction="none").loss
    with torch.autocast(student.logits.device.type, enabled=False):
        return -token_cross_entropy(student.logits, labels)
