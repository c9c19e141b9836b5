"""Divergences between the teacher's and the student's distribution at one position; docs/architecture.md adds one."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from potstill.errors import ShapeError
from potstill.losses.declared import Declared

LOG_ZERO = -1e37  # the log of a probability of 0: its exponential is 0, and 0 times it is 0, where 0 * -inf is NaN


class Divergence(Declared):
    """A divergence between the teacher's p and the student's q over one vocabulary.

    Set `linear_in_teacher` where the slope is linear in p: then an unbiased sample of p gives an unbiased gradient.
    """

    linear_in_teacher: ClassVar[bool] = False

    @abstractmethod
    def pointwise(self, log_q: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
        """Compute (value, slope), which give the divergence in nats and its gradient in logits z, q = softmax(z / T).

            D(p, q) = sum_v value_v,   slope_v = q_v * dD/dq_v,   dD/dz_v = (slope_v - q_v * sum_u slope_u) / T

        All are [..., V], float32 or float64. The log-probabilities are finite, and `LOG_ZERO` where a token is ruled
        out. A constant times q may be added to the slope: it cancels.
        """


def _open_unit(owner: object, name: str, value: float, hint: str) -> None:
    if not 0.0 < value < 1.0:
        raise ShapeError(f"{type(owner).__name__}: expected {name} in the open interval (0, 1), got {value}. {hint}")


@dataclass(frozen=True)
class ForwardKL(Divergence):
    """KL(teacher || student): mode-covering, penalises tokens likely to the teacher only.

        sum_v p_v (log p_v - log q_v)

    References:
        Hinton et al. 2015, arXiv 1503.02531.
    """

    linear_in_teacher = True
    name = "forward_kl"

    def pointwise(self, log_q: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
        p = log_p.exp()
        return p * (log_p - log_q), -p


@dataclass(frozen=True)
class SoftCrossEntropy(Divergence):
    """Cross-entropy with soft targets: forward KL plus the teacher's own entropy.

        -sum_v p_v log q_v

    Its minimum is that entropy, not 0.
    """

    linear_in_teacher = True
    name = "soft_cross_entropy"

    def pointwise(self, log_q: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
        p = log_p.exp()
        return p * -log_q, -p


@dataclass(frozen=True)
class ReverseKL(Divergence):
    """KL(student || teacher): mode-seeking, penalises tokens likely to the student only.

        sum_v q_v (log q_v - log p_v)

    It is infinite where the teacher rules out (-inf logit) a token to which the student gives probability.

    References:
        Gu et al. 2023, arXiv 2306.08543.
    """

    name = "reverse_kl"

    def pointwise(self, log_q: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
        value = log_q.exp() * (log_q - log_p)
        return value, value


@dataclass(frozen=True)
class JSD(Divergence):
    """Generalised Jensen-Shannon divergence; beta weights the teacher in the mixture.

        beta KL(p || m) + (1 - beta) KL(q || m),   m = beta p + (1 - beta) q

    As beta tends to 0 or 1 it tends to 0, not to a KL, so these values are refused.

    References:
        Agarwal et al. 2023, arXiv 2306.13649, section 2.
    """

    beta: float = 0.5
    name = "jsd"

    def __post_init__(self) -> None:
        _open_unit(self, "beta", self.beta, "At 0 and 1 the divergence is 0: use ForwardKL or ReverseKL there.")

    def pointwise(self, log_q: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
        p, q = log_p.exp(), log_q.exp()
        log_m = torch.logaddexp(log_p + math.log(self.beta), log_q + math.log1p(-self.beta))
        slope = (1 - self.beta) * (q * (log_q - log_m))
        return self.beta * (p * (log_p - log_m)) + slope, slope


@dataclass(frozen=True)
class SkewForwardKL(Divergence):
    """Forward KL to a mixture with a share alpha of the teacher: bounded by -log(alpha).

        KL(p || m),   m = alpha p + (1 - alpha) q

    References:
        Ko et al. 2024 (DistiLLM), arXiv 2402.03898, section 3.1.
    """

    alpha: float = 0.1
    name = "skew_forward_kl"

    def __post_init__(self) -> None:
        _open_unit(self, "alpha", self.alpha, "At 0 it is ForwardKL, at 1 it is 0.")

    def pointwise(self, log_q: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
        p = log_p.exp()
        log_m = torch.logaddexp(log_p + math.log(self.alpha), log_q + math.log1p(-self.alpha))
        return p * (log_p - log_m), (self.alpha - 1) * (p * (log_q - log_m).exp())


@dataclass(frozen=True)
class SkewReverseKL(Divergence):
    """Reverse KL to a mixture with a share alpha of the student: bounded by -log(alpha).

        KL(q || m),   m = (1 - alpha) p + alpha q

    References:
        Ko et al. 2024 (DistiLLM), arXiv 2402.03898, section 3.1.
    """

    alpha: float = 0.1
    name = "skew_reverse_kl"

    def __post_init__(self) -> None:
        _open_unit(self, "alpha", self.alpha, "At 0 it is ReverseKL, at 1 it is 0.")

    def pointwise(self, log_q: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
        q = log_q.exp()
        log_m = torch.logaddexp(log_p + math.log1p(-self.alpha), log_q + math.log(self.alpha))
        log_ratio = log_q - log_m
        value = q * log_ratio
        return value, value + q * (1 - self.alpha * log_ratio.exp())


@dataclass(frozen=True)
class TotalVariation(Divergence):
    """Half the L1 distance, in [0, 1].

        1/2 sum_v |p_v - q_v|

    References:
        Wen et al. 2023 (f-DISTILL), arXiv 2307.15190.
    """

    name = "total_variation"

    def pointwise(self, log_q: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
        q = log_q.exp()
        gap = log_p.exp() - q
        return 0.5 * gap.abs(), -0.5 * q * gap.sign()


@dataclass(frozen=True)
class AlphaBeta(Divergence):
    """Alpha-beta divergence: (1, 0) is forward KL, (0, 1) reverse KL, with all combinations between.

        -1/(alpha beta) sum_v [p^alpha q^beta - alpha/(alpha+beta) p^(alpha+beta) - beta/(alpha+beta) q^(alpha+beta)]

    with its limits where alpha or beta is 0.

    Args:
        alpha: >= 0, the weight of hard-to-match tokens.
        beta: >= 0, the weight of the student's own confidence. alpha + beta > 0.

    References:
        Wang et al. 2025 (ABKD), arXiv 2505.04560; Cichocki et al. 2011, Entropy 13, for the limits.
    """

    alpha: float
    beta: float
    name = "alpha_beta"

    def __post_init__(self) -> None:
        if not (self.alpha >= 0 and self.beta >= 0 and 0 < self.alpha + self.beta < math.inf):
            got = f"alpha={self.alpha}, beta={self.beta}"
            hint = "Negative powers are infinite where a token has no probability."
            raise ShapeError(f"AlphaBeta: expected alpha >= 0, beta >= 0 and not both 0, got {got}. {hint}")

    def pointwise(self, log_q: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
        # Both forms are the definition, with 1 = alpha/s + beta/s moved inside the bracket. Each is used where it
        # divides by the larger of alpha and beta, so that neither loses digits near its limit.
        total = self.alpha + self.beta
        x, y, share = (log_p, log_q, self.beta) if self.alpha >= self.beta else (log_q, log_p, self.alpha)
        gap = _power_difference(x, y, total, total) / total - _power_gap(x, y, share, total)
        return gap / max(self.alpha, self.beta), -_power_gap(log_q, log_p, self.alpha, total)


def _power_difference(log_x: Tensor, log_y: Tensor, share: float, total: float) -> Tensor:
    """Compute y^share x^(total-share) - x^total."""
    base = total * log_x
    mixed = share * log_y if share == total else share * log_y + (total - share) * log_x
    step = share * (log_y - log_x)  # a difference of two exponents would be all rounding for a small share
    return torch.where(step.abs() < 0.5, base.exp() * torch.expm1(step), mixed.exp() - base.exp())


def _power_gap(log_x: Tensor, log_y: Tensor, share: float, total: float) -> Tensor:
    """Compute (y^share x^(total-share) - x^total) / share, and x^total (log y - log x) at share = 0."""
    if share == 0:
        return (total * log_x).exp() * (log_y - log_x)
    return _power_difference(log_x, log_y, share, total) / share
