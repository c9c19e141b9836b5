"""What tensors given to linear_divergence may look like, and what does not fit."""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from typing import Any

import pytest
import torch

from linear_cases import (
    H,
    N,
    V,
    close,
    doubled,
    every_backend,
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
from potstill.errors import ShapeError, UserError, VocabularyError
from potstill.losses.divergences import JSD, ForwardKL
from potstill.losses.fused_linear import linear_cross_entropy, linear_divergence
from potstill.losses.targets import DenseTargets, HeadTargets, LMHead, SparseTargets, Targets


@pytest.mark.parametrize("kind", ["nothing", "dense", "head", "bucket"])
@every_backend
@every_reduction
def test_no_tokens(kind, backend, reduction):
    tensors = hidden, weight, bias = student(0)
    output = linear_divergence(
        *(hidden, LMHead(weight, bias, softcap=2.0, size=V - 2), make_targets(kind, 0, V - 2)),
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
        run = partial(linear_divergence, hidden, LMHead(weight, bias), make_targets(kind, dtype=dtype), JSD())
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
        *(hidden, LMHead(weight, bias), make_targets("dense", dtype=dtype), JSD()),
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
    whole = make_targets(kind, dtype=dtype)
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
    gradients = torch.autograd.grad(actual.loss.sum(), tensors)
    expected_gradients = torch.autograd.grad(expected.loss.sum(), (hidden, weight, bias))
    close((gradients[0][..., 0], gradients[1].t(), gradients[2][..., 0]), expected_gradients, dtype)
    assert (gradients[0][..., 1] == 0).all() and (gradients[2][..., 1] == 0).all()


@every_backend
def test_hidden_states_may_be_one_row_many_times(backend):
    row, weight = student(1)[0], student()[1]
    targets = make_targets("dense")
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
    targets = make_targets("dense", dtype=dtype)
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
    targets = make_targets(kind)
    short = targets if kind != "bucket" else dataclasses.replace(targets, ids=targets.ids.to(integer))
    run = partial(linear_divergence, label_weight=0.5, reduction=reduction, backend=backend)
    divergence = None if targets is None else JSD()
    expected = run(hidden, LMHead(weight, bias), targets, divergence, labels=some_labels())
    actual = run(hidden, LMHead(weight, bias), short, divergence, labels=some_labels().to(integer))
    assert torch.equal(actual.loss, expected.loss)
    for one, other in zip(*(torch.autograd.grad(x.loss.sum(), tensors) for x in (actual, expected)), strict=True):
        assert torch.equal(one, other)


@every_kind
@every_backend
@every_reduction
def test_no_gradient_flows_to_the_teacher(kind, backend, reduction):
    hidden, weight, _ = student()
    targets = make_targets(kind)
    if isinstance(targets, DenseTargets):
        teacher_tensors = [targets.logits]
    elif isinstance(targets, HeadTargets):
        teacher_tensors = [targets.hidden, targets.head.weight, targets.head.bias]
    else:
        teacher_tensors = [targets.log_probs]
    for tensor in teacher_tensors:
        tensor.requires_grad_()
    before = [x.clone() for x in teacher_tensors]
    output = linear_divergence(
        *(hidden, LMHead(weight), targets, JSD()), reduction=reduction, backend=backend, temperature=1.0
    )
    output.loss.sum().backward()
    assert hidden.grad is not None and all(x.grad is None for x in teacher_tensors)
    assert all(torch.equal(x, y) for x, y in zip(teacher_tensors, before, strict=True))


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
        r"temperature 2 of the bucket targets, got 1\. .*renormalized"),
    "a sample of another temperature": (
        {"targets": sparse("sampled", 2.0), "divergence": ForwardKL()}, ShapeError,
        r"temperature 2 of the sampled targets, got 1\. .*renormalized"),
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


def test_a_matrix_is_no_head() -> None:
    with pytest.raises(ShapeError, match=r"expected an LMHead as the head, got a Tensor. Give LMHead\(weight, bias\)"):
        linear_cross_entropy(torch.randn(3, 4), torch.randn(5, 4), torch.tensor([0, 1, 2]))
