"""Per-token losses from full logits: the readable reference, and the formulas it shares with the fused losses."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from potstill.errors import ShapeError, UserError, VocabularyError
from potstill.losses.alignment import IGNORE
from potstill.losses.divergences import LOG_ZERO, Divergence
from potstill.losses.targets import SparseTargets, Targets


def token_divergence(
    student_logits: Tensor, targets: Targets, divergence: Divergence, *, temperature: float = 1.0
) -> Tensor:
    """Compute the divergence between teacher and student, per token.

        sum_v value_v(log q, log p),   q = softmax(student_logits / T),   p = softmax(teacher_logits / T)

    With `SparseTargets` the sum runs over K + 1 events: the K tokens, and all others together. From logits [..., V],
    any float dtype, and targets over the same V and positions, without a gradient to them, to [...] float32 (float64
    for float64), nats, unmasked, unreduced, without a T^2 factor.

    Raises:
        VocabularyError: the vocabularies differ.
        ShapeError: the positions differ; T is not positive, or not that of sparse targets; sampled targets with a
            divergence that they would bias; or the teacher rules out (-inf) a token and the divergence is infinite.

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
    """Compute `token_divergence` without checking arguments and result."""
    needs_gradient = torch.is_grad_enabled() and student_logits.requires_grad
    dtype = compute_dtype(student_logits.dtype)
    # The gradient comes from `slope`, in the forward pass: only one [..., V] buffer is kept, and 0 * inf cannot arise
    # in a chain of elementary operations. The teacher's head keeps its own precision under autocast.
    with torch.no_grad():
        scaled = student_logits.to(dtype, copy=True).div_(temperature)
        gradient: Tensor | None = scaled
        if isinstance(targets, SparseTargets):
            events = (targets.events(temperature), targets.ids, targets.used())
            value = event_divergence_(scaled, *events, divergence, 1.0 if needs_gradient else None)
        else:
            with torch.autocast(student_logits.device.type, enabled=False):
                teacher = targets.dense(temperature)
            teacher = teacher.to(dtype, copy=True).div_(temperature)
            value, gradient = dense_divergence_(scaled, teacher, divergence, needs_gradient)
        if not needs_gradient or gradient is None:
            return value
        gradient.div_(temperature)
    return with_gradient(student_logits, value, gradient, "token_divergence")


def with_gradient(inputs: Tensor, value: Tensor, gradient: Tensor, caller: str) -> Tensor:
    """Return `value` [...] with the precomputed derivative `gradient` in `inputs`, [...] or [..., V] both."""
    return cast(Tensor, _PrecomputedGradient.apply(inputs, value, gradient, caller))  # type: ignore[no-untyped-call]


class _PrecomputedGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, value: Tensor, gradient: Tensor, caller: str) -> Tensor:
        ctx.save_for_backward(gradient)
        ctx.dtype, ctx.caller = inputs.dtype, caller
        return value

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None]:
        refuse_second_derivative(ctx.caller)
        (gradient,) = ctx.saved_tensors
        outer = grad_outputs[0]
        outer = outer if outer.ndim == gradient.ndim else outer.unsqueeze(-1)
        return (outer * gradient).to(ctx.dtype), None, None, None


def refuse_second_derivative(caller: str) -> None:
    """Raise an error under create_graph, whose graph would silently miss the student."""
    if torch.is_grad_enabled():
        raise UserError(
            f"{caller}: expected a first derivative, got create_graph=True. The gradient is computed in "
            "the forward pass; for a second derivative differentiate the sum of divergence.pointwise itself."
        )


def check_targets(caller: str, shape: torch.Size, targets: Targets, divergence: Divergence, temperature: float) -> None:
    """Check that targets fit student logits of `shape` [..., V]; raises the errors of `token_divergence`."""
    check_temperature(caller, temperature)
    if isinstance(targets, Tensor):
        raise ShapeError(f"{caller}: expected targets, got a tensor. Logits of a teacher are DenseTargets(logits).")
    if not isinstance(divergence, Divergence):
        raise ShapeError(f"{caller}: expected a Divergence such as ForwardKL(), got {divergence!r}.")
    if targets.sampled and not divergence.linear_in_teacher:
        raise ShapeError(
            f"{caller}: expected a divergence that is linear in the teacher with sampled targets, got "
            f"{type(divergence).__name__}, for which a sample is biased. Use ForwardKL or SoftCrossEntropy, or "
            'targets of kind "bucket" (a cache of --codec top_k).'
        )
    if isinstance(targets, SparseTargets):
        targets.slice(shape[-1])
    elif targets.vocabulary != shape[-1]:
        size = min(targets.vocabulary, shape[-1])
        student = "student_logits[..., :n]" if caller == "token_divergence" else "head.slice(n)"
        raise VocabularyError(
            f"{caller}: expected teacher vocabulary {shape[-1]}, got {targets.vocabulary}. If one head is only padded, "
            f"slice both to the shared real size (at most {size}) with targets.slice(n) and {student}; a Distiller "
            "does it with vocabulary=n."
        )
    if targets.leading != shape[:-1]:
        raise ShapeError(f"{caller}: expected targets for positions {list(shape[:-1])}, got {list(targets.leading)}.")


def check_temperature(caller: str, temperature: float) -> None:
    if not 0 < temperature < math.inf:
        raise ShapeError(f"{caller}: expected temperature > 0, got {temperature}.")


def check_finite(caller: str, values: Tensor, divergence: Divergence) -> None:
    """Raise an error if a divergence is infinite by definition."""
    # q (log q - log p) with log p = LOG_ZERO exceeds 1e9, and no divergence of finite logits comes near it.
    if (values.detach() > 1e9).any():
        expected = f"{caller}: expected a finite {type(divergence).__name__}, got inf"
        hint = "Use a bounded divergence (JSD, SkewForwardKL, SkewReverseKL), or slice those tokens off."
        raise ShapeError(f"{expected}: teacher and student rule out (-inf) different tokens. {hint}")


def log_softmax_(logits: Tensor) -> Tensor:
    """Compute log_softmax in place; -inf becomes `LOG_ZERO`, and a row of nothing but -inf has probabilities of 0."""
    top = logits.clamp_min_(LOG_ZERO).amax(-1, keepdim=True)
    empty = top <= LOG_ZERO
    logits.sub_(top.masked_fill_(empty, 0.0))
    total = torch.exp(logits).sum(-1, keepdim=True)
    return logits.sub_(total.masked_fill_(empty, 1.0).log_())


Exponentials = Callable[[Tensor], tuple[Tensor, Tensor]]


def exponentials_(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Overwrite logits [..., V] with exp(logit - largest); return the largest (`LOG_ZERO` if none) and the sum."""
    top = logits.clamp_min_(LOG_ZERO).amax(-1, keepdim=True)
    empty = top <= LOG_ZERO
    total = logits.sub_(top.masked_fill(empty, 0.0)).exp_().sum(-1, keepdim=True)
    return top, total.masked_fill_(empty, 1.0)


def dense_divergence_(
    student: Tensor, teacher: Tensor, divergence: Divergence, needs_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """Compute the divergence [...] of logits over T [..., V], which become log-probabilities, and its gradient."""
    log_q, log_p = log_softmax_(student), log_softmax_(teacher)
    terms, slope = divergence.pointwise(log_q, log_p)
    gradient = log_q.exp().mul_(-slope.sum(-1, keepdim=True)).add_(slope) if needs_gradient else None
    return terms.sum(-1), gradient


def event_divergence_(
    logits: Tensor,
    log_p: Tensor,
    ids: Tensor,
    used: Tensor,
    divergence: Divergence,
    weight: Tensor | float | None,
    exponentials: Exponentials = exponentials_,
) -> Tensor:
    """Compute the divergence [...] over K + 1 events from the student's logits over T, [..., V] float32 or float64.

    The logits are overwritten, with `weight` times the gradient in them unless it is None:

        dD/dz_v = gradient_v for the K tokens,   share_v * gradient_rest for all others

    An unused slot is an event of probability 0 on both sides, which adds nothing.
    """
    tokens = ids.to(torch.int64) * used
    kept = logits.gather(-1, tokens).clamp_min_(LOG_ZERO).masked_fill_(~used, LOG_ZERO)
    # Added, not assigned: unused slots share id 0 with one that may be used.
    logits.scatter_add_(-1, tokens, used.to(logits.dtype).mul_(2 * LOG_ZERO))
    top, total = exponentials(logits)
    empty = top <= LOG_ZERO
    # The others as one logit, relative to the row's largest, so that large logits lose no digits.
    largest = torch.maximum(top, kept.amax(-1, keepdim=True))
    others = (top - largest + total.log()).masked_fill_(empty, LOG_ZERO)
    log_q = log_softmax_(torch.cat([(kept - largest).clamp_min_(LOG_ZERO), others], -1))
    present = torch.cat([used, ~empty], -1)
    log_p = log_p.to(log_q.dtype).masked_fill(~present, LOG_ZERO)
    value, slope = (terms * present for terms in divergence.pointwise(log_q, log_p))
    if weight is not None:
        gradient = (slope - log_q.exp() * slope.sum(-1, keepdim=True)) * weight
        logits.mul_(gradient[..., -1:] / total).scatter_add_(-1, tokens, gradient[..., :-1] * used)
    return value.sum(-1)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return float64 for float64, float32 for all else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def on_float64_device(values: Tensor) -> Tensor:
    """Return values as they are, or on the CPU where their device (Metal's, mps) has no float64."""
    return values.cpu() if values.device.type == "mps" else values


def in_compute_dtype(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Cast both to the student's `compute_dtype`, the teacher without gradient."""
    dtype = compute_dtype(student.dtype)
    return student.to(dtype), teacher.detach().to(dtype)


def label_loss(student_logits: Tensor, labels: Tensor) -> Tensor:
    """Compute `token_cross_entropy` of integer labels [N], or the squared error of logits [N, 1] to other labels."""
    if not labels.is_floating_point():
        return token_cross_entropy(student_logits, labels)
    predictions = student_logits.to(compute_dtype(student_logits.dtype)).squeeze(-1)
    return (predictions - labels.to(predictions.dtype)).square()


def token_cross_entropy(student_logits: Tensor, labels: Tensor) -> Tensor:
    """Compute the cross-entropy with hard labels, per token: [N] float32 (float64), nats.

    -log softmax(student_logits)[label], from logits [N, V] of any float dtype; 0 without a gradient for the label -100.
    """
    logits = student_logits.to(compute_dtype(student_logits.dtype))
    return torch.nn.functional.cross_entropy(logits, labels.long(), reduction="none", ignore_index=IGNORE)


def token_mean(values: Tensor, weights: Tensor | None = None, normalizer: Tensor | float | None = None) -> Tensor:
    """Compute the weighted mean over tokens, 0 with a gradient of 0 for N = 0. No other place divides by their number.

        sum_n w_n x_n / normalizer,   values x [N], weights w [N] or None for ones

    The normalizer is the number (or weight) of all target tokens in the optimiser step, over ranks and accumulation
    steps; by default the sum of the weights here, at least 1. Raises `ShapeError` if weights and values
    differ in shape.
    """
    if weights is not None and weights.shape != values.shape:
        raise ShapeError(f"token_mean: expected weights of shape {list(values.shape)}, got {list(weights.shape)}.")
    total = (values if weights is None else values * weights).sum()
    if normalizer is None:
        normalizer = max(values.numel(), 1) if weights is None else weights.sum().clamp_min(1)
    if isinstance(normalizer, Tensor):
        normalizer = normalizer.to(total.device, torch.promote_types(total.dtype, torch.float32))
    return total / normalizer
