from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

import reference
from potstill.errors import ShapeError
from potstill.losses import divergences as module
from potstill.losses.divergences import (
    JSD,
    LOG_ZERO,
    AlphaBeta,
    Divergence,
    ForwardKL,
    ReverseKL,
    SkewForwardKL,
    SkewReverseKL,
    SoftCrossEntropy,
    TotalVariation,
)
from reference import DIVERGENCES

N, V = 16, 11
INFINITE_AT_ZERO = [ReverseKL(), AlphaBeta(0, 1), AlphaBeta(0, 0.5)]  # by definition, where p = 0 < q
every_divergence = pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)


@pytest.fixture
def logits() -> tuple[Tensor, Tensor]:
    """Student and teacher, [N, V] float64."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = 2 * torch.randn(2, N, V, dtype=torch.float64, generator=generator)
    return student, teacher


def pointwise(divergence: Divergence, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    return divergence.pointwise(*(logits.log_softmax(-1).clamp_min(LOG_ZERO) for logits in (student, teacher)))


def gradient(slope: Tensor, student: Tensor) -> Tensor:
    return slope - student.softmax(-1) * slope.sum(-1, keepdim=True)


def close(actual: Tensor, expected: Tensor, rtol: float = 1e-9, atol: float = 1e-9) -> None:
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


@every_divergence
def test_value_sums_to_the_papers_formula(divergence, logits):
    value, _ = pointwise(divergence, *logits)
    close(value.sum(-1), reference.token_divergence(*logits, divergence))


@every_divergence
@pytest.mark.parametrize("temperature", [0.5, 4.0])
def test_slope_is_the_gradient_of_value_through_the_softmax(divergence, temperature, logits):
    student, teacher = logits[0].requires_grad_(), logits[1]
    value, slope = pointwise(divergence, student / temperature, teacher / temperature)
    (expected,) = torch.autograd.grad(value.sum(), student)
    close(gradient(slope, student / temperature) / temperature, expected)


# Of kinds whose parameters have no default.
ARGUMENTS = {"alpha_beta": {"alpha": 0.3, "beta": 0.6}}


@pytest.mark.parametrize("logits_kind", ["random", "near one-hot", "ruled out by the student", "ruled out by both"])
@pytest.mark.parametrize("name", list(Divergence.kinds))
def test_every_kind_gives_the_gradient_that_autograd_finds(name, logits_kind, logits):
    divergence = Divergence.kinds[name](**ARGUMENTS.get(name, {}))
    student, teacher = logits
    if logits_kind == "near one-hot":
        student[:, 0] += 25
        teacher[: N // 2, 0] += 25
        teacher[N // 2 :, 1] += 25
    if logits_kind.startswith("ruled out"):
        student[:, 3] = LOG_ZERO
    if logits_kind == "ruled out by both":
        teacher[:, 3] = LOG_ZERO
    log_q, log_p = (x.log_softmax(-1).clamp_min(LOG_ZERO) for x in (student.requires_grad_(), teacher))
    value, slope = divergence.pointwise(log_q, log_p)
    if name == "alpha_beta" and logits_kind == "ruled out by the student":
        pytest.skip("autograd multiplies 0 by the infinite power of the branch that is not taken")
    (expected,) = torch.autograd.grad(value.sum(), student)
    close(gradient(slope, student.detach()), expected)


@every_divergence
def test_it_is_zero_only_where_the_two_are_equal(divergence, logits):
    student, teacher = logits
    if divergence == SoftCrossEntropy():
        entropy = -(teacher.softmax(-1) * teacher.log_softmax(-1)).sum(-1)
        close(pointwise(divergence, teacher, teacher)[0].sum(-1), entropy)
        return
    assert (pointwise(divergence, student, teacher)[0].sum(-1) > 1e-4).all()
    close(pointwise(divergence, teacher, teacher)[0].sum(-1), torch.zeros(N, dtype=torch.float64), atol=1e-14)


@every_divergence
def test_its_gradient_vanishes_where_the_two_are_equal(divergence, logits):
    _, slope = pointwise(divergence, logits[1], logits[1])
    close(gradient(slope, logits[1]), torch.zeros(N, V, dtype=torch.float64), atol=1e-14)


@every_divergence
def test_tokens_that_the_teacher_rules_out(divergence, logits):
    student, teacher = logits
    teacher[:, 3] = -math.inf
    value, slope = pointwise(divergence, student, teacher)
    if divergence in INFINITE_AT_ZERO:
        assert (value.sum(-1) > 1e30).all()
    else:
        assert value.isfinite().all() and slope.isfinite().all()
        close(value.sum(-1), reference.token_divergence(student, teacher, divergence))


@every_divergence
def test_tokens_that_both_rule_out_count_for_nothing(divergence, logits):
    student, teacher = logits
    without = pointwise(divergence, student[:, 1:], teacher[:, 1:])
    student[:, 0] = teacher[:, 0] = -math.inf
    value, slope = pointwise(divergence, student, teacher)
    close(value[:, 1:], without[0])
    close(slope[:, 1:], without[1])
    assert (value[:, 0] == 0).all() and (slope[:, 0] == 0).all()


@every_divergence
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("agreement", ["same", "opposite", "mixed"])
def test_underflow_is_never_not_a_number(divergence, dtype, agreement):
    signs = torch.tensor([[1.0, -1.0, 1.0, -1.0], [1.0, -1.0, -1.0, -1.0]], dtype=dtype)
    other = {"same": signs, "opposite": -signs, "mixed": signs.roll(1, -1)}[agreement]
    value, slope = pointwise(divergence, 1e4 * signs, 1e4 * other)
    assert value.isfinite().all() and slope.isfinite().all()
    if agreement == "same" and divergence != SoftCrossEntropy():
        assert value.sum(-1).abs().max() < 1e-6


@every_divergence
def test_float32_is_as_good_as_float32_can_be(divergence, logits):
    single = [x.float() for x in logits]
    actual = pointwise(divergence, *single)
    expected = pointwise(divergence, *(x.double() for x in single))
    close(actual[0].sum(-1).double(), expected[0].sum(-1), rtol=2e-6, atol=2e-6)
    close(actual[1].double(), expected[1], rtol=1e-6, atol=1e-6)


def test_total_variation_is_flat_at_ties():
    log_q = torch.tensor([0.5, 0.3, 0.2]).log()
    log_p = torch.tensor([0.5, 0.2, 0.3]).log()
    value, slope = TotalVariation().pointwise(log_q, log_p)
    close(value, torch.tensor([0.0, 0.05, 0.05]), atol=1e-6)
    close(slope, torch.tensor([0.0, 0.15, -0.1]), atol=1e-6)


@pytest.mark.parametrize(
    ("general", "special", "atol"),
    [
        (AlphaBeta(1, 0), ForwardKL(), 1e-12),
        (AlphaBeta(0, 1), ReverseKL(), 1e-12),
        (AlphaBeta(1, 1e-6), ForwardKL(), 1e-3),
        (AlphaBeta(1e-6, 1), ReverseKL(), 1e-3),
        (AlphaBeta(1, 1e-12), ForwardKL(), 1e-9),
        (AlphaBeta(1e-12, 1), ReverseKL(), 1e-9),
        (AlphaBeta(0.5, 1e-9), AlphaBeta(0.5, 0), 1e-6),
        (AlphaBeta(1e-9, 0.5), AlphaBeta(0, 0.5), 1e-6),
        (AlphaBeta(0.5, 0.5 + 1e-9), AlphaBeta(0.5 + 1e-9, 0.5), 1e-6),
    ],
    ids=str,
)
def test_alpha_beta_passes_into_the_kls_without_a_step(general, special, atol, logits):
    student, teacher = logits
    (value, slope), (expected, expected_slope) = (pointwise(d, student, teacher) for d in (general, special))
    close(value.sum(-1), expected.sum(-1), atol=atol)
    close(gradient(slope, student), gradient(expected_slope, student), atol=atol)


def test_jsd_does_not_tend_to_forward_kl():
    student, teacher = torch.tensor([[4.0, 0.0, 0.0], [0.0, 4.0, 0.0]], dtype=torch.float64)
    forward = pointwise(ForwardKL(), student, teacher)[0].sum()
    assert forward > 3
    for beta in (0.001, 0.999):  # here reverse KL equals forward KL
        close(pointwise(JSD(beta), student, teacher)[0].sum(), 0.001 * forward, rtol=0.05)


@pytest.mark.parametrize("value", [0, 1, -0.1, 1.1, math.nan])
@pytest.mark.parametrize(
    ("kind", "end"), [(JSD, "ForwardKL"), (SkewForwardKL, "ForwardKL"), (SkewReverseKL, "ReverseKL")]
)
def test_the_ends_of_a_mixture_are_refused(kind, end, value):
    with pytest.raises(ShapeError, match=rf"^{kind.__name__}: expected .*\(0, 1\), got {value}\. .*{end}"):
        kind(value)


@pytest.mark.parametrize(("alpha", "beta"), [(0, 0), (-0.1, 1), (1, -0.1), (math.nan, 1), (1, math.nan), (1, math.inf)])
def test_alpha_beta_refuses_what_has_no_meaning(alpha, beta):
    with pytest.raises(ShapeError, match=rf"^AlphaBeta: expected .* got alpha={alpha}, beta={beta}\."):
        AlphaBeta(alpha, beta)


@every_divergence
def test_a_divergence_is_a_value(divergence):
    twin = dataclasses.replace(divergence)
    assert twin == divergence and hash(twin) == hash(divergence)
    assert [other for other in DIVERGENCES if other == divergence] == [divergence]
    for field in dataclasses.fields(divergence):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(divergence, field.name, 0.5)
        assert dataclasses.replace(divergence, **{field.name: 0.3}) != divergence


def test_kinds_name_every_divergence_of_the_module():
    written = {kind for kind in vars(module).values() if isinstance(kind, type) and issubclass(kind, Divergence)}
    kinds = {kind for kind in Divergence.kinds.values() if kind.__module__ == module.__name__}
    assert kinds == written - {Divergence}
    assert kinds < set(reference.FORMULAS)


def test_a_divergence_without_pointwise_is_not_one():
    with pytest.raises(TypeError, match="pointwise"):
        Divergence()
