"""Losses per token from whole logits: the readable reference that every faster path is judged against."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from potstill.errors import ShapeError, UserError, VocabularyError
from potstill.losses.alignment import IGNORE
from potstill.losses.divergences import LOG_ZERO, Divergence
from potstill.losses.targets import MixtureTargets, SparseTargets, Targets

# A sum of q (log q - log p) with log p = LOG_ZERO passes this; no divergence of finite logits comes near it.
INFINITE = 1e9


def token_divergence(
    student_logits: Tensor, targets: Targets, divergence: Divergence, *, temperature: float = 1.0
) -> Tensor:
    """The divergence between teacher and student at every token.

        sum_v value_v(log q, log p),   q = softmax(student_logits / T),   p = softmax(teacher_logits / T)

    With `SparseTargets` the sum runs over K + 1 events: the K tokens, and all others together.

    Args:
        student_logits: [..., V], any float dtype; computed in float32 (float64 for float64).
        targets: what the teacher says over the same V, with the same leading shape. No gradient flows to it.
        divergence: which one; a user's own subclass works too.
        temperature: softmax temperature, > 0. No T^2 factor is applied here.

    Returns:
        [...] float32 (float64), nats, unmasked, unreduced.

    Raises:
        VocabularyError: the vocabularies differ.
        ShapeError: the leading shapes differ, the temperature is not positive or not that of sparse targets, sampled
            targets meet a divergence for which they are biased, or the divergence is infinite because the teacher
            rules out (-inf) a token that the student does not.

    >>> from potstill.losses.divergences import ReverseKL
    >>> from potstill.losses.targets import DenseTargets
    >>> student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 0.0]])
    >>> token_divergence(student, DenseTargets(teacher), ReverseKL())
    tensor([0.])
    """
    check_targets("token_divergence", student_logits.shape, targets, divergence, temperature)
    result = unchecked_divergence(student_logits, targets, divergence, temperature)
    check_finite("token_divergence", result, divergence)
    return result


def unchecked_divergence(
    student_logits: Tensor, targets: Targets, divergence: Divergence, temperature: float
) -> Tensor:
    """`token_divergence` without a look at what goes in and comes out."""
    result: Tensor
    with torch.autocast(student_logits.device.type, enabled=False):  # a teacher's head keeps its own precision
        dense = None if isinstance(targets, SparseTargets) else targets.dense(temperature).detach()
    if isinstance(targets, SparseTargets):
        result = _SparseDivergence.apply(  # type: ignore[no-untyped-call]
            student_logits, targets.ids, targets.used(), targets.events(temperature).detach(), divergence, temperature
        )
    else:
        result = _TokenDivergence.apply(  # type: ignore[no-untyped-call]
            student_logits, dense, divergence, temperature
        )
    return result


def check_targets(caller: str, shape: torch.Size, targets: Targets, divergence: Divergence, temperature: float) -> None:
    """Raise what `token_divergence` says of targets that do not fit student logits of a shape [..., V]."""
    if not 0 < temperature < math.inf:
        raise ShapeError(f"{caller}: expected temperature > 0, got {temperature}.")
    if is_sampled(targets) and not divergence.linear_in_teacher:
        raise ShapeError(
            f"{caller}: expected a divergence that is linear in the teacher with sampled targets, got "
            f"{type(divergence).__name__}, for which a sample is biased. Use ForwardKL or SoftCrossEntropy, or "
            'targets of kind "bucket" (a cache of --codec top_k).'
        )
    if isinstance(targets, SparseTargets):
        targets.slice(shape[-1])
    elif targets.vocabulary != shape[-1]:
        size = min(targets.vocabulary, shape[-1])
        raise VocabularyError(
            f"{caller}: expected teacher vocabulary {shape[-1]}, got {targets.vocabulary}. "
            "Per-token divergence needs one vocabulary. If one head is only padded, slice both to the shared "
            f"real size (at most {size}) with targets.slice(n) and "
            + ("student_logits[..., :n]." if caller == "token_divergence" else "head.slice(n).")
        )
    if targets.leading != shape[:-1]:
        raise ShapeError(f"{caller}: expected targets for positions {list(shape[:-1])}, got {list(targets.leading)}.")


def is_sampled(targets: Targets) -> bool:
    """Whether targets are a sample of what the teacher says, or a mixture with one."""
    if isinstance(targets, SparseTargets):
        return targets.kind == "sampled"
    return isinstance(targets, MixtureTargets) and targets.sampled


def check_finite(caller: str, divergences: Tensor, divergence: Divergence) -> None:
    """Raise the error of a divergence that is infinite by definition."""
    if (divergences.detach() > INFINITE).any():
        raise ShapeError(
            f"{caller}: expected a finite {type(divergence).__name__}, got inf: teacher and student rule "
            "out (-inf) different tokens. Use a bounded divergence (JSD, SkewForwardKL, SkewReverseKL), or slice "
            "those tokens off."
        )


def log_probabilities_(logits: Tensor) -> Tensor:
    """log_softmax in place, of logits [..., V] in float32 or float64.

    -inf becomes `LOG_ZERO`. In a row that holds nothing else all probabilities are 0.
    """
    logits.clamp_min_(LOG_ZERO)
    top = logits.amax(-1, keepdim=True)
    nothing = top <= LOG_ZERO
    logits.sub_(top.masked_fill_(nothing, 0.0))
    total = torch.exp(logits).sum(-1, keepdim=True)
    return logits.sub_(total.masked_fill_(nothing, 1.0).log_())


class Row(NamedTuple):
    """A row of logits as exponentials: the largest logit, and the sum of exp(logit - largest); [..., 1] each.

    A row in which every token is ruled out has the largest logit `LOG_ZERO` and the sum 1.
    """

    top: Tensor
    total: Tensor


def exponentials_(logits: Tensor) -> Row:
    """Overwrite logits [..., V] by exp(logit - largest)."""
    top = logits.clamp_min_(LOG_ZERO).amax(-1, keepdim=True)
    nothing = top <= LOG_ZERO
    total = logits.sub_(top.masked_fill(nothing, 0.0)).exp_().sum(-1, keepdim=True)
    return Row(top, total.masked_fill_(nothing, 1.0))


class _TokenDivergence(torch.autograd.Function):
    """The gradient comes from `slope`, made in the forward pass: one [..., V] buffer is kept and no NaN can arise
    from 0 * inf in a chain of elementary operations.
    """

    @staticmethod
    def forward(
        ctx: Any, student_logits: Tensor, teacher_logits: Tensor, divergence: Divergence, temperature: float
    ) -> Tensor:
        log_q, log_p = (
            log_probabilities_(_fresh(logits, student_logits.dtype, temperature))
            for logits in (student_logits, teacher_logits)
        )
        value, slope = divergence.pointwise(log_q, log_p)
        if ctx.needs_input_grad[0]:
            gradient = log_q.exp().mul_(-slope.sum(dim=-1, keepdim=True)).add_(slope)
            ctx.save_for_backward(gradient.div_(temperature))
            ctx.dtype = student_logits.dtype
        return value.sum(dim=-1)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None]:
        refuse_second_derivative("token_divergence")
        (gradient,) = ctx.saved_tensors
        return (grad_outputs[0].unsqueeze(-1) * gradient).to(ctx.dtype), None, None, None


class _SparseDivergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student_logits: Tensor,
        ids: Tensor,
        used: Tensor,
        log_p: Tensor,
        divergence: Divergence,
        temperature: float,
    ) -> Tensor:
        shares = _fresh(student_logits, student_logits.dtype, temperature)
        events = student_events_(shares, ids, used)
        value, gradient = event_divergence(events, log_p, divergence)
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(spread_(shares, events, gradient).div_(temperature))
            ctx.dtype = student_logits.dtype
        return value

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        refuse_second_derivative("token_divergence")
        (gradient,) = ctx.saved_tensors
        return (grad_outputs[0].unsqueeze(-1) * gradient).to(ctx.dtype), None, None, None, None, None


class Events(NamedTuple):
    """The student's probabilities of K tokens and of all others together.

    Args:
        log_q: [..., K + 1].
        total: [..., 1], the sum of the others' `student_events_`.
        tokens: [..., K] int64, the ids; 0 in slots that are not used.
        used: [..., K + 1] bool; the last is False where no other token is left.
    """

    log_q: Tensor
    total: Tensor
    tokens: Tensor
    used: Tensor


def student_events_(
    z: Tensor, ids: Tensor, used: Tensor, exponentials: Callable[[Tensor], Row] = exponentials_
) -> Events:
    """The student's events from its logits over T, z [..., V] float32 or float64.

    z is overwritten: over `total` it is every other token's share of the others' probability, 0 for the K tokens.
    """
    tokens = ids.to(torch.int64) * used
    kept = z.gather(-1, tokens).clamp_min_(LOG_ZERO).masked_fill_(~used, LOG_ZERO)
    # Added and not written: slots that are not used share their id 0 with one that may be.
    z.scatter_add_(-1, tokens, used.to(z.dtype).mul_(2 * LOG_ZERO))
    top, total = exponentials(z)
    nothing = top <= LOG_ZERO
    # The others as one logit, from their distance to the row's largest: so large logits lose no digits.
    largest = torch.maximum(top, kept.amax(-1, keepdim=True))
    others = (top - largest + total.log()).masked_fill_(nothing, LOG_ZERO)
    log_q = log_probabilities_(torch.cat([(kept - largest).clamp_min_(LOG_ZERO), others], -1))
    return Events(log_q, total, tokens, torch.cat([used, ~nothing], -1))


def event_divergence(events: Events, log_p: Tensor, divergence: Divergence) -> tuple[Tensor, Tensor]:
    """The divergence [...] over K + 1 events, and its gradient [..., K + 1] by the student's log-probability of each.

    What is not used is an event of probability 0 on both sides, so that it adds nothing.
    """
    log_p = log_p.to(events.log_q.dtype).masked_fill(~events.used, LOG_ZERO)
    value, slope = divergence.pointwise(events.log_q, log_p)
    value, slope = value * events.used, slope * events.used
    return value.sum(-1), slope - events.log_q.exp() * slope.sum(-1, keepdim=True)


def spread_(shares: Tensor, events: Events, gradient: Tensor) -> Tensor:
    """The gradient by event becomes one by token, [..., V], over what `student_events_` left there.

    dD/dz_v = gradient_v for the K tokens,   share_v * gradient_rest for all others
    """
    shares.mul_(gradient[..., -1:] / events.total)
    return shares.scatter_add_(-1, events.tokens, gradient[..., :-1] * events.used[..., :-1])


def refuse_second_derivative(caller: str) -> None:
    """Raise under create_graph, whose graph would miss the student, in silence."""
    if torch.is_grad_enabled():
        raise UserError(
            f"{caller}: expected a first derivative, got create_graph=True. The gradient is made in "
            "the forward pass. For a second one differentiate the sum of divergence.pointwise itself."
        )


def _fresh(logits: Tensor, like: torch.dtype, temperature: float) -> Tensor:
    """A copy of the logits over T, in the dtype of the computation."""
    return logits.to(compute_dtype(like), copy=True).div_(temperature)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for all else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def label_loss(student_logits: Tensor, labels: Tensor) -> Tensor:
    """The distance from labels: cross-entropy, or the squared error where they are numbers.

    Args:
        student_logits: [N, V]; [N, 1] where labels are numbers.
        labels: [N], of integers (`token_cross_entropy`) or floating point.

    Returns:
        [N] float32 (float64).
    """
    if not labels.is_floating_point():
        return token_cross_entropy(student_logits, labels)
    said = student_logits.to(compute_dtype(student_logits.dtype)).squeeze(-1)
    return (said - labels.to(said.dtype)).square()


def token_cross_entropy(student_logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy with hard labels at every token.

        -log softmax(student_logits)[label]

    Args:
        student_logits: [N, V], any float dtype; computed in float32 (float64 for float64).
        labels: [N] token ids; -100 does not count: 0, without a gradient.

    Returns:
        [N] float32 (float64), nats.
    """
    logits = student_logits.to(compute_dtype(student_logits.dtype))
    return torch.nn.functional.cross_entropy(logits, labels.long(), reduction="none", ignore_index=IGNORE)
