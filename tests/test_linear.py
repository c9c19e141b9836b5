"""linear_divergence gives what whole logits give, on every way to it: numbers, gradients, protocol and memory."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import reference
from potstill.divergence import (
    JSD,
    AlphaBeta,
    Divergence,
    ForwardKL,
    ReverseKL,
    SkewForwardKL,
    SoftCrossEntropy,
    TotalVariation,
)
from potstill.errors import ShapeError, UserError, VocabularyError
from potstill.losses import linear_cross_entropy, linear_divergence, token_divergence
from potstill.targets import DenseTargets, HeadTargets, LMHead, SparseTargets, Targets
from reference import DIVERGENCES

BACKENDS = ["eager", "chunked"]
FUSED = [backend for backend in BACKENDS if backend != "eager"]
N, H, V = 6, 4, 9

every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_fused_backend = pytest.mark.parametrize("backend", FUSED)
every_divergence = pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
every_reduction = pytest.mark.parametrize("reduction", ["mean", "none"])
every_dtype = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
every_kind = pytest.mark.parametrize("kind", ["dense", "head", "bucket"])


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def rand(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def student(N: int = N, H: int = H, V: int = V, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, weight and bias; all want a gradient."""
    shapes = enumerate([(N, H), (V, H), (V,)], start=1)
    hidden, weight, bias = (randn(*shape, seed=seed, dtype=dtype).requires_grad_() for seed, shape in shapes)
    return hidden, weight, bias


def said(
    kind: str, N: int = N, V: int = V, *, temperature: float = 1.0, K: int = 4, dtype: torch.dtype = torch.float64
) -> Targets | None:
    """What a teacher says of N positions."""
    logits = 1.5 * randn(N, V, seed=4)
    if kind == "nothing":
        return None
    if kind == "dense":
        return DenseTargets(logits.to(dtype))
    if kind == "head":  # of another width than the student's
        parts = (randn(*shape, seed=seed, dtype=dtype) for seed, shape in enumerate([(N, 7), (V, 7), (V,)], start=5))
        hidden, weight, bias = parts
        return HeadTargets(hidden, LMHead(weight, bias, logit_scale=0.5, softcap=3.0))
    if kind == "sampled":  # three draws in four slots: at least one slot is not used
        shares = (logits / temperature).softmax(-1)
        drawn = torch.multinomial(shares, 3, replacement=True, generator=torch.Generator().manual_seed(8))
        counts = torch.zeros(N, V, dtype=torch.float64).scatter_add_(1, drawn, torch.ones(N, 3, dtype=torch.float64))
        values, ids = counts.topk(K)
        return SparseTargets(ids, (values / 3).log().to(dtype), "sampled", temperature)
    if kind == "renormalized":  # taken at another temperature
        values, ids = (logits / 2).log_softmax(-1).topk(K)
        return SparseTargets(ids, values.to(dtype), "renormalized", 2.0)
    values, ids = (logits / temperature).log_softmax(-1).topk(K)
    return SparseTargets(ids, values.to(dtype), "bucket", temperature)


def some_labels(N: int = N, V: int = V) -> Tensor:
    """Every third does not count."""
    labels = torch.randint(0, V, (N,), generator=torch.Generator().manual_seed(9))
    labels[::3] = -100
    return labels


def doubled(thing: Any) -> Any:
    """The same numbers in float64."""
    if isinstance(thing, Tensor):
        return thing.detach().double() if thing.is_floating_point() else thing
    if dataclasses.is_dataclass(thing):
        changed = {field.name: doubled(getattr(thing, field.name)) for field in dataclasses.fields(thing)}
        return dataclasses.replace(thing, **changed)
    return thing


def wanting(*tensors: Tensor) -> list[Tensor]:
    """Fresh leaves with the same numbers, in float64."""
    return [x.detach().double().requires_grad_() for x in tensors]


def close(actual: Any, expected: Any, dtype: torch.dtype = torch.float64, tolerance: float | None = None) -> None:
    tolerance = tolerance or (1e-9 if dtype == torch.float64 else 2e-5)
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance, check_dtype=False)


def plain_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """[N], 0 where the label is -100, with a gradient."""
    counts = labels != -100
    return -logits.log_softmax(-1).gather(1, (labels.long() * counts)[:, None])[:, 0] * counts


def plain(
    head: LMHead,
    hidden: Tensor,
    targets: Targets | None,
    divergence: Divergence | None,
    temperature: float = 1.0,
    labels: Tensor | None = None,
    label_weight: float = 0.0,
) -> Tensor:
    """The definition, [N] with a gradient, over whole float64 logits."""
    logits = head.logits(hidden)
    total = torch.zeros(len(hidden), dtype=torch.float64)
    if targets is not None:
        total = total + token_divergence(logits, targets, divergence, temperature=temperature)
    if labels is not None:
        total = total + label_weight * plain_cross_entropy(logits, labels)
    return total


def loops(logits: Tensor, targets: Targets, divergence: Divergence, temperature: float) -> Tensor:
    """The divergences [N] by the loops of reference.py."""
    if isinstance(targets, SparseTargets):
        t = targets
        return reference.sparse_divergence(
            logits, t.ids, t.log_probs, t.kind, divergence, temperature, taken_at=t.temperature
        )
    if isinstance(targets, HeadTargets):
        head = targets.head
        teacher = reference.head_logits(targets.hidden, head.weight, head.bias, head.logit_scale, head.softcap)
    else:
        teacher = targets.logits
    return reference.token_divergence(logits, teacher, divergence, temperature)


def loops_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    counts = labels != -100
    entropies = torch.zeros(len(labels), dtype=torch.float64)
    entropies[counts] = reference.cross_entropy(logits[counts], labels[counts])
    return entropies


@cache
def expectation(divergence: Divergence, temperature: float, kind: str, dtype: torch.dtype) -> tuple[Any, ...]:
    """Divergence, cross-entropy and loss by loops, and the gradients by whole float64 logits."""
    exact = wanting(*student(dtype=dtype))
    targets, labels = doubled(said(kind, temperature=temperature, dtype=dtype)), some_labels()
    w = 0.5 + rand(N, seed=10, dtype=dtype).double()
    logits = reference.head_logits(*(x.detach() for x in exact))
    each, entropies = loops(logits, targets, divergence, temperature), loops_cross_entropy(logits, labels)
    whole = plain(LMHead(*exact[1:]), exact[0], targets, divergence, temperature, labels, 0.3)
    gradients = torch.autograd.grad((w * whole).sum() / w.sum(), exact)
    return each, entropies, (w * (each + 0.3 * entropies)).sum() / w.sum(), gradients


def check(divergence: Divergence, temperature: float, kind: str, dtype: torch.dtype, backend: str) -> None:
    """Loss, parts and gradients, with labels, weights and bias, are what is expected."""
    tensors = hidden, weight, bias = student(dtype=dtype)
    output = linear_divergence(
        *(hidden, LMHead(weight, bias), said(kind, temperature=temperature, dtype=dtype), divergence),
        temperature=temperature,
        token_weights=0.5 + rand(N, seed=10, dtype=dtype),
        labels=some_labels(),
        label_weight=0.3,
        backend=backend,
    )
    each, entropies, loss, gradients = expectation(divergence, temperature, kind, dtype)
    close(output.divergence, each, dtype)
    close(output.cross_entropy, entropies, dtype)
    close(output.loss, loss, dtype)
    assert output.loss.dtype == output.divergence.dtype == output.cross_entropy.dtype == dtype
    assert not output.divergence.requires_grad and not output.cross_entropy.requires_grad
    actual = torch.autograd.grad(output.loss, tensors)
    assert [x.dtype for x in actual] == [dtype] * 3
    close(actual, gradients, dtype)


# ---- the numbers


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
    targets = None if divergence is None else said("dense", 3, V, dtype=dtype)
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
    targets = said(kind, 37, dtype=dtype)

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
    output = linear_divergence(hidden, LMHead(weight), said("dense"), JSD(), backend=backend)
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
    targets, labels = said(kind, temperature=temperature, dtype=dtype), some_labels()
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
    targets, w = said("dense", dtype=dtype), torch.ones(N).double() if weights is None else weights.double()
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
        *(hidden, LMHead(weight, bias, softcap=2.0), said(kind, rows, dtype=dtype), divergence),
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
    """A user's own that says nothing."""

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
    targets = said("dense", dtype=dtype)
    output = linear_divergence(hidden, LMHead(weight, bias), targets, divergence, temperature=2.0, backend=backend)
    exact = wanting(*tensors)
    expected = plain(LMHead(*exact[1:]), exact[0], doubled(targets), divergence, 2.0).mean()
    close(output.loss, expected, dtype)
    close(torch.autograd.grad(output.loss, tensors), torch.autograd.grad(expected, exact), dtype)


# ---- the derivative


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
    targets = said(kind, 3, real, temperature=2.0, K=2)

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
    targets, labels, w = said(kind, dtype=dtype), some_labels(), rand(N, seed=10, dtype=dtype)
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


def error(actual: Iterable[Tensor], exact: Iterable[Tensor]) -> list[float]:
    return [float((ours.double() - theirs).norm()) for ours, theirs in zip(actual, exact, strict=True)]


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
    targets = said(kind, 48, 100, dtype=torch.float16)
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
    targets, small, scaling = said("dense", 48, 100, dtype=torch.float16), torch.full((48,), 1e-6), 2.0**16
    run = partial(linear_divergence, divergence=JSD(0.3), token_weights=small, normalizer=1.0)
    ours = torch.autograd.grad(run(hidden, LMHead(weight, bias), targets, backend=backend).loss * scaling, tensors)
    exact = wanting(*tensors)
    output = run(exact[0], LMHead(*exact[1:]), doubled(targets), backend="eager")
    expected = torch.autograd.grad(output.loss * scaling, exact)
    for our, gradient in zip(error(ours, expected), expected, strict=True):
        assert our <= 0.02 * float(gradient.norm())


# ---- what tensors may look like


@pytest.mark.parametrize("kind", ["nothing", "dense", "head", "bucket"])
@every_backend
@every_reduction
def test_no_tokens(kind, backend, reduction):
    tensors = hidden, weight, bias = student(0)
    output = linear_divergence(
        *(hidden, LMHead(weight, bias, softcap=2.0, size=V - 2), said(kind, 0, V - 2)),
        None if kind == "nothing" else JSD(),
        labels=torch.zeros(0, dtype=torch.long),
        label_weight=0.5,
        reduction=reduction,
        backend=backend,
    )
    assert output.loss.shape == (() if reduction == "mean" else (0,)) and output.loss.sum() == 0
    for gradient, tensor in zip(torch.autograd.grad(output.loss.sum(), tensors), tensors, strict=True):
        assert torch.equal(gradient, torch.zeros_like(tensor))


@every_dtype
@every_backend
@every_reduction
def test_labels_that_do_not_count_add_nothing(dtype, backend, reduction):
    tensors = hidden, weight, bias = student(dtype=dtype)
    none = torch.full((N,), -100)
    alone = linear_cross_entropy(hidden, LMHead(weight, bias), none, backend=backend, reduction=reduction)
    assert (alone.loss == 0).all() and (alone.cross_entropy == 0).all()
    assert all((x == 0).all() for x in torch.autograd.grad(alone.loss.sum(), tensors))
    for kind in ("dense", "bucket"):
        run = partial(linear_divergence, hidden, LMHead(weight, bias), said(kind, dtype=dtype), JSD())
        beside = run(labels=none, label_weight=0.5, backend=backend, reduction=reduction)
        without = run(backend=backend, reduction=reduction)
        close(beside.loss, without.loss, dtype)
        close(*(torch.autograd.grad(each.loss.sum(), tensors) for each in (beside, without)), dtype)


@every_dtype
@every_backend
@every_reduction
def test_token_weights_of_zero_leave_nothing(dtype, backend, reduction):
    tensors = hidden, weight, bias = student(dtype=dtype)
    output = linear_divergence(
        *(hidden, LMHead(weight, bias), said("dense", dtype=dtype), JSD()),
        token_weights=torch.zeros(N),
        labels=some_labels(),
        label_weight=0.5,
        backend=backend,
        reduction=reduction,
    )
    assert (output.loss == 0).all() and (output.divergence > 0).all()
    assert all((x == 0).all() for x in torch.autograd.grad(output.loss.sum(), tensors))


@pytest.mark.parametrize("kind", ["dense", "head"])
@every_dtype
@every_backend
@every_reduction
def test_tensors_need_not_be_contiguous(kind, dtype, backend, reduction):
    hidden, weight, bias = student(dtype=dtype)
    whole = said(kind, dtype=dtype)
    tensors = wide, turned, spread = (
        torch.stack([hidden, hidden], -1).detach().requires_grad_(),
        weight.detach().t().contiguous().requires_grad_(),
        torch.stack([bias, bias], -1).detach().requires_grad_(),
    )
    if isinstance(whole, DenseTargets):
        strided: Targets = DenseTargets(whole.logits.t().contiguous().t())
    else:
        head = dataclasses.replace(whole.head, weight=whole.head.weight.t().contiguous().t())
        strided = HeadTargets(whole.hidden.repeat_interleave(2, 0)[::2], head)
    labels, w = some_labels(), rand(N, seed=10)
    run = partial(linear_divergence, label_weight=0.5, reduction=reduction, backend=backend, chunk_tokens=4)
    expected = run(hidden, LMHead(weight, bias), whole, JSD(), labels=labels, token_weights=w)
    actual = run(
        *(wide[..., 0], LMHead(turned.t(), spread[..., 0]), strided, JSD()),
        labels=labels.repeat_interleave(2)[::2],
        token_weights=w.repeat_interleave(2)[::2],
    )
    close(actual.loss, expected.loss, dtype)
    ours = torch.autograd.grad(actual.loss.sum(), tensors)
    theirs = torch.autograd.grad(expected.loss.sum(), (hidden, weight, bias))
    close((ours[0][..., 0], ours[1].t(), ours[2][..., 0]), theirs, dtype)
    assert (ours[0][..., 1] == 0).all() and (ours[2][..., 1] == 0).all()


@every_backend
def test_hidden_states_may_be_one_row_many_times(backend):
    row, weight = student(1)[0], student()[1]
    targets = said("dense")
    output = linear_divergence(row.expand(N, H), LMHead(weight), targets, JSD(), backend=backend)
    expected = plain(LMHead(weight), row.expand(N, H), targets, JSD()).mean()
    close(output.loss, expected)
    close(*(torch.autograd.grad(loss, (row, weight)) for loss in (output.loss, expected)))


@every_dtype
@every_backend
@every_reduction
def test_a_head_that_is_also_the_embedding_gets_both_gradients(dtype, backend, reduction):
    _, weight, bias = student(dtype=dtype)
    ids, turn = torch.tensor([0, 3, 3, 8, 1, 0]), randn(H, H, seed=11, dtype=dtype)
    targets = said("dense", dtype=dtype)
    hidden = torch.tanh(weight[ids] @ turn)
    loss = linear_divergence(
        hidden, LMHead(weight, bias), targets, JSD(), reduction=reduction, backend=backend
    ).loss.mean()
    loss.backward()
    (exact,) = wanting(weight)
    hidden = torch.tanh(exact[ids] @ turn.double())
    plain(LMHead(exact, bias.detach().double()), hidden, doubled(targets), JSD()).mean().backward()
    close(weight.grad, exact.grad, dtype)


@pytest.mark.parametrize("integer", [torch.int32, torch.int16], ids=str)
@pytest.mark.parametrize("kind", ["nothing", "dense", "bucket"])
@every_backend
@every_reduction
def test_token_ids_may_be_short_integers(integer, kind, backend, reduction):
    tensors = hidden, weight, bias = student()
    targets = said(kind)
    short = targets if kind != "bucket" else dataclasses.replace(targets, ids=targets.ids.to(integer))
    run = partial(linear_divergence, label_weight=0.5, reduction=reduction, backend=backend)
    divergence = None if targets is None else JSD()
    expected = run(hidden, LMHead(weight, bias), targets, divergence, labels=some_labels())
    actual = run(hidden, LMHead(weight, bias), short, divergence, labels=some_labels().to(integer))
    assert torch.equal(actual.loss, expected.loss)
    for ours, theirs in zip(*(torch.autograd.grad(x.loss.sum(), tensors) for x in (actual, expected)), strict=True):
        assert torch.equal(ours, theirs)


@every_kind
@every_backend
@every_reduction
def test_no_gradient_flows_to_the_teacher(kind, backend, reduction):
    hidden, weight, _ = student()
    targets = said(kind)
    if isinstance(targets, DenseTargets):
        theirs = [targets.logits]
    elif isinstance(targets, HeadTargets):
        theirs = [targets.hidden, targets.head.weight, targets.head.bias]
    else:
        theirs = [targets.log_probs]
    for tensor in theirs:
        tensor.requires_grad_()
    before = [x.clone() for x in theirs]
    output = linear_divergence(
        *(hidden, LMHead(weight), targets, JSD()), reduction=reduction, backend=backend, temperature=1.0
    )
    output.loss.sum().backward()
    assert hidden.grad is not None and all(x.grad is None for x in theirs)
    assert all(torch.equal(x, y) for x, y in zip(theirs, before, strict=True))


# ---- memory


class Made(TorchDispatchMode):
    """Records the shape of every tensor that is made, views aside."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for x in tree_leaves(result):
            if isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in given:
                self.shapes.append(tuple(x.shape))
        return result

    @property
    def largest(self) -> int:
        return max(math.prod(shape) for shape in self.shapes)


@pytest.mark.parametrize("kind", ["nothing", "dense", "head", "bucket"])
@every_dtype
@every_backend
@every_reduction
def test_whole_logits_never_exist(kind, dtype, backend, reduction):
    rows, width, vocabulary, chunk = 128, 8, 300, 8
    tensors = hidden, weight, bias = student(rows, width, vocabulary, dtype=dtype)
    targets = said(kind, rows, vocabulary, dtype=dtype)
    with Made() as made:
        output = linear_divergence(
            *(hidden, LMHead(weight, bias, softcap=2.0), targets, None if targets is None else JSD()),
            temperature=1.0,
            labels=some_labels(rows, vocabulary),
            label_weight=0.5,
            reduction=reduction,
            backend=backend,
            chunk_tokens=chunk,
        )
        torch.autograd.grad(output.loss.sum(), tensors)
    if backend == "eager":
        assert made.largest == rows * vocabulary
    else:
        assert made.largest <= 2 * chunk * vocabulary < rows * vocabulary / 4


@pytest.mark.parametrize("wanted", list(itertools.product([True, False], repeat=3)), ids=str)
@pytest.mark.parametrize("kind", ["dense", "bucket"])
@every_backend
@every_reduction
def test_a_gradient_is_made_only_where_it_is_wanted(wanted, kind, backend, reduction):
    rows, width, vocabulary = 5, 17, 31
    tensors = [
        x.detach().requires_grad_(want) for x, want in zip(student(rows, width, vocabulary), wanted, strict=True)
    ]
    hidden, weight, bias = tensors
    targets = said(kind, rows, vocabulary)
    with Made() as made:
        output = linear_divergence(
            hidden, LMHead(weight, bias), targets, JSD(), reduction=reduction, backend=backend, chunk_tokens=3
        )
        assert output.loss.requires_grad == any(wanted)
        if any(wanted):
            output.loss.sum().backward()
    assert ((rows, width) in made.shapes, (vocabulary, width) in made.shapes) == wanted[:2]
    exact = wanting(*tensors)
    expected = plain(LMHead(*exact[1:]), exact[0], targets, JSD())
    expected = torch.autograd.grad(expected.mean() if reduction == "mean" else expected.sum(), exact)
    for tensor, want, gradient in zip(tensors, wanted, expected, strict=True):
        if want:
            close(tensor.grad, gradient)
        else:
            assert tensor.grad is None


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@every_dtype
@every_backend
@every_reduction
def test_no_gradient_is_made_where_none_is_recorded(mode, dtype, backend, reduction):
    rows, width, vocabulary = 5, 17, 31
    hidden, weight, bias = student(rows, width, vocabulary, dtype=dtype)
    run = partial(linear_divergence, reduction=reduction, backend=backend)
    targets = said("dense", rows, vocabulary, dtype=dtype)
    labels = {"labels": some_labels(rows, vocabulary), "label_weight": 0.5}
    expected = run(hidden, LMHead(weight, bias), targets, JSD(), **labels)
    with mode(), Made() as made:
        output = run(hidden, LMHead(weight, bias), targets, JSD(), **labels)
    assert not output.loss.requires_grad
    assert not {(rows, width), (vocabulary, width)} & set(made.shapes)
    for ours, theirs in zip(output, expected, strict=True):
        close(ours, theirs.detach(), dtype)


# ---- the protocol of autograd


@every_dtype
@every_backend
@every_reduction
def test_the_loss_may_be_scaled_and_added_to_others(dtype, backend, reduction):
    tensors = hidden, weight, bias = student(dtype=dtype)
    exact = wanting(*tensors)
    targets = said("dense", dtype=dtype)
    loss = linear_divergence(hidden, LMHead(weight, bias), targets, JSD(), reduction=reduction, backend=backend).loss
    other = linear_cross_entropy(hidden, LMHead(weight, bias), some_labels(), reduction=reduction, backend=backend).loss
    total = (-3 * loss + loss**2 + other / 7).mean() + hidden.square().sum() + weight.sum()
    total.backward()
    each = plain(LMHead(*exact[1:]), exact[0], doubled(targets), JSD())
    hard = plain(LMHead(*exact[1:]), exact[0], None, None, 1.0, some_labels(), 1.0)
    if reduction == "mean":
        each, hard = each.mean(), hard.mean()
    expected = (-3 * each + each**2 + hard / 7).mean() + exact[0].square().sum() + exact[1].sum()
    expected.backward()
    close([x.grad for x in tensors], [x.grad for x in exact], dtype)


@every_backend
@every_reduction
def test_gradients_add_up_over_two_calls(backend, reduction):
    tensors = hidden, weight, bias = student()
    exact = wanting(*tensors)
    for divergence in (JSD(), ForwardKL()):
        output = linear_divergence(
            hidden, LMHead(weight, bias), said("dense"), divergence, reduction=reduction, backend=backend
        )
        output.loss.mean().backward()
        plain(LMHead(*exact[1:]), exact[0], said("dense"), divergence).mean().backward()
    close([x.grad for x in tensors], [x.grad for x in exact])


@every_backend
@every_reduction
def test_one_backward_pass_may_keep_the_graph(backend, reduction):
    tensors = hidden, weight, bias = student()
    loss = linear_divergence(
        hidden, LMHead(weight, bias), said("dense"), JSD(), reduction=reduction, backend=backend
    ).loss.mean()
    loss.backward(retain_graph=True)
    expected = plain(LMHead(weight, bias), hidden, said("dense"), JSD()).mean()
    close([x.grad for x in tensors], list(torch.autograd.grad(expected, tensors)))


@pytest.mark.parametrize("retain_graph", [True, False])
@every_fused_backend
def test_a_second_backward_pass_is_an_error_that_says_what_to_do(backend, retain_graph):
    hidden, weight, _ = student()
    loss = linear_divergence(hidden, LMHead(weight), said("dense"), JSD(), backend=backend).loss
    loss.backward(retain_graph=retain_graph)
    before = hidden.grad.clone()
    with pytest.raises(UserError, match=r'^linear_divergence: expected one backward pass.*reduction="none"') as caught:
        loss.backward()
    assert "\n" not in str(caught.value) and torch.equal(hidden.grad, before)


@every_backend
def test_without_a_reduction_the_backward_pass_may_happen_twice(backend):
    tensors = hidden, weight, bias = student()
    loss = linear_divergence(hidden, LMHead(weight, bias), said("dense"), JSD(), reduction="none", backend=backend).loss
    once = torch.autograd.grad(loss.sum(), tensors, retain_graph=True)
    twice = torch.autograd.grad(2 * loss.sum(), tensors)
    close(twice, [2 * x for x in once])


@every_backend
@every_reduction
def test_a_second_derivative_is_refused(backend, reduction):
    hidden, weight, _ = student()
    loss = linear_divergence(hidden, LMHead(weight), said("dense"), JSD(), reduction=reduction, backend=backend).loss
    with pytest.raises(UserError, match=r"^\w+: .* first derivative, got create_graph=True") as caught:
        torch.autograd.grad(loss.sum(), hidden, create_graph=True)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("which", [0, 1, 2])
@every_backend
@every_reduction
def test_the_gradient_of_one_input_alone(which, backend, reduction):
    tensors = hidden, weight, bias = student()
    loss = linear_divergence(
        hidden, LMHead(weight, bias), said("dense"), JSD(), reduction=reduction, backend=backend
    ).loss.mean()
    (actual,) = torch.autograd.grad(loss, tensors[which])
    expected = plain(LMHead(weight, bias), hidden, said("dense"), JSD()).mean()
    close(actual, torch.autograd.grad(expected, tensors)[which])
    assert all(x.grad is None for x in tensors)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # both are torch's own,
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # about its own code
@pytest.mark.parametrize(("inside", "reduction"), [(True, "mean"), (True, "none"), (False, "mean")])
@every_backend
def test_it_goes_beside_and_into_a_compiled_function(inside, reduction, backend):
    dtype = torch.float32
    layer, head = torch.nn.Linear(5, H, dtype=dtype), torch.nn.Linear(H, V, dtype=dtype)
    inputs, targets = randn(N, 5, seed=12, dtype=dtype), said("dense", dtype=dtype)
    parameters = [*layer.parameters(), *head.parameters()]

    def model(x: Tensor) -> Tensor:
        return torch.tanh(layer(x))

    def loss(states: Callable[[Tensor], Tensor]) -> Tensor:
        return linear_divergence(
            *(states(inputs), LMHead(head.weight, head.bias), targets, JSD()), reduction=reduction, backend=backend
        ).loss.mean()

    expected = loss(model)
    gradients = torch.autograd.grad(expected, parameters)
    torch._dynamo.reset()
    if inside:
        actual = torch.compile(lambda: loss(model), backend="eager")()
    else:
        actual = loss(torch.compile(model, backend="eager"))
    close(actual, expected, dtype)
    close(torch.autograd.grad(actual, parameters), gradients, dtype)


@every_kind
@every_backend
@every_reduction
def test_autocast_multiplies_in_bfloat16_and_keeps_float32_gradients(kind, backend, reduction):
    tensors = hidden, weight, bias = student(24, 16, 50, dtype=torch.float32)
    targets = said(kind, 24, 50, dtype=torch.float32)
    run = partial(linear_divergence, divergence=JSD(0.3), labels=some_labels(24, 50), label_weight=0.5)

    def loss() -> Tensor:
        return run(hidden, LMHead(weight, bias), targets, reduction=reduction, backend=backend).loss.mean()

    expected = loss()
    with torch.autocast("cpu", torch.bfloat16):
        actual = loss()
    assert actual.dtype == torch.float32 and actual != expected
    close(actual, expected, tolerance=0.02)
    ours, theirs = torch.autograd.grad(actual, tensors), torch.autograd.grad(expected, tensors)
    assert [x.dtype for x in ours] == [torch.float32] * 3
    for our, gradient in zip(error(ours, theirs), theirs, strict=True):
        assert 0 < our <= 0.03 * float(gradient.norm())


@every_backend
@every_reduction
def test_autocast_takes_half_states_with_a_float32_head(backend, reduction):
    """As a layer in front of the head gives them."""
    layer, weight = torch.nn.Linear(5, H), student(dtype=torch.float32)[1]
    inputs, targets = randn(N, 5, seed=12, dtype=torch.float32), said("dense", dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        hidden = layer(inputs)
        hidden.retain_grad()
        output = linear_divergence(hidden, LMHead(weight), targets, JSD(), reduction=reduction, backend=backend)
    output.loss.mean().backward()
    assert (hidden.dtype, hidden.grad.dtype) == (torch.bfloat16, torch.bfloat16)
    assert output.loss.dtype == weight.grad.dtype == layer.weight.grad.dtype == torch.float32
    exact = wanting(hidden, weight)
    plain(LMHead(exact[1]), exact[0], doubled(targets), JSD()).mean().backward()
    for our, theirs in zip(error((hidden.grad, weight.grad), (x.grad for x in exact)), exact, strict=True):
        assert our <= 0.03 * float(theirs.grad.norm())


@every_backend
def test_autocast_leaves_float64_alone(backend):
    hidden, weight, _ = student()
    expected = linear_divergence(hidden, LMHead(weight), said("dense"), JSD(), backend=backend).loss
    with torch.autocast("cpu", torch.bfloat16):
        actual = linear_divergence(hidden, LMHead(weight), said("dense"), JSD(), backend=backend).loss
    assert torch.equal(actual, expected)


# ---- what does not fit


def sparse(kind: str = "bucket", temperature: float = 1.0, token: int = 1) -> SparseTargets:
    return SparseTargets(torch.full((4, 1), token), torch.full((4, 1), -1.0), kind, temperature)


SLICE = r"slice both .*at most {}\) with targets\.slice\(n\) and head\.slice\(n\)"
NEITHER = r"targets and a divergence, or neither of them and labels"
WRONG: dict[str, tuple[dict[str, Any], type[UserError], str]] = {
    "hidden of another width": (
        {"hidden": torch.zeros(4, 5)}, ShapeError, r"hidden of shape \[N, 3\], the head's width, got \[4, 5\]"),
    "hidden of three dimensions": (
        {"hidden": torch.zeros(2, 4, 3)}, ShapeError, r"hidden of shape \[N, 3\], the head's width, got \[2, 4, 3\]"),
    "a divergence without targets": ({"targets": None}, ShapeError, NEITHER),
    "targets without a divergence": ({"divergence": None}, ShapeError, NEITHER),
    "neither targets nor labels": ({"targets": None, "divergence": None}, ShapeError, NEITHER),
    "a larger vocabulary": (
        {"targets": DenseTargets(torch.zeros(4, 9))}, VocabularyError, r"vocabulary 7, got 9\. .*" + SLICE.format(7)),
    "a smaller vocabulary": (
        {"targets": HeadTargets(torch.zeros(4, 2), LMHead(torch.zeros(5, 2)))}, VocabularyError,
        r"vocabulary 7, got 5\. .*" + SLICE.format(5)),
    "targets of other positions": (
        {"targets": DenseTargets(torch.zeros(3, 7))}, ShapeError, r"targets for positions \[4\], got \[3\]"),
    "targets that are not flat": (
        {"targets": HeadTargets(torch.zeros(2, 2, 3), LMHead(torch.zeros(7, 3)))}, ShapeError,
        r"targets for positions \[4\], got \[2, 2\]"),
    "sparse targets of other positions": (
        {"targets": SparseTargets(torch.zeros(3, 1, dtype=torch.long), torch.zeros(3, 1))}, ShapeError,
        r"targets for positions \[4\], got \[3\]"),
    "temperature 0": ({"temperature": 0.0}, ShapeError, r"temperature > 0, got 0\.0"),
    "temperature -1": ({"temperature": -1.0}, ShapeError, r"temperature > 0, got -1\.0"),
    "temperature nan": ({"temperature": math.nan}, ShapeError, r"temperature > 0, got nan"),
    "token_weights of another length": (
        {"token_weights": torch.ones(3)}, ShapeError, r"token_weights of shape \[4\], got \[3\]"),
    "token_weights of two dimensions": (
        {"token_weights": torch.ones(4, 1)}, ShapeError, r"token_weights of shape \[4\], got \[4, 1\]"),
    "labels of another length": (
        {"labels": torch.zeros(5, dtype=torch.long)}, ShapeError, r"labels of shape \[4\], got \[5\]"),
    "a label behind the vocabulary": (
        {"labels": torch.tensor([0, 7, -100, 1])}, ShapeError, r"labels in 0\.\.6 or -100, got 0\.\.7"),
    "a label before the vocabulary": (
        {"labels": torch.tensor([0, 6, -100, -1])}, ShapeError, r"labels in 0\.\.6 or -100, got -1\.\.6"),
    "a label in the padding": (
        {"head": LMHead(torch.zeros(8, 3)).slice(7), "labels": torch.tensor([0, 7, -100, 1])}, ShapeError,
        r"labels in 0\.\.6 or -100, got 0\.\.7"),
    "an unknown reduction": ({"reduction": "sum"}, ShapeError, r"reduction \"mean\" or \"none\", got 'sum'"),
    "an unknown backend": (
        {"backend": "cuda"}, ShapeError, r"\"auto\", \"eager\", \"chunked\" or \"triton\", got 'cuda'"),
    "a bucket of another temperature": (
        {"targets": sparse("bucket", 2.0)}, ShapeError,
        r"temperature 2 that the bucket targets were taken at, got 1\. .*renormalized"),
    "a sample of another temperature": (
        {"targets": sparse("sampled", 2.0), "divergence": ForwardKL()}, ShapeError,
        r"temperature 2 that the sampled targets were taken at, got 1\. .*renormalized"),
    "a sample for a divergence that is not linear": (
        {"targets": sparse("sampled")}, ShapeError,
        r"linear in the teacher with sampled targets, got JSD, .*biased\. Use ForwardKL .*bucket"),
    "a sparse token behind the vocabulary": (
        {"targets": sparse(token=7)}, VocabularyError, r"token ids in 0\.\.6, got 7\.\.7\. .*another vocabulary"),
    "a sparse token before the vocabulary": (
        {"targets": sparse(token=-1)}, VocabularyError, r"token ids in 0\.\.6, got -1\.\.-1\. .*another vocabulary"),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "kind", "words"), WRONG.values(), ids=WRONG)
@every_backend
@pytest.mark.parametrize("with_gradient", [True, False])
def test_what_does_not_fit_is_named_in_one_line(changes, kind, words, backend, with_gradient):
    arguments = {
        "hidden": torch.zeros(4, 3),
        "head": LMHead(torch.zeros(7, 3, requires_grad=with_gradient)),
        "targets": DenseTargets(torch.zeros(4, 7)),
        "divergence": JSD(),
        "backend": backend,
        **changes,
    }
    with pytest.raises(kind, match=rf"^(linear_divergence|SparseTargets): expected .*{words}") as caught:
        linear_divergence(**arguments)
    assert isinstance(caught.value, UserError) and "\n" not in str(caught.value)
