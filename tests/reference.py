"""The papers' formulas as loops over probabilities, in float64: what every fast path is judged against.

Nothing here is shared with the package. A formula takes p (the teacher) and q (the student), two lists of
probabilities over one vocabulary, and gives nats.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from decimal import Decimal, localcontext
from functools import partial

import torch
from torch import Tensor

from potstill.losses.divergences import (
    JSD,
    AlphaBeta,
    Divergence,
    ForwardKL,
    ReverseKL,
    SkewForwardKL,
    SkewReverseKL,
    SoftCrossEntropy,
    TotalVariation,
)


def softmax(logits: list[float], temperature: float = 1.0) -> list[float]:
    top = max(logits)
    powers = [math.exp((logit - top) / temperature) for logit in logits]
    return [power / sum(powers) for power in powers]


def forward_kl(p: list[float], q: list[float]) -> float:
    total = 0.0
    for teacher, student in zip(p, q, strict=True):
        if teacher > 0:
            total += teacher * math.log(teacher / student) if student > 0 else math.inf
    return total


def reverse_kl(p: list[float], q: list[float]) -> float:
    return forward_kl(q, p)


def mixture(share: float, a: list[float], b: list[float]) -> list[float]:
    return [share * x + (1 - share) * y for x, y in zip(a, b, strict=True)]


def jsd(p: list[float], q: list[float], beta: float) -> float:
    """GKD, arXiv 2306.13649: beta weights the teacher."""
    m = mixture(beta, p, q)
    return beta * forward_kl(p, m) + (1 - beta) * forward_kl(q, m)


def skew_forward_kl(p: list[float], q: list[float], alpha: float) -> float:
    """DistiLLM, arXiv 2402.03898."""
    return forward_kl(p, mixture(alpha, p, q))


def skew_reverse_kl(p: list[float], q: list[float], alpha: float) -> float:
    """DistiLLM, arXiv 2402.03898."""
    return forward_kl(q, mixture(alpha, q, p))


def total_variation(p: list[float], q: list[float]) -> float:
    return sum(abs(teacher - student) for teacher, student in zip(p, q, strict=True)) / 2


def soft_cross_entropy(p: list[float], q: list[float]) -> float:
    return -sum(teacher * math.log(student) for teacher, student in zip(p, q, strict=True) if teacher > 0)


def alpha_beta(p: list[float], q: list[float], alpha: float, beta: float) -> float:
    """ABKD, arXiv 2505.04560. In 50 digits, because 1/(alpha beta) magnifies the rounding of the bracket."""
    if beta == 0:  # the limit in Cichocki et al. 2011, equation 20
        total = 0.0
        for teacher, student in zip(p, q, strict=True):
            x, y = teacher**alpha, student**alpha
            total += (x * math.log(x / y) if x > 0 else 0.0) - x + y
        return total / alpha**2
    if alpha == 0:  # the same with the two distributions exchanged
        return alpha_beta(q, p, beta, 0)
    with localcontext(prec=50):
        a, b, total = Decimal(alpha), Decimal(beta), Decimal(0)
        for teacher, student in zip(map(Decimal, p), map(Decimal, q), strict=True):
            total += teacher**a * student**b
            total -= (a * teacher ** (a + b) + b * student ** (a + b)) / (a + b)
        return float(-total / (a * b))


def squared_hellinger(p: list[float], q: list[float]) -> float:
    return sum((math.sqrt(t) - math.sqrt(s)) ** 2 for t, s in zip(p, q, strict=True)) / 2


@dataclass(frozen=True)
class SquaredHellinger(Divergence):
    """What a user may add: nothing in the package knows of it, and it must work everywhere."""

    def pointwise(self, log_q: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
        p, q = log_p.exp(), log_q.exp()
        return 0.5 * (p.sqrt() - q.sqrt()) ** 2, -0.5 * (p * q).sqrt()


FORMULAS: dict[type[Divergence], Callable[..., float]] = {
    ForwardKL: forward_kl,
    ReverseKL: reverse_kl,
    JSD: jsd,
    SkewForwardKL: skew_forward_kl,
    SkewReverseKL: skew_reverse_kl,
    TotalVariation: total_variation,
    SoftCrossEntropy: soft_cross_entropy,
    AlphaBeta: alpha_beta,
    SquaredHellinger: squared_hellinger,
}

# Each kind, at parameters that tell its two ends apart, and the user's own.
DIVERGENCES = [
    ForwardKL(),
    ReverseKL(),
    JSD(),
    JSD(0.1),
    JSD(0.999),
    SkewForwardKL(),
    SkewForwardKL(0.7),
    SkewReverseKL(),
    SkewReverseKL(0.7),
    TotalVariation(),
    SoftCrossEntropy(),
    AlphaBeta(1, 0),
    AlphaBeta(0, 1),
    AlphaBeta(0.5, 0.5),
    AlphaBeta(0.2, 0.7),
    AlphaBeta(0.7, 0.2),
    AlphaBeta(1, 1),
    AlphaBeta(1, 1e-6),
    AlphaBeta(1e-6, 1),
    SquaredHellinger(),
]


def formula(divergence: Divergence) -> Callable[[list[float], list[float]], float]:
    """The loop for a divergence, with its parameters filled in."""
    return partial(FORMULAS[type(divergence)], **asdict(divergence))


def token_divergence(student: Tensor, teacher: Tensor, divergence: Divergence, temperature: float = 1.0) -> Tensor:
    """[...] float64 from logits [..., V], one token after the other."""
    loop, V = formula(divergence), student.shape[-1]
    values = [
        loop(softmax(p, temperature), softmax(q, temperature))
        for p, q in zip(teacher.reshape(-1, V).tolist(), student.reshape(-1, V).tolist(), strict=True)
    ]
    return torch.tensor(values, dtype=torch.float64).reshape(student.shape[:-1])


def sparse_events(
    q: list[float], ids: list[int], log_probs: list[float], kind: str, ratio: float
) -> tuple[list[float], list[float]]:
    """The teacher's and the student's probabilities of the K tokens and, last, of all others together.

    A slot with log probability -inf holds no token. ratio is the temperature that the log_probs were taken at, over
    the one that is asked for.
    """
    held = {token: log_prob for token, log_prob in zip(ids, log_probs, strict=True) if log_prob > -math.inf}
    teacher = [math.exp(log_prob) for log_prob in held.values()]
    if kind == "renormalized" and held:
        teacher = softmax([log_prob * ratio for log_prob in held.values()])
    others = [token for token in range(len(q)) if token not in held]
    rest = max(0.0, 1 - sum(teacher)) if kind == "bucket" and others else 0.0
    return [*teacher, rest], [*(q[token] for token in held), sum(q[token] for token in others)]


def sparse_divergence(
    student: Tensor,
    ids: Tensor,
    log_probs: Tensor,
    kind: str,
    divergence: Divergence,
    temperature: float = 1.0,
    taken_at: float = 1.0,
) -> Tensor:
    """[N] float64 from logits [N, V] and the teacher's K tokens [N, K] at the temperature they were taken at."""
    loop = formula(divergence)
    values = [
        loop(*sparse_events(softmax(row, temperature), row_ids, row_log_probs, kind, taken_at / temperature))
        for row, row_ids, row_log_probs in zip(student.tolist(), ids.tolist(), log_probs.tolist(), strict=True)
    ]
    return torch.tensor(values, dtype=torch.float64)


def head_logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    size: int | None = None,
) -> Tensor:
    """[N, V] float64 from hidden [N, H] and weight [V, H], without a matrix product."""
    logits = (hidden.double().unsqueeze(1) * weight.double()).sum(-1)
    if bias is not None:
        logits = logits + bias.double()
    logits = logits[:, :size] * logit_scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """[N] float64 from logits [N, V] and labels [N]: -log softmax(logits)[label]."""
    rows = zip(logits.tolist(), labels.tolist(), strict=True)
    values = [-math.log(softmax(row)[label]) for row, label in rows]
    return torch.tensor(values, dtype=torch.float64)


def causal_alignment(labels: list[list[int]]) -> list[tuple[int, int, int]]:
    """(row, position, label to predict there) of every counting position: position t predicts token t + 1."""
    counting = []
    for row, tokens in enumerate(labels):
        for position in range(len(tokens) - 1):
            if tokens[position + 1] != -100:
                counting.append((row, position, tokens[position + 1]))
    return counting
