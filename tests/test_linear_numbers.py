"""The numbers of linear_divergence are those of whole logits."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

import reference
from linear_cases import (
    N,
    check,
    close,
    doubled,
    every_backend,
    every_divergence,
    every_dtype,
    every_fused_backend,
    every_kind,
    every_reduction,
    loops_cross_entropy,
    make_targets,
    plain,
    rand,
    some_labels,
    student,
    wanting,
)
from potstill.losses.divergences import JSD, Divergence, ReverseKL
from potstill.losses.fused_linear import linear_cross_entropy, linear_divergence
from potstill.losses.targets import LMHead


@every_divergence
@every_kind
@every_dtype
@every_backend
def test_it_is_the_papers_formula_with_the_gradient_of_whole_logits(divergence, kind, dtype, backend):
    for temperature in (0.5, 1.0, 4.0):
        check(divergence, temperature, kind, dtype, backend)


@pytest.mark.parametrize("divergence", [JSD(0.3), ReverseKL(), None], ids=str)
@pytest.mark.parametrize("V", [1, 2, 15, 16, 17, 1023, 1040, 2049])
@every_dtype
@every_backend
def test_vocabularies_of_any_size(divergence, V, dtype, backend):
    tensors = hidden, weight, bias = student(3, V=V, dtype=dtype)
    targets = None if divergence is None else make_targets("dense", 3, V, dtype=dtype)
    labels = torch.tensor([0, V - 1, -100])
    options = {"temperature": 2.0, "labels": labels, "label_weight": 0.5}
    output = linear_divergence(hidden, LMHead(weight, bias), targets, divergence, **options, backend=backend)
    exact = wanting(*tensors)
    expected = plain(LMHead(*exact[1:]), exact[0], doubled(targets), divergence, **options)
    close(output.loss, expected.mean(), dtype)
    close(torch.autograd.grad(output.loss, tensors), torch.autograd.grad(expected.mean(), exact), dtype)


@every_kind
@every_dtype
@every_backend
def test_two_threads_give_the_numbers_of_one(kind, dtype, backend):
    tensors = hidden, weight, bias = student(37, dtype=dtype)
    targets = make_targets(kind, 37, dtype=dtype)

    def run() -> list[Tensor]:
        output = linear_divergence(
            hidden, LMHead(weight, bias), targets, JSD(0.3), labels=some_labels(37), label_weight=0.5, backend=backend
        )
        return [output.loss, output.divergence, output.cross_entropy, *torch.autograd.grad(output.loss, tensors)]

    one = run()
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        two = run()
    finally:
        torch.set_num_threads(before)
    close(two, one, tolerance=1e-12 if dtype == torch.float64 else 1e-6)


@every_backend
def test_nothing_but_a_divergence(backend):
    hidden, weight, _ = student()
    output = linear_divergence(hidden, LMHead(weight), make_targets("dense"), JSD(), backend=backend)
    assert output.cross_entropy is None
    assert output.loss.shape == () and output.divergence.shape == (N,)
    close(output.loss, output.divergence.mean())


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@every_kind
@every_dtype
@every_backend
@every_reduction
def test_cross_entropy_without_a_weight_is_reported_and_no_more(temperature, kind, dtype, backend, reduction):
    hidden, weight, bias = student(dtype=dtype)
    targets, labels = make_targets(kind, temperature=temperature, dtype=dtype), some_labels()
    run = partial(
        linear_divergence, hidden, LMHead(weight, bias), targets, JSD(0.3), temperature=temperature, backend=backend
    )
    output, without = run(labels=labels, reduction=reduction), run(reduction=reduction)
    close(output.cross_entropy, loops_cross_entropy(reference.head_logits(hidden, weight, bias), labels), dtype)
    assert torch.equal(output.loss, without.loss) and torch.equal(output.divergence, without.divergence)
    tensors = (hidden, weight, bias)
    gradients = (torch.autograd.grad(each.loss.sum(), tensors) for each in (output, without))
    close(*gradients, dtype)


@every_dtype
@every_backend
@every_reduction
def test_cross_entropy_alone(dtype, backend, reduction):
    tensors = hidden, weight, bias = student(dtype=dtype)
    labels = some_labels()
    output = linear_cross_entropy(hidden, LMHead(weight, bias), labels, backend=backend, reduction=reduction)
    entropies = loops_cross_entropy(reference.head_logits(*(x.detach() for x in tensors)), labels)
    assert output.divergence is None
    close(output.cross_entropy, entropies, dtype)
    close(output.loss, entropies.mean() if reduction == "mean" else entropies, dtype)
    exact = wanting(*tensors)
    expected = plain(LMHead(*exact[1:]), exact[0], None, None, 1.0, labels, 1.0)
    expected = torch.autograd.grad(expected.mean() if reduction == "mean" else expected.sum(), exact)
    close(torch.autograd.grad(output.loss.sum(), tensors), expected, dtype)


@pytest.mark.parametrize(("weights", "normalizer", "divisor"), [
    (None, None, N),
    (None, 10.0, 10),
    (None, 10, 10),
    (None, torch.tensor(10), 10),
    (None, torch.tensor(10.0, dtype=torch.float64), 10),
    ([1, 0, 2, 0.5, 0, 1], None, 4.5),
    ([1, 0, 2, 0.5, 0, 1], 10.0, 10),
    ([0.1, 0, 0.2, 0, 0, 0.1], None, 1),  # at least 1
    ([True, False, True, True, False, False], None, 3),
    ([1, -1, 2, -0.5, 0, 1], 10.0, 10),
])  # fmt: skip
@every_dtype
@every_backend
def test_what_the_sum_is_divided_by(weights, normalizer, divisor, dtype, backend):
    tensors = hidden, weight, bias = student(dtype=dtype)
    weights = None if weights is None else torch.tensor(weights)
    targets, w = make_targets("dense", dtype=dtype), torch.ones(N).double() if weights is None else weights.double()
    output = linear_divergence(
        hidden, LMHead(weight, bias), targets, JSD(), token_weights=weights, normalizer=normalizer, backend=backend
    )
    exact = wanting(*tensors)
    expected = (w * plain(LMHead(*exact[1:]), exact[0], doubled(targets), JSD())).sum() / divisor
    close(output.loss, expected, dtype)
    close(torch.autograd.grad(output.loss, tensors), torch.autograd.grad(expected, exact), dtype)


@pytest.mark.parametrize("kind", ["nothing", "dense", "head", "bucket"])
@every_dtype
@every_fused_backend
@every_reduction
def test_chunks_of_any_size_give_the_same_numbers(kind, dtype, backend, reduction):
    rows = 12
    tensors = hidden, weight, bias = student(rows, dtype=dtype)
    divergence = None if kind == "nothing" else JSD(0.3)
    run = partial(
        linear_divergence,
        *(hidden, LMHead(weight, bias, softcap=2.0), make_targets(kind, rows, dtype=dtype), divergence),
        labels=some_labels(rows),
        label_weight=0.5,
        token_weights=rand(rows, seed=10),
        reduction=reduction,
    )
    whole = run(backend="eager")
    gradients = torch.autograd.grad(whole.loss.sum(), tensors)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-6
    for chunk_tokens in (1, 2, 3, 7, rows, rows + 1, 100):
        chunks = run(backend=backend, chunk_tokens=chunk_tokens)
        assert [x is None for x in chunks] == [x is None for x in whole]
        present = [(ours, expected) for ours, expected in zip(chunks, whole, strict=True) if expected is not None]
        for ours, expected in present:
            close(ours, expected, tolerance=tolerance)
        close(torch.autograd.grad(chunks.loss.sum(), tensors), gradients, tolerance=tolerance)


class Averaged(Divergence):
    """A user's own that is no elementary arithmetic: it looks at a whole row."""

    def pointwise(self, log_q: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
        p, q = log_p.exp(), log_q.exp()
        weights = torch.linspace(0, 1, p.shape[-1], dtype=p.dtype)
        gap = (weights * (q - p)).sum(-1, keepdim=True)
        return (gap**2).expand_as(p) / p.shape[-1], 2 * gap * weights * q


class Flat(Divergence):
    """A user's own that is zero everywhere."""

    def pointwise(self, log_q: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(log_q), torch.zeros_like(log_q)


class Branching(Divergence):
    """A user's own with a branch that depends on the numbers."""

    def pointwise(self, log_q: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
        p = log_p.exp()
        if (p > 0).any():
            return p * (log_p - log_q), -p
        return torch.zeros_like(p), torch.zeros_like(p)


class Clamped(Divergence):
    """A user's own out of operations that take options."""

    def pointwise(self, log_q: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
        q = log_q.exp()
        gap = torch.clamp(q - log_p.exp(), min=-0.1, max=0.1)
        inside = gap.abs() < 0.1
        value = torch.where(inside, 0.5 * gap.square(), 0.1 * gap.abs() - 0.005)
        return value, torch.mul(q, gap) * inside.to(q.dtype)


@pytest.mark.parametrize("divergence", [Averaged(), Flat(), Branching(), Clamped()], ids=lambda d: type(d).__name__)
@every_dtype
@every_backend
def test_a_divergence_of_ones_own_may_be_any_torch_code(divergence, dtype, backend):
    tensors = hidden, weight, bias = student(dtype=dtype)
    targets = make_targets("dense", dtype=dtype)
    output = linear_divergence(hidden, LMHead(weight, bias), targets, divergence, temperature=2.0, backend=backend)
    exact = wanting(*tensors)
    expected = plain(LMHead(*exact[1:]), exact[0], doubled(targets), divergence, 2.0).mean()
    close(output.loss, expected, dtype)
    close(torch.autograd.grad(output.loss, tensors), torch.autograd.grad(expected, exact), dtype)
