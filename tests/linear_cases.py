"""Cases for the tests of linear_divergence, and what is expected of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from functools import cache
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor

import reference
from potstill.losses.divergences import Divergence
from potstill.losses.fused_linear import linear_divergence
from potstill.losses.targets import DenseTargets, HeadTargets, LMHead, SparseTargets, Targets
from potstill.losses.token_losses import token_divergence
from reference import DIVERGENCES

BACKENDS = ["eager", "chunked"]
FUSED = [backend for backend in BACKENDS if backend != "eager"]
N, H, V = 6, 4, 9
WITH_TRITON = [
    pytest.mark.skipif(find_spec("triton") is None, reason="there is no Triton"),
    # Its interpreter computes in numpy, which warns of what a GPU silently rounds to inf or 0.
    pytest.mark.filterwarnings("ignore:.* encountered in :RuntimeWarning"),
]

every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_fused_backend = pytest.mark.parametrize("backend", FUSED)
every_divergence = pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
every_reduction = pytest.mark.parametrize("reduction", ["mean", "none"])
every_dtype = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
every_kind = pytest.mark.parametrize("kind", ["dense", "head", "bucket"])

WAYS = [(dtype, backend) for dtype in (torch.float64, torch.float32) for backend in BACKENDS]
# Triton's kernels have float32 alone. Without a GPU its interpreter runs them (conftest.py), slowly: one of a kind.
SHOWN = [kind for i, kind in enumerate(DIVERGENCES) if type(kind) not in map(type, DIVERGENCES[:i])]
every_way = pytest.mark.parametrize(
    ("dtype", "backend"), [*WAYS, pytest.param(torch.float32, "triton", marks=WITH_TRITON)], ids=str
)


def ways(divergences: list[Divergence]) -> pytest.MarkDecorator:
    """Every divergence by every way; by Triton one of each kind, and in slow tests those near ends of parameters."""
    cases: list[Any] = [(divergence, *way) for divergence in divergences for way in WAYS]
    cases += [
        pytest.param(
            divergence,
            torch.float32,
            "triton",
            marks=[*WITH_TRITON, *([] if divergence in SHOWN else [pytest.mark.slow])],
        )
        for divergence in divergences
        if divergence in SHOWN or divergence not in DIVERGENCES
    ]
    return pytest.mark.parametrize(("divergence", "dtype", "backend"), cases, ids=str)


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def rand(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def student(N: int = N, H: int = H, V: int = V, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, weight and bias; all want a gradient."""
    shapes = enumerate([(N, H), (V, H), (V,)], start=1)
    hidden, weight, bias = (randn(*shape, seed=seed, dtype=dtype).requires_grad_() for seed, shape in shapes)
    return hidden, weight, bias


def make_targets(
    kind: str, N: int = N, V: int = V, *, temperature: float = 1.0, K: int = 4, dtype: torch.dtype = torch.float64
) -> Targets | None:
    """A teacher's targets for N positions."""
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
    targets, labels = doubled(make_targets(kind, temperature=temperature, dtype=dtype)), some_labels()
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
        *(hidden, LMHead(weight, bias), make_targets(kind, temperature=temperature, dtype=dtype), divergence),
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


def error(actual: Iterable[Tensor], exact: Iterable[Tensor]) -> list[float]:
    return [float((one.double() - other).norm()) for one, other in zip(actual, exact, strict=True)]
