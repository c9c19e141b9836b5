"""Estimates of how small a student may be, from published results. Measure your own with `potstill evaluate`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import median
from typing import Literal

from potstill.errors import ShapeError

Capability = Literal["understanding", "knowledge", "generation", "reasoning"]  # GLUE, MMLU, summaries, GSM8K
TaskKind = Literal[Capability, "general", "classification", "simple", "medium", "complex"]
# The capabilities that a kind of task needs.
CAPABILITIES: dict[TaskKind, tuple[Capability, ...]] = {
    "understanding": ("understanding",),
    "knowledge": ("knowledge",),
    "generation": ("generation",),
    "reasoning": ("reasoning",),
    "general": ("understanding", "knowledge", "generation", "reasoning"),
    "classification": ("understanding",),
    "simple": ("understanding",),
    "medium": ("knowledge", "generation"),
    "complex": ("reasoning",),
}


@dataclass(frozen=True)
class PublishedResult:
    """A published pair of teacher and distilled student."""

    task: Capability
    compression: float  # the teacher's parameters over the student's
    share: float  # the student's score over the teacher's
    source: str


PUBLISHED = (
    PublishedResult("understanding", 1 / 0.6, 0.97, "DistilBERT on GLUE, arXiv 1910.01108"),
    PublishedResult("understanding", 7.5, 0.968, "TinyBERT 4 on GLUE, arXiv 1909.10351"),
    PublishedResult("knowledge", 8.0 / 4.5, 60.5 / 65.3, "Llama 3.1 Minitron 4B width on MMLU, arXiv 2408.11796"),
    PublishedResult("knowledge", 8.0 / 4.5, 58.7 / 65.3, "Llama 3.1 Minitron 4B depth on MMLU, arXiv 2408.11796"),
    PublishedResult("generation", 406 / 230, 20.17 / 21.06, "DistilBART 6-6 on CNN/DailyMail, arXiv 2010.13002"),
    PublishedResult("generation", 406 / 230, 20.92 / 21.85, "DistilBART 6-6 on XSum, arXiv 2010.13002"),
    PublishedResult("generation", 406 / 222, 18.31 / 21.85, "DistilBART 12-1 on XSum, arXiv 2010.13002"),
    PublishedResult("reasoning", 8.0 / 4.5, 41.2 / 48.6, "Llama 3.1 Minitron 4B width on GSM8K, arXiv 2408.11796"),
    PublishedResult("reasoning", 8.0 / 4.5, 16.8 / 48.6, "Llama 3.1 Minitron 4B depth on GSM8K, arXiv 2408.11796"),
)


@dataclass(frozen=True)
class CapacityEstimate:
    """An estimate from published results: from their median exponent, and from the least and the greatest."""

    value: float
    low: float
    high: float
    source: str
    extrapolated: bool  # whether the student is smaller, relative to its teacher, than any of theirs


def expected_share(compression: float, task: TaskKind) -> CapacityEstimate:
    """Estimate the share of the teacher's score that a well distilled student of the same family may keep.

        share = compression^-a

    with the least, the median and the greatest a of the published results of the task's capabilities. They are few (two
    or three for each), none compresses more than 8 times, and a student that is trained on little data stays below all
    of them.

    Raises:
        ShapeError: the task is not known, or the compression is below 1.
    """
    if not compression >= 1:
        raise ShapeError(f"expected_share: expected a compression >= 1, got {compression}.")
    least, middle, most, largest, source = _published(task)
    return CapacityEstimate(
        compression**-middle, compression**-most, compression**-least, source, compression > largest
    )


def smallest_student(teacher_parameters: int, share: float, task: TaskKind) -> CapacityEstimate:
    """Estimate the parameters that a student needs for a share of the teacher's score: `expected_share` inverted."""
    if not 0 < share < 1:
        raise ShapeError(f"smallest_student: expected a share of the teacher's score in (0, 1), got {share}.")
    least, middle, most, largest, source = _published(task)
    value, low, high = (teacher_parameters * share ** (1 / a) for a in (middle, least, most))
    return CapacityEstimate(value, low, high, source, extrapolated=value < teacher_parameters / largest)


def _published(task: TaskKind) -> tuple[float, float, float, float, str]:
    """Least, median and greatest exponent of a task's results, their largest compression, and their sources."""
    if task not in CAPABILITIES:
        raise ShapeError(f"capacity: expected a task of {', '.join(CAPABILITIES)}, got {task}.")
    results = [result for result in PUBLISHED if result.task in CAPABILITIES[task]]
    exponents = [-math.log(result.share) / math.log(result.compression) for result in results]
    largest, source = max(result.compression for result in results), "; ".join(result.source for result in results)
    return min(exponents), median(exponents), max(exponents), largest, source


@dataclass(frozen=True)
class SupervisedLaw:
    """Scaling law of a model trained on labels alone.

    L(N, D) = E + (A / N^alpha + B / D^beta)^gamma      nats per token; N parameters, D tokens
    """

    irreducible: float  # E
    size: float  # A
    alpha: float
    data: float  # B
    beta: float
    gamma: float

    def loss(self, parameters: float, tokens: float) -> float:
        return self.irreducible + (self.size / parameters**self.alpha + self.data / tokens**self.beta) ** self.gamma


@dataclass(frozen=True)
class DistillationLaw:
    """Scaling law of a distilled student.

        L_S = L_T + L_T^-c0 (1 + (L_T / (L~_S d1))^(1/f1))^(-c1 f1) (A'/N^alpha' + B'/D^beta')^gamma'

    with L~_S the loss of the same student trained on labels alone, and N without embeddings. The coefficients depend on
    the kind of model, tokenizer and data: fit them to a few runs of your own, or take a paper's.

    References:
        Busbridge et al. 2025, arXiv 2502.08606, equation 8.
    """

    supervised: SupervisedLaw  # of L~_S
    c0: float
    c1: float
    d1: float
    f1: float
    size: float  # A'
    alpha: float
    data: float  # B'
    beta: float
    gamma: float

    def loss(self, teacher_loss: float, parameters: float, tokens: float) -> float:
        """Compute the student's loss from its teacher's on the same data, both in nats per token."""
        alone = self.supervised.loss(parameters, tokens)
        gap = (1 + (teacher_loss / (alone * self.d1)) ** (1 / self.f1)) ** (-self.c1 * self.f1)
        own = (self.size / parameters**self.alpha + self.data / tokens**self.beta) ** self.gamma
        return teacher_loss + teacher_loss**-self.c0 * gap * own
