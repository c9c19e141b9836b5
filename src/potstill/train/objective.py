"""What is minimised: a weighted sum of terms."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from potstill.divergence import Divergence
from potstill.errors import ShapeError
from potstill.losses import token_cross_entropy, token_divergence, token_mean
from potstill.schedule import Schedule
from potstill.teachers import TeacherOutput

Number = float | Schedule  # every weight and temperature: fixed, or a function of the optimiser step


def value_at(number: Number, step: int) -> float:
    """The number at an optimiser step."""
    return number(step) if callable(number) else number


@dataclass(frozen=True)
class Signals:
    """All that a term may look at: N counting positions of one batch.

    Args:
        student_logits: [N, V].
        labels: [N] token ids.
        teacher: what the teacher said, or None where no term asks for it.
        normalizer: what every mean over tokens divides by, or None for N.
        step: the optimiser step, from 0.
    """

    student_logits: Tensor
    labels: Tensor
    teacher: TeacherOutput | None
    normalizer: Tensor | float | None
    step: int


class Term(ABC):
    """One summand of an objective."""

    name: str
    needs_teacher: bool
    weight: Number

    @abstractmethod
    def __call__(self, signals: Signals) -> Tensor:
        """The term's scalar, without its weight."""


@dataclass(frozen=True)
class Logits(Term):
    """The divergence between the teacher's and the student's next-token distributions.

        T^2 * mean over tokens of D(p, q) at temperature T

    T^2 keeps the gradient's size when T changes (Hinton et al. 2015, arXiv 1503.02531, section 2.1).

    Args:
        divergence: any `Divergence`.
        weight: >= 0.
        temperature: > 0.
    """

    divergence: Divergence
    weight: Number = 1.0
    temperature: Number = 1.0
    name = "logits"
    needs_teacher = True

    def __call__(self, signals: Signals) -> Tensor:
        assert signals.teacher is not None
        temperature = value_at(self.temperature, signals.step)
        values = token_divergence(
            signals.student_logits, signals.teacher.targets, self.divergence, temperature=temperature
        )
        return temperature**2 * token_mean(values, normalizer=signals.normalizer)


@dataclass(frozen=True)
class Labels(Term):
    """Cross-entropy with the tokens of the data."""

    weight: Number = 1.0
    name = "labels"
    needs_teacher = False

    def __call__(self, signals: Signals) -> Tensor:
        return token_mean(token_cross_entropy(signals.student_logits, signals.labels), normalizer=signals.normalizer)


class Objective(nn.Module):
    """The weighted sum of terms.

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
        # Two terms of one kind are told apart in the logs by their place.
        self.names = [f"{n}_{i}" if names.count(n) > 1 else n for i, n in enumerate(names)]
        self.needs_teacher = any(term.needs_teacher for term in terms)

    def forward(self, signals: Signals) -> tuple[Tensor, dict[str, Tensor]]:
        """The scalar loss, and every term's value without its weight, detached."""
        values = [term(signals) for term in self.terms]
        weighted = [value_at(t.weight, signals.step) * v for t, v in zip(self.terms, values, strict=True)]
        return torch.stack(weighted).sum(), {n: v.detach() for n, v in zip(self.names, values, strict=True)}
