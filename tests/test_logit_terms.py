"""Terms over logits beside the plain divergence, and which tokens count: the papers' formulas."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import reference_signals as reference
from conftest import make_batch, make_llama
from potstill.errors import ShapeError
from potstill.losses.alignment import target_positions
from potstill.losses.divergences import ForwardKL, ReverseKL
from potstill.losses.logit_losses import TOP_TOKENS, adaptive_kl, bild, interpolated_logits
from potstill.losses.schedule import linear
from potstill.losses.target_statistics import teacher_confidence, teacher_entropy, top_share, top_tokens
from potstill.losses.targets import DenseTargets, HeadTargets, LMHead, SparseTargets
from potstill.losses.token_losses import token_divergence
from potstill.train.distiller import Distiller
from potstill.train.terms import dense
from potstill.train.terms.dense import TAID, AdaptiveKL, BiLD
from potstill.train.terms.logits import Labels, Logits
from test_trainer import losses, trainer


def logits(*shape: int, seed: int = 0) -> Tensor:
    return 2 * torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_bild_and_adaptive_kl_are_their_formulas() -> None:
    s, t = logits(2, 3, 20), logits(2, 3, 20, seed=1)
    found, adaptive = bild(s, t, 5, 2.0), adaptive_kl(s, t, 0.7, 2.0)
    for b in range(2):
        for n in range(3):
            student_logits, teacher_logits = s[b, n].tolist(), t[b, n].tolist()
            assert found[b, n].item() == pytest.approx(
                reference.bild(student_logits, teacher_logits, 5, 2.0), rel=1e-10
            )
            assert adaptive[b, n].item() == pytest.approx(
                reference.adaptive_kl(student_logits, teacher_logits, 0.7, 2.0), rel=1e-10
            )


@pytest.mark.parametrize("sharpness", [1.0, 0.1])  # the head lies within the tokens that are looked at first, or not
def test_the_head_of_a_large_vocabulary(sharpness: float) -> None:
    s, t = logits(1, 3 * TOP_TOKENS), sharpness * logits(1, 3 * TOP_TOKENS, seed=1)
    assert (t.softmax(-1).topk(TOP_TOKENS).values.sum() > 0.7) == (sharpness == 1)
    expected = reference.adaptive_kl(s[0].tolist(), t[0].tolist(), 0.7, 1.0)
    assert adaptive_kl(s, t, 0.7).item() == pytest.approx(expected, rel=1e-10)


def test_gradients_are_those_of_the_formulas() -> None:
    s, t = logits(2, 9).requires_grad_(), logits(2, 9, seed=1)
    assert torch.autograd.gradcheck(lambda z: bild(z, t, 4), s)
    share = 0.3  # the weights of adaptive KL and TAID's target have none: taken as they are at s
    adaptive = torch.autograd.grad(adaptive_kl(s, t).sum(), s)[0]
    targets = DenseTargets(t)
    forward, reverse = (token_divergence(s, targets, kind) for kind in (ForwardKL(), ReverseKL()))
    weight = ((adaptive_kl(s, t) - reverse) / (forward - reverse)).detach()
    expected = torch.autograd.grad((weight * forward + (1 - weight) * reverse).sum(), s)[0]
    torch.testing.assert_close(adaptive, expected)
    mixed = interpolated_logits(s, t, share)
    assert not mixed.requires_grad
    torch.testing.assert_close(mixed, 0.7 * s.detach() + 0.3 * t)


def test_bild_looks_at_the_largest_alone() -> None:
    s, t = logits(1, 20), logits(1, 20, seed=1)
    assert bild(s, s + 3).item() == pytest.approx(0, abs=1e-12)
    neither = [v for v in range(20) if v not in {*s.topk(8).indices[0].tolist(), *t.topk(8).indices[0].tolist()}]
    changed = s.clone()
    changed[0, neither] -= 5
    assert bild(changed, t).item() == bild(s, t).item()


@pytest.mark.parametrize("call", [bild, adaptive_kl])
def test_ruled_out_and_equal_logits_are_finite(call: Any) -> None:
    s = logits(3, 12).float()
    t = logits(3, 12, seed=1).float()
    if call is bild:
        t[:, 3:] = float("-inf")
    t[2] = s[2] if call is adaptive_kl else t[2]
    s.requires_grad_()
    value = call(s, t)
    value.sum().backward()
    assert torch.isfinite(value).all()
    assert torch.isfinite(s.grad).all()
    assert call(torch.zeros(0, 12), torch.zeros(0, 12)).shape == (0,)
    assert torch.isfinite(interpolated_logits(s, t, 0.4)).all()


def test_what_is_out_of_range_is_named() -> None:
    s = logits(2, 4)
    for call in (
        lambda: bild(s, s, 5),
        lambda: bild(s, s[:1]),
        lambda: adaptive_kl(s, s, 1.0),
        lambda: interpolated_logits(s, s, 1.1),
        lambda: top_share(s[:, 0], 2.0),
        lambda: top_tokens(DenseTargets(s), 0),
        lambda: Logits(ForwardKL(), tokens="some"),  # type: ignore[arg-type]
    ):
        with pytest.raises(ShapeError, match="expected"):
            call()


def test_entropy_confidence_and_top_tokens_of_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, head = logits(7, 4), LMHead(logits(9, 4, seed=1))
    dense = DenseTargets(head.logits(hidden))
    p = torch.softmax(dense.logits / 2, -1)
    monkeypatch.setattr("potstill.losses.target_statistics.ELEMENTS", 18)  # two tokens at a time
    for targets in (dense, HeadTargets(hidden, head)):
        torch.testing.assert_close(teacher_entropy(targets, 2.0), -(p * p.log()).sum(-1))
        torch.testing.assert_close(teacher_confidence(targets, 2.0), p.amax(-1))
        kept = top_tokens(targets, 3, 2.0)
        assert isinstance(kept, SparseTargets)
        torch.testing.assert_close(kept.log_probs.exp(), p.topk(3).values)
        assert teacher_entropy(targets.__class__(hidden[:0], *([head] if targets is not dense else []))).shape == (0,)
        assert top_tokens(kept, 2) is kept
        torch.testing.assert_close(
            teacher_confidence(kept, 2.0), torch.maximum(p.amax(-1), 1 - p.topk(3).values.sum(-1))
        )
    assert top_share(torch.tensor([1.0, 3.0, 2.0]), 0.5).tolist() == [0, 1, 1]
    assert top_share(torch.tensor([1.0, 3.0, 2.0]), 0.0).tolist() == [0, 0, 0]
    assert top_share(torch.tensor([]), 0.5).tolist() == []


@pytest.mark.parametrize("whole", [False, True], ids=["cut", "whole"])
@pytest.mark.parametrize("tokens", ["entropy", "confident", "confidence"])
def test_tokens_count_as_they_are_weighed(tokens: Any, whole: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if whole:
        for module in ("potstill.train.distiller", "potstill.teachers.model"):
            monkeypatch.setattr(f"{module}.split_model", lambda model: None)
    student, teacher, batch = make_llama(hidden_size=8), make_llama(seed=1), make_batch()
    terms = [Logits(ReverseKL(), temperature=2.0, tokens=tokens, share=0.25), Labels(weight=0.5)]
    output = Distiller(student, teacher, terms).step(batch)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    there = target_positions(batch["labels"])
    q, p = (model(**inputs).logits[:, :-1][there] for model in (student, teacher))
    apart = 4 * token_divergence(q, DenseTargets(p), ReverseKL(), temperature=2.0)
    entropy = teacher_entropy(DenseTargets(p))
    sure = teacher_confidence(DenseTargets(p))
    N = len(p)
    count = -(-N // 4)
    weights = sure
    if tokens != "confidence":
        chosen = (entropy if tokens == "entropy" else sure).topk(count).indices
        weights = torch.zeros(N).index_fill_(0, chosen, 1.0)
    expected = (weights * apart).sum() / N
    torch.testing.assert_close(output.logs["logits"], expected.detach(), rtol=1e-4, atol=1e-6)
    labels = torch.nn.functional.cross_entropy(q, batch["labels"][:, 1:][there])
    torch.testing.assert_close(output.loss, expected + 0.5 * labels, rtol=1e-4, atol=1e-6)


def test_the_likeliest_tokens_alone() -> None:
    student, teacher, batch = make_llama(hidden_size=8), make_llama(seed=1), make_batch()

    def loss(**options: Any) -> float:
        return Distiller(student, teacher, [Logits(ForwardKL(), temperature=2.0, **options)]).step(batch).loss.item()

    assert loss(top_k=300) == pytest.approx(loss(), rel=1e-4)
    assert 0 < loss(top_k=3) < loss(top_k=30) < loss()


def test_dense_terms_in_a_training(tmp_path: Path) -> None:
    objective = [BiLD(), AdaptiveKL(weight=0.5), TAID(linear(0.4, 1.0, 3)), Logits(ForwardKL(), tokens="entropy")]
    whole, parts = (
        trainer(tmp_path / str(n), [*objective[:3]], per_device_train_batch_size=8 // n, gradient_accumulation_steps=n)
        for n in (1, 4)
    )
    whole.train()
    parts.train()
    assert losses(parts) == pytest.approx(losses(whole), rel=1e-4)
    more = trainer(tmp_path / "more", objective)
    more.train()
    assert set(more.evaluate()) >= {"eval_bild", "eval_adaptive_kl", "eval_taid", "eval_logits"}


@pytest.mark.parametrize(
    "term", [BiLD(), AdaptiveKL(weight=0.5), TAID(0.3, temperature=2.0)], ids=lambda term: term.name
)
def test_logits_are_made_some_at_a_time(term: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, batch = make_llama(seed=1), make_batch()
    batch["weights"] = torch.rand(batch["labels"].shape, generator=torch.Generator().manual_seed(3))
    found, most = [], []

    def step() -> None:
        student = make_llama(hidden_size=8)
        loss = Distiller(student, teacher, [term, Labels()]).step(batch).loss
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in student.parameters())])

    step()
    compare = type(term).compare
    monkeypatch.setattr(
        type(term), "compare", lambda self, s, t, *at: most.append(max(len(s), len(t))) or compare(self, s, t, *at)
    )
    monkeypatch.setattr(dense, "LOGITS_BYTES", 3 * 300 * 4)
    step()
    assert max(most) == 3 and len(most) > 2 * len(batch["labels"])  # and again in the backward pass
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_taid_ends_in_forward_kl() -> None:
    student, teacher, batch = make_llama(hidden_size=8), make_llama(seed=1), make_batch()

    def loss(term: Any) -> float:
        return Distiller(student, teacher, [term]).step(batch).loss.item()

    assert loss(TAID(1.0, temperature=2.0)) == pytest.approx(loss(Logits(ForwardKL(), temperature=2.0)), rel=1e-4)
    assert loss(TAID(0.0)) == pytest.approx(0, abs=1e-6)
