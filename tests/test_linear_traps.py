"""linear_divergence where numbers end: probabilities of 0, huge logits, equal sides, parameters at their ends."""

from __future__ import annotations

import itertools
import math
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

import reference
from linear_cases import close, every_backend, every_reduction, every_way, randn, ways
from potstill.errors import ShapeError
from potstill.losses.divergences import (
    JSD,
    AlphaBeta,
    Divergence,
    ForwardKL,
    ReverseKL,
    SkewForwardKL,
    SkewReverseKL,
    SoftCrossEntropy,
    TotalVariation,
)
from potstill.losses.fused_linear import linear_cross_entropy, linear_divergence
from potstill.losses.targets import DenseTargets, HeadTargets, LMHead
from reference import DIVERGENCES, SquaredHellinger

N, V = 5, 17
TEMPERATURES = (0.5, 1.0, 4.0)
INFINITE_AT_ZERO = [ReverseKL(), AlphaBeta(0, 1)]  # by definition, where p = 0 < q
BOUNDED = [
    d for d in DIVERGENCES if isinstance(d, JSD | SkewForwardKL | SkewReverseKL | TotalVariation | SquaredHellinger)
]
ENDS = [kind(end) for kind in (JSD, SkewForwardKL, SkewReverseKL) for end in (1e-6, 1 - 1e-6)]
finite_divergences = [divergence for divergence in DIVERGENCES if divergence not in INFINITE_AT_ZERO]

every_temperature = pytest.mark.parametrize("temperature", TEMPERATURES)


def pair(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """The student's and the teacher's logits."""
    return 1.5 * randn(N, V, seed=21, dtype=dtype), 1.5 * randn(N, V, seed=22, dtype=dtype)


def rounding(*logits: Tensor, temperature: float = 1.0) -> float:
    """What the logits' own last digits may make of a divergence."""
    largest = max(float(x[x.isfinite()].abs().max()) if x.isfinite().any() else 0.0 for x in logits)
    return 16 * torch.finfo(logits[0].dtype).eps * (1 + largest / temperature)


def over(
    student: Tensor, teacher: Tensor, divergence: Divergence, backend: str, **options: Any
) -> tuple[Tensor, list[Tensor]]:
    """The divergences [N] and the gradients of hidden (here the logits themselves) and of the head; all finite.

    A token that the student rules out in every row has -inf in the bias of its head.
    """
    out = (student == -math.inf).all(0)
    bias = torch.where(out, -math.inf, 0.0).to(student.dtype).requires_grad_()
    hidden = student.masked_fill(out, 0.0).requires_grad_()
    weight = torch.eye(student.shape[1], dtype=student.dtype).requires_grad_()
    chunk = 5 if backend == "triton" else 2  # a start of its interpreter costs as much as many rows
    output = linear_divergence(
        hidden, LMHead(weight, bias), DenseTargets(teacher), divergence, backend=backend, chunk_tokens=chunk, **options
    )
    gradients = list(torch.autograd.grad(output.loss.sum(), (hidden, weight, bias)))
    assert output.loss.isfinite().all() and output.divergence.isfinite().all()
    assert all(x.isfinite().all() for x in gradients)
    return output.divergence, gradients


def by_formula(student: Tensor, teacher: Tensor, divergence: Divergence, temperature: float = 1.0) -> Tensor:
    """[N] float64 by loops; a row that is -inf throughout has probabilities of 0."""
    rows = zip(student.tolist(), teacher.tolist(), strict=True)
    values = [row_by_formula(tuple(q), tuple(p), divergence, temperature) for q, p in rows]
    return torch.tensor(values, dtype=torch.float64)


@cache
def row_by_formula(
    student: tuple[float, ...], teacher: tuple[float, ...], divergence: Divergence, temperature: float
) -> float:
    def probabilities(row: tuple[float, ...]) -> list[float]:
        return [0.0] * len(row) if max(row) == -math.inf else reference.softmax(list(row), temperature)

    return reference.formula(divergence)(probabilities(teacher), probabilities(student))


def small_steps(student: Tensor, teacher: Tensor, divergence: Divergence, temperature: float) -> Tensor:
    """The gradient of the mean by central differences of the loops, in float64: [N, V]."""
    gradient, step = torch.zeros_like(student), 1e-5
    for v in range(student.shape[1]):
        moved = torch.zeros_like(student)
        moved[:, v] = step
        up, down = (by_formula(student + sign * moved, teacher, divergence, temperature) for sign in (1, -1))
        gradient[:, v] = (up - down) / (2 * step) / len(student)
    return gradient


# ---- probabilities of 0


@ways([*finite_divergences, *ENDS])
def test_tokens_that_the_teacher_rules_out(divergence, dtype, backend):
    student, teacher = pair(dtype)
    teacher[0, 3] = teacher[1, :-1] = teacher[2, 0] = teacher[2, -1] = teacher[:, 7] = -math.inf
    for temperature in (1.0, 2.0):
        values, _ = over(student, teacher, divergence, backend, temperature=temperature)
        close(values, by_formula(student, teacher, divergence, temperature), dtype)


@ways([*finite_divergences, *ENDS])
def test_a_row_that_the_teacher_rules_out_has_probabilities_of_zero(divergence, dtype, backend):
    student, teacher = pair(dtype)
    teacher[1] = teacher[4] = -math.inf
    for temperature in (1.0, 2.0):
        values, _ = over(student, teacher, divergence, backend, temperature=temperature)
        close(values, by_formula(student, teacher, divergence, temperature), dtype)


@pytest.mark.parametrize("divergence", [d for d in finite_divergences if d != AlphaBeta(1e-6, 1)], ids=str)
@every_backend
def test_the_gradient_there_is_the_slope_of_the_formula(divergence, backend):
    student, teacher = (x[:3, :6].clone() for x in pair())
    teacher[0, 2] = teacher[1] = -math.inf
    _, (gradient, *_) = over(student, teacher, divergence, backend, temperature=2.0)
    expected = small_steps(student, teacher, divergence, 2.0)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)


@ways([*DIVERGENCES, *ENDS])
def test_tokens_that_both_rule_out_count_for_nothing(divergence, dtype, backend):
    student, teacher = pair(dtype)
    values, gradients = over(student[:, 2:], teacher[:, 2:], divergence, backend)
    student[:, :2] = teacher[:, :2] = -math.inf
    with_them, (hidden, weight, bias) = over(student, teacher, divergence, backend)
    close(with_them, values, dtype)
    close(hidden[:, 2:], gradients[0], dtype)
    assert (hidden[:, :2] == 0).all() and (weight[:2] == 0).all() and (bias[:2] == 0).all()


@ways([*DIVERGENCES, *ENDS])
def test_rows_that_both_rule_out_count_for_nothing(divergence, dtype, backend):
    nothing = torch.full((N, V), -math.inf, dtype=dtype)
    values, gradients = over(nothing, nothing, divergence, backend)
    assert (values == 0).all() and all((x == 0).all() for x in gradients)


@ways([*BOUNDED, ReverseKL(), *ENDS])
def test_tokens_that_the_student_rules_out(divergence, dtype, backend):
    student, teacher = pair(dtype)
    student[:, 4] = student[:, 9] = -math.inf
    values, (hidden, weight, bias) = over(student, teacher, divergence, backend)
    close(values, by_formula(student, teacher, divergence), dtype)
    assert (hidden[:, 4] == 0).all() and (weight[9] == 0).all() and (bias[9] == 0).all()


@pytest.mark.parametrize("divergence", [*INFINITE_AT_ZERO, AlphaBeta(0, 0.5)], ids=str)
@pytest.mark.parametrize("as_head", [True, False])
@every_way
@every_reduction
def test_an_infinite_divergence_is_an_error_that_says_what_to_use(divergence, as_head, dtype, backend, reduction):
    student, teacher = pair(dtype)
    teacher[:, -1] = -math.inf
    targets = DenseTargets(teacher)
    if as_head:
        bias = torch.where(teacher[0] == -math.inf, -math.inf, 0.0).to(dtype)
        targets = HeadTargets(pair(dtype)[1], LMHead(torch.eye(V, dtype=dtype), bias))
    weight = torch.eye(V, dtype=dtype).requires_grad_()
    words = rf"^\w+: expected a finite {type(divergence).__name__}, got inf: .*Use a bounded divergence \(JSD"
    with pytest.raises(ShapeError, match=words) as caught:
        linear_divergence(
            student, LMHead(weight), targets, divergence, reduction=reduction, backend=backend, chunk_tokens=2
        )
    assert "\n" not in str(caught.value)


@every_way
def test_one_infinite_token_among_many_is_seen(dtype, backend):
    student, teacher = pair(dtype)
    teacher[-1] = -math.inf
    with pytest.raises(ShapeError, match=r"expected a finite ReverseKL, got inf"):
        linear_divergence(
            student, LMHead(torch.eye(V, dtype=dtype)), DenseTargets(teacher), ReverseKL(), backend=backend
        )


@every_way
def test_forward_kl_is_infinite_where_the_student_rules_out(dtype, backend):
    student, teacher = pair(dtype)
    head = LMHead(torch.eye(V, dtype=dtype), torch.where(torch.arange(V) == 2, -math.inf, 0.0).to(dtype))
    with pytest.raises(ShapeError, match=r"expected a finite ForwardKL, got inf: .*Use a bounded divergence \(JSD"):
        linear_divergence(student, head, DenseTargets(teacher), ForwardKL(), backend=backend)


@ways([*INFINITE_AT_ZERO, AlphaBeta(0, 0.5), ForwardKL(), JSD()])
@every_reduction
def test_where_the_weight_is_zero_the_divergence_may_be_infinite(divergence, dtype, backend, reduction):
    student, teacher = pair(dtype)
    weights = torch.tensor([1.0, 0, 2, 1, 0])
    hidden, weight = student.requires_grad_(), torch.eye(V, dtype=dtype).requires_grad_()

    def run() -> list[Tensor]:
        output = linear_divergence(
            *(hidden, LMHead(weight), DenseTargets(teacher), divergence),
            token_weights=weights,
            reduction=reduction,
            backend=backend,
        )
        gradients = torch.autograd.grad(output.loss.sum(), (hidden, weight))
        return [output.loss, output.divergence[weights != 0], *gradients]

    expected = run()
    teacher[1, 3] = teacher[4, :] = -math.inf
    close(run(), expected, dtype)


# ---- large and equal


@ways([*DIVERGENCES, *ENDS])
def test_huge_logits_are_never_not_a_number(divergence, dtype, backend):
    signs = randn(N, V, seed=23, dtype=dtype).sign()
    for other, temperature in itertools.product((signs, -signs, signs.roll(1, -1)), TEMPERATURES):
        student, teacher = 1e4 * signs, 1e4 * other
        values, (gradient, *_) = over(student, teacher, divergence, backend, temperature=temperature)
        assert (values >= -rounding(student, teacher, temperature=temperature)).all()
        if divergence in BOUNDED or divergence in ENDS:
            expected = by_formula(student, teacher, divergence, temperature)
            close(values, expected, tolerance=1e-9 if dtype == torch.float64 else 1e-4)
        if other is signs:
            close(gradient, torch.zeros_like(gradient), tolerance=1e-6)


@ways([*DIVERGENCES, *ENDS])
def test_both_sides_may_underflow(divergence, dtype, backend):
    student = torch.tensor(
        [[0.0, -200.0, -1e3], [0.0, -88.0, -104.0], [-1e4, 0.0, 0.0], [0.0, -1e9, -1e30]], dtype=dtype
    )
    teacher = torch.tensor(
        [[0.0, -1e3, -200.0], [0.0, -104.0, -88.0], [-1e3, 0.0, 0.0], [0.0, -1e30, -1e9]], dtype=dtype
    )
    values, (gradient, *_) = over(student, teacher, divergence, backend)
    assert (values >= -rounding(student[:3], teacher[:3])).all()
    tolerance = 1e-3 if divergence == AlphaBeta(1e-6, 1) or divergence == AlphaBeta(1, 1e-6) else 1e-5
    if divergence != SoftCrossEntropy():
        close(values, torch.zeros_like(values), tolerance=tolerance)
    close(gradient, torch.zeros_like(gradient), tolerance=tolerance)


@ways([*DIVERGENCES, *ENDS])
def test_equal_sides_are_zero_apart(divergence, dtype, backend):
    for scale, temperature in itertools.product((1.0, 30.0), TEMPERATURES):
        logits = scale * pair(dtype)[0]
        values, (gradient, *_) = over(logits, logits, divergence, backend, temperature=temperature)
        largest = rounding(logits, temperature=temperature)
        assert (values >= -largest).all()
        if divergence != SoftCrossEntropy():
            assert (values <= largest).all()
        assert (gradient.abs() <= largest / min(temperature, 1)).all()


@every_temperature
@every_way
def test_total_variation_is_flat_where_the_two_are_equal(temperature, dtype, backend):
    logits = pair(dtype)[0]
    values, (gradient, *_) = over(logits, logits, TotalVariation(), backend, temperature=temperature)
    assert (values == 0).all() and (gradient == 0).all()


@every_way
def test_total_variation_has_a_slope_between_its_two_sides_at_a_tie(dtype, backend):
    """Two tokens change places; all others are as likely for both, up to rounding."""
    student, teacher = (x.expand(N, V).clone() for x in (pair(dtype)[0][:1], pair(dtype)[0][:1]))
    teacher[:, [0, 1]] = teacher[:, [1, 0]]
    values, (gradient, *_) = over(student, teacher, TotalVariation(), backend, normalizer=1.0)
    q, p = student.double().softmax(-1), teacher.double().softmax(-1)
    close(values, (q - p)[:, :2].abs().sum(-1) / 2, dtype)
    sides = []
    for slope in (-0.5, 0.5):  # at the ties; what is common to all of them weighs with their probability
        slopes = torch.full_like(q, slope)
        slopes[:, :2] = 0.5 * (q - p)[:, :2].sign()
        sides.append(q * slopes)
    low, high = sides[0] - q * sides[1].sum(-1, keepdim=True), sides[1] - q * sides[0].sum(-1, keepdim=True)
    assert ((low - 1e-6 <= gradient) & (gradient <= high + 1e-6)).all()


@pytest.mark.parametrize("divergence", ENDS, ids=str)
@every_temperature
@every_way
def test_parameters_near_their_ends(divergence, temperature, dtype, backend):
    student, teacher = pair(dtype)
    values, (gradient, *_) = over(student, teacher, divergence, backend, temperature=temperature)
    assert (values >= -rounding(student, teacher, temperature=temperature)).all()
    close(
        values,
        by_formula(student, teacher, divergence, temperature),
        tolerance=1e-9 if dtype == torch.float64 else 5e-6,
    )
    if dtype == torch.float64:
        expected = small_steps(student, teacher, divergence, temperature)
        torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-8)


@ways(DIVERGENCES)
def test_no_divergence_is_below_zero(divergence, dtype, backend):
    student = pair(dtype)[0]
    for distance in (1e-8, 1e-6, 1e-4, 1e-2, 1.0):
        teacher = student + distance * pair(dtype)[1]
        values, _ = over(student, teacher, divergence, backend)
        assert (values >= -rounding(student)).all()


# ---- cross-entropy and what is no number


@every_way
@every_reduction
def test_cross_entropy_of_huge_logits(dtype, backend, reduction):
    hidden = (1e4 * randn(N, V, seed=23, dtype=dtype).sign()).requires_grad_()
    weight = torch.eye(V, dtype=dtype).requires_grad_()
    labels = torch.arange(N)
    output = linear_cross_entropy(hidden, LMHead(weight), labels, backend=backend, reduction=reduction)
    close(output.cross_entropy, reference_cross_entropy(hidden.detach(), labels), dtype, 1e-6)
    assert all(x.isfinite().all() for x in torch.autograd.grad(output.loss.sum(), (hidden, weight)))


def reference_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    exact = logits.double()
    return exact.logsumexp(-1) - exact.gather(1, labels[:, None])[:, 0]


@every_way
@every_reduction
def test_a_label_that_the_student_rules_out_is_no_nan(dtype, backend, reduction):
    hidden, weight = pair(dtype)[0].requires_grad_(), torch.eye(V, dtype=dtype).requires_grad_()
    bias = torch.where(torch.arange(V) == 2, -math.inf, 0.0).to(dtype).requires_grad_()
    labels = torch.tensor([0, 2, -100, 1, 2])
    output = linear_cross_entropy(hidden, LMHead(weight, bias), labels, backend=backend, reduction=reduction)
    assert not output.loss.isnan().any() and (output.cross_entropy[labels == 2] > 1e30).all()
    gradients = torch.autograd.grad(output.loss.sum(), (hidden, weight, bias))
    assert all(x.isfinite().all() for x in gradients)


@pytest.mark.parametrize(
    "divergence", [ForwardKL(), ReverseKL(), JSD(), TotalVariation(), AlphaBeta(0.2, 0.7)], ids=str
)
@pytest.mark.parametrize("where", ["student", "teacher"])
@every_way
def test_what_is_not_a_number_is_not_hidden(divergence, where, dtype, backend):
    """Else a training that diverges would go on in silence."""
    student, teacher = pair(dtype)
    {"student": student, "teacher": teacher}[where][2, 5] = math.nan
    weight = torch.eye(V, dtype=dtype).requires_grad_()
    output = linear_divergence(student, LMHead(weight), DenseTargets(teacher), divergence, backend=backend)
    assert output.loss.isnan() and output.divergence.isnan().tolist() == [False, False, True, False, False]


@every_way
def test_cross_entropy_of_what_is_not_a_number(dtype, backend):
    student = pair(dtype)[0]
    student[2, 5] = math.nan
    output = linear_cross_entropy(student, LMHead(torch.eye(V, dtype=dtype)), torch.arange(N), backend=backend)
    assert output.loss.isnan() and output.cross_entropy.isnan().tolist() == [False, False, True, False, False]
