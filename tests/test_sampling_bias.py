"""Why samples, and not the likeliest tokens: a closed form, on text, that needs no training.

A trigram teacher p(c | a, b), a tabular bigram student q(c | b). The student that minimises forward KL is the mean of
its targets over the contexts: exact, so that what is left between two kinds of targets is their bias.
"""

from __future__ import annotations

import argparse
import inspect
import textwrap
import typing

import pytest
import torch

from potstill.losses.targets import DenseTargets, SparseTargets
from potstill.teachers.cache.codec import Codec, Sampled, TopK


def trigrams() -> torch.Tensor:
    """Counts [V, V, V] of characters in the source of a few modules, where each context stands at every token."""
    text = "".join(inspect.getsource(module) for module in (argparse, inspect, textwrap, typing))
    letters = sorted(set(text))
    ids = torch.tensor([letters.index(letter) for letter in text])
    V = len(letters)
    flat = (ids[:-2] * V + ids[1:-1]) * V + ids[2:]
    return flat.bincount(minlength=V**3).reshape(V, V, V).double()


@pytest.fixture(scope="module")
def teacher() -> tuple[torch.Tensor, torch.Tensor]:
    """Distributions [contexts, V] and how often each context stands in the text."""
    counts = trigrams()
    often = counts.sum(-1)
    kept = often > 0
    return (counts[kept] / often[kept].unsqueeze(-1)), torch.stack([often[kept], kept.nonzero()[:, 1].double()])


def divergence_left(teacher: tuple[torch.Tensor, torch.Tensor], targets: torch.Tensor, V: int) -> float:
    """KL(teacher || best student for some targets), nats a token."""
    p, (often, last) = teacher
    weight = often / often.sum()
    q = torch.zeros(V, V, dtype=torch.float64).index_add(0, last.long(), weight.unsqueeze(-1) * targets)
    q = (q / q.sum(-1, keepdim=True).clamp_min(1e-300))[last.long()].clamp_min(1e-12)
    return float((weight.unsqueeze(-1) * p * (p.clamp_min(1e-300) / q).log()).sum())


def expected(codec: Codec, p: torch.Tensor, repeats: int) -> torch.Tensor:
    """The targets [contexts, V] that a student sees, averaged over its visits to a context."""
    total = torch.zeros_like(p)
    for seed in range(repeats):
        row = codec.encode(DenseTargets(p.log().float()), seed)
        targets = codec.decode([row], [len(p)])[0]
        assert isinstance(targets, SparseTargets)
        chances = targets.log_probs.double().exp()
        total.scatter_add_(-1, targets.ids, chances / chances.sum(-1, keepdim=True))
    return total / repeats


def test_samples_are_unbiased_and_the_likeliest_tokens_are_not(teacher) -> None:
    p, V = teacher[0], teacher[0].shape[-1]
    full = divergence_left(teacher, p, V)
    sampled = divergence_left(teacher, expected(Sampled(V, draws=12), p, 150), V)
    top = {k: divergence_left(teacher, expected(TopK(V, k), p, 1), V) for k in (3, 12)}
    assert sampled == pytest.approx(full, rel=0.01)
    assert top[12] > 1.05 * full
    assert top[3] > 2 * full


def test_evenly_spaced_draws_leave_less_noise_than_independent_ones(teacher) -> None:
    """Where a student sees each context's sample once, as from a cache: 11% above the whole teacher against 21%."""
    p, V = teacher[0], teacher[0].shape[-1]
    full = divergence_left(teacher, p, V)
    drawn = torch.multinomial(p, 50, replacement=True, generator=torch.Generator().manual_seed(0))
    independent = torch.zeros_like(p).scatter_add_(-1, drawn, torch.full(drawn.shape, 0.02, dtype=p.dtype))
    spaced = divergence_left(teacher, expected(Sampled(V, draws=50), p, 1), V)
    assert spaced - full < 0.6 * (divergence_left(teacher, independent, V) - full)
