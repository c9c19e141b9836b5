"""Objective: a weighted sum of terms."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from potstill.errors import ShapeError, UserError
from potstill.losses.alignment import Task
from potstill.losses.schedule import Schedule, value_at
from potstill.models.capture import ActivationRequest
from potstill.models.shapes import ModelShape
from potstill.train.signals import Signals
from potstill.train.terms.logits import Labels, Logits
from potstill.train.terms.term import Term

# Of the labels' weight to the logits' where both go through the head together: their gradient may be in half precision
# before it is weighted, and must stay within its range.
MAX_LABEL_WEIGHT_RATIO = 10.0
# Logs of on-policy samples and of data: sums over such tokens, and their number, both divided by all target tokens.
OF_TEXT = {"_own": "own_tokens", "_data": "data_tokens"}


class Objective(nn.Module):
    """Weighted sum of terms.

    A module, so that what a term trains beside the student is optimised, moved and saved with it.

    Raises:
        ShapeError: there is no term.
    """

    def __init__(self, terms: Sequence[Term]) -> None:
        super().__init__()
        self.terms = [] if isinstance(terms, Term) else list(terms)
        strange = [repr(term) for term in self.terms if not isinstance(term, Term)]
        if strange or not self.terms:
            got = strange[0] if strange else "one by itself" if isinstance(terms, Term) else "none"
            raise ShapeError(
                f"Objective: expected a list of at least one term, got {got}. Give [Logits(...), Labels()]."
            )
        names = [term.name for term in self.terms]
        # Terms of one kind are numbered in the logs by their place.
        self.names = [f"{n}_{i}" if names.count(n) > 1 else n for i, n in enumerate(names)]
        self.needs_teacher = any(term.needs_teacher for term in self.terms)
        self.reads_layers = any(term.reads_layers for term in self.terms)
        self.reads_teacher_layers = any(term.reads_layers and term.needs_teacher for term in self.terms)
        self.computations: list[Callable[[Signals], Tensor]] = list(self.terms)
        self.trained = nn.ModuleList()

    def fit(self, student: ModelShape, teacher: ModelShape | None) -> tuple[ActivationRequest, ActivationRequest]:
        """Choose layers and widths, make what is trained, and return the activations that all terms read of each model.

        Raises:
            UserError: a term cannot be computed for these models; the message begins with its place.
        """
        of_student, of_teacher = ActivationRequest(), ActivationRequest()
        self.computations = []
        for place, term in enumerate(self.terms):
            try:
                fitted = term.fit(student, teacher if term.needs_teacher and teacher else student)
            except UserError as error:
                raise type(error)(f"objective.{place}: {error}") from None
            self.computations.append(fitted.compute)
            of_student, of_teacher = of_student | fitted.student, of_teacher | fitted.teacher
        self.trained = nn.ModuleList(compute for compute in self.computations if isinstance(compute, nn.Module))
        return of_student, of_teacher

    def total(self, means: Mapping[str, float], step: int) -> float:
        """Sum the terms' means to the loss of an optimiser step; without a teacher's, the loss on the labels."""
        if self.needs_teacher and not set(self.names) <= set(means):
            return next(means[name] for name in ("cross_entropy", "squared_error") if name in means)
        return sum(value_at(term.weight, step) * means[name] for term, name in zip(self.terms, self.names, strict=True))

    def scheduled(self, step: int) -> dict[str, float]:
        """Return the values of weights and temperatures that change with the step, such as logits_temperature."""
        fields = [(i, field.name) for i, term in enumerate(self.terms) for field in dataclasses.fields(term)]  # type: ignore[arg-type]
        values = {f"{self.names[i]}_{name}": getattr(self.terms[i], name) for i, name in fields}
        return {name: value_at(value, step) for name, value in values.items() if isinstance(value, Schedule)}

    def forward(self, signals: Signals) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the loss, and every term's value without its weight, detached; in evaluation also that of the labels.

        The first Logits and the first Labels share one pass through the student's head, which is most of the work.
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
        joined = None  # labels that go through the head together with the logits
        if logits is not None:
            term, weight = cast(Logits, self.terms[logits]), weights[logits]
            joinable = weight > 0 and term.tokens == term.text == "all"  # else the labels would share its token weights
            if joinable and labels is not None and weights[labels] <= MAX_LABEL_WEIGHT_RATIO * weight:
                joined = labels
            ratio = (None if self.training else 0.0) if joined is None else weights[joined] / weight
            loss = term.with_labels(signals, ratio)
            divergence = cast(Tensor, loss.divergence)
            summands.append(weight * loss.loss)
            values[logits] = signals.mean(divergence)
            by_text = _by_text(self.names[logits], divergence, signals)
            entropy = None if loss.cross_entropy is None else signals.mean(loss.cross_entropy)
            if joined is not None:
                values[joined] = cast(Tensor, entropy)
        for i, compute in enumerate(self.computations):
            if i not in values:
                value = compute(signals)
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
    if signals.sampled is None:
        return {}
    logs: dict[str, Tensor] = {}
    sampled = signals.sampled.tokens.to(values.dtype)
    for part, tokens in (("_own", sampled), ("_data", 1 - sampled)):
        logs |= {name + part: signals.mean(values * tokens), OF_TEXT[part]: signals.mean(tokens)}
    return logs
