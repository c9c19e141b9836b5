"""Quality of a language model on held-out text, and its agreement with the teacher."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from potstill.data.right_padding import right_padded
from potstill.engines.decode import generate_tokens
from potstill.engines.sampling import Sampling
from potstill.losses.alignment import Alignment, Task, align
from potstill.losses.divergences import JSD, ForwardKL
from potstill.losses.targets import DenseTargets
from potstill.losses.token_losses import token_cross_entropy, token_divergence
from potstill.models.split import evaluation_mode, forward_targets, inputs

TOP_K = 10
BINS = 15  # of confidence, as in Guo et al. 2017, arXiv 1706.04599


@dataclass(frozen=True)
class Quality:
    """Means over the target tokens of a held-out set; what compares with a reference is None without one.

    Args:
        loss: cross-entropy with the data, nats per token.
        agreement: share of tokens where the most likely token is the reference's.
        kl: KL(reference || model), nats per token.
        js: Jensen-Shannon divergence from the reference, nats per token, at most log 2.
        top_k_agreement: share of the reference's 10 most likely tokens among the model's own 10.
        ece: expected calibration error: mean gap between confidence and accuracy over 15 bins.
        kl_by_position: mean KL in each bin of `position_edges`; None for an empty bin.
        position_edges: [bins + 1] the first position of each bin, and the end.
    """

    loss: float
    perplexity: float
    agreement: float | None
    kl: float | None
    js: float | None
    top_k_agreement: float | None
    ece: float
    kl_by_position: list[float | None]
    position_edges: list[int]
    tokens: int


class _Sums:
    """Running sums of one model over target tokens, in float64."""

    def __init__(self) -> None:
        self.tokens, self.loss = 0, 0.0
        self.overconfidence, self.distances, self.kl_at, self.count_at = (
            torch.zeros(length, dtype=torch.float64) for length in (BINS, 4, 0, 0)
        )

    def add(self, logits: Tensor, expected: Tensor | None, alignment: Alignment) -> None:
        self.tokens += len(alignment)
        self.loss += float(token_cross_entropy(logits, alignment.labels).cpu().double().sum())
        self.overconfidence += overconfidence(logits, alignment.labels)
        if expected is None:
            return
        distances = {name: values.cpu().double() for name, values in teacher_distances(logits, expected).items()}
        self.distances += torch.stack([values.sum() for values in distances.values()])
        column, longer = alignment.column.cpu(), (0, max(alignment.length - len(self.kl_at), 0))
        self.kl_at = pad(self.kl_at, longer).index_add(0, column, distances["kl"])
        self.count_at = pad(self.count_at, longer).index_add(0, column, torch.ones_like(distances["kl"]))

    def means(self, bins: int) -> Quality:
        count = max(self.tokens, 1)
        positions = max(len(self.kl_at) - 1, 0)  # the last position of a row predicts nothing
        bins = min(bins, max(positions, 1))
        edges = [round(i * positions / bins) for i in range(bins + 1)]
        parts = [(float(self.kl_at[a:b].sum()), float(self.count_at[a:b].sum())) for a, b in pairwise(edges)]
        kl_by_position = [total / tokens if tokens else None for total, tokens in parts]
        kl, js, overlap, agreement = (self.distances / count).tolist() if len(self.kl_at) else [None] * 4
        compared = (agreement, None if kl is None else max(kl, 0.0), js, overlap)
        loss, ece = self.loss / count, float(self.overconfidence.abs().sum()) / count
        return Quality(loss, math.exp(min(loss, 700.0)), *compared, ece, kl_by_position, edges, self.tokens)


@torch.no_grad()
def compare(
    reference: nn.Module | None,
    models: Mapping[str, nn.Module],
    batches: Iterable[Mapping[str, Tensor]],
    *,
    vocabulary: int | None = None,
    bins: int = 16,
    task: Task = "causal",
) -> dict[str, Quality]:
    """Measure models and the reference (the teacher) on the same held-out batches.

    The result is name -> Quality, with the reference itself as "teacher"; without one (None), nothing is compared.

    Args:
        batches: input_ids, attention_mask, labels, [B, T] each; others as for `Distiller.step`.
        vocabulary: compare over the first tokens only; see `LMHead.slice`.
        bins: number of bins for positions.
        task: causal, or masked: then perplexity is the pseudo-perplexity of masked tokens.
    """
    measured = dict(models) if reference is None else {"teacher": reference, **models}
    sums = {name: _Sums() for name in measured}
    with evaluation_mode(*measured.values()):
        for batch in (right_padded(batch, task) for batch in batches):
            alignment = align(batch["labels"], task)
            expected = None
            for name, model in measured.items():  # the reference is the first
                logits = logits_at(model, batch, alignment, vocabulary)
                expected = logits if model is reference else expected
                sums[name].add(logits, expected, alignment)
    return {name: model_sums.means(bins) for name, model_sums in sums.items()}


def logits_at(model: Any, batch: Mapping[str, Tensor], alignment: Alignment, vocabulary: int | None) -> Tensor:
    """Compute a model's logits [N, V] at the target positions, float32, on the batch's device."""
    targets = forward_targets(model, None, inputs(batch, next(model.parameters()).device), alignment)
    return targets.dense()[:, :vocabulary].float().to(batch["labels"].device)


def teacher_distances(logits: Tensor, expected: Tensor) -> dict[str, Tensor]:
    """Compare logits [N, V] with the teacher's: [N] kl, js, overlap (of the most likely tokens) and agreement."""
    targets, k = DenseTargets(expected), min(TOP_K, logits.shape[-1])
    top, expected_top = (values.topk(k, -1).indices for values in (logits, expected))
    return {
        "kl": token_divergence(logits, targets, ForwardKL()),
        "js": token_divergence(logits, targets, JSD(0.5)),
        "overlap": (top[:, :, None] == expected_top[:, None, :]).any(1).cpu().double().mean(-1),
        "agreement": logits.argmax(-1) == expected.argmax(-1),
    }


def overconfidence(logits: Tensor, labels: Tensor) -> Tensor:
    """Compute [BINS] sums of confidence minus accuracy, by bin of confidence.

    The sum of absolute values over the number of positions is the expected calibration error.
    """
    confidence, predicted = (values.cpu() for values in logits.softmax(-1).max(-1))
    excess = confidence.double() - (predicted == labels.cpu()).double()
    bins = (confidence * BINS).long().clamp_max(BINS - 1)
    return torch.zeros(BINS, dtype=torch.float64).index_add_(0, bins, excess)


def gap_closed(teacher: float, baseline: float, student: float) -> float | None:
    """Compute the share of the gap in held-out loss that distillation closes.

        (baseline - student) / (baseline - teacher)

    1 is the teacher's loss, 0 that of the same student trained on labels alone, below 0 is worse; None if the teacher
    is no better than the baseline.
    """
    return (baseline - student) / (baseline - teacher) if baseline > teacher else None


def continuation(model: Any, prompt: list[int], new_tokens: int, ends: frozenset[int]) -> list[int]:
    """Continue a prompt of token ids greedily by at most `new_tokens`, and return the new ones, with the end token."""
    sampling = Sampling(max_new_tokens=new_tokens, sampling_temperature=0)
    return generate_tokens(model, [prompt], sampling, eos_ids=ends)[0].ids
