"""A teacher's targets survive packing: each codec against the numbers that went in."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from potstill.errors import ShapeError
from potstill.losses.targets import DenseTargets, HeadTargets, LMHead, SparseTargets
from potstill.teachers.cache import codec as codec_module
from potstill.teachers.cache.codec import Codec, Dense, HiddenStates, Sampled, TopK, codec_of

VOCABULARIES = [2, 3, 255, 256, 257, 70_000, 300_000]  # one, two and three bytes for an id; beyond 2^18


def logits_of(n: int, vocabulary: int, spread: float = 3.0) -> torch.Tensor:
    return torch.randn(n, vocabulary) * spread


def again(codec: Codec, targets, rows: list[int] | None = None, head: LMHead | None = None):
    """Encode row by row, decode together: the targets."""
    rows = rows or [targets.leading[0]]
    parts, start = [], 0
    for count in rows:
        part = slice(start, start + count)
        of_row = (
            HeadTargets(targets.hidden[part], targets.head)
            if isinstance(targets, HeadTargets)
            else SparseTargets(targets.ids[part], targets.log_probs[part], targets.kind, targets.temperature)
            if isinstance(targets, SparseTargets)
            else DenseTargets(targets.logits[part])
        )
        parts.append(codec.encode(of_row, start))
        start += count
    return codec.decode(parts, rows, head)[0]


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_top_k_keeps_ids_probabilities_and_the_rest(vocabulary: int, temperature: float) -> None:
    logits, k = logits_of(5, vocabulary), min(8, vocabulary)
    found = again(TopK(vocabulary, k, temperature), DenseTargets(logits), [2, 3])
    true = torch.log_softmax(logits.double() / temperature, -1)
    assert found.kind == "bucket" and found.temperature == temperature
    assert all(len(set(row)) == k for row in found.ids.tolist())
    expected, ids = true.topk(k)
    assert torch.equal(found.ids, ids)
    torch.testing.assert_close(found.log_probs.double(), expected.clamp_min(-((254 / 56) ** 2)), atol=0.09, rtol=0)
    likely = expected > -1
    torch.testing.assert_close(found.log_probs.double()[likely], expected[likely], atol=0.025, rtol=0)
    others = found.events(temperature)[:, -1].exp().double()
    torch.testing.assert_close(others, 1 - expected.exp().sum(-1), atol=3e-7, rtol=1e-4)


def test_top_k_of_the_whole_vocabulary_leaves_nothing() -> None:
    logits = logits_of(4, 6)
    found = again(TopK(6, 6), DenseTargets(logits))
    assert found.log_probs.exp().sum(-1) == pytest.approx(torch.ones(4))


def test_top_k_keeps_tokens_that_are_ruled_out_as_unused_slots() -> None:
    logits = logits_of(3, 10)
    logits[:, 2:] = -torch.inf
    found = again(TopK(10, 4), DenseTargets(logits))
    assert found.used().sum(-1).tolist() == [2, 2, 2]
    assert torch.isfinite(found.events(1.0)).all()


def test_top_k_of_a_teacher_that_gives_its_likeliest_tokens_only() -> None:
    true = torch.log_softmax(logits_of(4, 50), -1)
    given, ids = true.topk(6)
    order = torch.randperm(6)
    targets = SparseTargets(ids[:, order], given[:, order])
    fewer, more = again(TopK(50, 3), targets), again(TopK(50, 9), targets)
    assert torch.equal(fewer.ids, ids[:, :3])
    assert more.used().sum(-1).tolist() == [6] * 4
    for found in (fewer, more):
        kept = found.log_probs.exp().sum(-1)
        torch.testing.assert_close(kept, given[:, : found.used()[0].sum()].exp().sum(-1), atol=1e-6, rtol=1e-5)
    with pytest.raises(ShapeError, match="at temperature 2, got bucket targets at 1"):
        again(TopK(50, 3, temperature=2.0), targets)


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_sampled_keeps_counts(vocabulary: int) -> None:
    logits = logits_of(7, vocabulary)
    found = again(Sampled(vocabulary, draws=50), DenseTargets(logits), [1, 6])
    assert found.kind == "sampled"
    counts = counts_of(found, vocabulary, 50)
    assert torch.allclose(counts, counts.round(), atol=1e-4)
    assert counts.sum(-1).round().tolist() == [50] * 7
    for ids, used in zip(found.ids, found.used(), strict=True):
        kept = ids[used].tolist()
        assert kept == sorted(set(kept)) and kept[0] >= 0 and kept[-1] < vocabulary


def counts_of(found: SparseTargets, vocabulary: int, draws: int) -> torch.Tensor:
    """How often each token was drawn: [n, V] float64."""
    shares = torch.where(found.used(), found.log_probs, -torch.inf).exp().double()
    return torch.zeros(len(shares), vocabulary, dtype=torch.float64).scatter_add_(1, found.ids, shares) * draws


@pytest.mark.parametrize("vocabulary", [2, 64, 65, 700, 5_000])
@pytest.mark.parametrize(("draws", "temperature"), [(1, 1.0), (50, 1.0), (255, 2.0)])
def test_a_token_is_drawn_as_often_as_it_is_likely_to_less_than_one(
    vocabulary: int, draws: int, temperature: float
) -> None:
    logits = logits_of(40, vocabulary, 2.0)
    logits[0, : vocabulary // 2] = -torch.inf
    counts = counts_of(again(Sampled(vocabulary, draws, temperature), DenseTargets(logits)), vocabulary, draws)
    expected = draws * torch.softmax(logits.double() / temperature, -1)
    assert ((counts - expected).abs() < 1 + 1e-4).all()
    assert (counts[0, : vocabulary // 2] == 0).all()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_draws_follow_the_teacher(temperature: float) -> None:
    """Each token's share is the teacher's within five standard errors, which are smaller than independent draws'."""
    logits = torch.cat([logits_of(1, 700, 2.0), torch.full((1, 700), -torch.inf)])
    logits[1, [3, 300, 699]] = torch.tensor([0.0, 1.0, -3.0])
    rows, draws = 2000, 50
    targets = DenseTargets(logits.repeat_interleave(rows, 0))
    found = again(Sampled(700, draws, temperature), targets, [rows, rows])
    counts = counts_of(found, 700, draws).reshape(2, rows, 700)
    true = torch.softmax(logits.double() / temperature, -1)
    fraction = draws * true - (draws * true).floor()
    variance = fraction * (1 - fraction)
    assert ((counts.mean(1) - draws * true).abs() <= 5 * (variance / rows).sqrt() + 1e-5).all()
    torch.testing.assert_close(counts.var(1).sum(-1), variance.sum(-1), rtol=0.05, atol=0)
    assert (variance.sum(-1) < (draws * true * (1 - true)).sum(-1)).all()
    assert ((counts > 0).sum(1)[1] > 0).sum() == 3


def test_the_order_of_the_vocabulary_makes_no_bias() -> None:
    """Likely tokens beside each other, or apart: a token's mean count is the same."""
    logits, rows = logits_of(1, 90, 2.0), 4000
    true = 50 * torch.softmax(logits.double(), -1)
    for order in (logits.argsort(-1)[0], torch.randperm(90)):
        found = again(Sampled(90), DenseTargets(logits[:, order].expand(rows, -1)))
        error = 0.5 / rows**0.5  # at most, of a count that is one of two neighbours
        assert ((counts_of(found, 90, 50).mean(0) - true[0, order]).abs() < 5 * error).all()


def test_draws_depend_on_the_seed_alone() -> None:
    targets = DenseTargets(logits_of(3, 100))
    codec = Sampled(100)
    assert codec.encode(targets, 1) == codec.encode(targets, 1) != codec.encode(targets, 2)


def test_a_certain_teacher_is_drawn_whole() -> None:
    logits = torch.full((2, 1000), -torch.inf)
    logits[:, 999] = 5.0
    found = again(Sampled(1000, draws=255), DenseTargets(logits))
    assert found.ids.tolist() == [[999], [999]] and found.log_probs.abs().max() < 1e-6


def test_dense_keeps_everything_in_half_precision() -> None:
    logits = logits_of(6, 40)
    logits[0, 3] = -torch.inf
    found = again(Dense(40), DenseTargets(logits), [4, 2])
    true = torch.log_softmax(logits, -1)
    torch.testing.assert_close(found.logits.float(), true, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_hidden_states_are_kept_as_they_are(dtype: str) -> None:
    hidden = torch.randn(5, 16).to(getattr(torch, dtype))
    head = LMHead(torch.randn(40, 16))
    found = again(HiddenStates(40, 16, dtype), HeadTargets(hidden, head), [2, 3], head)
    assert found.hidden.dtype == hidden.dtype and torch.equal(found.hidden, hidden) and found.head is head


@pytest.mark.parametrize("codec", [Sampled(30), TopK(30, 4), Dense(30)], ids=lambda codec: codec.name)
def test_rows_without_tokens_are_empty(codec: Codec) -> None:
    targets = DenseTargets(torch.zeros(0, 30))
    assert codec.decode([codec.encode(targets, 0)], [0])[0].leading == (0,)


@pytest.mark.parametrize("codec", [Sampled(30), TopK(30, 4), Dense(30)], ids=lambda codec: codec.name)
def test_nan_is_refused(codec: Codec) -> None:
    logits = logits_of(2, 30)
    logits[1, 2] = torch.nan
    with pytest.raises(ShapeError, match="expected numbers, got NaN"):
        codec.encode(DenseTargets(logits), 0)


@pytest.mark.parametrize("codec", [Sampled(30), TopK(30, 4), Dense(30)], ids=lambda codec: codec.name)
@pytest.mark.parametrize("change", [-1, 1])
def test_a_row_of_another_length_is_refused(codec: Codec, change: int) -> None:
    row = codec.encode(DenseTargets(logits_of(3, 30)), 0)
    with pytest.raises(ShapeError, match="expected a row of"):
        codec.decode([row[:change] if change < 0 else row + b"\0"], [3])


def test_a_codec_is_made_again_from_its_record() -> None:
    for codec in (Sampled(30, 7, 2.0), TopK(30, 4), Dense(30), HiddenStates(30, 8, "float16")):
        assert codec_of(codec.record()) == codec
    assert set(Codec.kinds) == {"sampled", "top_k", "dense", "hidden"}


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: codec_of({"name": "topk", "vocabulary": 3}), "expected one of .* got topk. Did you mean top_k?"),
        (lambda: codec_of({"name": "dense", "vocabulary": 3, "k": 1}), "expected the parameters of dense, got k"),
        (lambda: Sampled(30, draws=256), r"draws: expected a number in \[1, 255\], got 256"),
        (lambda: TopK(30, k=31), r"k in 1\.\.30, got 31"),
        (lambda: TopK(30, k=3, temperature=0.0), r"temperature: expected a number in \(0, inf\)"),
        (
            lambda: HiddenStates(30, 4).encode(DenseTargets(torch.zeros(1, 30)), 0),
            "a teacher with a plain head, got DenseTargets",
        ),
        (
            lambda: Sampled(30).encode(SparseTargets(torch.zeros(1, 1).long(), torch.zeros(1, 1)), 0),
            "full distributions, got sparse targets",
        ),
    ],
)
def test_what_can_not_be_is_refused(make, expected: str) -> None:
    with pytest.raises(ShapeError, match=expected):
        make()


def test_bytes_of_a_row_are_those_that_are_documented() -> None:
    """docs/cache.md describes them, for readers in other languages."""
    logits = torch.full((2, 600), -torch.inf)
    logits[0, [1, 300, 301]] = torch.tensor([4.0, 2.0, 2.0]).log() - 8.0
    logits[1, 5] = 0.0
    row = TopK(600, 3).encode(DenseTargets(logits), 0, label_log_probs=torch.tensor([-0.5, -2.0]))
    assert list(zip(row[:2], row[2:4], strict=True)) == [tuple(np.float16(x).tobytes()) for x in (-0.5, -2.0)]
    row = row[4:]
    low, high, codes, rest = row[:6], row[6:12], row[12:18], np.frombuffer(row[18:], "<f4", 2)
    first = {1: 47, 44 + 256: 66, 45 + 256: 66}  # 56 * sqrt(log 2), 56 * sqrt(log 4)
    ids = [a + 256 * b for a, b in zip(low, high, strict=True)]
    assert ids[0] == 1 and set(ids[:3]) == set(first) and ids[3] == 5
    assert list(codes) == [47, 19, 0, 0, 255, 0]
    assert rest.tolist() == pytest.approx([0.0, 0.0], abs=1e-6)


def test_the_log_probabilities_of_the_datas_own_tokens_are_kept() -> None:
    hidden, head, labels = torch.randn(5, 8), LMHead(torch.randn(30, 8)), torch.arange(5)
    targets = HeadTargets(hidden, head)
    expected = torch.log_softmax(targets.dense(), -1)[range(5), range(5)]
    codecs = [Dense(30), TopK(30, 4), Sampled(30), TopK(30, 4, 2.0), Sampled(30, temperature=2.0), HiddenStates(30, 8)]
    for codec in codecs:
        parts = [HeadTargets(hidden[part], head) for part in (slice(0, 2), slice(2, 5))]
        rows = [codec.encode(part, 0, labels=some) for part, some in zip(parts, (labels[:2], labels[2:]), strict=True)]
        torch.testing.assert_close(codec.decode(rows, [2, 3], head)[1], expected, atol=1e-5, rtol=1e-3)
        rows[1] = codec.encode(parts[1], 0)
        assert codec.decode(rows, [2, 3], head)[1] is None


@pytest.mark.parametrize("kind", ["dense", "top_k", "sampled", "hidden"])
def test_logits_are_computed_for_some_positions_at_a_time(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    codec: Any = {"dense": Dense(30), "top_k": TopK(30, 4), "sampled": Sampled(30), "hidden": HiddenStates(30, 8)}[kind]
    targets, labels = HeadTargets(torch.randn(11, 8), LMHead(torch.randn(30, 8))), torch.arange(11)
    whole = codec.decode([codec.encode(targets, 7, labels=labels)], [11], targets.head)
    sizes = []
    logits = LMHead.logits
    monkeypatch.setattr(LMHead, "logits", lambda self, hidden: sizes.append(len(hidden)) or logits(self, hidden))
    monkeypatch.setattr(codec_module, "ELEMENTS", 4 * 30 + 1)
    in_parts = codec.decode([codec.encode(targets, 7, labels=labels)], [11], targets.head)
    assert sizes == [4, 4, 3]
    torch.testing.assert_close(in_parts[1], whole[1])
    values = [
        read[0].events(1.0) if isinstance(read[0], SparseTargets) else read[0].dense() for read in (in_parts, whole)
    ]
    torch.testing.assert_close(*values, atol=1e-3, rtol=1e-3)
