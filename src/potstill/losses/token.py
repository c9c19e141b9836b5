"""Losses per token from whole logits: the readable reference that every faster path is judged against."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from potstill.divergence import Divergence
from potstill.errors import ShapeError, UserError, VocabularyError
from potstill.targets import Targets


def token_divergence(
    student_logits: Tensor, targets: Targets, divergence: Divergence, *, temperature: float = 1.0
) -> Tensor:
    """The divergence between teacher and student at every token.

        sum_v value_v(log q, log p),   q = softmax(student_logits / T),   p = softmax(teacher_logits / T)

    Args:
        student_logits: [..., V], any float dtype; computed in float32 (float64 for float64).
        targets: what the teacher says over the same V, with the same leading shape. No gradient flows to it.
        divergence: which one; a user's own subclass works too.
        temperature: softmax temperature, > 0. No T^2 factor is applied here.

    Returns:
        [...] float32 (float64), nats, unmasked, unreduced.

    Raises:
        VocabularyError: the vocabularies differ.
        ShapeError: the leading shapes differ, the temperature is not positive, or the divergence is infinite
            because the teacher rules out (-inf) a token that the student does not.

    >>> from potstill.divergence import ReverseKL
    >>> from potstill.targets import DenseTargets
    >>> student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 0.0]])
    >>> token_divergence(student, DenseTargets(teacher), ReverseKL())
    tensor([0.])
    """
    if not temperature > 0:
        raise ShapeError(f"token_divergence: expected temperature > 0, got {temperature}.")
    if targets.vocabulary != student_logits.shape[-1]:
        size = min(targets.vocabulary, student_logits.shape[-1])
        raise VocabularyError(
            f"token_divergence: expected teacher vocabulary {student_logits.shape[-1]}, got {targets.vocabulary}. "
            "Per-token divergence needs one vocabulary. If one head is only padded, slice both to the shared "
            f"real size (at most {size}) with targets.slice(n) and student_logits[..., :n]."
        )
    teacher_logits = targets.dense().detach()
    if teacher_logits.shape != student_logits.shape:
        raise ShapeError(
            f"token_divergence: expected targets of shape {list(student_logits.shape)}, "
            f"got {list(teacher_logits.shape)}."
        )
    result: Tensor = _TokenDivergence.apply(  # type: ignore[no-untyped-call]
        student_logits, teacher_logits, divergence, temperature
    )
    if torch.isposinf(result.detach()).any():
        raise ShapeError(
            f"token_divergence: expected a finite {type(divergence).__name__}, got inf: teacher and student rule "
            "out (-inf) different tokens. Use a bounded divergence (JSD, SkewForwardKL, SkewReverseKL), or slice "
            "those tokens off."
        )
    return result


class _TokenDivergence(torch.autograd.Function):
    """The gradient comes from `slope`, made in the forward pass: one [..., V] buffer is kept and no NaN can arise
    from 0 * inf in a chain of elementary operations.
    """

    @staticmethod
    def forward(
        ctx: Any, student_logits: Tensor, teacher_logits: Tensor, divergence: Divergence, temperature: float
    ) -> Tensor:
        dtype = torch.float64 if student_logits.dtype == torch.float64 else torch.float32
        log_q, log_p = (
            torch.log_softmax(logits if temperature == 1 else logits.to(dtype) / temperature, dim=-1, dtype=dtype)
            for logits in (student_logits, teacher_logits)
        )
        value, slope = divergence.pointwise(log_q, log_p)
        if ctx.needs_input_grad[0]:
            # (slope - q * sum(slope)) / T, in place: a [..., V] buffer costs more than its arithmetic.
            gradient = log_q.exp().mul_(-slope.sum(dim=-1, keepdim=True)).add_(slope)
            ctx.save_for_backward(gradient if temperature == 1 else gradient.div_(temperature))
            ctx.dtype = student_logits.dtype
        return value.sum(dim=-1)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None]:
        if torch.is_grad_enabled():  # only under create_graph, whose graph would miss the student, in silence
            raise UserError(
                "token_divergence: expected a first derivative, got create_graph=True. The gradient is made in "
                "the forward pass. For a second one differentiate the sum of divergence.pointwise itself."
            )
        (gradient,) = ctx.saved_tensors
        return (grad_outputs[0].unsqueeze(-1) * gradient).to(ctx.dtype), None, None, None


def token_cross_entropy(student_logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy with hard labels at every token.

        -log softmax(student_logits)[label]

    Args:
        student_logits: [N, V], any float dtype; computed in float32 (float64 for float64).
        labels: [N] token ids, none of them -100: select the counting positions first.

    Returns:
        [N] float32 (float64), nats.
    """
    dtype = torch.float64 if student_logits.dtype == torch.float64 else torch.float32
    return torch.nn.functional.cross_entropy(student_logits.to(dtype), labels, reduction="none")
