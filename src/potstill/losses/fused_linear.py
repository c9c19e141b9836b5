"""linear_divergence: head and divergence in one, exact, without the logits."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor

from potstill.errors import ShapeError, UserError
from potstill.losses.alignment import IGNORE
from potstill.losses.cpu import multiplies_bfloat16
from potstill.losses.divergences import Divergence
from potstill.losses.fused_chunks import FusedInputs, FusedResult, LossKernel, Reduction, run_chunks
from potstill.losses.kernel_native import native_kernel
from potstill.losses.kernel_torch import TorchKernel
from potstill.losses.targets import FullTargets, HeadTargets, LMHead, MixtureTargets, SparseTargets, Targets
from potstill.losses.token_losses import (
    check_finite,
    check_targets,
    compute_dtype,
    refuse_second_derivative,
    token_cross_entropy,
    token_mean,
    unchecked_divergence,
)
from potstill.losses.torch_compile import disable_compile

Backend = Literal["auto", "eager", "chunked", "triton"]


class FusedLoss(NamedTuple):
    loss: Tensor  # a scalar, or [N] with reduction "none"; with gradient to hidden, head.weight and head.bias
    divergence: Tensor | None  # [N] nats, detached; None without targets
    cross_entropy: Tensor | None  # [N] nats, detached; None without labels


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
    """Compute divergence and hard-label cross-entropy of a student's hidden states, fused with its head.

        loss = sum_n w_n (D_n + label_weight * CE_n) / normalizer

    The same numbers as `token_divergence(head.logits(hidden), ...)`, but [N, V] logits never exist: memory does not
    grow with N, and each matrix product is done once. The gradient is computed in the forward pass and handed over in
    the backward pass, which can therefore run only once.

    Args:
        hidden: [N, H], at the target positions.
        targets: for the same N, without a gradient to them; None, as the divergence, for cross-entropy alone.
        temperature: of the divergence, > 0. No T^2 factor is applied here.
        token_weights: [N], w_n, without gradient; None for ones.
        normalizer: without gradient; default: the sum of w_n, at least 1.
        labels: [N] token ids for the cross-entropy (at temperature 1); -100 = ignored.
        label_weight: with 0 the cross-entropy is only reported.
        reduction: "none" gives w_n (D_n + label_weight * CE_n) by token, for weights that are only known afterwards
            (policy gradients). The backward pass then recomputes the logits: about 1.6 times the cost, but it can run
            more than once. `normalizer` does not apply.
        backend: "eager" (readable reference, builds the logits), "chunked" (any device), "triton" (CUDA), or "auto"
            (the fastest available).
        chunk_tokens: tokens at a time; default: from a byte budget. It changes memory and time, not the numbers.

    Raises:
        VocabularyError: the vocabularies differ.
        ShapeError: arguments do not fit together, or the divergence is infinite.

    >>> from potstill.losses.divergences import JSD
    >>> from potstill.losses.targets import HeadTargets
    >>> hidden, head = torch.ones(3, 4), LMHead(torch.eye(5, 4))
    >>> loss = linear_divergence(hidden, head, HeadTargets(hidden, head), JSD()).loss
    >>> torch.testing.assert_close(loss, torch.tensor(0.0))
    """
    if not isinstance(head, LMHead):
        got = f"a {type(head).__name__}"
        raise ShapeError(f"linear_divergence: expected an LMHead as the head, got {got}. Give LMHead(weight, bias).")
    weights = None if token_weights is None else token_weights.detach()
    total = normalizer.detach() if isinstance(normalizer, Tensor) else normalizer
    reducing = (weights, total, reduction, chunk_tokens, _products_dtype(hidden, head.weight))
    inputs = FusedInputs(hidden, head, targets, divergence, temperature, labels, label_weight, *reducing)
    _check(inputs)
    result = _eager(inputs) if backend == "eager" else _fused(inputs, backend)
    if result.divergence is not None:
        assert divergence is not None
        weighted = result.divergence if weights is None else result.divergence * (weights != 0)
        check_finite("linear_divergence", weighted, divergence)
    return result


def linear_cross_entropy(hidden: Tensor, head: LMHead, labels: Tensor, **options: Any) -> FusedLoss:
    """Compute the cross-entropy of hard labels without the logits, with the options of `linear_divergence`."""
    return linear_divergence(hidden, head, None, None, labels=labels, label_weight=1.0, **options)


def _check(inputs: FusedInputs) -> None:
    hidden, labels, width, V = inputs.hidden, inputs.labels, inputs.head.weight.shape[1], inputs.head.vocabulary
    if hidden.ndim != 2 or hidden.shape[1] != width:
        expected = f"hidden of shape [N, {width}], the head's width"
        raise ShapeError(f"linear_divergence: expected {expected}, got {list(hidden.shape)}.")
    N, targets, divergence = len(hidden), inputs.targets, inputs.divergence
    if (targets is None) != (divergence is None) or (targets is None and labels is None):
        raise ShapeError("linear_divergence: expected targets and a divergence, or neither of them and labels.")
    if inputs.label_weight and labels is None:
        raise ShapeError(f"linear_divergence: expected labels for label_weight={inputs.label_weight}, got None.")
    if targets is not None and divergence is not None:
        check_targets("linear_divergence", torch.Size([N, V]), targets, divergence, inputs.temperature)
    for name, values in (("token_weights", inputs.token_weights), ("labels", labels)):
        if values is not None and values.shape != (N,):
            raise ShapeError(f"linear_divergence: expected {name} of shape [{N}], got {list(values.shape)}.")
    if labels is not None and (labels.is_floating_point() or labels.dtype == torch.bool):
        raise ShapeError(f"linear_divergence: expected labels of an integer dtype, got {labels.dtype}.")
    if labels is not None and ((labels < 0) & (labels != IGNORE) | (labels >= V)).any():
        low, high = labels[labels != IGNORE].aminmax()
        raise ShapeError(f"linear_divergence: expected labels in 0..{V - 1} or -100, got {int(low)}..{int(high)}.")
    if inputs.reduction not in ("mean", "none"):
        raise ShapeError(f'linear_divergence: expected reduction "mean" or "none", got {inputs.reduction!r}.')
    if inputs.chunk_tokens is not None and inputs.chunk_tokens < 1:
        raise ShapeError(f"linear_divergence: expected chunk_tokens of at least 1, got {inputs.chunk_tokens}.")


def _loss(inputs: FusedInputs, divergence: Tensor | None, cross_entropy: Tensor | None) -> Tensor:
    """Reduce D_n + label_weight * CE_n, [N], to the scalar; with reduction "none" to the weighted values."""
    if divergence is None:
        assert cross_entropy is not None
        values = inputs.label_weight * cross_entropy
    elif cross_entropy is None or inputs.label_weight == 0:
        values = divergence
    else:
        values = divergence + inputs.label_weight * cross_entropy
    weights = inputs.token_weights
    if weights is not None:
        values = values.masked_fill(weights == 0, 0.0)  # they may be infinite
    if inputs.reduction == "mean":
        return token_mean(values, weights, inputs.normalizer)
    return values if weights is None else values * weights


def _kernel(backend: str, inputs: FusedInputs) -> LossKernel:
    """Choose the fastest kernel that the backend allows."""
    if backend not in ("auto", "chunked", "triton"):
        expected = '"auto", "eager", "chunked" or "triton"'
        raise ShapeError(f"linear_divergence: expected backend {expected}, got {backend!r}.")
    device, single = inputs.hidden.device.type, compute_dtype(inputs.products) == torch.float32
    divergence, sparse = inputs.divergence, isinstance(inputs.targets, SparseTargets)
    if backend != "triton" and not (backend == "auto" and device == "cuda" and single):
        return (native_kernel(divergence, sparse) if device == "cpu" and single else None) or TorchKernel()
    try:
        from potstill.losses import kernel_triton
    except ImportError:
        if backend == "auto":
            return TorchKernel()
        raise UserError(
            'linear_divergence: expected Triton for backend "triton", got an ImportError. '
            'Install it (pip install triton), or use backend "chunked".'
        ) from None
    if device != "cuda" and not kernel_triton.INTERPRETED:
        got = f'{device}. Use backend "chunked".'
        raise ShapeError(f'linear_divergence: expected CUDA tensors for backend "triton", got {got}')
    if single and (kernel := kernel_triton.triton_kernel(divergence, sparse)) is not None:
        return kernel
    without = f"{type(divergence).__name__ if single else 'float64'} has no Triton kernel"
    warnings.warn(f"linear_divergence: {without}; the chunked backend is used.", UserWarning, stacklevel=3)
    return TorchKernel()


def _eager(inputs: FusedInputs) -> FusedLoss:
    logits = inputs.head.logits(inputs.hidden)
    divergence = cross_entropy = None
    if inputs.targets is not None and inputs.divergence is not None:
        divergence = unchecked_divergence(logits, inputs.targets, inputs.divergence, inputs.temperature)
    if inputs.labels is not None:
        cross_entropy = token_cross_entropy(logits, inputs.labels)
    loss = _loss(inputs, divergence, cross_entropy)
    return FusedLoss(loss, *(None if x is None else x.detach() for x in (divergence, cross_entropy)))


# Compiling would gain nothing, and a graph cannot hold buffers that are written in place.
@disable_compile
def _fused(inputs: FusedInputs, backend: str) -> FusedLoss:
    tensors, kernel = (inputs.hidden, inputs.head.weight, inputs.head.bias), _kernel(backend, inputs)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        return FusedLoss(*_Fused.apply(*tensors, inputs, kernel))  # type: ignore[no-untyped-call]
    losses = _run(inputs, kernel, tensors, None)[:2]
    return FusedLoss(_loss(inputs, *losses), *losses)


_Tensors = tuple[Tensor, Tensor, Tensor | None]  # hidden, weight and bias


def _run(inputs: FusedInputs, kernel: LossKernel, tensors: _Tensors, scale: Tensor | None, *needs: bool) -> FusedResult:
    """Call `run_chunks` in the dtype of the products."""
    dtype = inputs.products
    with torch.no_grad(), torch.autocast(tensors[0].device.type, enabled=False):
        hidden, weight, bias = (None if x is None else x.to(dtype) for x in tensors)
        assert hidden is not None and weight is not None
        head = replace(inputs.head, weight=weight, bias=bias)
        targets = None if inputs.targets is None else _in_one_dtype(inputs.targets)
        return run_chunks(replace(inputs, hidden=hidden, head=head, targets=targets), kernel, scale, *needs)


def _in_one_dtype(targets: Targets) -> Targets:
    """Cast the teacher's states and head to the dtype of its products, outside of the student's autocast."""
    if isinstance(targets, MixtureTargets):
        members = tuple(cast(FullTargets | SparseTargets, _in_one_dtype(member)) for member in targets.members)
        return replace(targets, members=members)
    if not isinstance(targets, HeadTargets):
        return targets
    dtype = _products_dtype(targets.hidden, targets.head.weight)
    return HeadTargets(targets.hidden.to(dtype), replace(targets.head, weight=targets.head.weight.to(dtype)))


def _products_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """Return the dtype a linear layer would compute in; float32 on a CPU without fast half-precision products."""
    dtype, device = torch.promote_types(hidden.dtype, weight.dtype), hidden.device.type
    if torch.is_autocast_enabled(device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    if device == "cpu" and (dtype == torch.float16 or (dtype == torch.bfloat16 and not multiplies_bfloat16())):
        return torch.float32
    return dtype


class _Fused(torch.autograd.Function):
    """Reduction "mean" computes the gradient with the loss; "none" in a second pass, by the weight of each token."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, inputs: FusedInputs, kernel: LossKernel
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        tensors = (hidden, weight, bias)
        if inputs.reduction == "mean":
            ctx.inputs, weights = None, inputs.token_weights
            if weights is None:
                weights = torch.ones(hidden.shape[0], device=hidden.device)
            weights = weights.to(compute_dtype(inputs.products))
            normalizer = weights.sum().clamp_min(1) if inputs.normalizer is None else inputs.normalizer
            share = token_mean(weights.new_ones(1), normalizer=normalizer)
            scale, ctx.factor = _scale(weights * share, inputs.products)
            result = _run(inputs, kernel, tensors, scale, *ctx.needs_input_grad[:3])
        else:
            ctx.save_for_backward(*tensors)
            ctx.inputs, ctx.kernel = inputs, kernel
            result = _run(inputs, kernel, tensors, None)
        divergence, cross_entropy, *ctx.gradients = result
        ctx.mark_non_differentiable(*(x for x in (divergence, cross_entropy) if x is not None))
        # The loss by token may be the same tensor as the divergence, which has no gradient.
        return _loss(inputs, divergence, cross_entropy).clone(), divergence, cross_entropy

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("linear_divergence")
        if ctx.inputs is not None:
            weights, products = ctx.inputs.token_weights, ctx.inputs.products
            scale, factor = _scale(grad_outputs[0] if weights is None else grad_outputs[0] * weights, products)
            gradients = _run(ctx.inputs, ctx.kernel, ctx.saved_tensors, scale, *ctx.needs_input_grad[:3])[2:]
        elif ctx.gradients is None:
            raise UserError(
                "linear_divergence: expected one backward pass, got a second. "
                'Call linear_divergence again, or use reduction="none", which recomputes its gradients.'
            )
        else:
            gradients, ctx.gradients = ctx.gradients, None  # autograd gets the only reference, and copies nothing
            factor = grad_outputs[0] if ctx.factor is None else grad_outputs[0] * ctx.factor
            if factor.device.type == "cpu" and factor == 1:  # elsewhere the comparison would wait for the device
                factor = None
        for gradient in gradients:
            if gradient is not None and factor is not None:
                gradient.mul_(factor)
        return *gradients, None, None  # autograd casts them


def _scale(scale: Tensor, products: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Split the tokens' weights into weights of order 1 and a factor of the sums.

    In half precision a weight as small as 1 / normalizer would underflow the gradients.
    """
    if products.itemsize >= 4 or not len(scale):
        return scale, None
    room = 16 if products == torch.float16 else 1  # for the sum over a chunk of tokens
    largest = room * scale.abs().amax().clamp_min(torch.finfo(torch.float32).tiny)
    return scale / largest, largest
