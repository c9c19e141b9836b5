"""Objective: a weighted sum of terms."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from potstill.errors import ShapeError, UserError
from potstill.losses.alignment import Task
from potstill.losses.schedule import value_at
from potstill.models.capture import ActivationRequest
from potstill.models.structure import ModelShape
from potstill.train.signals import Signals
from potstill.train.terms.logits import Labels, Logits
from potstill.train.terms.term import FittedTerm, Term

# Limit on the labels' weight over the logits' where both go through the head together: their gradient may be in half
# precision before it is weighted, and must stay within its range.
MAX_LABEL_WEIGHT_RATIO = 10.0

# Logs of on-policy samples and of data: sums over such tokens, and their number, both divided by all target tokens.
OWN_TOKENS, DATA_TOKENS = "own_tokens", "data_tokens"
OF_TEXT = {"_own": OWN_TOKENS, "_data": DATA_TOKENS}


class Objective(nn.Module):
    """Weighted sum of terms.

    A module, so that what a term trains beside the student is optimised, moved and saved with it.

    Args:
        terms: at least one.

    Raises:
        ShapeError: there is no term.
    """

    def __init__(self, terms: Sequence[Term]) -> None:
        super().__init__()
        if not terms:
            raise ShapeError("Objective: expected at least one term, got none. Add Logits(...) or Labels().")
        self.terms = list(terms)
        names = [term.name for term in terms]
        # Terms of one kind are numbered in the logs by their place.
        self.names = [f"{n}_{i}" if names.count(n) > 1 else n for i, n in enumerate(names)]
        self.needs_teacher = any(term.needs_teacher for term in terms)
        self.reads_layers = any(term.reads_layers for term in terms)
        self.reads_teacher_layers = any(term.reads_layers and term.needs_teacher for term in terms)
        self.fitted = [FittedTerm(term) for term in terms]
        self.trained = nn.ModuleList()

    def fit(self, student: ModelShape, teacher: ModelShape | None) -> tuple[ActivationRequest, ActivationRequest]:
        """Choose layers and widths for two models, and make what is trained with the student.

        Args:
            student: the student's shape.
            teacher: the teacher's; None where no term reads its layers.

        Returns:
            The activations that all terms together read of the student, and of the teacher.

        Raises:
            UserError: a term cannot be computed for these models; the message begins with its place.
        """
        of_student, of_teacher = ActivationRequest(), ActivationRequest()
        self.fitted = []
        for place, term in enumerate(self.terms):
            try:
                fitted = term.fit(student, teacher if term.needs_teacher and teacher else student)
            except UserError as error:
                raise type(error)(f"objective.{place}: {error}") from None
            self.fitted.append(fitted)
            of_student, of_teacher = of_student | fitted.student, of_teacher | fitted.teacher
        computations = (fitted.compute for fitted in self.fitted)
        self.trained = nn.ModuleList(compute for compute in computations if isinstance(compute, nn.Module))
        return of_student, of_teacher

    def total(self, means: Mapping[str, float], step: int) -> float:
        """Sum the terms' means to the loss of an optimiser step; without a teacher's, the loss on the labels."""
        if self.needs_teacher and not set(self.names) <= set(means):
            return next(means[name] for name in ("cross_entropy", "squared_error") if name in means)
        return sum(value_at(term.weight, step) * means[name] for term, name in zip(self.terms, self.names, strict=True))

    def forward(self, signals: Signals) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the scalar loss, and every term's value without its weight, detached, for the logs.

        In evaluation mode the logs hold the loss on the labels too, as cross_entropy or squared_error. The first Logits
        and the first Labels share one pass through the student's head, whose products are most of the work.
        """
        if self.needs_teacher and signals.teacher is None:  # held-out rows that the teacher does not cover
            held_out = Labels()(signals).detach()
            return held_out, {str(signals.label_loss): held_out}
        weights = [value_at(term.weight, signals.step) for term in self.terms]
        summands: list[Tensor] = []
        values: dict[int, Tensor] = {}
        entropy: Tensor | None = None
        by_text: dict[str, Tensor] = {}
        logits, labels = self._first(Logits), self._first(Labels)
        joined = labels
        if (
            logits is None
            or labels is None
            or weights[logits] <= 0
            or weights[labels] > MAX_LABEL_WEIGHT_RATIO * weights[logits]
            or cast(Logits, self.terms[logits]).weighs_tokens  # the labels would share its token weights
        ):
            joined = None
        if logits is not None:
            ratio = 0.0 if joined is None else weights[joined] / weights[logits]
            with_labels = joined is not None or not self.training
            loss = cast(Logits, self.terms[logits]).with_labels(signals, ratio if with_labels else None)
            summands.append(weights[logits] * loss.loss)
            values[logits] = signals.mean(cast(Tensor, loss.divergence))
            if signals.sampled is not None:
                by_text = _by_text(self.names[logits], cast(Tensor, loss.divergence), signals)
            if loss.cross_entropy is not None:
                entropy = signals.mean(loss.cross_entropy)
                values |= {} if joined is None else {joined: entropy}
        for i, fitted in enumerate(self.fitted):
            if i not in values:
                value = fitted.compute(signals)
                summands.append(weights[i] * value)
                values[i] = value.detach()
        logs = {name: values[i] for i, name in enumerate(self.names)} | by_text
        if not self.training and signals.label_loss is not None:
            if entropy is None:
                entropy = Labels()(signals).detach() if labels is None else values[labels]
            logs[signals.label_loss] = entropy
        return torch.stack(summands).sum(), logs

    def _first(self, kind: type[Term]) -> int | None:
        return next((i for i, term in enumerate(self.terms) if isinstance(term, kind)), None)


def task_mistakes(terms: Sequence[Term], task: Task) -> Iterator[str]:
    """Explain each term that is not defined for a task, as a line that begins with its place."""
    for place, term in enumerate(terms):
        if (mistake := term.task_mistake(task)) is not None:
            yield f"objective.{place}{mistake}"


def _by_text(name: str, values: Tensor, signals: Signals) -> dict[str, Tensor]:
    """Split a term's mean into on-policy samples and data, beside the fraction of target tokens that each is."""
    assert signals.sampled is not None
    sampled = signals.sampled.tokens.to(values.dtype)
    parts = {"_own": sampled, "_data": 1 - sampled}
    return {name + part: signals.mean(values * of) for part, of in parts.items()} | {
        OF_TEXT[part]: signals.mean(of) for part, of in parts.items()
    }
