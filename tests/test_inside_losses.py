"""Losses over hidden states, attention and examples: the papers' formulas, and nothing that is not finite."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import reference_signals as reference
from potstill.errors import ShapeError
from potstill.losses.attention import (
    attention_divergence,
    attention_mse,
    head_importance,
    head_overlap,
    match_heads,
    relation_divergence,
)
from potstill.losses.divergences import JSD
from potstill.losses.embedding import embedding_divergence
from potstill.losses.hidden import (
    dimension_importance,
    hidden_cosine,
    hidden_l1,
    hidden_mse,
    linear_cka,
    select_dimensions,
    unit,
)
from potstill.losses.rkd import rkd_angle, rkd_distance

BY_TOKEN = {"mse": hidden_mse, "l1": hidden_l1, "cosine": hidden_cosine}
OF_THE_BATCH: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cka": linear_cka,
    "rkd_distance": rkd_distance,
    "rkd_angle": rkd_angle,
    "similarity_kl": partial(embedding_divergence, temperature=0.5),
}
REFERENCES: dict[str, Callable[..., float]] = {
    **{name: getattr(reference, name) for name in (*BY_TOKEN, *OF_THE_BATCH)},
    "similarity_kl": partial(reference.similarity_kl, temperature=0.5),
}


def vectors(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def maps(*shape: int, seed: int = 0) -> Tensor:
    """Causal attention."""
    scores = vectors(*shape, seed=seed)
    return scores.masked_fill(torch.ones(shape[-2:]).triu(1).bool(), float("-inf")).softmax(-1)


@pytest.mark.parametrize("name", BY_TOKEN)
def test_hidden_losses_are_their_formulas(name: str) -> None:
    s, t = vectors(2, 3, 5), vectors(2, 3, 5, seed=1)
    found = BY_TOKEN[name](s, t)
    for b in range(2):
        for n in range(3):
            assert found[b, n].item() == pytest.approx(REFERENCES[name](s[b, n].tolist(), t[b, n].tolist()), rel=1e-12)


@pytest.mark.parametrize("name", OF_THE_BATCH)
def test_losses_of_the_batch_are_their_formulas(name: str) -> None:
    s, t = vectors(6, 4), 3 * vectors(6, 7, seed=1)
    expected = REFERENCES[name](s.tolist(), t.tolist())
    assert OF_THE_BATCH[name](s, t).item() == pytest.approx(expected, rel=1e-12)
    assert OF_THE_BATCH[name](s.float(), t.float()).item() == pytest.approx(expected, rel=1e-5)
    assert OF_THE_BATCH[name](s.bfloat16(), t).dtype == torch.float32


@pytest.mark.parametrize("name", [*BY_TOKEN, *OF_THE_BATCH])
def test_gradients_are_those_of_the_formulas(name: str) -> None:
    call = (BY_TOKEN | OF_THE_BATCH)[name]
    t = vectors(5, 4, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda s: call(s, t.detach()), vectors(5, 4).requires_grad_())
    call(vectors(5, 4).requires_grad_(), t).sum().backward()
    assert t.grad is None


@pytest.mark.parametrize("name", OF_THE_BATCH)
@pytest.mark.parametrize("rows", [0, 1, 2, 3])
@pytest.mark.parametrize("kind", ["random", "constant", "zero", "one constant column", "huge"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_whatever_the_batch_it_is_finite(name: str, rows: int, kind: str, dtype: torch.dtype) -> None:
    if name == "similarity_kl" and rows < 2:
        pytest.skip("an error: tests/test_embedding_losses.py")
    s = vectors(rows, 4).to(dtype)
    if kind == "constant":
        s = torch.full_like(s, 0.1)
    if kind == "zero":
        s = torch.zeros_like(s)
    if kind == "one constant column":
        s[:, 0] = 7
    if kind == "huge":
        s = s * 1e4
    s.requires_grad_()
    for t in (vectors(rows, 3, seed=1).to(dtype), torch.ones(rows, 3, dtype=dtype)):
        value = OF_THE_BATCH[name](s, t)
        (gradient,) = torch.autograd.grad(value, s)
        assert torch.isfinite(value)
        assert torch.isfinite(gradient).all()
        assert rows > 1 or value.item() == 0


@pytest.mark.parametrize("name", BY_TOKEN)
def test_zero_vectors_have_a_finite_gradient(name: str) -> None:
    s = torch.zeros(2, 4, requires_grad=True)
    value = BY_TOKEN[name](s, torch.stack([torch.zeros(4), torch.ones(4)]))
    value.sum().backward()
    assert torch.isfinite(value).all()
    assert s.grad is not None
    assert s.grad.abs().max() <= 2
    assert BY_TOKEN[name](torch.zeros(0, 4), torch.zeros(0, 4)).shape == (0,)


def test_cka_sees_through_rotation_and_scale_and_makes_no_gram_matrix() -> None:
    s = vectors(50, 6)
    rotation = torch.linalg.qr(vectors(6, 6, seed=1)).Q
    assert linear_cka(s, 3 * s @ rotation + 1).item() == pytest.approx(1)
    sizes: list[int] = []

    class Sizes(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            made = function(*args, **(kwargs or {}))
            sizes.append(made.numel() if isinstance(made, Tensor) else 0)
            return made

    with Sizes():
        linear_cka(vectors(1000, 6), vectors(1000, 4))
    assert max(sizes) == 6000


def test_a_mask_is_a_slice_for_attention_and_relations() -> None:
    s, t = vectors(2, 6, 9), vectors(2, 6, 7, seed=1)
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[1, 4:] = False
    masked = relation_divergence(s, t, mask, 3)
    alone = relation_divergence(s[1:, :4], t[1:, :4], mask[1:, :4], 3)
    torch.testing.assert_close(masked[1, :4], alone[0])
    changed = s.clone()
    changed[1, 4:] = 100
    torch.testing.assert_close(relation_divergence(changed, t, mask, 3)[mask], masked[mask])
    a, b = maps(1, 2, 6, 6), maps(1, 2, 6, 6, seed=1)
    for loss in (attention_mse, attention_divergence):
        torch.testing.assert_close(loss(a, b)[:, :4], loss(a[..., :4, :4], b[..., :4, :4]))


def test_attention_losses_are_their_formulas() -> None:
    s, t = maps(2, 3, 4, 4), maps(2, 3, 4, 4, seed=1)
    for found, expected in (
        (attention_mse(s, t), reference.attention_mse),
        (attention_divergence(s, t), reference.attention_kl),
    ):
        for b in range(2):
            for row in range(4):
                of_heads = s[b, :, row].tolist(), t[b, :, row].tolist()
                assert found[b, row].item() == pytest.approx(expected(*of_heads), rel=1e-12, abs=1e-12)
    assert not attention_divergence(s, t, divergence=JSD()).equal(attention_divergence(s, t))
    weights = torch.tensor([1.0, 0.0, 0.0])
    torch.testing.assert_close(attention_mse(s, t, weights), attention_mse(s[:, :1], t[:, :1]))


def test_attention_without_normalisation_is_length_times_the_mean_over_maps() -> None:
    s, t = maps(2, 3, 4, 4), maps(2, 3, 4, 4, seed=1)
    torch.testing.assert_close(attention_mse(s, t, normalize=False).mean(), 4 * torch.nn.functional.mse_loss(s, t))
    a, b = (torch.nn.functional.normalize(x, p=2, dim=-1) for x in (s, t))
    torch.testing.assert_close(attention_mse(s, t).mean(), 4 * torch.nn.functional.mse_loss(a, b))
    assert torch.autograd.gradcheck(
        lambda z: attention_mse(z.softmax(-1), t, normalize=False), s.log().requires_grad_()
    )


@pytest.mark.parametrize("heads", [1, 2, 4, 5])
def test_relations_are_their_formula(heads: int) -> None:
    s, t = vectors(2, 5, 10), 2 * vectors(2, 5, 7, seed=1)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    found = relation_divergence(s, t, mask, heads)
    for b in range(2):
        for row in range(5):
            there = mask[b].bool().tolist()
            if there[row]:
                expected = reference.relation_kl(s[b].tolist(), t[b].tolist(), heads, row, there)
                assert found[b, row].item() == pytest.approx(expected, rel=1e-10)


def test_attention_and_relations_have_the_gradients_of_their_formulas() -> None:
    scores, t = vectors(1, 2, 3, 3).requires_grad_(), maps(1, 2, 3, 3, seed=1)
    assert torch.autograd.gradcheck(lambda z: attention_mse(z.softmax(-1), t), scores)
    assert torch.autograd.gradcheck(lambda z: attention_divergence(z.softmax(-1), t), scores)
    x, mask = vectors(2, 3, 5).requires_grad_(), torch.tensor([[1, 1, 1], [1, 1, 0]])
    assert torch.autograd.gradcheck(lambda s: relation_divergence(s, vectors(2, 3, 4, seed=1), mask, 2), x)


def test_attention_that_is_nowhere_or_certain_is_finite() -> None:
    certain, even = torch.eye(3)[None, None], torch.full((1, 1, 3, 3), 1 / 3)
    for s in (certain, even, torch.zeros_like(even)):
        for loss in (attention_mse, attention_divergence):
            leaf = s.clone().requires_grad_()
            value = loss(leaf, certain)
            value.sum().backward()
            assert torch.isfinite(value).all()
            assert torch.isfinite(leaf.grad).all()
    x = torch.randn(2, 3, 4, requires_grad=True)
    value = relation_divergence(x, torch.randn(2, 3, 6), torch.zeros(2, 3), 2)
    value.sum().backward()
    assert torch.isfinite(value).all()
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize(("student", "teacher"), [(1, 1), (1, 5), (2, 3), (3, 2), (4, 6), (6, 4), (5, 7), (2, 8)])
def test_heads_share_what_does_not_divide(student: int, teacher: int) -> None:
    shares = head_overlap(student, teacher)
    torch.testing.assert_close(shares.sum(1), torch.ones(student))
    torch.testing.assert_close(shares.sum(0), torch.full((teacher,), student / teacher))
    if student == teacher:
        assert torch.equal(shares, torch.eye(student))
    t = maps(2, teacher, 3, 3)
    matched, weights = match_heads(t, shares)
    assert matched.shape == (2, student, 3, 3)
    torch.testing.assert_close(matched.sum(-1), torch.ones(2, student, 3, dtype=torch.float64))
    torch.testing.assert_close(weights, torch.full((student,), 1 / student, dtype=torch.float64))


def test_focused_heads_count_more() -> None:
    t = torch.stack([torch.full((4, 4), 0.25), torch.eye(4)]).unsqueeze(0)
    mask = torch.ones(1, 4)
    for kind in ("entropy", "variance"):
        importance = head_importance(t, mask, kind)
        assert importance[1] > importance[0]
        torch.testing.assert_close(importance.sum(), torch.tensor(1.0))
        _, weights = match_heads(t, head_overlap(2, 2), importance)
        torch.testing.assert_close(weights, importance)
        assert torch.equal(head_importance(t, mask * 0, kind), torch.tensor([0.5, 0.5]))
    torch.testing.assert_close(head_importance(t, mask, "entropy")[1], 1 / (1 + 1 / (1 + torch.tensor(4.0).log())))
    several = maps(2, 3, 4, 4).float()
    unbiased = several.var(-1).mean((0, 2))  # whose factor T / (T - 1) is that of all heads
    torch.testing.assert_close(head_importance(several, torch.ones(2, 4), "variance"), unbiased / unbiased.sum())
    matched, _ = match_heads(t, head_overlap(1, 2), torch.tensor([0.0, 1.0]))
    assert torch.equal(matched[0, 0], torch.eye(4))


def test_examples_that_are_the_same_relate_the_same() -> None:
    s = vectors(5, 4)
    for name, call in OF_THE_BATCH.items():
        assert call(s, 2 * s).item() == pytest.approx(1 if name == "cka" else 0, abs=1e-12)
        assert call(s, vectors(5, 4, seed=1)).item() > 0


def test_dimensions_are_picked_by_their_gradient() -> None:
    gradients = torch.tensor([[0.1, -3.0, 0.0, 1.0], [0.1, 3.0, 0.0, -2.0]])
    importance = dimension_importance(gradients)
    torch.testing.assert_close(importance, torch.tensor([0.1, 3.0, 0.0, 1.5]))
    assert select_dimensions(importance, 2).tolist() == [1, 3]
    assert not dimension_importance(torch.zeros(0, 4)).any()
    with pytest.raises(ShapeError, match=r"count in 1\.\.4"):
        select_dimensions(importance, 5)


def test_shapes_that_do_not_fit_are_named() -> None:
    with pytest.raises(ShapeError, match=r"hidden_mse.*\[2, 4\] and \[2, 5\].*Project"):
        hidden_mse(vectors(2, 4), vectors(2, 5))
    with pytest.raises(ShapeError, match=r"linear_cka.*same N examples"):
        linear_cka(vectors(2, 4), vectors(3, 4))
    with pytest.raises(ShapeError, match=r"rkd_angle.*same N examples"):
        rkd_angle(vectors(2, 4), vectors(3, 4))
    with pytest.raises(ShapeError, match=r"attention_mse.*match_heads"):
        attention_mse(maps(1, 2, 3, 3), maps(1, 3, 3, 3))
    with pytest.raises(ShapeError, match=r"relation heads in 1\.\.4"):
        relation_divergence(vectors(1, 2, 4), vectors(1, 2, 9), torch.ones(1, 2), 5)
    with pytest.raises(ShapeError, match="same \\[B, T\\]"):
        relation_divergence(vectors(1, 2, 4), vectors(1, 3, 9), torch.ones(1, 2), 2)


def test_unit_keeps_zero() -> None:
    assert torch.equal(unit(torch.tensor([[3.0, 4.0], [0.0, 0.0]])), torch.tensor([[0.6, 0.8], [0.0, 0.0]]))
