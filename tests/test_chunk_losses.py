"""Likelihoods of chunks, sorted probabilities and boundary bias, against loops in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from potstill.errors import ShapeError
from potstill.losses.cross_tokenizer import boundary_bias, chunk_divergence, chunk_log_probs, sorted_distance
from potstill.losses.divergences import JSD, ForwardKL, ReverseKL, TotalVariation
from reference_across import alm, uld

KINDS = [ForwardKL(), ReverseKL(), JSD(0.5), TotalVariation()]


def test_a_chunk_is_the_sum_of_its_tokens() -> None:
    log_probs = torch.tensor([-1.0, -2.0, -4.0, -8.0, -16.0], dtype=torch.float64, requires_grad=True)
    chunk = torch.tensor([1, -1, 0, 1, -1])
    found = chunk_log_probs(log_probs, chunk, 3)
    assert found.tolist() == [-4, -9, 0]
    found.sum().backward()
    assert log_probs.grad is not None
    assert log_probs.grad.tolist() == [1, 0, 1, 1, 0]


@pytest.mark.parametrize("temperature", [1.0, 3.0, 100.0])
def test_it_is_the_binary_divergence_of_the_paper(temperature: float) -> None:
    log_q, log_p = -3 * torch.rand(2, 20, dtype=torch.float64) - 0.01
    found = chunk_divergence(log_q, log_p, ForwardKL(), temperature=temperature)
    expected = [alm(p, q, temperature) for p, q in zip(log_p.tolist(), log_q.tolist(), strict=True)]
    assert found.tolist() == pytest.approx(expected, rel=1e-9)
    single = chunk_divergence(log_q.float(), log_p.float(), ForwardKL(), temperature=temperature)
    assert single.tolist() == pytest.approx(expected, rel=1e-2, abs=3e-5)


def test_the_temperature_keeps_the_size() -> None:
    log_q, log_p = torch.tensor([-2.0, -7.0]).double(), torch.tensor([-3.0, -0.5]).double()
    limit = -log_p * (log_p / log_q).log() + log_p - log_q
    found = chunk_divergence(log_q, log_p, ForwardKL(), temperature=1e5)
    torch.testing.assert_close(found, limit, rtol=1e-3, atol=0)


@pytest.mark.parametrize("divergence", KINDS, ids=lambda one: type(one).__name__)
@pytest.mark.parametrize("temperature", [1.0, 100.0])
def test_gradients(divergence: Any, temperature: float) -> None:
    log_q = (-4 * torch.rand(6, dtype=torch.float64) - 0.05).requires_grad_()
    log_p = -4 * torch.rand(6, dtype=torch.float64) - 0.05
    assert torch.autograd.gradcheck(lambda x: chunk_divergence(x, log_p, divergence, temperature=temperature), [log_q])


@pytest.mark.parametrize("divergence", [ForwardKL(), JSD(0.5), TotalVariation()], ids=lambda one: type(one).__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nothing_is_infinite(divergence: Any, dtype: torch.dtype) -> None:
    edges = [0.0, -1e-30, -1e-8, -1e-3, -0.69, -5.0, -200.0, -1e5]
    log_q, log_p = (
        x.flatten()
        for x in torch.meshgrid(torch.tensor(edges, dtype=dtype), torch.tensor(edges, dtype=dtype), indexing="ij")
    )
    for temperature in (0.5, 1.0, 100.0, 1e4):
        given = log_q.clone().requires_grad_()
        found = chunk_divergence(given, log_p, divergence, temperature=temperature)
        found.sum().backward()
        assert given.grad is not None
        assert torch.isfinite(found).all()
        assert torch.isfinite(given.grad).all()
        assert (found > -1e-4 * temperature).all()
        equal = chunk_divergence(log_q, log_q, divergence, temperature=temperature)
        assert equal.abs().max() < 1e-6 * temperature
    ruled_out = chunk_divergence(log_q[:1], torch.tensor([-math.inf], dtype=dtype), divergence)
    assert torch.isfinite(ruled_out).all()


def test_no_chunk_is_no_loss() -> None:
    none = torch.zeros(0, requires_grad=True)
    chunk_divergence(none, torch.zeros(0), ForwardKL()).sum().backward()
    assert none.grad is not None


def test_sorted_distance() -> None:
    student, teacher = torch.randn(5, 7, dtype=torch.float64), 2 * torch.randn(5, 4, dtype=torch.float64)
    expected = [uld(s, t) for s, t in zip(student.tolist(), teacher.tolist(), strict=True)]
    assert sorted_distance(student, teacher).tolist() == pytest.approx(expected)
    assert sorted_distance(teacher, student).tolist() == pytest.approx(expected)
    assert torch.autograd.gradcheck(lambda x: sorted_distance(x, teacher, temperature=2.0), [student.requires_grad_()])
    shuffled = student[:, torch.randperm(7)]
    torch.testing.assert_close(sorted_distance(shuffled, student), torch.zeros(5, dtype=torch.float64))
    ruled_out = torch.tensor([[0.0, -math.inf, -math.inf]], requires_grad=True)
    sorted_distance(ruled_out, torch.zeros(1, 3)).sum().backward()
    assert ruled_out.grad is not None
    assert torch.isfinite(ruled_out.grad).all()


def test_boundary_bias_is_the_share_of_longer_tokens() -> None:
    logits = torch.randn(3, 6, dtype=torch.float64)
    p = logits.softmax(-1)
    longer, position = torch.tensor([1, 2, 5]), torch.tensor([0, 0, 2])
    found = boundary_bias(logits, torch.tensor([0, 3, 4]), longer, position)
    first = (p[0, 1] + p[0, 2]) / (p[0, 0] + p[0, 1] + p[0, 2])
    assert found.tolist() == pytest.approx([first.item(), 0.0, (p[2, 5] / (p[2, 4] + p[2, 5])).item()])
    impossible = torch.tensor([[0.0, -math.inf, -math.inf]])
    assert boundary_bias(impossible, torch.tensor([1]), torch.tensor([2]), torch.tensor([0])).tolist() == [0]


def test_what_does_not_fit_is_refused() -> None:
    x = torch.zeros(2)
    with pytest.raises(ShapeError, match="chunk_divergence: expected one shape"):
        chunk_divergence(x, torch.zeros(3), ForwardKL())
    with pytest.raises(ShapeError, match="chunk_divergence: expected temperature > 0"):
        chunk_divergence(x, x, ForwardKL(), temperature=0.0)
    with pytest.raises(ShapeError, match="sorted_distance: expected logits for the same positions"):
        sorted_distance(torch.zeros(2, 3), torch.zeros(3, 3))
    with pytest.raises(ShapeError, match="sorted_distance: expected temperature > 0"):
        sorted_distance(torch.zeros(2, 3), torch.zeros(2, 3), temperature=-1.0)
