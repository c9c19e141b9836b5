"""Terms over whole logits of student and teacher, with formulas that have no fused pass through the head."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from functools import partial
from typing import Annotated

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from potstill.errors import ShapeError
from potstill.losses.alignment import DISTRIBUTION_TASKS, HEAD_TASKS
from potstill.losses.declared import Range
from potstill.losses.divergences import ForwardKL
from potstill.losses.logit_losses import adaptive_kl, bild, interpolated_logits
from potstill.losses.schedule import Linear, Number, Share, Temperature, Weight, value_at
from potstill.losses.targets import DenseTargets, HeadTargets, SparseTargets, Targets
from potstill.losses.token_losses import token_divergence
from potstill.train.signals import Signals
from potstill.train.terms.term import Term

LOGITS_BYTES = 2**26  # of the student's logits at a time: 500 tokens of 32,000


class DenseTerm(Term):
    """A term that compares logits token by token.

    Where the student has a plain head, logits are computed for some tokens at a time, and again in the backward pass:
    memory does not grow with N. A student that gives whole logits is compared at once.
    """

    tasks = DISTRIBUTION_TASKS
    temperature: Number = 1.0  # of the distributions that are compared

    @abstractmethod
    def compare(self, student: Tensor, teacher: Tensor, temperature: float, step: int) -> Tensor:
        """Compute the term's value [N] by token, from logits [N, V]."""

    def __call__(self, signals: Signals) -> Tensor:
        assert signals.teacher is not None
        student, teacher, num_tokens = signals.student, signals.teacher.targets, len(signals.labels)
        chunk = max(1, LOGITS_BYTES // (4 * student.vocabulary))
        if num_tokens <= chunk or not isinstance(student, HeadTargets):
            return signals.mean(self._values(student, teacher, signals.step))
        recomputed = partial(checkpoint, self._values, use_reentrant=False, preserve_rng_state=False)
        parts = (slice(first, first + chunk) for first in range(0, num_tokens, chunk))
        values = [recomputed(student.rows(part), teacher.rows(part), signals.step) for part in parts]
        return signals.mean(torch.cat(values))

    def _values(self, student: HeadTargets | DenseTargets, teacher: Targets, step: int) -> Tensor:
        logits, temperature = student.dense(), value_at(self.temperature, step)
        with torch.autocast(logits.device.type, enabled=False):
            return self.compare(logits, self.teacher_logits(teacher, temperature), temperature, step)

    def teacher_logits(self, targets: Targets, temperature: float = 1.0) -> Tensor:
        """Return the teacher's logits [N, V] for a temperature; raises ShapeError for targets of only some tokens."""
        if isinstance(targets, SparseTargets) or targets.sampled:
            raise ShapeError(
                f"{self.name}: expected the teacher's whole distributions, got a few tokens of each. "
                "Use the term logits, or a teacher that is a model or a dense cache."
            )
        return targets.dense(temperature).detach()


@dataclass(frozen=True)
class Values(DenseTerm):
    """Match the teacher's logits by their squared distance, before any softmax: the soft target of a regression.

        mean over tokens of mean_v (z_v - t_v)^2

    References:
        Ba and Caruana 2014, arXiv 1312.6184, section 2.
    """

    weight: Weight = 1.0
    name = "values"
    tasks = HEAD_TASKS

    def compare(self, student: Tensor, teacher: Tensor, temperature: float, step: int) -> Tensor:
        dtype = torch.promote_types(student.dtype, torch.float32)
        return (student.to(dtype) - teacher.to(dtype)).square().mean(-1)


@dataclass(frozen=True)
class BiLD(DenseTerm):
    """Match differences between the largest logits of both models (BiLD); see `potstill.losses.logit_losses`.

    Args:
        top_k: logits of each model that are compared.
        temperature: > 0. No T^2 factor is applied, as in the paper.
    """

    weight: Weight = 1.0
    top_k: Annotated[int, Range(ge=2)] = 8
    temperature: Temperature = 3.0
    name = "bild"

    def compare(self, student: Tensor, teacher: Tensor, temperature: float, step: int) -> Tensor:
        return bild(student, teacher, min(self.top_k, student.shape[-1]), temperature)


@dataclass(frozen=True)
class AdaptiveKL(DenseTerm):
    """T^2 times forward and reverse KL, weighted by where the models differ (AKL); see `potstill.losses.logit_losses`.

    Args:
        head_mass: probability of the teacher's most likely tokens that form its head, in (0, 1).
        temperature: > 0.
    """

    weight: Weight = 1.0
    head_mass: Annotated[float, Range(gt=0, lt=1)] = 0.5
    temperature: Temperature = 1.0
    name = "adaptive_kl"

    def compare(self, student: Tensor, teacher: Tensor, temperature: float, step: int) -> Tensor:
        return temperature**2 * adaptive_kl(student, teacher, self.head_mass, temperature)


@dataclass(frozen=True)
class TAID(DenseTerm):
    """T^2 times forward KL to a target that moves from the student to the teacher over training (TAID).

        target = softmax(((1 - share) z_s + share z_t) / T),   z_s without gradient

    Args:
        share: of the teacher, in [0, 1]; by default linear from 0.4 to 1 over the run. The paper also speeds it up as
            the loss falls.
        temperature: > 0.

    References:
        Shing et al. 2025 (TAID), arXiv 2501.16937.
    """

    share: Share = Linear(0.4, 1.0)
    weight: Weight = 1.0
    temperature: Temperature = 1.0
    name = "taid"

    def compare(self, student: Tensor, teacher: Tensor, temperature: float, step: int) -> Tensor:
        target = interpolated_logits(student, teacher, value_at(self.share, step))
        return temperature**2 * token_divergence(student, DenseTargets(target), ForwardKL(), temperature=temperature)
