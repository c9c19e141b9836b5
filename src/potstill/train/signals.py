"""What terms of the objective read: one batch as the student and the teacher see it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

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
    """Target tokens that the student sampled itself.

    Args:
        tokens: [N] bool, True on sampled tokens.
        rows: [N] row of each token.
        log_probs: [N] the student's log-probability when it sampled the token, nats; NaN on other tokens.
        sampler_log_probs: [N] log-probability under the distribution that the token was drawn from; NaN on others.
    """

    tokens: Tensor
    rows: Tensor
    log_probs: Tensor
    sampler_log_probs: Tensor


@dataclass(frozen=True)
class Signals:
    """Everything that a term may read of one batch with N target positions.

    Args:
        student: last hidden states [N, H] with the head, or logits [N, V] where the head is not a plain linear layer.
            With gradient. `student.dense()` gives logits of both.
        labels: [N] token ids or classes; floating point for regression.
        teacher: the teacher's output, or None where no term needs a teacher.
        normalizer: what every mean over tokens divides by; None: N, or the sum of the weights.
        step: optimiser step, from 0.
        inside: activations of the student that terms requested, at all positions. With gradient.
        attended: [B, T] bool, the positions that terms over layers average over; see `losses.alignment.attended`.
        attended_normalizer: what means over attended positions divide by; None: their number.
        alignment: target positions and their weights.
        sampled: target tokens that the student sampled; None where there are none.
    """

    student: HeadTargets | DenseTargets
    labels: Tensor
    teacher: TeacherOutput | None
    normalizer: Tensor | float | None
    step: int
    inside: Activations = field(default_factory=Activations)
    attended: Tensor | None = None
    attended_normalizer: Tensor | float | None = None
    alignment: Alignment | None = None
    sampled: SampledTokens | None = None

    def only(self, text: Text) -> Tensor | None:
        """Return [N] with 1 on tokens of such text and 0 on others; None for all ones."""
        if text == "all" or (text == "data" and self.sampled is None):
            return None
        if self.sampled is None:
            return torch.zeros(len(self.labels), device=self.labels.device)
        return (self.sampled.tokens if text == "own" else ~self.sampled.tokens).float()

    @property
    def label_loss(self) -> str | None:
        """Name of the loss on the labels in logs; None for a model without a head."""
        if not self.student.vocabulary:
            return None
        return "squared_error" if self.labels.is_floating_point() else "cross_entropy"

    @property
    def weights(self) -> Tensor | None:
        """[N] weight of each token in every mean over tokens; None where all are equal."""
        return None if self.alignment is None else self.alignment.weights

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

            mean over tokens of w * (D + label_weight * CE)

        Args:
            divergence: D, from the teacher; None leaves it out.
            temperature: softmax temperature of the divergence.
            label_weight: weight of the cross-entropy; 0 reports it only, None leaves it out.
            targets: teacher targets; None: those of its output.
            token_weights: [N], w, without gradient, on top of the data's weights; None: ones. The mean does not divide
                by them.
        """
        if targets is None and divergence is not None and self.teacher is not None:
            targets = self.teacher.targets
        labels = None if label_weight is None else self.labels
        if labels is not None and self.sampled is not None:
            labels = labels.masked_fill(self.sampled.tokens, IGNORE)  # the student's own samples are no ground truth
        if isinstance(self.student, HeadTargets):
            return linear_divergence(
                self.student.hidden,
                self.student.head,
                targets,
                divergence,
                temperature=temperature,
                token_weights=self.weights if token_weights is None else weighted(token_weights, self.weights),
                normalizer=self.divisor,
                labels=labels,
                label_weight=label_weight or 0.0,
            )
        logits = self.student.logits
        divergences = entropy = None
        parts = []
        with torch.autocast(logits.device.type, enabled=False):  # a teacher's head keeps its own precision
            if targets is not None and divergence is not None:
                divergences = token_divergence(logits, targets, divergence, temperature=temperature)
                parts.append(self.mean(weighted(divergences, token_weights)))
            if labels is not None:
                entropy = label_loss(logits, labels)
                parts += [label_weight * self.mean(weighted(entropy, token_weights))] if label_weight else []
        return FusedLoss(
            torch.stack(parts).sum(),
            None if divergences is None else divergences.detach(),
            None if entropy is None else entropy.detach(),
        )


def weighted(values: Tensor, weights: Tensor | None) -> Tensor:
    """Multiply by weights, where there are any."""
    return values if weights is None else values * weights


def or_one(total: Tensor) -> Tensor:
    """Return a sum of weights to divide by: 1 where all weights are 0."""
    return total.masked_fill(total == 0, 1)
