"""The losses between spaces of different size, against loops over pairs."""

from __future__ import annotations

import pytest
import torch

import reference_embedding as reference
from potstill.errors import ShapeError
from potstill.losses.embedding import (
    embedding_divergence,
    matryoshka,
    pair_correlation,
    rank_error,
    reconstruction_error,
    similarity_error,
)

LOSSES = [embedding_divergence, similarity_error, pair_correlation, rank_error]


@pytest.fixture
def spaces() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(9, 3, dtype=torch.float64), torch.randn(9, 7, dtype=torch.float64)


@pytest.mark.parametrize("own", [None, 0.4])
def test_the_divergence_is_that_of_the_paper(spaces, own) -> None:
    student, teacher = spaces
    value = embedding_divergence(student, teacher, temperature=0.3, student_temperature=own)
    wanted = reference.embedding_divergence(student.tolist(), teacher.tolist(), 0.3, own or 0.3)
    assert float(value) == pytest.approx(wanted, rel=1e-10)


def test_the_others_are_those_of_loops(spaces) -> None:
    student, teacher = spaces
    s, t = reference.pairs(student.tolist()), reference.pairs(teacher.tolist())
    squares = [(x - y) ** 2 for x, y in zip(s, t, strict=True)]
    assert float(similarity_error(student, teacher)) == pytest.approx(sum(squares) / len(squares), rel=1e-10)
    assert float(pair_correlation(student, teacher)) == pytest.approx(1 - reference.pearson(s, t), rel=1e-10)


def test_the_rank_error_is_spearman_where_every_pair_is_a_quantile() -> None:
    student, teacher = torch.randn(9, 3, dtype=torch.float64), torch.randn(9, 7, dtype=torch.float64)
    wanted = 1 - reference.spearman(reference.pairs(student.tolist()), reference.pairs(teacher.tolist()))
    assert float(rank_error(student, teacher)) == pytest.approx(wanted, abs=1e-9)  # 36 pairs, 64 quantiles
    large = torch.randn(200, 3, dtype=torch.float64), torch.randn(200, 7, dtype=torch.float64)
    large = large[0], torch.cat([large[0], large[1]], 1)
    wanted = 1 - reference_spearman(*large)
    assert float(rank_error(*large)) == pytest.approx(wanted, abs=0.01)


def reference_spearman(student: torch.Tensor, teacher: torch.Tensor) -> float:
    values = []
    for vectors in (student, teacher):
        unit = vectors / vectors.norm(dim=1, keepdim=True)
        i, j = torch.triu_indices(len(unit), len(unit), 1)
        values.append((unit @ unit.T)[i, j].argsort().argsort().double())
    return float(torch.corrcoef(torch.stack(values))[0, 1])


@pytest.mark.parametrize("loss", LOSSES)
def test_a_space_agrees_with_itself_and_with_its_turns(loss, spaces) -> None:
    _, teacher = spaces
    turn, _ = torch.linalg.qr(torch.randn(7, 7, dtype=torch.float64))
    assert abs(float(loss(teacher, teacher))) < 1e-9
    assert abs(float(loss(3 * teacher @ turn, teacher))) < 1e-9
    assert float(loss(-teacher[:, :3], teacher)) > 1e-3


@pytest.mark.parametrize("loss", [embedding_divergence, similarity_error, pair_correlation])
def test_gradients_are_those_of_differences(loss, spaces) -> None:
    student, teacher = spaces
    assert torch.autograd.gradcheck(lambda s: loss(s, teacher), student.requires_grad_())


def test_following_the_rank_gradient_orders_the_pairs() -> None:
    teacher = torch.randn(40, 6)
    student = torch.randn(40, 3, requires_grad=True)
    optimizer = torch.optim.Adam([student], lr=0.05)
    before = float(rank_error(student, teacher).detach())
    for _ in range(100):
        loss = rank_error(student, teacher)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.5 * before


@pytest.mark.parametrize("loss", LOSSES)
def test_no_gradient_reaches_the_teacher(loss, spaces) -> None:
    student, teacher = (each.clone().requires_grad_() for each in spaces)
    loss(student, teacher).backward()
    assert teacher.grad is None
    assert student.grad is not None and student.grad.isfinite().all()


def test_matryoshka_is_the_weighted_mean_over_prefixes(spaces) -> None:
    student, teacher = spaces
    wanted = (0.7 * similarity_error(student[:, :2], teacher) + 0.2 * similarity_error(student, teacher)) / 0.9
    assert float(matryoshka(similarity_error, student, teacher, {2: 0.7, 3: 0.2})) == pytest.approx(float(wanted))
    for wrong in ({}, {4: 1.0}, {2: 0.0}, {0: 1.0}):
        with pytest.raises(ShapeError, match="expected prefixes of 1 to 3"):
            matryoshka(similarity_error, student, teacher, wrong)


def test_reconstruction_is_a_share_of_the_spread(spaces) -> None:
    _, teacher = spaces
    assert float(reconstruction_error(teacher, teacher)) == 0
    with pytest.raises(ShapeError, match=r"decoded and teacher of one shape \[B, Ht\]"):
        reconstruction_error(teacher[:, :-1], teacher)
    assert float(reconstruction_error(teacher.mean(0).expand_as(teacher), teacher)) == pytest.approx(1)


@pytest.mark.parametrize("loss", LOSSES)
def test_inputs_that_do_not_fit_are_refused(loss) -> None:
    with pytest.raises(ShapeError, match=r"same B examples, got \[3, 2\] and \[4, 5\]"):
        loss(torch.randn(3, 2), torch.randn(4, 5))
    with pytest.raises(ShapeError, match="at least two rows, got 1"):
        loss(torch.randn(1, 2), torch.randn(1, 5))
    with pytest.raises(ShapeError, match="temperature > 0"):
        embedding_divergence(torch.randn(3, 2), torch.randn(3, 5), temperature=0.0)
    with pytest.raises(ShapeError, match="student_temperature > 0"):
        embedding_divergence(torch.randn(3, 2), torch.randn(3, 5), student_temperature=-1.0)


@pytest.mark.parametrize("loss", LOSSES)
def test_equal_rows_and_zero_rows_are_finite(loss) -> None:
    student = torch.zeros(4, 2, requires_grad=True)
    value = loss(student, torch.ones(4, 5))
    value.backward()
    assert value.isfinite() and student.grad is not None and student.grad.isfinite().all()


def test_half_precision_is_computed_in_float32() -> None:
    student, teacher = torch.randn(8, 3).bfloat16(), torch.randn(8, 5).bfloat16()
    assert embedding_divergence(student, teacher).dtype == torch.float32
