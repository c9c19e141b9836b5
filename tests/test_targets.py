from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

import reference
from potstill.errors import ShapeError, VocabularyError
from potstill.losses.alignment import causal_alignment
from potstill.losses.divergences import ForwardKL
from potstill.losses.targets import DenseTargets, HeadTargets, LMHead, SparseTargets
from potstill.losses.token_losses import token_divergence

V, H = 6, 4


def randn(*shape: int) -> Tensor:
    """The same numbers for the same shape."""
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("leading", [(), (3,), (2, 3)], ids=str)
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("logit_scale", [1.0, 0.0625])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_the_logits_of_a_head(leading, with_bias, logit_scale, softcap):
    hidden, weight, bias = randn(*leading, H), randn(V, H), randn(V) if with_bias else None
    expected = (hidden.unsqueeze(-2) * weight).sum(-1)
    if bias is not None:
        expected = expected + bias
    expected = expected * logit_scale
    if softcap is not None:
        expected = softcap * torch.tanh(expected / softcap)
    head = LMHead(weight, bias, logit_scale, softcap)
    torch.testing.assert_close(head.logits(hidden), expected)
    torch.testing.assert_close(HeadTargets(hidden, head).dense(), expected)


def test_the_soft_cap_is_in_the_chain_of_the_gradient():
    hidden, weight, bias = (x.requires_grad_() for x in (randn(3, H), randn(V, H), randn(V)))

    def logits(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return LMHead(w, b, logit_scale=0.5, softcap=1.5).logits(h)

    assert torch.autograd.gradcheck(logits, (hidden, weight, bias))
    z = logits(hidden, weight, bias)
    (through_the_cap,) = torch.autograd.grad(z.sum(), bias, retain_graph=True)
    torch.testing.assert_close(through_the_cap, 0.5 * (1 - (z / 1.5) ** 2).sum(0))


@pytest.mark.parametrize("make", [
    lambda weight, hidden: HeadTargets(hidden, LMHead(weight, randn(V), 0.5, 1.5)),
    lambda weight, hidden: HeadTargets(hidden, LMHead(weight)),
    lambda weight, hidden: DenseTargets(hidden @ weight.T),
])  # fmt: skip
def test_a_slice_is_the_first_tokens(make):
    targets = make(randn(V, H), randn(2, 3, H))
    sliced = targets.slice(4)
    assert (targets.vocabulary, sliced.vocabulary) == (V, 4)
    assert torch.equal(sliced.dense(), targets.dense()[..., :4])
    assert torch.equal(targets.slice(V).dense(), targets.dense())


def test_a_slice_of_a_head_is_no_copy():
    head = LMHead(randn(V, H), randn(V))
    sliced = head.slice(4)
    assert sliced.weight.data_ptr() == head.weight.data_ptr()
    assert sliced.bias.data_ptr() == head.bias.data_ptr()


def test_a_slice_of_a_slice_is_the_smaller_one():
    head = LMHead(randn(V, H), randn(V), logit_scale=0.5, softcap=2.0).slice(5)
    assert head.vocabulary == 5 and head.slice(3).vocabulary == 3
    torch.testing.assert_close(head.slice(3).logits(randn(2, H)), head.logits(randn(2, H))[..., :3])
    with pytest.raises(VocabularyError, match=r"^LMHead\.slice: expected a size in 1\.\.5, got 6"):
        head.slice(6)


def test_the_gradient_of_padding_is_zero():
    weight, bias = randn(V, H).requires_grad_(), randn(V).requires_grad_()
    LMHead(weight, bias).slice(4).logits(randn(3, H)).square().sum().backward()
    assert (weight.grad[4:] == 0).all() and (bias.grad[4:] == 0).all()
    assert (weight.grad[:4] != 0).all() and (bias.grad[:4] != 0).all()


@pytest.mark.parametrize("leading", [(), (3,), (2, 3)], ids=str)
@pytest.mark.parametrize("kind", ["bucket", "sampled", "renormalized"])
def test_the_events_of_sparse_targets(leading, kind):
    log_probs = torch.tensor([0.5, 0.125, 0.0], dtype=torch.float64).log().expand(*leading, 3)
    targets = SparseTargets(torch.tensor([4, 1, 1]).expand(*leading, 3), log_probs, kind, temperature=2.0)
    expected = {"bucket": [0.5, 0.125, 0, 0.375], "sampled": [0.5, 0.125, 0, 0], "renormalized": [0.8, 0.2, 0, 0]}[kind]
    events = targets.events(2.0)
    assert targets.leading == leading and targets.used().tolist() == (log_probs > -math.inf).tolist()
    assert events.shape == (*leading, 4) and events.isfinite().all()
    torch.testing.assert_close(events.exp(), torch.tensor(expected, dtype=torch.float64).expand(*leading, 4))


def test_the_events_of_sparse_targets_at_another_temperature():
    log_probs = randn(3, 4).log_softmax(-1)
    targets = SparseTargets(torch.arange(4).expand(3, 4), log_probs, "renormalized", temperature=2.0)
    for temperature in (0.5, 1.0, 4.0):
        torch.testing.assert_close(targets.events(temperature)[:, :4], (log_probs * 2 / temperature).log_softmax(-1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_the_rest_of_a_bucket_is_never_below_nothing(dtype):
    """Rounded probabilities may add up to more than 1."""
    log_probs = torch.tensor([0.5, 0.5]).log().to(dtype) + 1e-2
    rest = SparseTargets(torch.tensor([0, 1]), log_probs).events(1.0)[-1]
    assert rest.isfinite() and rest < -15 and rest.dtype == torch.promote_types(dtype, torch.float32)


def test_sparse_targets_are_sliced_only_where_no_token_is_lost():
    targets = SparseTargets(torch.tensor([[0, 3], [2, 99]]), torch.tensor([[-1.0, -1.0], [-1.0, -math.inf]]))
    assert targets.slice(4) is targets  # a slot that is not used may hold any id
    with pytest.raises(VocabularyError, match=r"^SparseTargets: expected token ids in 0\.\.2, got 0\.\.3\. .*another"):
        targets.slice(3)


def test_sparse_targets_without_positions():
    targets = SparseTargets(torch.zeros(0, 2, dtype=torch.long), torch.zeros(0, 2))
    assert targets.slice(1) is targets and targets.events(1.0).shape == (0, 3)


IDS = torch.zeros(3, 2, dtype=torch.long)


@pytest.mark.parametrize(("wrong", "words"), [
    (lambda: SparseTargets(IDS, torch.zeros(3, 3)), r"expected ids and log_probs of one shape .*\[3, 2\] and \[3, 3\]"),
    (lambda: SparseTargets(IDS[:, :0], torch.zeros(3, 0)), r"expected ids and log_probs of one shape \[\.\.\., K\]"),
    (lambda: SparseTargets(IDS[0, 0], torch.tensor(0.0)), r"expected ids and log_probs of one shape \[\.\.\., K\]"),
    (lambda: SparseTargets(IDS, torch.zeros(3, 2), "top"), r"expected kind bucket, sampled or renormalized, got 'top'"),
    (lambda: SparseTargets(IDS, torch.zeros(3, 2), temperature=0.0), r"expected temperature > 0, got 0\.0"),
    (lambda: SparseTargets(IDS, torch.zeros(3, 2), temperature=-1.0), r"expected temperature > 0, got -1\.0"),
    (lambda: SparseTargets(IDS, torch.zeros(3, 2), temperature=math.nan), r"expected temperature > 0, got nan"),
    (lambda: SparseTargets(IDS, torch.zeros(3, 2), temperature=math.inf), r"expected temperature > 0, got inf"),
    (lambda: SparseTargets(IDS, torch.zeros(3, 2)).events(2.0), r"temperature 1 .*bucket.*, got 2\. .*renorm"),
    (lambda: SparseTargets(IDS, torch.zeros(3, 2), "sampled").events(0.5), r"temperature 1 .*sampled.*, got 0\.5"),
])  # fmt: skip
def test_what_are_no_sparse_targets(wrong, words):
    with pytest.raises(ShapeError, match=rf"^SparseTargets: .*{words}") as caught:
        wrong()
    assert "\n" not in str(caught.value)


def test_padding_of_the_vocabulary_is_sliced_off_before_the_normaliser():
    """Rows of zeros give logits of 0, which is real probability: the two models below differ only by them."""
    hidden, weight, teacher = randn(5, H), randn(V, H), randn(5, V)
    head = LMHead(torch.cat([weight, torch.zeros(3, H, dtype=torch.float64)]))
    wide_targets = DenseTargets(torch.nn.functional.pad(teacher, (0, 3)))
    unpadded = token_divergence(LMHead(weight).logits(hidden), DenseTargets(teacher), ForwardKL())
    sliced = token_divergence(head.slice(V).logits(hidden), wide_targets.slice(V), ForwardKL())
    padded = token_divergence(head.logits(hidden), wide_targets, ForwardKL())
    assert torch.equal(sliced, unpadded)
    assert ((padded - unpadded).abs() > 0.01).all()


@pytest.mark.parametrize(("wrong", "words"), [
    (lambda: LMHead(randn(V)), r"expected weight of shape \[V, H\], got \[6\]"),
    (lambda: LMHead(randn(V, H), randn(H)), r"expected bias of shape \[6\], got \[4\]"),
    (lambda: LMHead(randn(V, H), softcap=0.0), r"expected softcap > 0 or None, got 0\.0"),
    (lambda: LMHead(randn(V, H), softcap=-1.0), r"expected softcap > 0 or None, got -1\.0"),
    (lambda: LMHead(randn(V, H)).logits(randn(3, H + 1)), r"expected hidden of width 4, got 5"),
])  # fmt: skip
def test_what_is_no_head(wrong, words):
    with pytest.raises(ShapeError, match=rf"^LMHead: {words}"):
        wrong()


@pytest.mark.parametrize("size", [0, -1, V + 1])
@pytest.mark.parametrize(("owner", "name"), [
    (LMHead(randn(V, H)), "LMHead"),
    (DenseTargets(randn(3, V)), "DenseTargets"),
    (HeadTargets(randn(3, H), LMHead(randn(V, H))), "LMHead"),
], ids=["head", "dense", "head targets"])  # fmt: skip
def test_a_slice_that_is_not_there(owner, name, size):
    with pytest.raises(VocabularyError, match=rf"^{name}\.slice: expected a size in 1\.\.6, got {size}"):
        owner.slice(size)


def random_labels(B: int, T: int) -> Tensor:
    generator = torch.Generator().manual_seed(B * T)
    labels = torch.randint(0, 50, (B, T), generator=generator)
    return labels.where(torch.rand(B, T, generator=generator) > 0.4, torch.tensor(-100))


@pytest.mark.parametrize("labels", [
    random_labels(5, 9),
    random_labels(1, 30),
    random_labels(3, 2),
    torch.full((2, 4), 7),
    torch.tensor([[-100, -100, -100], [1, 2, 3], [-100, 2, -100]]),
    torch.tensor([[5, -100, -100], [6, -100, -100]]),  # a first token is never predicted
    torch.tensor([[5], [6]]),
    torch.full((2, 4), -100),
    torch.zeros(0, 4, dtype=torch.long),
], ids=lambda labels: str(list(labels.shape)))  # fmt: skip
def test_the_causal_alignment(labels):
    alignment = causal_alignment(labels)
    expected = reference.causal_alignment(labels.tolist())
    B, T = labels.shape
    states = torch.arange(B * T * 2.0).reshape(B, T, 2)
    assert len(alignment) == len(expected)
    assert alignment.labels.tolist() == [label for _, _, label in expected]
    assert alignment.column.tolist() == [position for _, position, _ in expected]
    assert alignment.positions.tolist() == [row * T + position for row, position, _ in expected]
    assert alignment.select(states).tolist() == [states[row, position].tolist() for row, position, _ in expected]


def test_select_takes_any_trailing_shape():
    alignment = causal_alignment(torch.tensor([[0, 1, -100], [0, -100, 2]]))
    assert alignment.select(torch.arange(6).reshape(2, 3)).tolist() == [0, 4]
    assert alignment.select(torch.zeros(2, 3, 4, 5)).shape == (2, 4, 5)


def test_the_gradient_reaches_exactly_what_was_selected():
    labels = random_labels(3, 5)
    states = randn(3, 5, 2).requires_grad_()
    causal_alignment(labels).select(states).sum().backward()
    expected = torch.zeros(3, 5, 2, dtype=torch.float64)
    for row, position, _ in reference.causal_alignment(labels.tolist()):
        expected[row, position] = 1
    assert torch.equal(states.grad, expected)


def test_no_counting_position_leaves_a_gradient_of_zero():
    states = randn(2, 3, 2).requires_grad_()
    causal_alignment(torch.full((2, 3), -100)).select(states).sum().backward()
    assert torch.equal(states.grad, torch.zeros_like(states))


@pytest.mark.parametrize("owner", [
    LMHead(randn(V, H)),
    DenseTargets(randn(3, V)),
    HeadTargets(randn(3, H), LMHead(randn(V, H))),
    SparseTargets(torch.zeros(3, 2, dtype=torch.long), randn(3, 2)),
    causal_alignment(random_labels(2, 3)),
], ids=lambda owner: type(owner).__name__)  # fmt: skip
def test_they_are_frozen(owner):
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(owner, dataclasses.fields(owner)[0].name, None)
