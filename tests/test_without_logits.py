"""Training from hidden states and heads is the training from logits, without the logits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from conftest import make_batch, make_llama
from potstill.evaluate.quality import compare
from potstill.losses.alignment import target_positions
from potstill.losses.divergences import JSD, ForwardKL, ReverseKL
from potstill.losses.fused_linear import linear_divergence
from potstill.train.distiller import Distiller
from potstill.train.terms.logits import Labels, Logits
from potstill.train.trainer import DistillationTrainer
from test_trainer import CHECKPOINTING, losses, trainer, weights


@pytest.fixture
def whole(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Call it, and from then on no model is cut: student and teacher give whole logits."""

    def keep_whole() -> None:
        for module in ("potstill.train.distiller", "potstill.teachers.model"):
            monkeypatch.setattr(f"{module}.split_model", lambda model: None)

    return keep_whole


@pytest.mark.parametrize(
    ("changes", "tolerance"),
    [
        ({}, 1e-5),
        ({"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4}, 1e-5),
        ({"bf16": True}, 2e-2),
        ({"student": {"vocab_size": 310}, "vocabulary": 300}, 1e-5),
        ({"student": {"tie_word_embeddings": True}}, 1e-5),
        ({CHECKPOINTING: True}, 1e-5),
    ],
    ids=str,
)
def test_without_logits_it_is_the_same_training(
    tmp_path: Path, whole: Callable[[], None], changes: dict[str, Any], tolerance: float
) -> None:
    def train(name: str) -> DistillationTrainer:
        student = make_llama(**{"hidden_size": 8, "layers": 1, **changes.get("student", {})})
        one = trainer(
            tmp_path / name, max_steps=4, optim="sgd", **{**changes, "student": student, "learning_rate": 0.5}
        )
        one.train()
        return one

    fused = train("fused")
    whole()
    eager = train("whole")
    assert fused.distiller.split is not None
    assert eager.distiller.split is None
    assert losses(fused) == pytest.approx(losses(eager), rel=tolerance)
    torch.testing.assert_close(weights(fused), weights(eager), rtol=tolerance, atol=tolerance)
    measured, expected = fused.evaluate(), eager.evaluate()
    for name in ("eval_loss", "eval_logits", "eval_labels", "eval_cross_entropy"):
        assert measured[name] == pytest.approx(expected[name], rel=tolerance)


@pytest.mark.parametrize(
    ("objective", "in_training", "in_evaluation"),
    [
        ([Logits(ForwardKL(), temperature=2.0), Labels(weight=0.5)], 1, 1),
        ([Labels(weight=0.5), Logits(ReverseKL(), weight=0.1)], 1, 1),
        ([Logits(ForwardKL()), Labels(weight=0.0)], 1, 1),
        ([Logits(ForwardKL())], 1, 1),
        ([Labels()], 1, 1),
        ([Logits(ForwardKL()), Labels(weight=0.5), Logits(ReverseKL()), Labels(weight=2.0)], 3, 3),
        ([Logits(ForwardKL(), weight=0.0), Labels(weight=0.5)], 2, 2),
        ([Logits(ForwardKL(), weight=1e-6), Labels()], 2, 2),
    ],
)
def test_terms_share_one_pass_through_the_head(
    monkeypatch: pytest.MonkeyPatch,
    whole: Callable[[], None],
    objective: list[Any],
    in_training: int,
    in_evaluation: int,
) -> None:
    passes = []

    def counted(*args: Any, **options: Any) -> Any:
        passes.append(args)
        return linear_divergence(*args, **options)

    monkeypatch.setattr("potstill.train.signals.linear_divergence", counted)
    batch, found = make_batch(), []
    for keep in (lambda: None, whole):
        keep()
        distiller = Distiller(make_llama(hidden_size=8), make_llama(seed=1), objective)
        output = distiller.step(batch)
        output.loss.backward()
        gradient = torch.cat([p.grad.flatten() for p in distiller.parameters()])
        distiller.eval()
        found.append((output.loss.detach(), output.logs, gradient, distiller.step(batch).logs))
        if keep is not whole:
            assert len(passes) == in_training + in_evaluation
    assert len(passes) == in_training + in_evaluation
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)
    assert {"cross_entropy", *found[0][1]} == set(found[0][3])


class Largest(TorchDispatchMode):
    """Notes the largest tensor that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        for each in made if isinstance(made, list | tuple) else [made]:
            if isinstance(each, torch.Tensor):
                self.elements = max(self.elements, each.numel())
        return made


def test_no_logits_are_built(monkeypatch: pytest.MonkeyPatch, whole: Callable[[], None]) -> None:
    V = 4000
    monkeypatch.setattr("potstill.losses.fused_chunks.CPU_LEAST", 0)
    monkeypatch.setattr("potstill.losses.fused_chunks.CPU_BYTES", 2 * 4 * V * 8)  # eight tokens at a time
    batch = make_batch(rows=8, length=32, vocab_size=V)
    logits = int(target_positions(batch["labels"]).sum()) * V

    def largest() -> int:
        student, teacher = make_llama(V, hidden_size=8), make_llama(V, seed=1)
        distiller = Distiller(student, teacher, [Logits(JSD(), temperature=2.0), Labels(weight=0.5)])
        distiller.step(batch)  # the teacher's probe, and what is compiled once
        with Largest() as seen:
            distiller.step(batch).loss.backward()
            distiller.eval()
            distiller.step(batch)
        return seen.elements

    assert largest() < logits / 4
    whole()
    assert largest() >= logits


@pytest.mark.filterwarnings("ignore")  # torch's own
def test_the_distiller_may_be_compiled() -> None:
    def steps(compiled: bool) -> list[float]:
        distiller = Distiller(make_llama(hidden_size=8, layers=1), make_llama(seed=1), [Logits(ForwardKL()), Labels()])
        step = torch.compile(distiller, backend="eager") if compiled else distiller
        optimizer, seen = torch.optim.SGD(distiller.parameters(), lr=0.5), []
        for at in range(2):
            loss = step(make_batch(), at=at).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            seen.append(loss.item())
        assert distiller.split is not None
        return seen

    assert steps(compiled=True) == pytest.approx(steps(compiled=False), rel=1e-5)


@pytest.mark.parametrize("padded", [False, True])
def test_an_evaluation_builds_logits_of_some_positions_at_a_time(monkeypatch: pytest.MonkeyPatch, padded: bool) -> None:
    """A batch of long rows times a large vocabulary is gigabytes for each model, more than the training needed."""
    V, at_once = 4000, 16
    monkeypatch.setattr("potstill.evaluate.quality.ELEMENTS", at_once * (V + 8 * padded))
    batch = make_batch(rows=8, length=32, vocab_size=V)
    teacher, student = make_llama(V + 8 * padded, seed=1), make_llama(V, hidden_size=8)

    def measured() -> Any:
        return compare(teacher, {"student": student}, [batch], vocabulary=V)

    in_parts = measured()
    with Largest() as seen:
        measured()
    assert seen.elements <= max(at_once * (V + 8 * padded), teacher.lm_head.weight.numel())
    assert seen.elements < int(target_positions(batch["labels"]).sum()) * V / 2
    monkeypatch.setattr("potstill.evaluate.quality.ELEMENTS", 2**30)
    monkeypatch.setattr("potstill.evaluate.quality.split_model", lambda model: None)
    for name, expected in measured().items():
        for key, value in vars(expected).items():
            assert getattr(in_parts[name], key) == pytest.approx(value, rel=1e-5, abs=1e-6)
