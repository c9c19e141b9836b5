"""A teacher with a tokenizer of its own: its log-probabilities of chunks, and the terms that compare them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from conftest import TEXT, make_llama
from potstill.data.batches import PaddingCollator
from potstill.errors import ShapeError, VocabularyError
from potstill.losses.alignment import causal_alignment, target_positions
from potstill.losses.cross_tokenizer import chunk_divergence, sorted_distance
from potstill.losses.divergences import JSD, ForwardKL, ReverseKL
from potstill.losses.targets import DenseTargets, SparseTargets
from potstill.losses.token_losses import token_divergence
from potstill.teachers.byte_alignment import AlignedChunks
from potstill.teachers.crosstok import CrossTokenizerTeacher
from potstill.teachers.model import ModelTeacher
from potstill.teachers.teacher import Teacher, TeacherOutput
from potstill.train.distiller import Distiller
from potstill.train.terms.across import ULD, Chunks, MappedLogits
from potstill.train.terms.logits import Labels, Logits
from reference_across import alm, byte_level, llama_like, uld

SMALL, LARGE = byte_level(270), byte_level(600)
LLAMA = llama_like()


def batch_of(tokenizer: Any, texts: list[str], prompts: list[int] | None = None) -> dict[str, torch.Tensor]:
    """A padded batch of texts, the first tokens of which are prompts."""
    rows = [tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id] for text in texts]
    labels = [[-100] * n + ids[n:] for ids, n in zip(rows, prompts or [0] * len(rows), strict=True)]
    examples = [{"input_ids": ids, "labels": row} for ids, row in zip(rows, labels, strict=True)]
    return PaddingCollator(tokenizer.pad_token_id)(examples)


def model(tokenizer: Any, seed: int = 0, **options: Any) -> Any:
    return make_llama(vocab_size=max(tokenizer.get_vocab().values()) + 1, seed=seed, **options)


def across_of(teacher: CrossTokenizerTeacher, batch: dict[str, torch.Tensor]) -> AlignedChunks:
    found = teacher(batch, causal_alignment(batch["labels"])).chunks
    assert found is not None
    return found


TEXTS = [TEXT[0][:40], TEXT[7][:25], "zwei 🎉\n"]


@pytest.mark.parametrize("other", [LARGE, LLAMA], ids=["BPE", "Llama"])
@pytest.mark.parametrize("whole", [False, True], ids=["head", "logits"])
def test_a_chunk_has_the_probability_of_its_bytes(other: Any, whole: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """By brute force: each row of the teacher alone, token by token."""
    if whole:
        monkeypatch.setattr("potstill.teachers.model.split_model", lambda model: None)
    teacher_model, batch = model(other, seed=1), batch_of(SMALL, TEXTS, [0, 5, 2])
    teacher = CrossTokenizerTeacher(teacher_model, other, SMALL)
    across = across_of(teacher, batch)
    alignment = causal_alignment(batch["labels"])
    chunk, seen = 0, 0
    for row, (ids, mask) in enumerate(zip(batch["input_ids"], batch["attention_mask"], strict=True)):
        reading = teacher.align(ids[mask.bool()].tolist())
        logits = teacher_model(input_ids=torch.tensor([reading.ids])).logits[0]
        log_probs = logits[:, : len(other)].log_softmax(-1)
        for i in range(len(reading.sizes)):
            student_at = (reading.student == i).nonzero()[0].tolist()
            teacher_at = (reading.teacher == i).nonzero()[0].tolist()
            if any(batch["labels"][row, t] == -100 for t in student_at) or 0 in (student_at[0], teacher_at[0]):
                continue
            expected = sum(log_probs[t - 1, reading.ids[t]].item() for t in teacher_at)
            assert across.log_probs[chunk].item() == pytest.approx(expected, rel=1e-4)
            places = (across.student == chunk).nonzero()[:, 0]
            assert alignment.labels[places].tolist() == [int(ids[t]) for t in student_at]
            assert across.sizes[chunk] == reading.sizes[i]
            chunk += 1
            seen += len(student_at)
    assert chunk == len(across) > 10
    assert (across.student >= 0).sum() == seen


def test_prompts_and_first_tokens_do_not_count() -> None:
    teacher = CrossTokenizerTeacher(model(LARGE), LARGE, SMALL)
    batch = batch_of(SMALL, [TEXT[0][:30]], [10])
    across = across_of(teacher, batch)
    reading = teacher.align(batch["input_ids"][0].tolist())
    counted = set(reading.student[reading.student >= 0]) - set(reading.student[:10])
    assert len(across) == len(counted)
    nothing = {**batch, "labels": torch.full_like(batch["labels"], -100)}
    assert len(across_of(teacher, nothing)) == 0
    output = Distiller(model(SMALL), teacher, [Chunks(), MappedLogits(), ULD(), Labels()]).step(nothing)
    output.loss.backward()
    assert output.loss.item() == 0


def test_a_longer_text_than_the_teacher_can_read_is_cut() -> None:
    batch = batch_of(SMALL, [TEXT[0][:50]])
    limited = across_of(CrossTokenizerTeacher(model(LARGE), LARGE, SMALL, max_length=5), batch)
    whole = across_of(CrossTokenizerTeacher(model(LARGE), LARGE, SMALL), batch)
    assert 0 < len(limited) < len(whole)
    torch.testing.assert_close(limited.log_probs, whole.log_probs[: len(limited)])


def test_padding_on_the_left_is_the_same() -> None:
    teacher = CrossTokenizerTeacher(model(LARGE), LARGE, SMALL)
    batch = batch_of(SMALL, TEXTS, [0, 5, 2])
    lengths = batch["attention_mask"].sum(1)
    left = {
        name: torch.stack([row.roll(int(len(row) - n)) for row, n in zip(x, lengths, strict=True)])
        for name, x in batch.items()
    }
    one, two = (across_of(teacher, each) for each in (batch, left))
    torch.testing.assert_close(one.log_probs, two.log_probs)
    assert one.student.tolist() == two.student.tolist()


@pytest.mark.parametrize("whole", [False, True], ids=["head", "logits"])
def test_equal_tokenizers_match_token_by_token(whole: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if whole:
        for module in ("potstill.train.distiller", "potstill.teachers.model"):
            monkeypatch.setattr(f"{module}.split_model", lambda model: None)
    student, teacher_model, batch = model(SMALL, hidden_size=8), model(SMALL, seed=1), batch_of(SMALL, TEXTS, [0, 5, 2])
    distiller = Distiller(student, CrossTokenizerTeacher(teacher_model, SMALL, SMALL), [Chunks(temperature=7.0)])
    output = distiller.step(batch)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    there, labels = target_positions(batch["labels"]), batch["labels"][:, 1:][target_positions(batch["labels"])]
    log_q, log_p = (
        each(**inputs).logits[:, :-1][there].log_softmax(-1).gather(-1, labels[:, None])[:, 0]
        for each in (student, teacher_model)
    )
    expected = [alm(p, q, 7.0) for p, q in zip(log_p.tolist(), log_q.tolist(), strict=True)]
    assert output.loss.item() == pytest.approx(sum(expected) / len(expected), rel=1e-3)
    output.loss.backward()
    found = {name: x.grad.clone() for name, x in student.named_parameters()}
    student.zero_grad()
    chunk_divergence(log_q, log_p.detach(), ForwardKL(), temperature=7.0).mean().backward()
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-3, atol=1e-6)


def test_a_student_equal_to_its_teacher_has_no_loss() -> None:
    teacher_model, batch = model(SMALL), batch_of(SMALL, TEXTS)
    teacher = CrossTokenizerTeacher(teacher_model, SMALL, SMALL)
    for term in (Chunks(divergence=JSD()), MappedLogits(ReverseKL(), top_k=1000), ULD()):
        output = Distiller(model(SMALL), teacher, [term]).step(batch)
        assert output.loss.item() == pytest.approx(0, abs=1e-5)
        output.loss.backward()


@pytest.mark.parametrize("biased", ["merge", "drop"])
def test_biased_chunks_are_merged_or_dropped(biased: Any) -> None:
    student, batch = model(SMALL, hidden_size=8), batch_of(SMALL, TEXTS)
    teacher = CrossTokenizerTeacher(model(LARGE, seed=1), LARGE, SMALL)
    across = across_of(teacher, batch)
    bias = across.bias().tolist()
    assert max(bias) > 0.5
    assert min(bias) == 0
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    there, labels = target_positions(batch["labels"]), batch["labels"][:, 1:][target_positions(batch["labels"])]
    log_probs = student(**inputs).logits[:, :-1][there].log_softmax(-1).gather(-1, labels[:, None])[:, 0].double()
    threshold = 0.3
    total, p, q = 0.0, 0.0, 0.0
    for i in range(len(across)):
        p += across.log_probs[i].item()
        q += log_probs[across.student == i].sum().item()
        if bias[i] <= threshold:
            total += alm(p, q, 100.0)
        elif biased == "merge" and across.continues[i]:
            continue
        p = q = 0.0
    loss = Distiller(student, teacher, [Chunks(bias_threshold=threshold, biased=biased)]).step(batch).loss
    assert loss.item() == pytest.approx(total / len(labels), rel=1e-3)
    kept = Distiller(student, teacher, [Chunks(bias_threshold=1.0)]).step(batch).loss
    assert kept.item() != pytest.approx(loss.item(), rel=1e-2)


def test_bias_is_what_longer_tokens_keep() -> None:
    """By brute force, from bytes: all tokens of the teacher that go on over the end where the student's do not."""
    teacher_model, batch = model(LARGE, seed=1), batch_of(SMALL, TEXTS[:1])
    teacher = CrossTokenizerTeacher(teacher_model, LARGE, SMALL)
    across = across_of(teacher, batch)
    student_ends, teacher_ends = across.last()
    p = across.logits(teacher_ends).softmax(-1)
    pair = teacher.pair
    for i, bias in enumerate(across.bias().tolist()):
        own, student = int(across.teacher_tokens[teacher_ends[i]]), int(across.student_tokens[student_ends[i]])
        piece, other = pair.teacher.bytes_of[own], pair.student.bytes_of[student]
        longer = 0.0
        for id, longer_piece in pair.teacher.bytes_of.items():
            if piece and longer_piece and longer_piece.startswith(piece) and longer_piece != piece:
                longer += (
                    0.0 if other + longer_piece[len(piece) :] in pair.student.bytes_of.values() else p[i, id].item()
                )
        assert bias == pytest.approx(longer / (longer + p[i, own].item()), abs=1e-5)


def test_mapped_logits_by_the_definition() -> None:
    """For each of the student's tokens, the teacher's probability of all tokens that it would begin with it."""
    student, teacher_model, batch = model(SMALL, hidden_size=8), model(LARGE, seed=1), batch_of(SMALL, TEXTS)
    teacher = CrossTokenizerTeacher(teacher_model, LARGE, SMALL)
    across, begins = across_of(teacher, batch), teacher.pair.first_student_token
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    there = target_positions(batch["labels"])
    q, total = student(**inputs).logits[:, :-1][there], 0.0
    for i in range(len(across)):
        student_places, teacher_places = ((x == i).nonzero()[0] for x in (across.student, across.teacher))
        p = [0.0] * q.shape[-1]
        for id, share in enumerate((across.logits(teacher_places)[0] / 2).softmax(-1).tolist()):
            p[begins[id]] += share
        targets = DenseTargets(2 * torch.tensor([p]).log())
        total += 4 * token_divergence(q[student_places], targets, ForwardKL(), temperature=2.0).item()
    loss = Distiller(student, teacher, [MappedLogits(temperature=2.0, top_k=1000)]).step(batch).loss
    assert loss.item() == pytest.approx(total / int(there.sum()), rel=1e-3)
    fewer = Distiller(student, teacher, [MappedLogits(temperature=2.0, top_k=5)]).step(batch).loss
    assert 0 < fewer.item() < loss.item()


def test_mapped_logits_of_one_tokenizer_are_logits() -> None:
    student, teacher_model, batch = model(SMALL, hidden_size=8), model(SMALL, seed=1), batch_of(SMALL, TEXTS, [0, 5, 2])
    mapped = CrossTokenizerTeacher(teacher_model, SMALL, SMALL)
    for divergence in (ForwardKL(), ReverseKL()):
        one = Distiller(student, mapped, [MappedLogits(divergence, temperature=2.0, top_k=1000)]).step(batch)
        two = Distiller(student, teacher_model, [Logits(divergence, temperature=2.0)]).step(batch)
        torch.testing.assert_close(one.loss, two.loss, rtol=1e-4, atol=1e-5)


def test_where_only_one_puts_a_space_before_the_text() -> None:
    batch = batch_of(SMALL, ["return 1<end>return 2"])
    for other, expected in ((LARGE, 0), (LLAMA, 1)):  # the first token of a row is never predicted
        across = across_of(CrossTokenizerTeacher(model(other), other, SMALL), batch)
        assert across.spaced.sum() == expected
        assert (across.sizes == 0).sum() == 2


def test_uld_pairs_what_begins_at_the_same_byte() -> None:
    student, teacher_model, batch = model(SMALL, hidden_size=8), model(LARGE, seed=1), batch_of(SMALL, TEXTS)
    teacher = CrossTokenizerTeacher(teacher_model, LARGE, SMALL)
    across = across_of(teacher, batch)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    there = target_positions(batch["labels"])
    q = student(**inputs).logits[:, :-1][there]
    total = 0.0
    for i in range(len(across)):
        student_place, teacher_place = ((x == i).nonzero()[0, 0] for x in (across.student, across.teacher))
        total += uld(q[student_place].tolist(), across.logits(teacher_place[None])[0].tolist())
    loss = Distiller(student, teacher, [ULD()]).step(batch).loss
    assert loss.item() == pytest.approx(total / int(there.sum()), rel=1e-3)
    assert sorted_distance(q, q.flip(-1)).abs().max() < 1e-6


def test_several_batches_are_one() -> None:
    batch = batch_of(SMALL, [text[:30] for text in TEXT[:6]], [0, 3, 0, 6, 1, 2])
    gradients = []
    for parts in (1, 3):
        student = model(SMALL, hidden_size=8)
        teacher = CrossTokenizerTeacher(model(LARGE, seed=1), LARGE, SMALL)
        distiller = Distiller(student, teacher, [Chunks(), MappedLogits(weight=0.5), ULD(weight=0.1), Labels()])
        tokens = int(target_positions(batch["labels"]).sum())
        for rows in torch.arange(6).chunk(parts):
            some = {name: x[rows] for name, x in batch.items()}
            distiller(some, normalizer=tokens, at=0).loss.backward()
        gradients.append({name: x.grad for name, x in student.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-3, atol=1e-6)


def test_rows_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = CrossTokenizerTeacher(model(LARGE), LARGE, SMALL)
    reads = []
    plain = teacher.pair.align
    monkeypatch.setattr(teacher.pair, "align", lambda ids: reads.append(ids) or plain(ids))
    batch = batch_of(SMALL, TEXTS)
    first, second = (across_of(teacher, batch) for _ in range(2))
    assert len(reads) == len(TEXTS)
    assert torch.equal(first.log_probs, second.log_probs)
    monkeypatch.setattr("potstill.teachers.crosstok.CACHED_ROWS", 1)
    across_of(teacher, batch_of(SMALL, TEXTS[::-1]))
    assert len(teacher._rows) <= 3


class Sparse(Teacher):
    def __call__(self, batch: Any, alignment: Any) -> TeacherOutput:
        ids = torch.zeros(len(alignment), 1, dtype=torch.long)
        return TeacherOutput(SparseTargets(ids, torch.zeros(len(alignment), 1)))


def test_what_does_not_go_together_is_refused() -> None:
    batch = batch_of(SMALL, TEXTS)
    teacher = CrossTokenizerTeacher(model(LARGE), LARGE, SMALL)
    with pytest.raises(VocabularyError, match="terms over bytes with CrossTokenizerTeacher, got logits"):
        Distiller(model(SMALL), teacher, [Chunks(), Logits(ForwardKL())])
    with pytest.raises(VocabularyError, match="a CrossTokenizerTeacher for the term uld, got ModelTeacher"):
        Distiller(model(SMALL), ModelTeacher(model(SMALL)), [ULD()])
    with pytest.raises(ShapeError, match="full distributions, got a mixture or a few tokens"):
        CrossTokenizerTeacher(Sparse(), LARGE, SMALL)(batch, causal_alignment(batch["labels"]))
    with pytest.raises(ShapeError, match=r"Chunks.bias_threshold: expected a number in"):
        Chunks(bias_threshold=2.0)
    with pytest.raises(ShapeError, match=r"Chunks.biased: expected one of drop, merge"):
        Chunks(biased="keep")  # type: ignore[arg-type]
    targets = teacher(batch, causal_alignment(batch["labels"])).targets
    assert not isinstance(targets, DenseTargets)
