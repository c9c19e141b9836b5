"""Terms over next-token distributions that go through the student's head once: the teacher's, and the data's labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from torch import Tensor

from potstill.losses.alignment import DISTRIBUTION_TASKS, HEAD_TASKS
from potstill.losses.declared import Range, in_words
from potstill.losses.divergences import Divergence, ForwardKL
from potstill.losses.fused_linear import FusedLoss
from potstill.losses.schedule import Share, Temperature, Weight, value_at
from potstill.losses.target_statistics import teacher_confidence, teacher_entropy, top_share, top_tokens
from potstill.train.signals import Signals, Text, weighted
from potstill.train.terms.term import Term


@dataclass(frozen=True)
class Logits(Term):
    """Match the teacher's next-token distribution.

        T^2 * mean over target tokens of w D(p, q) at temperature T

    T^2 keeps the size of the gradient when T changes (Hinton et al. 2015, arXiv 1503.02531, section 2.1).

    Args:
        divergence: any divergence.
        temperature: softmax temperature, > 0.
        tokens: weight of each token: all equal; only the `share` of a batch where the teacher's entropy is highest
            (entropy) or its top probability highest (confident); or the teacher's top probability (confidence). The
            mean is over all target tokens, so that a share of them gives a smaller loss.
        share: of the tokens, in [0, 1], for entropy and confident; a schedule makes a curriculum.
        top_k: compare only the teacher's top_k tokens, with all others as one event (`SparseTargets`).
        text: own: on-policy samples only (needs a rollout); data: all other tokens. The mean is over all target tokens.
    """

    divergence: Divergence = ForwardKL()
    weight: Weight = 1.0
    temperature: Temperature = 1.0
    tokens: Literal["all", "entropy", "confident", "confidence"] = "all"
    share: Share = 0.5
    top_k: Annotated[int | None, Range(ge=1)] = None
    text: Text = "all"
    name = "logits"
    tasks = DISTRIBUTION_TASKS

    @property
    def needs_samples(self) -> bool:  # type: ignore[override]
        return self.text == "own"

    def describe(self) -> str:
        name = f"{in_words(self.divergence)} at temperature {in_words(self.temperature)}"
        others = self.changed(but=("divergence", "temperature", "weight"))
        return ", ".join([name, *others, f"weight {in_words(self.weight)}"])

    def __call__(self, signals: Signals) -> Tensor:
        return self.with_labels(signals, None).loss

    def with_labels(self, signals: Signals, label_weight: float | None) -> FusedLoss:
        """Compute the term plus label_weight times `Labels`, and both of them by token; None leaves the labels out."""
        temperature = value_at(self.temperature, signals.step)
        factor = temperature**2
        assert signals.teacher is not None
        targets, weights = signals.teacher.targets, signals.only(self.text)
        if self.tokens != "all":
            values = teacher_entropy(targets) if self.tokens == "entropy" else teacher_confidence(targets)
            if self.tokens != "confidence":
                values = top_share(values, value_at(self.share, signals.step))
            weights = weighted(values, weights)
        if self.top_k is not None:
            targets = top_tokens(targets, self.top_k, temperature)
        label_weight = None if label_weight is None else label_weight / factor
        loss = signals.compare(
            self.divergence, temperature=temperature, label_weight=label_weight, targets=targets, token_weights=weights
        )
        assert loss.divergence is not None
        return FusedLoss(factor * loss.loss, factor * weighted(loss.divergence, weights), loss.cross_entropy)


@dataclass(frozen=True)
class Labels(Term):
    """Cross-entropy with the data's tokens or classes; the squared error for regression.

    On-policy samples contribute nothing.

    Args:
        weight: >= 0.
    """

    weight: Weight = 1.0
    name = "labels"
    needs_labels = True
    needs_teacher = False
    tasks = HEAD_TASKS

    def __call__(self, signals: Signals) -> Tensor:
        return signals.compare(None, label_weight=1.0).loss
