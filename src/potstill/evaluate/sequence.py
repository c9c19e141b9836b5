"""Quality of models with one output per row (classes, numbers, embeddings), and `measure` for every task."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from potstill.evaluate.quality import Quality, compare, overconfidence, teacher_distances
from potstill.evaluate.space import SpaceEvaluator, pearson, ranks
from potstill.losses.alignment import TOKEN_TASKS, Alignment, Task, align
from potstill.losses.embedding import similarity_error
from potstill.losses.token_losses import label_loss
from potstill.models.split import evaluation_mode, forward_targets, inputs, run


@dataclass(frozen=True)
class ClassificationQuality:
    """Means over the rows of a held-out set; what compares with a reference is None without one."""

    loss: float  # cross-entropy with the data's classes, nats per row
    accuracy: float  # share of rows whose most likely class is right
    f1_macro: float  # mean of 2 tp / (2 tp + fp + fn) over the classes that occur
    agreement: float | None  # share of rows where the most likely class is the reference's
    kl: float | None  # KL(reference || model), nats per row
    js: float | None  # Jensen-Shannon divergence from the reference
    ece: float  # expected calibration error, see `Quality`
    rows: int


@dataclass(frozen=True)
class RegressionQuality:
    """Errors and correlations over the rows of a held-out set."""

    loss: float  # mean squared error
    pearson: float  # correlation with the data's numbers
    spearman: float  # rank correlation with them
    to_teacher: float | None  # mean squared distance from the reference's numbers; None without a reference
    rows: int


@dataclass(frozen=True)
class EncoderQuality:
    """Similarity of an encoder's space to the reference's; a row's vector is the mean of its last hidden states."""

    loss: float  # mean squared difference of the cosines of all pairs of rows
    all_pairs: float  # Spearman's correlation of these cosines
    recall: float  # share of the reference's 10 nearest rows that are the model's too
    rows: int  # number of compared rows; evenly spaced if there are many


AnyQuality = Quality | ClassificationQuality | RegressionQuality | EncoderQuality


def measure(
    task: Task,
    reference: nn.Module | None,
    models: Mapping[str, nn.Module],
    batches: Iterable[Mapping[str, Tensor]],
    *,
    vocabulary: int | None = None,
) -> Mapping[str, AnyQuality]:
    """Measure models and the reference (the teacher) on the same held-out batches of any task; see `compare`."""
    if task in TOKEN_TASKS:
        return compare(reference, models, batches, vocabulary=vocabulary, task=task)
    measured = dict(models) if reference is None else {"teacher": reference, **models}
    parts: dict[str, list[Tensor]] = {name: [] for name in measured}
    label_parts = []
    with torch.no_grad(), evaluation_mode(*measured.values()):
        for batch in batches:
            alignment = align(batch["labels"], task)
            label_parts.append(alignment.labels)
            for name, model in measured.items():
                parts[name].append(_outputs(model, batch, alignment, task).float().cpu())
    outputs, labels = {name: torch.cat(tensors) for name, tensors in parts.items()}, torch.cat(label_parts)
    expected = outputs.get("teacher") if reference is not None else None
    if task == "encoder":
        assert expected is not None, "an encoder's teacher is a model"
        evaluator = SpaceEvaluator(expected)
        return {name: _encoder(vectors, expected, evaluator) for name, vectors in outputs.items()}
    quality = _classification if task == "classification" else _regression
    return {name: quality(values, expected, labels) for name, values in outputs.items()}


def _outputs(model: Any, batch: Mapping[str, Tensor], alignment: Alignment, task: Task) -> Tensor:
    """Logits of each labelled row, or the mean of its last hidden states."""
    batch = inputs(batch, next(model.parameters()).device)
    if task != "encoder":
        return forward_targets(model, None, batch, alignment).dense()
    mask = batch["attention_mask"].unsqueeze(-1)
    means: Tensor = (run(model, batch).last_hidden_state * mask).sum(1) / mask.sum(1)
    return means[alignment.positions.to(means.device)]


def _classification(logits: Tensor, expected: Tensor | None, labels: Tensor) -> ClassificationQuality:
    predicted = logits.argmax(-1)
    right, true, chosen = (
        torch.bincount(classes, minlength=logits.shape[-1])
        for classes in (labels[predicted == labels], labels, predicted)
    )
    either = true + chosen
    present = either > 0
    distances = {} if expected is None else teacher_distances(logits, expected)
    agreement, kl, js = (
        float(distances[key].double().mean()) if distances else None for key in ("agreement", "kl", "js")
    )
    f1_by_class = 2 * right[present].double() / either[present]
    means = (values.double().mean() for values in (label_loss(logits, labels), predicted == labels, f1_by_class))
    ece = float(overconfidence(logits, labels).abs().sum()) / max(len(labels), 1)
    loss, accuracy, f1_macro = map(float, means)
    return ClassificationQuality(loss, accuracy, f1_macro, agreement, kl, js, ece, len(labels))


def _regression(values: Tensor, expected: Tensor | None, labels: Tensor) -> RegressionQuality:
    predicted, labels = values.squeeze(-1).double(), labels.double()
    loss = float((predicted - labels).square().mean())
    to_teacher = None if expected is None else float((predicted - expected.squeeze(-1).double()).square().mean())
    correlations = pearson(predicted, labels), pearson(ranks(predicted), ranks(labels))
    return RegressionQuality(loss, *correlations, to_teacher, len(labels))


def _encoder(vectors: Tensor, expected: Tensor, evaluator: SpaceEvaluator) -> EncoderQuality:
    scores, chosen = evaluator(vectors), evaluator.chosen
    loss = float(similarity_error(vectors[chosen], expected[chosen]))
    return EncoderQuality(loss, scores.all_pairs, scores.recall, len(chosen))
