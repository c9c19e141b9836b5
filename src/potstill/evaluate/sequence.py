"""How good a model is where rows are judged as a whole, and how like its teacher."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from potstill.evaluate.correlation import pearson, ranks
from potstill.evaluate.quality import Quality, compare, overconfidence
from potstill.evaluate.space import SpaceEvaluator
from potstill.losses.alignment import TOKEN_TASKS, Alignment, Task, align
from potstill.losses.divergences import JSD, ForwardKL
from potstill.losses.embedding import similarity_error
from potstill.losses.targets import DenseTargets
from potstill.losses.token_losses import label_loss, token_divergence
from potstill.models.split import forward_targets, inputs, run


@dataclass(frozen=True)
class ClassQuality:
    """Means over the rows of a held-out set, for classification.

    Args:
        loss: cross-entropy with the data's classes, nats a row.
        accuracy: share of rows whose likeliest class is right.
        f1_macro: the mean over the classes that there are of 2 tp / (2 tp + fp + fn).
        agreement: share of rows where the likeliest class is the reference's; None without a reference.
        kl: KL(reference || model), nats a row; None without a reference.
        js: Jensen-Shannon divergence between both; None without a reference.
        ece: expected calibration error, see `Quality`.
        rows: how many counted.
    """

    loss: float
    accuracy: float
    f1_macro: float
    agreement: float | None
    kl: float | None
    js: float | None
    ece: float
    rows: int


@dataclass(frozen=True)
class NumberQuality:
    """The same for regression.

    Args:
        loss: the mean squared error.
        pearson: correlation with the data's numbers.
        spearman: correlation of the ranks of both.
        to_teacher: the mean squared distance from the reference's numbers; None without a reference.
        rows: how many counted.
    """

    loss: float
    pearson: float
    spearman: float
    to_teacher: float | None
    rows: int


@dataclass(frozen=True)
class SpaceQuality:
    """How much of the reference's space an encoder keeps: of rows by the means of their last hidden states.

    Args:
        loss: the mean squared difference of the cosines of all pairs of rows.
        all_pairs: Spearman's correlation of these cosines.
        recall: the share of the reference's 10 nearest rows that are the model's too.
        rows: how many were compared; of many an even spread.
    """

    loss: float
    all_pairs: float
    recall: float
    rows: int


Measured = Quality | ClassQuality | NumberQuality | SpaceQuality


def measure(
    task: Task,
    reference: nn.Module | None,
    models: Mapping[str, nn.Module],
    batches: Iterable[Mapping[str, Tensor]],
    *,
    vocabulary: int | None = None,
) -> Mapping[str, Measured]:
    """Measure models and the reference (the teacher) on the same held-out batches, by what they are asked for.

    Args:
        task: see `potstill.losses.alignment.Task`.
        reference: with which the others are compared; None where there is no such model here.
        models: name -> model.
        batches: as the collator makes them.
        vocabulary: see `compare`.

    Returns:
        name -> what was measured, with the reference itself as "teacher".
    """
    if task in TOKEN_TASKS:
        return compare(reference, models, batches, vocabulary=vocabulary, task=task)
    everyone = dict(models) if reference is None else {"teacher": reference, **models}
    said: dict[str, list[Tensor]] = {name: [] for name in everyone}
    labels: list[Tensor] = []
    was_training = {name: model.training for name, model in everyone.items()}
    for model in everyone.values():
        model.eval()
    with torch.no_grad():
        for batch in batches:
            alignment = align(batch["labels"], task)
            labels.append(alignment.labels)
            for name, model in everyone.items():
                said[name].append(_said(model, batch, alignment, task).float().cpu())
    for name, model in everyone.items():
        model.train(was_training[name])
    whole, wanted = {name: torch.cat(parts) for name, parts in said.items()}, torch.cat(labels)
    expected = None if reference is None else whole["teacher"]
    if task == "encoder":
        assert expected is not None, "an encoder's teacher is a model"
        judge = SpaceEvaluator(expected)
        return {name: _space(each, expected, judge) for name, each in whole.items()}
    of = _classes if task == "classification" else _numbers
    return {name: of(each, expected, wanted) for name, each in whole.items()}


def _said(model: Any, batch: Mapping[str, Tensor], alignment: Alignment, task: Task) -> Tensor:
    """What a model says of each row that counts: logits, or the mean of its last hidden states."""
    there = inputs(batch, next(model.parameters()).device)
    if task != "encoder":
        return forward_targets(model, None, there, alignment).dense()
    mask = there["attention_mask"].unsqueeze(-1)
    means: Tensor = (run(model, there).last_hidden_state * mask).sum(1) / mask.sum(1)
    return means[alignment.positions.to(means.device)]


def _classes(logits: Tensor, expected: Tensor | None, labels: Tensor) -> ClassQuality:
    chosen = logits.argmax(-1)
    counts = logits.shape[-1]
    hit = torch.bincount(labels[chosen == labels], minlength=counts)
    either = torch.bincount(labels, minlength=counts) + torch.bincount(chosen, minlength=counts)
    there = either > 0
    kl = js = agreement = None
    if expected is not None:
        targets = DenseTargets(expected)
        kl = float(token_divergence(logits, targets, ForwardKL()).double().mean())
        js = float(token_divergence(logits, targets, JSD(0.5)).double().mean())
        agreement = float((chosen == expected.argmax(-1)).double().mean())
    return ClassQuality(
        loss=float(label_loss(logits, labels).double().mean()),
        accuracy=float((chosen == labels).double().mean()),
        f1_macro=float((2 * hit[there].double() / either[there]).mean()),
        agreement=agreement,
        kl=kl,
        js=js,
        ece=float(overconfidence(logits, labels).abs().sum()) / max(len(labels), 1),
        rows=len(labels),
    )


def _numbers(values: Tensor, expected: Tensor | None, labels: Tensor) -> NumberQuality:
    said, wanted = values.squeeze(-1).double(), labels.double()
    return NumberQuality(
        loss=float((said - wanted).square().mean()),
        pearson=pearson(said, wanted),
        spearman=pearson(ranks(said), ranks(wanted)),
        to_teacher=None if expected is None else float((said - expected.squeeze(-1).double()).square().mean()),
        rows=len(labels),
    )


def _space(vectors: Tensor, expected: Tensor, judge: SpaceEvaluator) -> SpaceQuality:
    kept, chosen = judge(vectors), judge.chosen
    return SpaceQuality(
        loss=float(similarity_error(vectors[chosen], expected[chosen])),
        all_pairs=kept.all_pairs,
        recall=kept.recall,
        rows=len(chosen),
    )
