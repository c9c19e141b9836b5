"""The gradients of linear_divergence: exact, and no less so in fewer digits."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from linear_cases import (
    N,
    V,
    close,
    doubled,
    error,
    every_backend,
    every_divergence,
    every_dtype,
    every_kind,
    every_reduction,
    make_targets,
    plain,
    rand,
    randn,
    some_labels,
    student,
    wanting,
)
from potstill.losses.divergences import (
    JSD,
    AlphaBeta,
    Divergence,
    ForwardKL,
    ReverseKL,
    SkewForwardKL,
    SoftCrossEntropy,
    TotalVariation,
)
from potstill.losses.fused_linear import linear_divergence
from potstill.losses.targets import DenseTargets, HeadTargets, LMHead


class Fresh(torch.autograd.Function):
    """A function that is called again by each backward pass, because gradcheck goes back more than once."""

    @staticmethod
    def forward(ctx: Any, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        ctx.function = function
        ctx.save_for_backward(*inputs)
        return function(*inputs)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        with torch.enable_grad():
            inputs = [x.detach().requires_grad_() for x in ctx.saved_tensors]
            return None, *torch.autograd.grad(ctx.function(*inputs), inputs, upstream)


HEADS: dict[str, dict[str, Any]] = {
    "plain": {"bias": None},
    "bias": {},
    "scaled": {"logit_scale": 0.5},
    "capped": {"softcap": 1.5},
    "padded": {"size": 4},
    "all": {"logit_scale": 0.5, "softcap": 1.5, "size": 4},
}


@pytest.mark.parametrize(
    ("kind", "name"), [*(("dense", name) for name in HEADS), ("nothing", "all"), ("head", "all"), ("bucket", "all")]
)
@every_backend
@every_reduction
def test_its_gradient_is_the_slope_of_its_value(kind, name, backend, reduction):
    changes = HEADS[name]
    tensors = student(3, 2, 5)[: 2 if "bias" in changes else 3]
    real = changes.get("size", 5)
    targets = make_targets(kind, 3, real, temperature=2.0, K=2)

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return linear_divergence(
            *(hidden, LMHead(weight, **{"bias": bias, **changes}), targets, None if targets is None else JSD(0.3)),
            temperature=2.0,
            token_weights=torch.tensor([1.0, -0.5, 2.0]),
            normalizer=None if reduction == "none" else torch.tensor(7.0),
            labels=torch.tensor([0, -100, real - 1]),
            label_weight=0.5,
            reduction=reduction,
            backend=backend,
            chunk_tokens=2,
        ).loss

    assert torch.autograd.gradcheck(partial(Fresh.apply, loss), tensors)
    if "size" in changes:
        for gradient in torch.autograd.grad(loss(*tensors).sum(), tensors[1:]):
            assert (gradient[real:] == 0).all() and (gradient[:real] != 0).any()


@every_backend
@every_dtype
def test_padding_of_the_vocabulary_may_hold_anything(backend, dtype):
    hidden, weight, bias = student(dtype=dtype)
    rows, real = 5, V - 3
    with torch.no_grad():
        weight[real:], bias[real:] = math.nan, math.inf
    teacher = HeadTargets(
        randn(N, rows, seed=5), LMHead(torch.cat([randn(real, rows, seed=6), weight.new_full((3, rows), math.nan)]))
    )
    output = linear_divergence(
        *(hidden, LMHead(weight, bias).slice(real), teacher.slice(real), JSD()),
        labels=torch.full((N,), real - 1),
        label_weight=0.5,
        backend=backend,
    )
    gradients = torch.autograd.grad(output.loss, (hidden, weight, bias))
    assert output.loss.isfinite() and all(x.isfinite().all() for x in gradients)
    assert (gradients[1][real:] == 0).all() and (gradients[2][real:] == 0).all()


@pytest.mark.parametrize("divergence", [JSD(0.3), TotalVariation(), AlphaBeta(0.2, 0.7)], ids=str)
@every_kind
@every_dtype
@every_backend
def test_without_a_reduction_each_token_has_a_weight_of_its_own(divergence, kind, dtype, backend):
    tensors = hidden, weight, bias = student(dtype=dtype)
    targets, labels, w = make_targets(kind, dtype=dtype), some_labels(), rand(N, seed=10, dtype=dtype)
    output = linear_divergence(
        *(hidden, LMHead(weight, bias), targets, divergence),
        labels=labels,
        label_weight=0.5,
        token_weights=w,
        normalizer=1e6,  # does not apply
        reduction="none",
        backend=backend,
        chunk_tokens=4,
    )
    exact = wanting(*tensors)
    expected = w.double() * plain(LMHead(*exact[1:]), exact[0], doubled(targets), divergence, 1.0, labels, 0.5)
    assert output.loss.shape == (N,)
    close(output.loss, expected, dtype)
    for upstream in (torch.tensor([1e4, -3.0, 0.0, 1e-3, 2.0, -1.0], dtype=dtype), torch.zeros(N, dtype=dtype)):
        actual = torch.autograd.grad(output.loss, tensors, upstream, retain_graph=True)
        close(actual, torch.autograd.grad(expected, exact, upstream.double(), retain_graph=True), dtype)


def formula(hidden: Tensor, weight: Tensor, teacher: Tensor, divergence: Divergence, temperature: float) -> Tensor:
    """What one writes without a second thought: logits in their dtype, softmax in float32, autograd."""
    logits = torch.nn.functional.linear(hidden, weight)
    wide = torch.promote_types(logits.dtype, torch.float32)
    log_q, log_p = ((x.to(wide) / temperature).log_softmax(-1) for x in (logits, teacher))
    return divergence.pointwise(log_q, log_p)[0].sum(-1).mean()


@every_divergence
@pytest.mark.parametrize("temperature", [0.5, 4.0])
@every_backend
def test_its_float32_gradient_is_no_worse_than_autograd_of_the_formula(divergence, temperature, backend):
    tensors = [randn(*shape, seed=seed, dtype=torch.float32) for seed, shape in ((1, (48, 16)), (2, (300, 16)))]
    tensors = [x.requires_grad_() for x in tensors]
    teacher, exact = 3 * randn(48, 300, seed=3, dtype=torch.float32), wanting(*tensors)
    expected = torch.autograd.grad(formula(*exact, teacher.double(), divergence, temperature), exact)
    naive = torch.autograd.grad(formula(*tensors, teacher, divergence, temperature), tensors)
    output = linear_divergence(
        *(tensors[0], LMHead(tensors[1]), DenseTargets(teacher), divergence), temperature=temperature, backend=backend
    )
    ours = torch.autograd.grad(output.loss, tensors)
    for our, their, gradient in zip(error(ours, expected), error(naive, expected), expected, strict=True):
        assert our <= 2 * their + 1e-7 * float(gradient.norm())


HALVES = [torch.bfloat16, torch.float16]
FEW = [ForwardKL(), ReverseKL(), JSD(0.3), SkewForwardKL(), TotalVariation(), SoftCrossEntropy(), AlphaBeta(0.2, 0.7)]


@pytest.mark.parametrize("divergence", FEW, ids=str)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@every_backend
@every_reduction
def test_half_precision_is_no_worse_than_a_softmax_in_float32_over_half_logits(divergence, dtype, backend, reduction):
    tensors = [randn(*shape, seed=seed, dtype=dtype) for seed, shape in ((1, (48, 16)), (2, (300, 16)))]
    tensors = [x.requires_grad_() for x in tensors]
    teacher, exact = 3 * randn(48, 300, seed=3, dtype=dtype), wanting(*tensors)
    value = formula(*exact, teacher.double(), divergence, 2.0)
    expected = torch.autograd.grad(value, exact)
    naive_value = formula(*tensors, teacher, divergence, 2.0)
    naive = torch.autograd.grad(naive_value, tensors)
    output = linear_divergence(
        *(tensors[0], LMHead(tensors[1]), DenseTargets(teacher), divergence),
        temperature=2.0,
        backend=backend,
        reduction=reduction,
        chunk_tokens=48,
    )
    loss = output.loss.mean()
    ours = torch.autograd.grad(loss, tensors)
    assert output.loss.dtype == output.divergence.dtype == torch.float32
    assert [x.dtype for x in ours] == [dtype] * 2
    for our, their, gradient in zip(error(ours, expected), error(naive, expected), expected, strict=True):
        assert our <= 2 * their + 1e-7 * float(gradient.norm())
    value, naive_value, loss = (x.item() for x in (value, naive_value, loss))
    assert abs(loss - value) <= 2 * abs(naive_value - value) + 1e-6 * value


@every_kind
@every_backend
@every_reduction
def test_a_large_normaliser_does_not_flush_float16_gradients_to_zero(kind, backend, reduction):
    tensors = hidden, weight, bias = student(48, 16, 100, dtype=torch.float16)
    targets = make_targets(kind, 48, 100, dtype=torch.float16)
    run = partial(linear_divergence, divergence=JSD(0.3), labels=some_labels(48, 100), label_weight=0.5)
    many, scaling = 1e6, 2.0**16
    output = run(hidden, LMHead(weight, bias), targets, normalizer=many, reduction=reduction, backend=backend)
    ours = torch.autograd.grad((output.loss if reduction == "mean" else output.loss / many).sum() * scaling, tensors)
    exact = wanting(*tensors)
    output = run(exact[0], LMHead(*exact[1:]), doubled(targets), normalizer=many, backend="eager")
    expected = torch.autograd.grad(output.loss * scaling, exact)
    for our, gradient in zip(error(ours, expected), expected, strict=True):
        assert our <= 0.02 * float(gradient.norm())


@every_backend
def test_small_token_weights_do_not_flush_float16_gradients_to_zero(backend):
    """1 / normalizer may also be folded into the weights."""
    tensors = hidden, weight, bias = student(48, 16, 100, dtype=torch.float16)
    targets, small, scaling = make_targets("dense", 48, 100, dtype=torch.float16), torch.full((48,), 1e-6), 2.0**16
    run = partial(linear_divergence, divergence=JSD(0.3), token_weights=small, normalizer=1.0)
    ours = torch.autograd.grad(run(hidden, LMHead(weight, bias), targets, backend=backend).loss * scaling, tensors)
    exact = wanting(*tensors)
    output = run(exact[0], LMHead(*exact[1:]), doubled(targets), backend="eager")
    expected = torch.autograd.grad(output.loss * scaling, exact)
    for our, gradient in zip(error(ours, expected), expected, strict=True):
        assert our <= 0.02 * float(gradient.norm())
