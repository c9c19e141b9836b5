"""Between models with different tokenizers: likelihoods of chunks of text, sorted probabilities, and boundary bias."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from potstill.errors import ShapeError
from potstill.losses.divergences import LOG_ZERO, Divergence
from potstill.losses.token import compute_dtype, log_probabilities_, refuse_second_derivative


def chunk_log_probs(log_probs: Tensor, chunk: Tensor, chunks: int) -> Tensor:
    """The log-probability of each chunk of tokens, by the chain rule: exact.

        log P(chunk c) = sum of log_probs_n over tokens n with chunk_n = c

    Args:
        log_probs: [N] of the tokens, nats, with gradient.
        chunk: [N] the chunk of each token, 0 to chunks - 1; -1 belongs to none.
        chunks: how many there are.

    Returns:
        [chunks] nats.
    """
    there = chunk >= 0
    return log_probs.new_zeros(chunks).index_add(0, chunk[there], log_probs[there])


def chunk_divergence(log_q: Tensor, log_p: Tensor, divergence: Divergence, *, temperature: float = 100.0) -> Tensor:
    """Approximate likelihood matching: how far apart two models find a chunk, as an event that happens or does not.

        T * D((p, 1 - p), (q, 1 - q)),   p = P_teacher(chunk)^(1/T),   q = P_student(chunk)^(1/T)

    T in front keeps the size when T changes: for a large T forward KL tends to l_p log(l_p / l_q) - l_p + l_q, of
    l = -log P. T = 1 is the divergence between the two events themselves.

    Args:
        log_q: [C] the student's log-probabilities of the chunks, nats; at least float32.
        log_p: [C] the teacher's. No gradient flows to it.
        divergence: which one, over the two events.
        temperature: T, > 0.

    Returns:
        [C] nats, unreduced. Finite where the teacher is certain or rules a chunk out, and where the student is certain:
        its certainty is taken as 1 minus the rounding of a number near 1.

    Raises:
        ShapeError: the shapes differ, or the temperature is not positive.

    References:
        Minixhofer et al. 2025 (ALM), arXiv 2503.20083.
    """
    if log_q.shape != log_p.shape:
        raise ShapeError(
            f"chunk_divergence: expected one shape, got {list(log_q.shape)} for the student and {list(log_p.shape)}."
        )
    if not 0 < temperature < math.inf:
        raise ShapeError(f"chunk_divergence: expected temperature > 0, got {temperature}.")
    result: Tensor = _ChunkDivergence.apply(log_q, log_p, divergence, temperature)  # type: ignore[no-untyped-call]
    return result


class _ChunkDivergence(torch.autograd.Function):
    """With Q_1 = q and Q_2 = 1 - q: dD/dlog P = (slope_1 - slope_2 Q_1 / Q_2) / T."""

    @staticmethod
    def forward(ctx: Any, log_q: Tensor, log_p: Tensor, divergence: Divergence, temperature: float) -> Tensor:
        dtype = compute_dtype(log_q.dtype)
        events = [_events(x.to(dtype), temperature) for x in (log_q, log_p)]
        value, slope = divergence.pointwise(*events)
        happens, fails = slope.unbind(-1)
        odds = (events[0][..., 0] - events[0][..., 1]).exp()
        ctx.save_for_backward(happens - fails * odds)  # T in front and 1 / T of the chain rule cancel
        ctx.dtype = log_q.dtype
        return temperature * value.sum(-1)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None]:
        refuse_second_derivative("chunk_divergence")
        (gradient,) = ctx.saved_tensors
        return (grad_outputs[0] * gradient).to(ctx.dtype), None, None, None


def _events(log_probs: Tensor, temperature: float) -> Tensor:
    """[..., 2]: the logarithms of x^(1/T) and 1 - x^(1/T)."""
    scaled = log_probs.clamp(LOG_ZERO, -torch.finfo(log_probs.dtype).eps) / temperature
    # Each form where the other would lose its digits.
    near_one = torch.log(-torch.expm1(scaled.clamp_min(-1.0)))
    far = torch.log1p(-torch.exp(scaled))
    return torch.stack([scaled, torch.where(scaled > -math.log(2), near_one, far)], -1)


def sorted_distance(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Universal logit distillation (ULD): the distance of the probabilities in falling order, whatever they are of.

        sum_i |q_(i) - p_(i)|,   the shorter of both filled up with 0

    It is 0 for a student that has the teacher's probabilities under other tokens.

    Args:
        student_logits: [..., V], any float dtype; computed in float32 (float64 for float64).
        teacher_logits: [..., W]. No gradient flows to it.
        temperature: softmax temperature of both, > 0.

    Returns:
        [...], in [0, 2], unreduced.

    Raises:
        ShapeError: the leading shapes differ, or the temperature is not positive.

    References:
        Boizard et al. 2024 (ULD), arXiv 2402.12030, section 3.
    """
    if student_logits.shape[:-1] != teacher_logits.shape[:-1]:
        raise ShapeError(
            f"sorted_distance: expected logits for the same positions, got {list(student_logits.shape)} and "
            f"{list(teacher_logits.shape)}."
        )
    if not 0 < temperature < math.inf:
        raise ShapeError(f"sorted_distance: expected temperature > 0, got {temperature}.")
    dtype = compute_dtype(student_logits.dtype)
    both = (z.to(dtype).clamp_min(LOG_ZERO) / temperature for z in (student_logits, teacher_logits.detach()))
    q, p = (z.softmax(-1).sort(-1, descending=True).values for z in both)
    size = max(q.shape[-1], p.shape[-1])
    q, p = (torch.nn.functional.pad(x, (0, size - x.shape[-1])) for x in (q, p))
    return (q - p).abs().sum(-1)


@torch.no_grad()
def boundary_bias(logits: Tensor, tokens: Tensor, longer: Tensor, position: Tensor) -> Tensor:
    """How much of the probability that a text begins with a token lies on longer tokens.

        sum of P(t) over the longer t / (that + P(token))

    A model has learnt that a token is not followed by what would have made a longer one. A model that can go on there
    gives the same bytes another probability, and the two do not compare.

    Args:
        logits: [n, V] of a model.
        tokens: [n] the token at each position.
        longer: [L] token ids that begin with the token and go on, of all positions one after another.
        position: [L] the row of `logits` that each of them belongs to.

    Returns:
        [n] in [0, 1]; 0 where there is no longer token.
    """
    log_probs = log_probabilities_(logits.to(compute_dtype(logits.dtype), copy=True))
    own = log_probs.gather(-1, tokens[:, None])[:, 0].exp()
    others = torch.zeros_like(own).index_add_(0, position, log_probs[position, longer].exp())
    total = own + others
    return torch.where(total > 0, others / total.clamp_min(torch.finfo(total.dtype).tiny), 0.0)
