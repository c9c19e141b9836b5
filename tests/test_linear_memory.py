"""linear_divergence makes nothing of the size of the logits."""

from __future__ import annotations

import itertools
import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from linear_cases import (
    close,
    every_backend,
    every_dtype,
    every_reduction,
    make_targets,
    plain,
    some_labels,
    student,
    wanting,
)
from potstill.losses.divergences import JSD
from potstill.losses.fused_linear import linear_divergence
from potstill.losses.targets import LMHead


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
    targets = make_targets(kind, rows, vocabulary, dtype=dtype)
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
    targets = make_targets(kind, rows, vocabulary)
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
    targets = make_targets("dense", rows, vocabulary, dtype=dtype)
    labels = {"labels": some_labels(rows, vocabulary), "label_weight": 0.5}
    expected = run(hidden, LMHead(weight, bias), targets, JSD(), **labels)
    with mode(), Made() as made:
        output = run(hidden, LMHead(weight, bias), targets, JSD(), **labels)
    assert not output.loss.requires_grad
    assert not {(rows, width), (vocabulary, width)} & set(made.shapes)
    for actual, exact in zip(output, expected, strict=True):
        close(actual, exact.detach(), dtype)
