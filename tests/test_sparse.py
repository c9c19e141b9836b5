"""Targets of K tokens: a bucket, a sample, a renormalised few. Whole logits and linear_divergence alike."""

from __future__ import annotations

import dataclasses
import itertools
import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import reference
from linear_cases import (
    BACKENDS,
    check,
    close,
    every_backend,
    every_divergence,
    every_dtype,
    every_reduction,
    make_targets,
    rand,
    randn,
    wanting,
)
from potstill.errors import ShapeError, UserError, VocabularyError
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
from potstill.losses.fused_linear import linear_divergence
from potstill.losses.targets import DenseTargets, LMHead, SparseTargets
from potstill.losses.token_losses import token_divergence
from reference import DIVERGENCES, SquaredHellinger

N, H, V, K = 6, 4, 9, 4
INFINITE_AT_ZERO = [ReverseKL(), AlphaBeta(0, 1)]  # the rest of a renormalised few has probability 0
LINEAR = [ForwardKL(), SoftCrossEntropy()]
# A coarser look never sees a larger f-divergence; forward KL plus entropy is a sum of two such.
F_DIVERGENCES = [
    *(ForwardKL(), ReverseKL(), SoftCrossEntropy(), TotalVariation(), SquaredHellinger()),
    *(JSD(), JSD(0.1), JSD(0.999), SkewForwardKL(), SkewForwardKL(0.7), SkewReverseKL(), SkewReverseKL(0.7)),
    *(AlphaBeta(0.3, 0.7), AlphaBeta(0.5, 0.5)),  # alpha + beta = 1: the alpha-divergences
]
WAYS = ["token", *BACKENDS]
TEMPERATURES = (0.5, 1.0, 4.0)
every_temperature = pytest.mark.parametrize("temperature", TEMPERATURES)


def logits(dtype: torch.dtype = torch.float64, N: int = N, V: int = V) -> tuple[Tensor, Tensor]:
    """The student's, which want a gradient, and the teacher's."""
    student, teacher = 1.5 * randn(N, V, seed=31, dtype=dtype), 1.5 * randn(N, V, seed=32, dtype=dtype)
    return student.requires_grad_(), teacher


def bucket(teacher: Tensor, K: int = K, temperature: float = 1.0) -> SparseTargets:
    values, ids = (teacher / temperature).log_softmax(-1).topk(K)
    return SparseTargets(ids, values, temperature=temperature)


def by_loops(student: Tensor, targets: SparseTargets, divergence: Divergence, temperature: float = 1.0) -> Tensor:
    t = targets
    return reference.sparse_divergence(
        student.detach(), t.ids, t.log_probs, t.kind, divergence, temperature, taken_at=t.temperature
    )


def over(student: Tensor, targets: SparseTargets, divergence: Divergence, backend: str, **options: Any) -> list[Tensor]:
    """The divergences [N] and their gradient by the logits: of whole ones, or of a head that passes them on."""
    if backend == "token":
        values = token_divergence(student, targets, divergence, **options)
        loss = values.sum()
    else:
        head = LMHead(torch.eye(student.shape[-1], dtype=student.dtype))
        options = {"normalizer": 1.0, "backend": backend, "chunk_tokens": 4, **options}
        loss, values, _ = linear_divergence(student, head, targets, divergence, **options)
    (gradient,) = torch.autograd.grad(loss, student)
    assert values.isfinite().all() and gradient.isfinite().all()
    return [values.detach(), gradient]


# ---- the definition


@every_divergence
@every_dtype
def test_a_bucket_is_a_divergence_over_k_tokens_and_all_others_together(divergence, dtype):
    student, teacher = logits(dtype)
    for temperature in TEMPERATURES:
        targets = bucket(teacher, temperature=temperature)
        values = token_divergence(student, targets, divergence, temperature=temperature)
        close(values, by_loops(student, targets, divergence, temperature), dtype)


@pytest.mark.parametrize("divergence", LINEAR, ids=str)
@every_temperature
@every_dtype
def test_a_sample_gives_nothing_to_the_others(divergence, temperature, dtype):
    student, targets = logits(dtype)[0], make_targets("sampled", temperature=temperature, dtype=dtype)
    values = token_divergence(student, targets, divergence, temperature=temperature)
    close(values, by_loops(student, targets, divergence, temperature), dtype)


@pytest.mark.parametrize("divergence", [d for d in DIVERGENCES if d not in INFINITE_AT_ZERO], ids=str)
@every_dtype
def test_a_renormalised_few_give_nothing_to_the_others(divergence, dtype):
    student, targets = logits(dtype)[0], make_targets("renormalized", dtype=dtype)
    for temperature in TEMPERATURES:
        values = token_divergence(student, targets, divergence, temperature=temperature)
        close(values, by_loops(student, targets, divergence, temperature), dtype)


@every_divergence
@pytest.mark.parametrize("temperature", [0.5, 4.0])
def test_its_gradient_is_the_slope_of_its_value(divergence, temperature):
    student, teacher = logits(N=2, V=5)
    targets = bucket(teacher, 3, temperature)
    torch.autograd.gradcheck(lambda z: token_divergence(z, targets, divergence, temperature=temperature), student)
    kinds = ["renormalized"] * (divergence not in INFINITE_AT_ZERO) + ["sampled"] * (divergence in LINEAR)
    for kind in kinds:
        other = make_targets(kind, 2, 5, temperature=temperature, K=4)
        torch.autograd.gradcheck(
            lambda z, t=other: token_divergence(z, t, divergence, temperature=temperature), student
        )


@pytest.mark.parametrize("divergence", [*LINEAR, JSD(0.3), TotalVariation(), AlphaBeta(0.2, 0.7)], ids=str)
@pytest.mark.parametrize("kind", ["sampled", "renormalized"])
@every_dtype
@every_backend
def test_a_head_gives_what_its_whole_logits_give(divergence, kind, dtype, backend):
    if kind == "sampled" and divergence not in LINEAR:
        return
    for temperature in (0.5, 1.0, 4.0):
        check(divergence, temperature, kind, dtype, backend)


@every_divergence
def test_targets_may_have_any_leading_shape(divergence):
    student, teacher = logits()
    targets = bucket(teacher)
    flat = token_divergence(student, targets, divergence)
    shaped = SparseTargets(targets.ids.view(2, 3, K), targets.log_probs.view(2, 3, K))
    assert torch.equal(token_divergence(student.view(2, 3, V), shaped, divergence), flat.view(2, 3))
    single = SparseTargets(targets.ids[1], targets.log_probs[1])
    close(token_divergence(student[1], single, divergence), flat[1])


# ---- a bucket and the whole


@every_divergence
@pytest.mark.parametrize("backend", WAYS)
def test_a_bucket_of_all_tokens_is_the_whole(divergence, backend):
    student, teacher = logits()
    shuffled = torch.randperm(V, generator=torch.Generator().manual_seed(0))
    for temperature, order in itertools.product(TEMPERATURES, (torch.arange(V), shuffled)):
        whole = bucket(teacher, V, temperature)
        targets = SparseTargets(whole.ids[:, order], whole.log_probs[:, order], temperature=temperature)
        values, gradient = over(student, targets, divergence, backend, temperature=temperature)
        expected = token_divergence(student, DenseTargets(teacher), divergence, temperature=temperature)
        close(values, expected)
        close(gradient, torch.autograd.grad(expected.sum(), student)[0])


@every_dtype
@every_backend
def test_a_bucket_of_all_tokens_is_the_whole_where_the_teacher_rules_out(dtype, backend):
    student, teacher = logits(dtype)
    teacher[:, 2] = -math.inf
    values, gradient = over(student, bucket(teacher, V), JSD(), backend)
    expected = token_divergence(student, DenseTargets(teacher), JSD())
    close(values, expected, dtype)
    close(gradient, torch.autograd.grad(expected.sum(), student)[0], dtype)


@pytest.mark.parametrize("divergence", F_DIVERGENCES, ids=str)
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_a_bucket_is_never_above_the_whole_and_grows_with_its_tokens(divergence, temperature):
    student, teacher = logits(N=200)
    run = partial(token_divergence, student, divergence=divergence, temperature=temperature)
    values = [run(bucket(teacher, K, temperature)) for K in range(1, V + 1)]
    values.append(run(DenseTargets(teacher)))
    for coarser, finer in itertools.pairwise(values):
        assert (coarser <= finer + 1e-12).all()
    assert (values[0] < values[-1] - 1e-4).any()


@pytest.mark.parametrize("divergence", [ReverseKL(), ForwardKL(), JSD(), AlphaBeta(0.2, 0.7)], ids=str)
@every_dtype
@every_backend
def test_the_students_rest_keeps_its_digits_where_it_is_small(divergence, dtype, backend):
    """1 - the sum of the others would be all rounding."""
    student, teacher = logits(dtype)
    ids = teacher.topk(K).indices
    with torch.no_grad():
        student.scatter_add_(-1, ids, torch.full_like(ids, 25, dtype=dtype))
    targets = dataclasses.replace(bucket(teacher), ids=ids)
    values, gradient = over(student, targets, divergence, backend)
    close(values, by_loops(student.double(), targets, divergence), dtype)
    exact = student.detach().double().requires_grad_()
    wide = dataclasses.replace(targets, log_probs=targets.log_probs.double())
    close(gradient, over(exact, wide, divergence, "token")[1], dtype)


# ---- slots that are not used


@pytest.mark.parametrize("kind", ["bucket", "sampled", "renormalized"])
@pytest.mark.parametrize("filling", ["zeros", "a used token", "one token twice", "behind the vocabulary", "negative"])
@every_dtype
@every_backend
def test_slots_that_are_not_used_change_nothing(kind, filling, dtype, backend):
    divergence = ForwardKL() if kind == "sampled" else JSD(0.3)
    student, teacher = logits(dtype)
    targets = bucket(teacher)
    if kind != "bucket":  # any log-probabilities are allowed
        targets = SparseTargets(targets.ids, (1 + rand(N, K, seed=33, dtype=dtype)).log_softmax(-1), kind)
    extra = {
        "zeros": torch.zeros(N, 3, dtype=torch.long),
        "a used token": targets.ids[:, :3],
        "one token twice": targets.ids[:, :1].expand(N, 3),
        "behind the vocabulary": torch.full((N, 3), V + 5),
        "negative": torch.full((N, 3), -1),
    }[filling]
    nothing = torch.full((N, 3), -math.inf, dtype=dtype)
    order = torch.randperm(K + 3, generator=torch.Generator().manual_seed(1))
    more = SparseTargets(
        torch.cat([targets.ids, extra], -1)[:, order], torch.cat([targets.log_probs, nothing], -1)[:, order], kind
    )
    expected = over(student, targets, divergence, backend)
    close(over(student, more, divergence, backend), expected, dtype)
    close(over(student, more, divergence, "token"), expected, dtype)


@pytest.mark.parametrize("kind", ["bucket", "sampled", "renormalized"])
@every_dtype
@every_backend
def test_a_position_without_any_used_slot(kind, dtype, backend):
    """In a bucket all tokens are one event, certain on both sides; else there is no teacher: probabilities of 0."""
    student = logits(dtype)[0]
    targets = SparseTargets(torch.zeros(N, K, dtype=torch.long), torch.full((N, K), -math.inf, dtype=dtype), kind)
    for divergence in [ForwardKL()] + [JSD(0.3), TotalVariation()] * (kind != "sampled"):
        values, gradient = over(student, targets, divergence, backend)
        expected = reference.formula(divergence)([1.0 if kind == "bucket" else 0.0], [1.0])
        close(values, torch.full_like(values, expected), dtype)
        close(gradient, torch.zeros_like(gradient), dtype)


# ---- what numbers may do


@every_divergence
@every_dtype
@every_backend
def test_huge_logits_are_never_not_a_number(divergence, dtype, backend):
    signs = randn(N, V, seed=34, dtype=dtype).sign()
    student = (1e4 * signs).requires_grad_()
    for teacher in (1e4 * signs, -1e4 * signs):
        values, _ = over(student, bucket(teacher), divergence, backend)
        assert (values >= (-1e-2 if dtype == torch.float32 else -1e-9)).all()


@pytest.mark.parametrize("divergence", [JSD(0.3), SkewForwardKL(), SkewReverseKL(), TotalVariation()], ids=str)
@every_dtype
@every_backend
def test_tokens_that_the_student_rules_out(divergence, dtype, backend):
    student, teacher = logits(dtype)
    ruled_out = torch.where(torch.arange(V) % 3 == 0, -math.inf, 0.0).to(dtype)
    targets, weight = bucket(teacher), torch.eye(V, dtype=dtype)
    output = linear_divergence(student, LMHead(weight, ruled_out), targets, divergence, backend=backend)
    close(output.divergence, by_loops(student + ruled_out, targets, divergence), dtype)
    (gradient,) = torch.autograd.grad(output.loss, student)
    assert gradient.isfinite().all() and (gradient[:, ::3] == 0).all() and (gradient[:, 1::3] != 0).any()


@pytest.mark.parametrize("divergence", INFINITE_AT_ZERO, ids=str)
@every_backend
@every_reduction
def test_reverse_kl_to_a_renormalised_few_is_an_error_that_says_what_to_use(divergence, backend, reduction):
    student, targets = logits()[0], make_targets("renormalized")
    with pytest.raises(ShapeError, match=r"^\w+: expected a finite \w+, got inf: .*Use a bounded divergence \(JSD"):
        linear_divergence(
            student, LMHead(torch.eye(V).double()), targets, divergence, reduction=reduction, backend=backend
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@every_backend
@every_reduction
def test_half_precision_is_computed_in_float32(dtype, backend, reduction):
    hidden, weight = (
        randn(24, 8, seed=1, dtype=dtype).requires_grad_(),
        randn(50, 8, seed=2, dtype=dtype).requires_grad_(),
    )
    targets = bucket(1.5 * randn(24, 50, seed=32))
    output = linear_divergence(hidden, LMHead(weight), targets, JSD(), reduction=reduction, backend=backend)
    ours = torch.autograd.grad(output.loss.mean(), (hidden, weight))
    assert output.loss.dtype == output.divergence.dtype == torch.float32 and {x.dtype for x in ours} == {dtype}
    exact = wanting(hidden, weight)
    value = token_divergence(LMHead(exact[1]).logits(exact[0]), targets, JSD()).mean()
    close(output.loss.mean(), value, tolerance=1e-2)
    for our, gradient in zip(ours, torch.autograd.grad(value, exact), strict=True):
        assert (our.double() - gradient).norm() <= 2e-2 * gradient.norm()


def test_log_probs_may_be_kept_in_half_precision():
    student, teacher = logits(torch.float32)
    targets = bucket(teacher)
    short = dataclasses.replace(targets, log_probs=targets.log_probs.half())
    for divergence in (ForwardKL(), ReverseKL(), JSD()):
        close(*(token_divergence(student, each, divergence) for each in (short, targets)), tolerance=1e-2)


# ---- temperatures


@pytest.mark.parametrize("kind", ["bucket", "sampled"])
@pytest.mark.parametrize("backend", WAYS)
def test_what_was_taken_at_one_temperature_is_refused_at_another(kind, backend):
    student, targets = logits()[0], make_targets(kind, temperature=2.0)
    over(student, targets, ForwardKL(), backend, temperature=2.0)
    words = rf"temperature 2 of the {kind} targets, got 1\. .*at that temperature, or .*renormalized"
    with pytest.raises(ShapeError, match=words) as caught:
        over(student, targets, ForwardKL(), backend, temperature=1.0)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("taken_at", "temperature"), [(1.0, 4.0), (2.0, 0.5), (4.0, 4.0), (0.5, 1.0)])
@pytest.mark.parametrize("backend", WAYS)
def test_a_renormalised_few_can_be_tempered_again(taken_at, temperature, backend):
    student, teacher = logits()
    values, ids = (teacher / taken_at).log_softmax(-1).topk(K)
    again = SparseTargets(ids, (teacher / temperature).gather(-1, ids).log_softmax(-1), "renormalized", temperature)
    expected = over(student, again, JSD(), backend, temperature=temperature)
    targets = SparseTargets(ids, values, "renormalized", taken_at)
    close(targets.events(temperature)[:, :-1], (values * taken_at / temperature).log_softmax(-1))
    close(over(student, targets, JSD(), backend, temperature=temperature), expected)


# ---- samples


@pytest.mark.parametrize("divergence", [d for d in DIVERGENCES if d not in LINEAR], ids=str)
@pytest.mark.parametrize("backend", WAYS)
def test_a_sample_is_refused_where_it_would_be_biased(divergence, backend):
    words = rf"linear in the teacher with sampled targets, got {type(divergence).__name__}, .*Use ForwardKL or"
    with pytest.raises(ShapeError, match=words) as caught:
        over(logits()[0], make_targets("sampled"), divergence, backend)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("divergence", LINEAR, ids=str)
@pytest.mark.parametrize("temperature", [0.5, 1.0])
@every_dtype
@every_backend
def test_the_mean_over_samples_is_the_gradient_of_the_whole(divergence, temperature, dtype, backend):
    rows, draws = 20_000, 5
    hidden, weight = randn(1, H, seed=1, dtype=dtype), randn(V, H, seed=2, dtype=dtype).requires_grad_()
    teacher = 1.5 * randn(1, V, seed=4, dtype=dtype)
    shares = (teacher / temperature).softmax(-1).expand(rows, V)
    drawn = torch.multinomial(shares, draws, replacement=True, generator=torch.Generator().manual_seed(5))
    counts = torch.zeros(rows, V, dtype=dtype).scatter_add_(1, drawn, torch.ones(rows, draws, dtype=dtype))
    kept, ids = counts.topk(draws)  # what was drawn twice leaves a slot that is not used

    def mean(kind: str, log_probs: Tensor) -> Tensor:
        targets = SparseTargets(ids, log_probs, kind, temperature)
        output = linear_divergence(
            hidden.expand(rows, H), LMHead(weight), targets, divergence, temperature=temperature, backend=backend
        )
        return torch.autograd.grad(output.loss, weight)[0]

    whole = token_divergence(hidden @ weight.t(), DenseTargets(teacher), divergence, temperature=temperature)
    (expected,) = torch.autograd.grad(whole.sum(), weight)
    bound = 4 * hidden.norm() / temperature / math.sqrt(rows * draws)  # four standard deviations of a share, at most
    assert (mean("sampled", (kept / draws).log()) - expected).abs().max() < bound
    equal = torch.where(kept > 0, 0.0, -math.inf).to(dtype)  # biased: a token's share is not its number of draws
    assert (mean("renormalized", equal) - expected).abs().max() > 2 * bound


# ---- what does not fit


@pytest.mark.parametrize("token", [-1, V, 10**9])
@pytest.mark.parametrize("backend", WAYS)
def test_a_token_of_another_vocabulary_is_an_error(token, backend):
    student, teacher = logits()
    targets = bucket(teacher)
    targets.ids[2, 1] = token
    words = rf"^SparseTargets: expected token ids in 0\.\.{V - 1}, got .*{token}.*another vocabulary"
    with pytest.raises(VocabularyError, match=words) as caught:
        over(student, targets, JSD(), backend)
    assert isinstance(caught.value, UserError) and "\n" not in str(caught.value)


@every_backend
def test_a_token_in_the_padding_is_an_error(backend):
    hidden, weight = randn(N, H, seed=1), randn(V + 3, H, seed=2)
    targets = bucket(logits()[1])
    linear_divergence(hidden, LMHead(weight).slice(V), targets, JSD(), backend=backend)
    targets.ids[0, 0] = V
    with pytest.raises(VocabularyError, match=r"expected token ids in 0\.\.8, got 0\.\.9|expected token ids in 0\.\.8"):
        linear_divergence(hidden, LMHead(weight).slice(V), targets, JSD(), backend=backend)
