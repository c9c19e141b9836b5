from __future__ import annotations

import doctest
import importlib
import math
import pkgutil

import pytest
import torch
from torch import Tensor

import potstill.losses
import reference
from potstill.errors import ShapeError, UserError, VocabularyError
from potstill.losses.divergences import JSD, AlphaBeta, ForwardKL, ReverseKL, SkewForwardKL, SkewReverseKL
from potstill.losses.targets import DenseTargets, HeadTargets, LMHead
from potstill.losses.token_losses import token_cross_entropy, token_divergence
from reference import DIVERGENCES

every_divergence = pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
every_temperature = pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])


def pair(*shape: int, dtype: torch.dtype = torch.float64, scale: float = 1.5) -> tuple[Tensor, Tensor]:
    """The student's logits, which want a gradient, and the teacher's."""
    student, teacher = scale * torch.randn(2, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return student.to(dtype).requires_grad_(), teacher.to(dtype)


@every_divergence
@every_temperature
@pytest.mark.parametrize("shape", [(7,), (5, 7), (2, 3, 7)], ids=str)
def test_it_is_the_papers_formula_at_every_token(divergence, temperature, shape):
    student, teacher = pair(*shape)
    actual = token_divergence(student, DenseTargets(teacher), divergence, temperature=temperature)
    expected = reference.token_divergence(student.detach(), teacher, divergence, temperature)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


@every_divergence
@every_temperature
def test_its_gradient_is_the_slope_of_its_value(divergence, temperature):
    student, teacher = pair(2, 3, 5)
    torch.autograd.gradcheck(
        lambda z: token_divergence(z, DenseTargets(teacher), divergence, temperature=temperature), student
    )


@every_divergence
def test_it_does_not_see_a_shift_of_the_logits(divergence):
    student, teacher = pair(4, 7)
    plain = token_divergence(student, DenseTargets(teacher), divergence)
    shifted = token_divergence(student + 100, DenseTargets(teacher - 50), divergence)
    torch.testing.assert_close(shifted, plain, rtol=1e-10, atol=1e-10)


@every_divergence
@every_temperature
def test_its_float32_gradient_is_no_worse_than_autograd_of_the_formula(divergence, temperature):
    student, teacher = pair(64, 300, dtype=torch.float32, scale=3.0)

    def formula(z: Tensor) -> Tensor:
        log_q, log_p = ((x / temperature).log_softmax(-1) for x in (z, teacher.to(z.dtype)))
        return divergence.pointwise(log_q, log_p)[0].sum()

    (naive,) = torch.autograd.grad(formula(student), student)
    exact_student = student.detach().double().requires_grad_()
    (exact,) = torch.autograd.grad(formula(exact_student), exact_student)
    loss = token_divergence(student, DenseTargets(teacher), divergence, temperature=temperature).sum()
    (ours,) = torch.autograd.grad(loss, student)
    floor = 1e-7 * exact.norm()
    assert (ours.double() - exact).norm() <= 2 * (naive.double() - exact).norm() + floor


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_computed_in_float32(dtype):
    student, teacher = pair(4, 300, dtype=dtype)
    wide = student.detach().float().requires_grad_()
    loss = token_divergence(student, DenseTargets(teacher), JSD())
    expected = token_divergence(wide, DenseTargets(teacher.float()), JSD())
    weights = torch.rand(4, generator=torch.Generator().manual_seed(1))
    (loss * weights).sum().backward()
    (expected * weights).sum().backward()
    assert loss.dtype == torch.float32 and student.grad.dtype == dtype
    assert torch.equal(loss, expected)
    assert torch.equal(student.grad, wide.grad.to(dtype))


def test_upstream_gradients_weigh_each_token():
    student, teacher = pair(2, 3, 7)
    weights = torch.arange(6.0).reshape(2, 3)
    each = token_divergence(student, DenseTargets(teacher), ForwardKL())
    (plain,) = torch.autograd.grad(each.sum(), student, retain_graph=True)
    (weighed,) = torch.autograd.grad((each * weights).sum(), student)
    torch.testing.assert_close(weighed, plain * weights.unsqueeze(-1))


def test_head_targets_equal_their_dense_logits_and_get_no_gradient():
    student, _ = pair(2, 3, 7)
    hidden, weight, bias = (pair(*shape)[0] for shape in ((2, 3, 4), (7, 4), (7,)))
    targets = HeadTargets(hidden, LMHead(weight, bias, logit_scale=0.5, softcap=3.0))
    dense = DenseTargets(targets.dense())
    loss, same = (token_divergence(student, teacher, ReverseKL()) for teacher in (targets, dense))
    assert torch.equal(loss, same)
    (loss + same).sum().backward()
    assert student.grad is not None
    assert hidden.grad is weight.grad is bias.grad is None


def test_no_tokens():
    student, teacher = pair(0, 7)
    loss = token_divergence(student, DenseTargets(teacher), JSD())
    loss.sum().backward()
    assert loss.shape == (0,) and student.grad.shape == (0, 7)


@pytest.mark.parametrize(
    "divergence", [JSD(), SkewForwardKL(), SkewReverseKL(), ForwardKL(), AlphaBeta(0.5, 0.5)], ids=str
)
def test_a_token_ruled_out_by_the_teacher_leaves_everything_finite(divergence):
    student, teacher = pair(4, 7)
    teacher[:, 2] = -math.inf
    loss = token_divergence(student, DenseTargets(teacher), divergence)
    loss.sum().backward()
    torch.testing.assert_close(loss, reference.token_divergence(student.detach(), teacher, divergence))
    assert student.grad.isfinite().all()


def test_an_infinite_divergence_is_an_error_that_says_what_to_use():
    student, teacher = pair(4, 7)
    teacher[1, 2] = -math.inf
    with pytest.raises(ShapeError, match=r"^token_divergence: .* finite ReverseKL, got inf: .*Use .*JSD"):
        token_divergence(student, DenseTargets(teacher), ReverseKL())


@pytest.mark.parametrize(
    ("shape", "temperature", "error", "words"),
    [
        ((4, 9), 1.0, VocabularyError, r"vocabulary 7, got 9\. .*slice both .*at most 7.*targets\.slice"),
        ((4, 5), 1.0, VocabularyError, r"vocabulary 7, got 5\. .*slice both .*at most 5.*targets\.slice"),
        ((3, 7), 1.0, ShapeError, r"expected targets for positions \[4\], got \[3\]"),
        ((7,), 1.0, ShapeError, r"expected targets for positions \[4\], got \[\]"),
        ((4, 7), 0.0, ShapeError, r"expected temperature > 0, got 0\.0"),
        ((4, 7), -1.0, ShapeError, r"expected temperature > 0, got -1\.0"),
        ((4, 7), math.nan, ShapeError, r"expected temperature > 0, got nan"),
    ],
)
def test_what_does_not_fit_is_named_in_one_line(shape, temperature, error, words):
    with pytest.raises(error, match=rf"^token_divergence: .*{words}") as caught:
        token_divergence(torch.zeros(4, 7), DenseTargets(torch.zeros(shape)), JSD(), temperature=temperature)
    assert isinstance(caught.value, UserError) and "\n" not in str(caught.value)


def test_plain_logits_and_the_name_of_a_divergence_are_refused():
    with pytest.raises(ShapeError, match=r"expected targets, got a tensor\. .*DenseTargets\(logits\)"):
        token_divergence(torch.zeros(4, 7), torch.zeros(4, 7), JSD())
    for divergence in ("forward_kl", JSD):
        with pytest.raises(ShapeError, match="expected a Divergence such as"):
            token_divergence(torch.zeros(4, 7), DenseTargets(torch.zeros(4, 7)), divergence)


def test_a_second_derivative_is_refused():
    student, teacher = pair(4, 7)
    loss = token_divergence(student, DenseTargets(teacher), JSD()).sum()
    with pytest.raises(UserError, match=r"^token_divergence: .* first derivative, got create_graph"):
        torch.autograd.grad(loss, student, create_graph=True)


def test_cross_entropy_of_hard_labels():
    student, _ = pair(5, 7)
    labels = torch.tensor([0, 6, 3, 3, 1])
    torch.testing.assert_close(token_cross_entropy(student, labels), reference.cross_entropy(student.detach(), labels))
    torch.autograd.gradcheck(lambda z: token_cross_entropy(z, labels), student)


def test_cross_entropy_of_half_precision_is_computed_in_float32():
    student, _ = pair(5, 300, dtype=torch.bfloat16)
    labels = torch.arange(5)
    loss = token_cross_entropy(student, labels)
    loss.sum().backward()
    assert loss.dtype == torch.float32 and student.grad.dtype == torch.bfloat16
    assert torch.equal(loss, token_cross_entropy(student.float(), labels))


def test_cross_entropy_of_no_tokens():
    student, _ = pair(0, 7)
    loss = token_cross_entropy(student, torch.zeros(0, dtype=torch.long))
    loss.sum().backward()
    assert loss.shape == (0,) and student.grad.shape == (0, 7)


LOSSES = [f"potstill.losses.{found.name}" for found in pkgutil.iter_modules(potstill.losses.__path__)]


@pytest.mark.parametrize(
    "name", ["potstill.losses.divergences", "potstill.losses.targets", "potstill.losses.schedule", *LOSSES]
)
def test_the_examples_in_docstrings(name):
    if name == "potstill.losses.kernel_triton":
        pytest.importorskip("triton")
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_there_are_examples_in_docstrings():
    for name in ("potstill.losses.schedule", "potstill.losses.token_losses"):
        assert doctest.testmod(importlib.import_module(name)).attempted > 0
