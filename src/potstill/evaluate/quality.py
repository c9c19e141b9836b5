"""Quality of a language model on held-out text, and its agreement with the teacher."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
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
from potstill.losses.targets import DenseTargets, HeadTargets, MixtureTargets
from potstill.losses.token_losses import token_cross_entropy, token_divergence
from potstill.models.split import SplitModel, evaluation_mode, forward_targets, inputs, split_model

TOP_K = 10
ELEMENTS = 2**25  # logits of a model that exist at a time
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
        difference_errors: by other models, standard errors of the differences between their losses and this one's, for
            rows drawn at random; none for a single row.
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
    difference_errors: dict[str, float]


class _Sums:
    """Running sums of one model over target tokens, in float64."""

    def __init__(self) -> None:
        self.tokens = 0
        self.overconfidence, self.distances, self.kl_at, self.count_at, self.losses = (
            torch.zeros(length, dtype=torch.float64) for length in (BINS, 4, 0, 0, 0)
        )

    def add(
        self,
        logits: Tensor,
        expected: Tensor | None,
        labels: Tensor,
        row: Tensor,
        column: Tensor,
        length: int,
    ) -> None:
        """Add positions with logits [C, V] of the model and of the reference; `column` are their places in rows."""
        self.tokens += len(labels)
        more = (0, max(int(row.max()) + 1 - len(self.losses), 0))
        self.losses = pad(self.losses, more).index_add(0, row, token_cross_entropy(logits, labels).cpu().double())
        self.overconfidence += overconfidence(logits, labels)
        if expected is None:
            return
        distances = {name: values.cpu().double() for name, values in teacher_distances(logits, expected).items()}
        self.distances += torch.stack([values.sum() for values in distances.values()])
        longer = (0, max(length - len(self.kl_at), 0))
        self.kl_at = pad(self.kl_at, longer).index_add(0, column, distances["kl"])
        self.count_at = pad(self.count_at, longer).index_add(0, column, torch.ones_like(distances["kl"]))

    def means(self, bins: int, errors: dict[str, float]) -> Quality:
        count = max(self.tokens, 1)
        positions = max(len(self.kl_at) - 1, 0)  # the last position of a row predicts nothing
        bins = min(bins, max(positions, 1))
        edges = [round(i * positions / bins) for i in range(bins + 1)]
        parts = [(float(self.kl_at[a:b].sum()), float(self.count_at[a:b].sum())) for a, b in pairwise(edges)]
        kl_by_position = [total / tokens if tokens else None for total, tokens in parts]
        kl, js, overlap, agreement = (self.distances / count).tolist() if len(self.kl_at) else [None] * 4
        compared = (agreement, None if kl is None else max(kl, 0.0), js, overlap)
        loss, ece = float(self.losses.sum()) / count, float(self.overconfidence.abs().sum()) / count
        return Quality(loss, math.exp(min(loss, 700.0)), *compared, ece, kl_by_position, edges, self.tokens, errors)


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
    splits = {name: split_model(model) for name, model in measured.items()}
    tokens: list[Tensor] = []  # of each row
    with evaluation_mode(*measured.values()):
        for batch in (right_padded(batch, task) for batch in batches):
            alignment = align(batch["labels"], task)
            outputs = {name: outputs_at(model, splits[name], batch, alignment) for name, model in measured.items()}
            labels, column, row = alignment.labels, alignment.column.cpu(), alignment.row.cpu()
            before = sum(map(len, tokens))
            tokens.append(torch.bincount(row, minlength=len(batch["labels"])))
            for part, logits in logits_in_parts(outputs, vocabulary, labels.device):
                expected = None if reference is None else logits["teacher"]
                for name, own in logits.items():
                    sums[name].add(own, expected, labels[part], before + row[part], column[part], alignment.length)
    losses = {name: pad(each.losses, (0, sum(map(len, tokens)) - len(each.losses))) for name, each in sums.items()}
    return {name: each.means(bins, dict(_errors(name, losses, tokens))) for name, each in sums.items()}


def _errors(name: str, losses: Mapping[str, Tensor], tokens: list[Tensor]) -> Iterator[tuple[str, float]]:
    """Standard errors of the differences between the mean loss of other models and that of one.

    A mean over the tokens of rows [R] is a ratio of two sums: Cochran, Sampling Techniques, 1977, 6.3.

    Args:
        losses: of each model, the sum in each row.
        tokens: of each row, by batch.
    """
    counts = torch.cat(tokens) if tokens else torch.zeros(0)
    number = int((counts > 0).sum())
    for other in (other for other in losses if other != name and number > 1):
        difference = losses[other] - losses[name]
        rest = difference - counts * difference.sum() / counts.sum()
        yield other, float((number / (number - 1) * rest.square().sum()).sqrt() / counts.sum())


FullTargets = HeadTargets | DenseTargets | MixtureTargets


def outputs_at(
    model: Any, split: SplitModel | None, batch: Mapping[str, Tensor], alignment: Alignment
) -> HeadTargets | DenseTargets:
    """Run a model, wherever it is, and return its output at the target positions; see `forward_targets`."""
    return forward_targets(model, split, inputs(batch, next(model.parameters()).device), alignment)


def logits_in_parts(
    outputs: Mapping[str, FullTargets], vocabulary: int | None, device: torch.device
) -> Iterator[tuple[slice, dict[str, Tensor]]]:
    """Give the logits [C, V] of models at the same positions, float32 and on a device, for some positions at a time.

    All positions of a batch at once would need more memory than the training: gigabytes for each model.

    Args:
        vocabulary: the first tokens only, where there are more.
    """
    widest = max((output.vocabulary for output in outputs.values()), default=0)
    size = max(1, ELEMENTS // max(1, widest))
    length = max((output.leading[0] for output in outputs.values()), default=0)
    for part in (slice(start, start + size) for start in range(0, length, size)):
        logits = {name: output.rows(part).dense()[:, :vocabulary] for name, output in outputs.items()}
        yield part, {name: values.float().to(device) for name, values in logits.items()}


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
