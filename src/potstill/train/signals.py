"""What terms of the objective read: one batch as the student and the teacher see it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from potstill.losses.alignment import IGNORE, Alignment
from potstill.losses.divergences import Divergence
from potstill.losses.fused_linear import FusedLoss, linear_divergence
from potstill.losses.targets import DenseTargets, HeadTargets, Targets
from potstill.losses.token_losses import label_loss, token_divergence, token_mean
from potstill.models.capture import Activations
from potstill.teachers.teacher import TeacherOutput

Text = Literal["all", "data", "own"]  # tokens of both, of the data, or of on-policy samples


@dataclass(frozen=True)
class SampledTokens:
    """Target tokens that the student sampled itself. Log-probabilities are in nats, and NaN on other tokens."""

    tokens: Tensor  # [N] bool, True on sampled tokens
    log_probs: Tensor  # [N] under the student when it sampled the token
    sampler_log_probs: Tensor  # [N] under the distribution that the token was drawn from


@dataclass(frozen=True)
class Signals:
    """Everything that a term may read of one batch with N target positions."""

    student: HeadTargets | DenseTargets  # with gradient; logits [N, V] where the head is not a plain linear layer
    alignment: Alignment  # target positions, with their labels and weights
    teacher: TeacherOutput | None  # None where no term needs a teacher
    normalizer: Tensor | float | None  # what every mean over tokens divides by; None: N, or the sum of the weights
    step: int  # optimiser step, from 0
    inside: Activations = field(default_factory=Activations)  # of the student, as requested; with gradient
    attended: Tensor | None = None  # [B, T] bool; see `losses.alignment.attended_positions`
    attended_normalizer: Tensor | float | None = None  # of means over attended positions; None: their number
    sampled: SampledTokens | None = None  # None where the student sampled no token

    def only(self, text: Text) -> Tensor | None:
        """Return [N] with 1 on tokens of such text and 0 on others; None for all ones."""
        if text == "all" or (text == "data" and self.sampled is None):
            return None
        if self.sampled is None:
            return torch.zeros(len(self.labels), device=self.labels.device)
        return (self.sampled.tokens if text == "own" else ~self.sampled.tokens).float()

    @property
    def labels(self) -> Tensor:
        """[N] token ids or classes; floating point for regression."""
        return self.alignment.labels

    @property
    def label_loss(self) -> str | None:
        """Name of the loss on the labels in logs; None for a model without a head."""
        if not self.student.vocabulary:
            return None
        return "squared_error" if self.labels.is_floating_point() else "cross_entropy"

    @property
    def weights(self) -> Tensor | None:
        """[N] weight of each token in every mean over tokens; None where all are equal."""
        return self.alignment.weights

    @property
    def divisor(self) -> Tensor | float:
        """The normaliser; without one, that of this batch alone."""
        if self.normalizer is not None:
            return self.normalizer
        return max(len(self.labels), 1) if self.weights is None else or_one(self.weights.sum())

    def mean(self, values: Tensor) -> Tensor:
        """Average values [N] over the target tokens of the optimiser step, by their weights."""
        return token_mean(values, self.weights, self.divisor)

    def attended_mean(self, values: Tensor) -> Tensor:
        """Average values [A] over the attended positions of the optimiser step."""
        return token_mean(values, normalizer=self.attended_normalizer)

    def batch_mean(self, value: Tensor) -> Tensor:
        """Average a scalar of each batch over the optimiser step, weighted by target tokens."""
        return self.mean(value.expand(len(self.labels)))

    def compare(
        self,
        divergence: Divergence | None,
        *,
        temperature: float = 1.0,
        label_weight: float | None = None,
        targets: Targets | None = None,
        token_weights: Tensor | None = None,
    ) -> FusedLoss:
        """Compute the loss against the teacher, the labels, or both in one pass through the student's head.

            mean over tokens of w * (D + label_weight * CE),   w = token_weights, on top of the data's weights

        The mean does not divide by w. A divergence or label_weight of None leaves that part out; a label_weight of 0
        only reports the cross-entropy. Targets are those of the teacher's output, unless others are given.
        """
        if targets is None and divergence is not None and self.teacher is not None:
            targets = self.teacher.targets
        labels = None if label_weight is None else self.labels
        if labels is not None and self.sampled is not None:
            labels = labels.masked_fill(self.sampled.tokens, IGNORE)  # the student's own samples are no ground truth
        if isinstance(self.student, HeadTargets):
            weights = self.weights if token_weights is None else weighted(token_weights, self.weights)
            options: dict[str, Any] = {"temperature": temperature, "token_weights": weights, "normalizer": self.divisor}
            options |= {"labels": labels, "label_weight": label_weight or 0.0}
            return linear_divergence(self.student.hidden, self.student.head, targets, divergence, **options)
        logits, parts, divergences, entropy = self.student.logits, [], None, None
        with torch.autocast(logits.device.type, enabled=False):  # a teacher's head keeps its own precision
            if targets is not None and divergence is not None:
                divergences = token_divergence(logits, targets, divergence, temperature=temperature)
                parts.append(self.mean(weighted(divergences, token_weights)))
                divergences = divergences.detach()
            if labels is not None:
                entropy = label_loss(logits, labels)
                parts += [label_weight * self.mean(weighted(entropy, token_weights))] if label_weight else []
                entropy = entropy.detach()
        return FusedLoss(torch.stack(parts).sum(), divergences, entropy)


def weighted(values: Tensor, weights: Tensor | None) -> Tensor:
    """Multiply by weights, where there are any."""
    return values if weights is None else values * weights


def or_one(total: Tensor) -> Tensor:
    """Return a sum of weights to divide by: 1 where all weights are 0."""
    return total.masked_fill(total == 0, 1)
