"""The figures of the report, against loops."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from conftest import make_batch, make_llama
from potstill.evaluate.quality import compare, continuation, gap_closed
from potstill.evaluate.speed import latency_ms, weight_bytes


def test_compare_is_what_a_loop_finds() -> None:
    teacher, student = make_llama(seed=1), make_llama(hidden_size=8)
    batches = [make_batch(4, 12, seed=3), make_batch(3, 9, seed=4)]
    found = compare(teacher, {"student": student}, batches, bins=4)["student"]
    losses, kls, agreed, places = [], [], [], []
    for batch in batches:
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        with torch.no_grad():
            q = student.eval()(**inputs).logits.double().log_softmax(-1)
            p = teacher.eval()(**inputs).logits.double().log_softmax(-1)
        for row in range(batch["labels"].shape[0]):
            for t in range(batch["labels"].shape[1] - 1):
                label = int(batch["labels"][row, t + 1])
                if label == -100:
                    continue
                losses.append(-float(q[row, t, label]))
                pairs = zip(p[row, t].tolist(), q[row, t].tolist(), strict=True)
                kls.append(sum(math.exp(a) * (a - b) for a, b in pairs))
                agreed.append(int(p[row, t].argmax()) == int(q[row, t].argmax()))
                places.append(t)
    count = len(losses)
    assert found.tokens == count
    assert found.loss == pytest.approx(sum(losses) / count, rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(sum(losses) / count), rel=1e-5)
    assert found.kl == pytest.approx(sum(kls) / count, rel=1e-5)
    assert found.agreement == pytest.approx(sum(agreed) / count)
    assert found.position_edges == [0, 3, 6, 8, 11]
    for value, start, end in zip(found.kl_by_position, found.position_edges, found.position_edges[1:], strict=False):
        inside = [kl for kl, place in zip(kls, places, strict=False) if start <= place < end]
        assert value == (pytest.approx(sum(inside) / len(inside), rel=1e-5) if inside else None)


def test_the_teacher_agrees_with_itself_and_is_left_as_it_was() -> None:
    teacher, student = make_llama(seed=1).eval(), make_llama(hidden_size=8).train()
    found = compare(teacher, {"student": student}, [make_batch()])
    assert found["teacher"].agreement == 1
    assert found["teacher"].kl == pytest.approx(0, abs=1e-6)
    assert student.training
    assert not teacher.training


def test_padding_rows_of_a_head_do_not_count() -> None:
    teacher, student = make_llama(seed=1), make_llama(hidden_size=8)
    found = compare(teacher, {"student": student}, [make_batch()], vocabulary=300)["student"]
    student.resize_token_embeddings(310, mean_resizing=False)
    sliced = compare(teacher, {"student": student}, [make_batch()], vocabulary=300)["student"]
    assert sliced.loss == pytest.approx(found.loss, rel=1e-5)
    assert sliced.kl == pytest.approx(found.kl, rel=1e-5)


@pytest.mark.parametrize(
    ("losses", "closed"),
    [((2.0, 4.0, 3.0), 0.5), ((2.0, 4.0, 5.0), -0.5), ((2.0, 4.0, 1.0), 1.5), ((4.0, 4.0, 3.0), None)],
)
def test_gap_closed(losses: tuple[float, float, float], closed: float | None) -> None:
    assert gap_closed(*losses) == closed


def test_continuation_is_greedy() -> None:
    model, ids = make_llama(seed=1).eval(), [5, 6, 7]
    expected = list(ids)
    for _ in range(4):
        with torch.no_grad():
            expected.append(int(model(input_ids=torch.tensor([expected])).logits[0, -1].argmax()))
        if expected[-1] == 0:
            break
    assert continuation(model, ids, 4, frozenset({0})) == expected[3:]


def test_speed_and_size(tmp_path: Path) -> None:
    model = make_llama()
    model.save_pretrained(tmp_path)
    assert latency_ms(model, 16, repeats=3) > 0
    assert weight_bytes(tmp_path) >= 4 * model.num_parameters()
    assert weight_bytes(tmp_path / "nowhere") == 0
