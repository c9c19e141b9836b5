"""Objectives that hardly pull at a student far from its teacher are reported before the training."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset

from conftest import make_llama
from potstill import ForwardKL, Labels, Logits, ReverseKL, SkewReverseKL
from potstill.losses.schedule import Linear
from potstill.losses.targets import DenseTargets
from potstill.runs import start
from potstill.runs.start import weak_gradient

ROWS = [
    {"input_ids": ids, "labels": ids, "attention_mask": [1] * 12}
    for ids in (torch.randint(300, (4, 12), generator=torch.Generator().manual_seed(0)).tolist())
]


def built(*terms: Any, task: str = "causal", whole: bool = False) -> Any:
    """A run whose teacher is sure of the right tokens."""

    def teacher(batch: Any, alignment: Any) -> Any:
        logits = 20.0 * torch.nn.functional.one_hot(alignment.labels, 300).float()
        return SimpleNamespace(targets=DenseTargets(logits))

    return SimpleNamespace(
        objective=SimpleNamespace(terms=terms),
        recipe=SimpleNamespace(task=task),
        needs_whole_rows=whole,
        train=SimpleNamespace(dataset=Dataset.from_list(ROWS)),
        tokenizer=SimpleNamespace(pad_token_id=0, padding_side="right"),
        teacher=teacher,
        vocabulary=300,
    )


@pytest.fixture(autouse=True)
def batches(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {name: torch.tensor([row[name] for row in ROWS]) for name in ROWS[0]}
    monkeypatch.setattr(start, "in_batches", lambda *_: [tensors])


def far_student() -> Any:
    """A student that is sure of other tokens."""
    student = make_llama()
    with torch.no_grad():
        student.lm_head.weight.mul_(200.0)
    return student


@pytest.mark.parametrize(
    "term",
    [Logits(SkewReverseKL(0.1)), Logits(SkewReverseKL(0.1), temperature=2.0, weight=5.0), Logits(ReverseKL())],
)
def test_a_flat_divergence_is_reported(term: Any) -> None:
    note = weak_gradient(built(term), far_student())
    assert note is not None
    assert "learns slowly from this start" in note
    assert "labels" in note


@pytest.mark.parametrize(
    "terms",
    [
        [Logits(ForwardKL())],
        [Logits(SkewReverseKL(0.1), weight=0.5), Labels(weight=0.5)],
        [Logits(SkewReverseKL(0.1)), Logits(ForwardKL())],
        [
            Logits(SkewReverseKL(0.1), weight=Linear(0.0, 1.0, steps=10)),
            Logits(ForwardKL(), weight=Linear(1.0, 0.0, steps=10)),
        ],
        [Labels()],
    ],
)
def test_an_objective_that_pulls_is_not(terms: list[Any]) -> None:
    assert weak_gradient(built(*terms), far_student()) is None


def test_a_student_near_its_teacher_is_not() -> None:
    near = make_llama()
    run = built(Logits(SkewReverseKL(0.1)))
    run.teacher = lambda batch, alignment: SimpleNamespace(
        targets=DenseTargets(alignment.select(near(batch["input_ids"]).logits) + 0.1 * torch.randn(len(alignment), 300))
    )
    assert weak_gradient(run, near) is None


def test_only_tokens_are_looked_at() -> None:
    term = Logits(SkewReverseKL(0.1))
    assert weak_gradient(built(term, task="classification"), far_student()) is None
    assert weak_gradient(built(term, whole=True), far_student()) is None
