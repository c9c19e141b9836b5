"""What models compute for a task: target positions, heads that are split off, terms that make sense."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from potstill.data.batches import PaddingCollator
from potstill.errors import ShapeError
from potstill.losses.alignment import IGNORE, align, attended_positions, target_positions
from potstill.losses.divergences import ForwardKL
from potstill.losses.targets import DenseTargets, HeadTargets
from potstill.models.layer_map import LayerMap
from potstill.models.split import forward_targets, split_model
from potstill.train.distiller import Distiller
from potstill.train.terms.dense import Values
from potstill.train.terms.layers import Attention, Hidden, Relations, Similarity
from potstill.train.terms.logits import Labels, Logits
from toy_encoders import VOCABULARY, make_encoder

MASKED = ("bert", "distilbert", "roberta", "modernbert")


def make_rows(task: str, rows: int = 6, seed: int = 0, typed: bool = True) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)
    made = []
    for i in range(rows):
        length = int(torch.randint(4, 12, (1,), generator=generator))
        ids = torch.randint(5, VOCABULARY, (length,), generator=generator).tolist()
        labels: Any = {"classification": i % 3, "regression": i / 2, "encoder": 0}.get(task)
        if task == "masked":
            labels = [IGNORE] * length
            labels[1], labels[-1] = ids[1], ids[-1]
            ids[1] = 4
        kinds = {"token_type_ids": [0] * 2 + [1] * (length - 2)} if typed and task == "classification" else {}
        made.append({"input_ids": ids, "labels": labels, **kinds})
    return made


def make_batch(task: str, **options: Any) -> dict[str, Tensor]:
    return PaddingCollator(0)(make_rows(task, **options))


# Which positions count


def test_positions_of_each_task() -> None:
    labels = torch.tensor([[5, IGNORE, 7], [IGNORE, IGNORE, 9]])
    causal = align(labels)
    assert causal.positions.tolist() == [1, 4] and causal.labels.tolist() == [7, 9]
    masked = align(labels, "masked")
    assert masked.positions.tolist() == [0, 2, 5] and masked.labels.tolist() == [5, 7, 9]
    assert masked.column.tolist() == [0, 2, 2]
    classes = align(torch.tensor([2, IGNORE, 0]), "classification")
    assert classes.positions.tolist() == [0, 2] and classes.labels.tolist() == [2, 0]
    numbers = align(torch.tensor([-100.0, math.nan, 0.5]), "regression")
    assert numbers.positions.tolist() == [0, 2] and numbers.labels.tolist() == [-100.0, 0.5]
    assert len(align(torch.tensor([0, IGNORE]), "encoder")) == 1


def test_rows_that_do_not_count_are_not_attended_to() -> None:
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    for task, labels in (
        ("classification", torch.tensor([1, IGNORE])),
        ("regression", torch.tensor([1.0, math.nan])),
        ("masked", torch.tensor([[3, IGNORE, IGNORE], [IGNORE] * 3])),
    ):
        attended = attended_positions({"attention_mask": mask, "labels": labels}, task)
        assert attended.tolist() == [[True, True, False], [False] * 3]
        assert int(target_positions(labels, task).sum()) == 1


# Heads


@pytest.mark.parametrize("kind", MASKED)
def test_a_masked_head_is_split_off_with_the_same_logits(kind: str) -> None:
    model, batch = make_encoder(kind, "masked").eval(), make_batch("masked")
    alignment = align(batch["labels"], "masked")
    found = split_model(model)
    assert found is not None
    targets, whole = forward_targets(model, found, batch, alignment), forward_targets(model, None, batch, alignment)
    assert isinstance(targets, HeadTargets) and isinstance(whole, DenseTargets)
    torch.testing.assert_close(targets.dense(), whole.dense(), rtol=1e-4, atol=1e-5)


def test_what_stands_between_is_proven() -> None:
    model = make_encoder("bert", "masked")
    transform = model.cls.predictions.transform
    model.cls.predictions.transform.forward = lambda states: 2 * type(transform).forward(transform, states)
    assert split_model(model) is not None, "the module itself decides"
    model = make_encoder("distilbert", "masked")
    model.activation = torch.nn.Sequential(model.activation, torch.nn.Linear(16, 16))  # trained, and used by both
    assert split_model(model) is not None
    model.extra = torch.nn.Linear(2, 2)
    assert split_model(model) is not None, "it takes no part"
    forward = model.forward

    def with_extra(*args: Any, **inputs: Any) -> Any:
        output = forward(*args, **inputs)
        output.logits = output.logits + 0 * model.extra.weight.sum()
        return output

    model.forward = with_extra
    assert split_model(model) is None, "it trains parameters beside"


def test_classifiers_and_encoders_stay_whole() -> None:
    for task in ("classification", "encoder"):
        assert split_model(make_encoder("bert", task)) is None
    batch = make_batch("encoder")
    targets = forward_targets(make_encoder("bert", "encoder"), None, batch, align(batch["labels"], "encoder"))
    assert targets.dense().shape == (6, 0)


def test_types_of_tokens_go_to_models_that_have_them() -> None:
    batch = make_batch("classification")
    plain = {name: value for name, value in batch.items() if name != "token_type_ids"}
    for kind, differs in (("bert", True), ("roberta", False), ("distilbert", False)):
        model = make_encoder(kind, "classification").eval()
        alignment = align(batch["labels"], "classification")
        one, other = (forward_targets(model, None, each, alignment).dense() for each in (batch, plain))
        assert torch.equal(one, other) is not differs


# Steps


def float64_of(model: Any, batch: dict[str, Tensor]) -> Tensor:
    kinds = {"token_type_ids": batch["token_type_ids"]} if "token_type_ids" in batch else {}
    return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], **kinds).logits.double()


@pytest.mark.parametrize("kind", ["bert", "distilbert", "roberta"])
def test_masked_loss_is_the_formula_at_the_masks(kind: str) -> None:
    student, teacher = (make_encoder(kind, "masked", seed).eval() for seed in (0, 1))
    batch = make_batch("masked")
    terms = [Logits(ForwardKL(), temperature=2.0), Labels(weight=0.5)]
    output = Distiller(student, teacher, terms, task="masked").step(batch)
    total = torch.zeros((), dtype=torch.float64)
    z, t = float64_of(student, batch), float64_of(teacher, batch)
    places = (batch["labels"] != IGNORE).nonzero().tolist()
    for row, column in places:
        p, log_p = (t[row, column] / 2).softmax(-1), (t[row, column] / 2).log_softmax(-1)
        total += 4 * (p * (log_p - (z[row, column] / 2).log_softmax(-1))).sum()
        total -= 0.5 * z[row, column].log_softmax(-1)[batch["labels"][row, column]]
    assert output.loss.item() == pytest.approx(total.item() / len(places), rel=1e-4)


def test_classes_and_numbers_are_the_formula() -> None:
    student, teacher = (make_encoder("bert", "classification", seed).eval() for seed in (0, 1))
    batch = make_batch("classification")
    distiller = Distiller(student, teacher, [Logits(ForwardKL()), Labels()], task="classification").eval()
    z, t = float64_of(student, batch), float64_of(teacher, batch)
    kl = (t.softmax(-1) * (t.log_softmax(-1) - z.log_softmax(-1))).sum(-1).mean()
    entropy = -z.log_softmax(-1)[torch.arange(6), batch["labels"]].mean()
    output = distiller(batch)
    assert output.loss.item() == pytest.approx((kl + entropy).item(), rel=1e-4)
    assert output.logs["cross_entropy"].item() == pytest.approx(entropy.item(), rel=1e-4)

    student, teacher = (make_encoder("bert", "regression", seed).eval() for seed in (0, 1))
    batch = make_batch("regression")
    output = Distiller(student, teacher, [Values(weight=2.0), Labels()], task="regression").eval()(batch)
    z, t = float64_of(student, batch)[:, 0], float64_of(teacher, batch)[:, 0]
    error = (z - batch["labels"]).square().mean()
    assert output.loss.item() == pytest.approx((2 * (z - t).square().mean() + error).item(), rel=1e-4)
    assert output.logs["squared_error"].item() == pytest.approx(error.item(), rel=1e-4)


TERMS: dict[str, list[Any]] = {
    "masked": [Logits(ForwardKL()), Labels(), Values(weight=0.1)],
    "classification": [Logits(ForwardKL(), temperature=3.0), Labels()],
    "regression": [Values(), Labels()],
    "encoder": [],
}


@pytest.mark.parametrize("task", TERMS)
def test_parts_of_a_batch_add_up_to_the_whole(task: str) -> None:
    inside = [Hidden(LayerMap.uniform(), "cosine"), Attention(LayerMap.last_k(1)), Relations(LayerMap.last_k(1))]
    student, teacher = make_encoder("bert", task, num_hidden_layers=2), make_encoder("bert", task, seed=1)
    distiller = Distiller(student, teacher, [*TERMS[task], *inside], task=task)
    rows = make_rows(task, rows=6)
    whole = PaddingCollator(0)(rows)
    distiller(whole).loss.backward()
    expected = {name: one.grad.clone() for name, one in distiller.named_parameters() if one.grad is not None}
    distiller.zero_grad()
    tokens, there = target_positions(whole["labels"], task).sum(), attended_positions(whole, task).sum()
    for part in (rows[:1], rows[1:4], rows[4:]):
        distiller(PaddingCollator(0)(part), normalizer=tokens, attended_normalizer=there).loss.backward()
    assert expected
    for name, one in distiller.named_parameters():
        if name in expected:
            torch.testing.assert_close(one.grad, expected[name], rtol=1e-3, atol=1e-5, msg=name)


def test_fused_and_whole_heads_give_one_gradient() -> None:
    batch = make_batch("masked")
    gradients = []
    for fused in (True, False):
        distiller = Distiller(
            make_encoder("distilbert", "masked"),
            make_encoder("distilbert", "masked", seed=1),
            [Logits(ForwardKL(), temperature=2.0), Labels(weight=0.3)],
            task="masked",
        )
        assert distiller.split is not None
        distiller.split = distiller.split if fused else None
        distiller.step(batch).loss.backward()
        gradients.append({name: one.grad for name, one in distiller.named_parameters()})
    assert any("vocab_transform" in name for name in gradients[0])
    for name, one in gradients[0].items():
        torch.testing.assert_close(one, gradients[1][name], rtol=1e-3, atol=1e-6, msg=name)


def test_any_objective_on_an_encoder_learns() -> None:
    student, teacher = make_encoder("bert", "encoder", num_hidden_layers=2), make_encoder("bert", "encoder", seed=1)
    terms = [Hidden(LayerMap.skip(2)), Similarity(kind="angle"), Relations(), Attention(LayerMap.last_k(1))]
    distiller = Distiller(student, teacher, terms, task="encoder")
    optimizer = torch.optim.Adam(distiller.parameters(), lr=1e-2)
    losses = []
    for _ in range(8):
        loss = distiller.step(make_batch("encoder")).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert "cross_entropy" not in distiller.eval()(make_batch("encoder")).logs


# What makes no sense


@pytest.mark.parametrize(
    ("task", "term", "message"),
    [
        ("regression", Logits(ForwardKL()), "Use values for the teacher's number"),
        ("encoder", Labels(), "Use terms over layers"),
        ("encoder", Values(), "Use terms over layers"),
    ],
)
def test_terms_that_make_no_sense_are_refused(task: Any, term: Any, message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        Distiller(make_encoder("bert", task), make_encoder("bert", task), [term], task=task)
