"""Terms over the logits of student and teacher: formulas that no fused pass through the head knows."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from potstill.errors import ShapeError
from potstill.losses.adaptive import adaptive_kl, interpolated_logits
from potstill.losses.alignment import ANSWERS, DISTRIBUTIONS
from potstill.losses.bild import bild
from potstill.losses.divergences import ForwardKL
from potstill.losses.targets import DenseTargets, HeadTargets, SparseTargets, Targets
from potstill.losses.token import is_sampled, token_divergence
from potstill.train.objective import Number, Signals, Term, value_at

LOGITS_BYTES = 2**26  # of the student's logits at a time: 500 tokens of 32,000


class DenseTerm(Term):
    """A term that compares logits token by token.

    Where the student has a plain head, the logits of some tokens at a time are made, and made again in the backward
    pass: memory does not grow with N. A student that gives whole logits is compared as a whole.
    """

    needs_teacher = True
    tasks = DISTRIBUTIONS
    temperature: Number = 1.0  # of the distributions that are compared

    @abstractmethod
    def compare(self, student: Tensor, teacher: Tensor, step: int) -> Tensor:
        """The term's value [N] by token, from logits [N, V]."""

    def __call__(self, signals: Signals) -> Tensor:
        assert signals.teacher is not None
        student, teacher = signals.student, signals.teacher.targets
        tokens = len(signals.labels)
        few = max(1, LOGITS_BYTES // (4 * student.vocabulary))
        if tokens <= few or not isinstance(student, HeadTargets):
            return signals.mean(self._values(student, teacher, signals.step))
        parts = (slice(first, first + few) for first in range(0, tokens, few))
        values = [
            checkpoint(
                self._values,
                student.rows(part),
                teacher.rows(part),
                signals.step,
                use_reentrant=False,
                preserve_rng_state=False,
            )
            for part in parts
        ]
        return signals.mean(torch.cat(values))

    def _values(self, student: HeadTargets | DenseTargets, teacher: Targets, step: int) -> Tensor:
        logits = student.dense()
        with torch.autocast(logits.device.type, enabled=False):
            return self.compare(logits, self.whole(teacher, value_at(self.temperature, step)), step)

    def whole(self, targets: Targets, temperature: float = 1.0) -> Tensor:
        """The teacher's logits [N, V] for a temperature.

        Raises:
            ShapeError: it gives a few tokens of each distribution alone.
        """
        if isinstance(targets, SparseTargets) or is_sampled(targets):
            raise ShapeError(
                f"{self.name}: expected the teacher's whole distributions, got a few tokens of each. "
                "Use the term logits, or a teacher that is a model or a dense cache."
            )
        return targets.dense(temperature).detach()


@dataclass(frozen=True)
class Values(DenseTerm):
    """The squared distance of what both models say, before any softmax: the soft target of a regression.

        mean over tokens of mean_v (z_v - t_v)^2

    Args:
        weight: >= 0.

    References:
        Ba and Caruana 2014, arXiv 1312.6184, section 2.
    """

    weight: Number = 1.0
    name = "values"
    tasks = ANSWERS

    def compare(self, student: Tensor, teacher: Tensor, step: int) -> Tensor:
        """See `DenseTerm`."""
        dtype = torch.promote_types(student.dtype, torch.float32)
        return (student.to(dtype) - teacher.to(dtype)).square().mean(-1)


@dataclass(frozen=True)
class BiLD(DenseTerm):
    """The differences between the largest logits, as both models rank them; see `potstill.losses.bild`.

    Args:
        weight: >= 0.
        top_k: how many logits of each.
        temperature: > 0. No T^2 factor is applied, as in the paper.
    """

    weight: Number = 1.0
    top_k: int = 8
    temperature: Number = 3.0
    name = "bild"

    def compare(self, student: Tensor, teacher: Tensor, step: int) -> Tensor:
        """See `DenseTerm`."""
        return bild(student, teacher, min(self.top_k, student.shape[-1]), value_at(self.temperature, step))


@dataclass(frozen=True)
class AdaptiveKL(DenseTerm):
    """T^2 times forward and reverse KL, weighted by where the models differ; see `potstill.losses.adaptive`.

    Args:
        weight: >= 0.
        head_mass: the share of the teacher's probability that is its head, in (0, 1).
        temperature: > 0.
    """

    weight: Number = 1.0
    head_mass: float = 0.5
    temperature: Number = 1.0
    name = "adaptive_kl"

    def compare(self, student: Tensor, teacher: Tensor, step: int) -> Tensor:
        """See `DenseTerm`."""
        temperature = value_at(self.temperature, step)
        return temperature**2 * adaptive_kl(student, teacher, self.head_mass, temperature)


@dataclass(frozen=True)
class TAID(DenseTerm):
    """T^2 times forward KL to a target between student and teacher, that moves to the teacher over training.

        target = softmax(((1 - share) z_s + share z_t) / T),   z_s without gradient

    Args:
        share: of the teacher: a schedule from 0.4 to 1, as in the paper, where it is also sped up as the loss falls.
        weight: >= 0.
        temperature: > 0.

    References:
        Shing et al. 2025 (TAID), arXiv 2501.16937.
    """

    share: Number
    weight: Number = 1.0
    temperature: Number = 1.0
    name = "taid"

    def compare(self, student: Tensor, teacher: Tensor, step: int) -> Tensor:
        """See `DenseTerm`."""
        temperature = value_at(self.temperature, step)
        target = interpolated_logits(student, teacher, value_at(self.share, step))
        apart = token_divergence(student, DenseTargets(target), ForwardKL(), temperature=temperature)
        return temperature**2 * apart
