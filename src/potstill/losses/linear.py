"""linear_divergence: head and divergence in one, exact, without the logits."""

from __future__ import annotations

import warnings
from dataclasses import replace
from functools import cache
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor

from potstill.errors import ShapeError, UserError
from potstill.losses.alignment import IGNORE
from potstill.losses.chunked import Job, Result, Tail, Wanted, run
from potstill.losses.divergences import Divergence
from potstill.losses.native import native_tail
from potstill.losses.reduce import token_mean
from potstill.losses.tail import TorchTail
from potstill.losses.targets import HeadTargets, LMHead, MixtureTargets, SparseTargets, Targets, Whole
from potstill.losses.token import (
    check_finite,
    check_targets,
    compute_dtype,
    refuse_second_derivative,
    token_cross_entropy,
    unchecked_divergence,
)
from potstill.losses.uncompiled import uncompiled

Backend = Literal["auto", "eager", "chunked", "triton"]
Reduction = Literal["mean", "none"]


class FusedLoss(NamedTuple):
    """What `linear_divergence` gives.

    Args:
        loss: a scalar, or [N] with reduction "none"; with gradient to hidden, head.weight and head.bias.
        divergence: [N] nats, detached; None without targets.
        cross_entropy: [N] nats, detached; None without labels.
    """

    loss: Tensor
    divergence: Tensor | None
    cross_entropy: Tensor | None


def linear_divergence(
    hidden: Tensor,
    head: LMHead,
    targets: Targets | None,
    divergence: Divergence | None,
    *,
    temperature: float = 1.0,
    token_weights: Tensor | None = None,
    normalizer: Tensor | float | None = None,
    labels: Tensor | None = None,
    label_weight: float = 0.0,
    reduction: Reduction = "mean",
    backend: Backend = "auto",
    chunk_tokens: int | None = None,
) -> FusedLoss:
    """The divergence between a teacher and a student's head over its last hidden states, and hard-label cross-entropy.

        loss = sum_n w_n (D_n + label_weight * CE_n) / normalizer

    The same numbers as `token_divergence(head.logits(hidden), ...)`, but [N, V] logits of student or teacher never
    exist: memory does not grow with N, and each matrix product is done once. The gradient is made in the forward pass
    and handed over in the backward pass, which can therefore happen once.

    Args:
        hidden: [N, H] the student's last hidden states at the counting positions.
        head: the student's head.
        targets: the teacher's, for the same N; None for cross-entropy alone. No gradient flows to it.
        divergence: which one; a user's own subclass works too. None for cross-entropy alone.
        temperature: softmax temperature of the divergence, > 0. No T^2 factor is applied here.
        token_weights: [N], w_n, without gradient; None for ones.
        normalizer: what to divide by, without gradient; default: the sum of w_n, at least 1.
        labels: [N] token ids for the cross-entropy (at temperature 1); -100 does not count.
        label_weight: its weight; with 0 it is only reported.
        reduction: "none" gives w_n (D_n + label_weight * CE_n) by token, for weights that are known only afterwards
            (policy gradients). The backward pass then makes the logits again: about 1.6 times the cost, but it can
            happen more than once. `normalizer` does not apply.
        backend: "eager" (readable reference, builds the logits), "chunked" (any device), "triton" (CUDA), or "auto":
            the fastest there is.
        chunk_tokens: tokens at a time; default: from a byte budget. It changes memory and time, not the numbers.

    Returns:
        See `FusedLoss`.

    Raises:
        VocabularyError: the vocabularies differ.
        ShapeError: shapes, temperature, labels or backend do not fit; sparse targets do not go with the temperature or
            the divergence; or the divergence is infinite.

    >>> from potstill.losses.divergences import JSD
    >>> from potstill.losses.targets import HeadTargets
    >>> hidden, head = torch.ones(3, 4), LMHead(torch.eye(5, 4))
    >>> loss = linear_divergence(hidden, head, HeadTargets(hidden, head), JSD()).loss
    >>> torch.testing.assert_close(loss, torch.tensor(0.0))
    """
    token_weights = None if token_weights is None else token_weights.detach()
    normalizer = normalizer.detach() if isinstance(normalizer, Tensor) else normalizer
    dtype = _products_dtype(hidden, head.weight)
    plan = _Plan(
        head, targets, divergence, temperature, token_weights, normalizer, labels, label_weight, chunk_tokens, dtype
    )
    _check(hidden, plan, reduction)
    output = _eager(hidden, plan, reduction) if backend == "eager" else _fused(hidden, plan, reduction, backend)
    if output.divergence is not None:
        assert divergence is not None
        counting = output.divergence if token_weights is None else output.divergence * (token_weights != 0)
        check_finite("linear_divergence", counting, divergence)
    return output


def linear_cross_entropy(hidden: Tensor, head: LMHead, labels: Tensor, **options: Any) -> FusedLoss:
    """Cross-entropy of hard labels without the logits: `linear_divergence` without a teacher.

    Args:
        hidden: [N, H].
        head: the student's.
        labels: [N] token ids; -100 does not count.
        **options: token_weights, normalizer, reduction, backend and chunk_tokens of `linear_divergence`.
    """
    return linear_divergence(hidden, head, None, None, labels=labels, label_weight=1.0, **options)


class _Plan(NamedTuple):
    """The arguments of `linear_divergence` that are no tensors with gradient."""

    head: LMHead
    targets: Targets | None
    divergence: Divergence | None
    temperature: float
    token_weights: Tensor | None
    normalizer: Tensor | float | None
    labels: Tensor | None
    label_weight: float
    chunk_tokens: int | None
    dtype: torch.dtype  # of the matrix products

    def total(self, divergence: Tensor | None, cross_entropy: Tensor | None) -> Tensor:
        """D_n + label_weight * CE_n, [N]."""
        if divergence is None:
            assert cross_entropy is not None
            return self.label_weight * cross_entropy
        if cross_entropy is None or self.label_weight == 0:
            return divergence
        return divergence + self.label_weight * cross_entropy

    def reduce(self, values: Tensor, reduction: Reduction) -> Tensor:
        """The scalar, or with reduction "none" the weighted values."""
        weights = self.token_weights
        if weights is not None:
            values = values.masked_fill(weights == 0, 0.0)  # they may be infinite
        if reduction == "mean":
            return token_mean(values, weights, self.normalizer)
        return values if weights is None else values * weights


def _check(hidden: Tensor, plan: _Plan, reduction: str) -> None:
    width, V = plan.head.weight.shape[1], plan.head.vocabulary
    if hidden.ndim != 2 or hidden.shape[1] != width:
        raise ShapeError(
            f"linear_divergence: expected hidden of shape [N, {width}], the head's width, got {list(hidden.shape)}."
        )
    N, labels = hidden.shape[0], plan.labels
    if (plan.targets is None) != (plan.divergence is None) or (plan.targets is None and labels is None):
        raise ShapeError("linear_divergence: expected targets and a divergence, or neither of them and labels.")
    if plan.label_weight and labels is None:
        raise ShapeError(f"linear_divergence: expected labels for label_weight={plan.label_weight}, got None.")
    if plan.targets is not None and plan.divergence is not None:
        check_targets("linear_divergence", torch.Size([N, V]), plan.targets, plan.divergence, plan.temperature)
    for name, each in (("token_weights", plan.token_weights), ("labels", labels)):
        if each is not None and each.shape != (N,):
            raise ShapeError(f"linear_divergence: expected {name} of shape [{N}], got {list(each.shape)}.")
    if labels is not None and (labels.is_floating_point() or labels.dtype == torch.bool):
        raise ShapeError(f"linear_divergence: expected labels of an integer dtype, got {labels.dtype}.")
    if labels is not None and ((labels < 0) & (labels != IGNORE) | (labels >= V)).any():
        counts = labels[labels != IGNORE]
        raise ShapeError(
            f"linear_divergence: expected labels in 0..{V - 1} or -100, got {int(counts.min())}..{int(counts.max())}."
        )
    if reduction not in ("mean", "none"):
        raise ShapeError(f'linear_divergence: expected reduction "mean" or "none", got {reduction!r}.')
    if plan.chunk_tokens is not None and plan.chunk_tokens < 1:
        raise ShapeError(f"linear_divergence: expected chunk_tokens of at least 1, got {plan.chunk_tokens}.")


def _tail(backend: str, plan: _Plan, device: torch.device) -> Tail:
    """The way from logits to losses: the fastest of what the backend allows."""
    if backend not in ("auto", "chunked", "triton"):
        raise ShapeError(
            f'linear_divergence: expected backend "auto", "eager", "chunked" or "triton", got {backend!r}.'
        )
    sparse = isinstance(plan.targets, SparseTargets)
    single = compute_dtype(plan.dtype) == torch.float32
    tail: Tail | None = None
    if backend == "triton" or (backend == "auto" and device.type == "cuda" and single):
        tail = _triton_tail(plan.divergence, sparse, single, device, asked=backend == "triton")
    elif device.type == "cpu" and single:
        tail = native_tail(plan.divergence, sparse)
    return tail or TorchTail()


def _triton_tail(
    divergence: Divergence | None, sparse: bool, single: bool, device: torch.device, asked: bool
) -> Tail | None:
    try:
        from potstill.losses import triton
    except ImportError:
        if asked:
            raise UserError(
                'linear_divergence: expected Triton for backend "triton", got an ImportError. '
                'Install it (pip install triton), or use backend "chunked".'
            ) from None
        return None
    if device.type != "cuda" and not triton.INTERPRETED:
        raise ShapeError(
            f'linear_divergence: expected CUDA tensors for backend "triton", got {device.type}. Use backend "chunked".'
        )
    tail = triton.triton_tail(divergence, sparse) if single else None
    if tail is None:
        what = type(divergence).__name__ if single else "float64"
        warnings.warn(
            f"linear_divergence: {what} has no Triton kernel; the chunked backend is used.", UserWarning, stacklevel=4
        )
    return tail


def _eager(hidden: Tensor, plan: _Plan, reduction: Reduction) -> FusedLoss:
    logits = plan.head.logits(hidden)
    divergence = cross_entropy = None
    if plan.targets is not None and plan.divergence is not None:
        divergence = unchecked_divergence(logits, plan.targets, plan.divergence, plan.temperature)
    if plan.labels is not None:
        cross_entropy = token_cross_entropy(logits, plan.labels)
    loss = plan.reduce(plan.total(divergence, cross_entropy), reduction)
    return FusedLoss(
        loss,
        None if divergence is None else divergence.detach(),
        None if cross_entropy is None else cross_entropy.detach(),
    )


# A graph would gain nothing here, and could not hold buffers that are written in place.
@uncompiled
def _fused(hidden: Tensor, plan: _Plan, reduction: Reduction, backend: str) -> FusedLoss:
    head, tail = plan.head, _tail(backend, plan, hidden.device)
    tensors = (hidden, head.weight, head.bias)
    wanted = Wanted(*(torch.is_grad_enabled() and x is not None and x.requires_grad for x in tensors))
    if not any(wanted):
        result = _run(*tensors, plan, tail, None, wanted)
        values = plan.total(result.divergence, result.cross_entropy)
        return FusedLoss(plan.reduce(values, reduction), result.divergence, result.cross_entropy)
    function = _Fused if reduction == "mean" else _PerToken
    return FusedLoss(*function.apply(*tensors, plan, tail, wanted))  # type: ignore[no-untyped-call]


def _run(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    plan: _Plan,
    tail: Tail,
    scale: Tensor | None,
    wanted: Wanted,
) -> Result:
    dtype = plan.dtype
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        head = replace(plan.head, weight=weight.to(dtype), bias=None if bias is None else bias.to(dtype))
        targets = None if plan.targets is None else _in_one_dtype(plan.targets)
        job = Job(hidden.to(dtype), head, targets, plan.divergence, plan.temperature, plan.labels, plan.label_weight)
        return run(job, tail, scale, wanted, plan.chunk_tokens)


def _in_one_dtype(targets: Targets) -> Targets:
    """The teacher's states and head in the dtype of its products; outside of the student's autocast."""
    if isinstance(targets, MixtureTargets):
        members = tuple(cast(Whole | SparseTargets, _in_one_dtype(one)) for one in targets.members)
        return replace(targets, members=members)
    if not isinstance(targets, HeadTargets):
        return targets
    same = _products_dtype(targets.hidden, targets.head.weight)
    return HeadTargets(targets.hidden.to(same), replace(targets.head, weight=targets.head.weight.to(same)))


def _products_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """What a linear layer would compute in, here; float32 on a CPU that can multiply half precision only in steps."""
    dtype, device = torch.promote_types(hidden.dtype, weight.dtype), hidden.device.type
    if torch.is_autocast_enabled(device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    if device == "cpu" and (dtype == torch.float16 or (dtype == torch.bfloat16 and not multiplies_bfloat16())):
        return torch.float32
    return dtype


@cache
def multiplies_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16: AVX512-BF16 or AMX on x86, as PyTorch sees it."""
    return any(getattr(torch.cpu, name, bool)() for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))


class _Fused(torch.autograd.Function):
    """One pass: the gradient is there when the loss is."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, plan: _Plan, tail: Tail, wanted: Wanted
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        weights = plan.token_weights
        if weights is None:
            weights = torch.ones(hidden.shape[0], device=hidden.device)
        weights = weights.to(compute_dtype(plan.dtype))
        normalizer = weights.sum().clamp_min(1) if plan.normalizer is None else plan.normalizer
        share = token_mean(weights.new_ones(1), normalizer=normalizer)
        scale, ctx.factor = _scale(weights * share, plan.dtype)
        result = _run(hidden, weight, bias, plan, tail, scale, wanted)
        ctx.gradients = (result.hidden, result.weight, result.bias)
        ctx.dtypes = [None if x is None else x.dtype for x in (hidden, weight, bias)]
        outputs = (result.divergence, result.cross_entropy)
        ctx.mark_non_differentiable(*(x for x in outputs if x is not None))
        return plan.reduce(plan.total(*outputs), "mean"), *outputs

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("linear_divergence")
        if ctx.gradients is None:
            raise UserError(
                "linear_divergence: expected one backward pass, got a second. Its gradients are handed over and not "
                'kept. Call linear_divergence again, or use reduction="none", which can be gone through twice.'
            )
        gradients, ctx.gradients = ctx.gradients, None  # autograd keeps the only reference, and copies nothing
        factor = grad_outputs[0] if ctx.factor is None else grad_outputs[0] * ctx.factor
        if factor.device.type != "cpu" or factor != 1:  # elsewhere a look at it would wait for the device
            for gradient in gradients:
                if gradient is not None:
                    gradient.mul_(factor)
        return (*_cast(gradients, ctx.dtypes), None, None, None)


class _PerToken(torch.autograd.Function):
    """Two passes: the gradient waits for the weight of each token."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, plan: _Plan, tail: Tail, wanted: Wanted
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        ctx.save_for_backward(hidden, weight, bias)
        ctx.rest = (plan, tail, wanted)
        result = _run(hidden, weight, bias, plan, tail, None, wanted)
        outputs = (result.divergence, result.cross_entropy)
        ctx.mark_non_differentiable(*(x for x in outputs if x is not None))
        # A tensor of its own: what is given back as .divergence too has no gradient.
        return plan.reduce(plan.total(*outputs), "none").clone(), *outputs

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("linear_divergence")
        hidden, weight, bias = ctx.saved_tensors
        plan, tail, wanted = ctx.rest
        scale = grad_outputs[0] if plan.token_weights is None else grad_outputs[0] * plan.token_weights
        scale, factor = _scale(scale, plan.dtype)
        result = _run(hidden, weight, bias, plan, tail, scale, wanted)
        gradients = (result.hidden, result.weight, result.bias)
        for gradient in gradients:
            if gradient is not None and factor is not None:
                gradient.mul_(factor)
        return (*_cast(gradients, [None if x is None else x.dtype for x in (hidden, weight, bias)]), None, None, None)


def _scale(scale: Tensor, products: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """The weight of each token in the gradient by logits, and what its sums are multiplied by at the end.

    In half precision a weight as small as 1 / normalizer would push gradients under the smallest number: there the
    weights are of order 1, and their size comes in when the sums are made, in float32, and the loss is scaled. float16
    keeps room for the sum over a chunk of tokens.
    """
    if products.itemsize >= 4 or not len(scale):
        return scale, None
    room = 16 if products == torch.float16 else 1
    largest = room * scale.abs().amax().clamp_min(torch.finfo(torch.float32).tiny)
    return scale / largest, largest


def _cast(gradients: tuple[Tensor | None, ...], dtypes: list[torch.dtype | None]) -> list[Tensor | None]:
    return [None if g is None else g.to(dtype) for g, dtype in zip(gradients, dtypes, strict=True)]
