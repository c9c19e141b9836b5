"""How small a student may be: estimates from published results, each with its source. None is a promise.

Measure your own: `potstill evaluate`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from potstill.errors import ShapeError

Task = Literal["understanding", "knowledge", "reasoning"]


@dataclass(frozen=True)
class Published:
    """A published pair of teacher and distilled student.

    Args:
        task: understanding (classification, entailment), knowledge (MMLU) or reasoning (GSM8K).
        compression: the teacher's parameters over the student's.
        share: the student's score over the teacher's.
        source: where it stands.
    """

    task: Task
    compression: float
    share: float
    source: str

    @property
    def exponent(self) -> float:
        """The a of share = compression^-a through this point."""
        return -math.log(self.share) / math.log(self.compression)


PUBLISHED = (
    Published("understanding", 1 / 0.6, 0.97, "DistilBERT on GLUE, arXiv 1910.01108"),
    Published("understanding", 7.5, 0.968, "TinyBERT 4 on GLUE, arXiv 1909.10351"),
    Published("knowledge", 8.0 / 4.5, 60.5 / 65.3, "Llama 3.1 Minitron 4B width on MMLU, arXiv 2408.11796"),
    Published("knowledge", 8.0 / 4.5, 58.7 / 65.3, "Llama 3.1 Minitron 4B depth on MMLU, arXiv 2408.11796"),
    Published("reasoning", 8.0 / 4.5, 41.2 / 48.6, "Llama 3.1 Minitron 4B width on GSM8K, arXiv 2408.11796"),
    Published("reasoning", 8.0 / 4.5, 16.8 / 48.6, "Llama 3.1 Minitron 4B depth on GSM8K, arXiv 2408.11796"),
)


@dataclass(frozen=True)
class Estimate:
    """An estimate and what it rests on.

    Args:
        value: in the middle.
        low: with the worst of the published points.
        high: with the best.
        source: the points.
        extrapolated: the student is smaller, beside its teacher, than any of them.
    """

    value: float
    low: float
    high: float
    source: str
    extrapolated: bool


def expected_share(compression: float, task: Task) -> Estimate:
    """The share of the teacher's score that a well distilled student of the same family may keep.

        share = compression^-a

    with the least, the mean and the greatest a of the published points of the task. They are few (two for each task),
    none compresses more than 8 times, and a student that is trained on little data stays below all of them.

    Args:
        compression: the teacher's parameters over the student's, >= 1.
        task: see `Published`.

    Raises:
        ShapeError: there is no such task, or the compression is below 1.
    """
    if not compression >= 1:
        raise ShapeError(f"expected_share: expected a compression >= 1, got {compression}.")
    exponents, source, most = _published(task)
    value, low, high = (compression**-a for a in (sum(exponents) / len(exponents), max(exponents), min(exponents)))
    return Estimate(value, low, high, source, extrapolated=compression > most)


def smallest_student(teacher_parameters: int, share: float, task: Task) -> Estimate:
    """The parameters that a student needs to keep a share of the teacher's score; `expected_share` turned around.

    Args:
        teacher_parameters: of the teacher.
        share: of the teacher's score, in (0, 1).
        task: see `Published`.

    Returns:
        An estimate whose `low` is the smallest of the published points.

    Raises:
        ShapeError: there is no such task, or no such share.
    """
    if not 0 < share < 1:
        raise ShapeError(f"smallest_student: expected a share of the teacher's score in (0, 1), got {share}.")
    exponents, source, most = _published(task)
    values = (sum(exponents) / len(exponents), min(exponents), max(exponents))
    value, low, high = (teacher_parameters * share ** (1 / a) for a in values)
    return Estimate(value, low, high, source, extrapolated=value < teacher_parameters / most)


def _published(task: str) -> tuple[list[float], str, float]:
    points = [point for point in PUBLISHED if point.task == task]
    if not points:
        raise ShapeError(f"capacity: expected a task of {', '.join(get_args(Task))}, got {task}.")
    sources = "; ".join(point.source for point in points)
    return [point.exponent for point in points], sources, max(point.compression for point in points)


@dataclass(frozen=True)
class SupervisedLaw:
    """The loss of a model trained on labels alone.

        L(N, D) = E + (A / N^alpha + B / D^beta)^gamma

    Args:
        irreducible: E, nats a token.
        size: A; alpha, its exponent.
        data: B; beta, its exponent.
        gamma: the exponent around both.
    """

    irreducible: float
    size: float
    alpha: float
    data: float
    beta: float
    gamma: float

    def loss(self, parameters: float, tokens: float) -> float:
        """The law's loss, nats a token."""
        return self.irreducible + (self.size / parameters**self.alpha + self.data / tokens**self.beta) ** self.gamma


@dataclass(frozen=True)
class DistillationLaw:
    """The loss of a student, from its teacher's loss, its own size and its data.

        L_S = L_T + L_T^-c0 (1 + (L_T / (L~_S d1))^(1/f1))^(-c1 f1) (A'/N^alpha' + B'/D^beta')^gamma'

    with L~_S the loss that the same student would have from labels alone. The coefficients belong to one kind of model,
    tokenizer and data, and are arguments here: fit them to a few runs of your own, or take a paper's.

    Args:
        supervised: gives L~_S.
        c0: see above; so c1, d1, f1.
        size: A'; alpha, its exponent.
        data: B'; beta, its exponent.
        gamma: the exponent around both.

    References:
        Busbridge et al. 2025, arXiv 2502.08606, equation 8.
    """

    supervised: SupervisedLaw
    c0: float
    c1: float
    d1: float
    f1: float
    size: float
    alpha: float
    data: float
    beta: float
    gamma: float

    def loss(self, teacher_loss: float, parameters: float, tokens: float) -> float:
        """The student's loss, nats a token.

        Args:
            teacher_loss: of the teacher on the same data, nats a token.
            parameters: of the student, without embeddings, as in the paper.
            tokens: that the student is distilled on.
        """
        alone = self.supervised.loss(parameters, tokens)
        gap = (1 + (teacher_loss / (alone * self.d1)) ** (1 / self.f1)) ** (-self.c1 * self.f1)
        own = (self.size / parameters**self.alpha + self.data / tokens**self.beta) ** self.gamma
        return teacher_loss + teacher_loss**-self.c0 * gap * own
