"""How good a language model is on held-out text, and how like its teacher."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from potstill.losses.alignment import Alignment, Task, align
from potstill.losses.divergences import JSD, ForwardKL
from potstill.losses.targets import DenseTargets
from potstill.losses.token_losses import token_cross_entropy, token_divergence
from potstill.models.split import forward_targets, inputs

TOP = 10  # of the most likely tokens
BINS = 15  # of confidence, as in Guo et al. 2017, arXiv 1706.04599


@dataclass(frozen=True)
class Quality:
    """Means over the counting tokens of a held-out set.

    Args:
        loss: cross-entropy with the data, nats a token.
        perplexity: exp(loss).
        agreement: share of tokens where the most likely next token is the reference's; None without a reference.
        kl: KL(reference || model), nats a token; None without a reference.
        js: Jensen-Shannon divergence between both, nats a token, at most log 2; None without a reference.
        top_k_agreement: share of the reference's 10 most likely tokens that are among the model's own 10; likewise.
        ece: expected calibration error: how far the probability of the most likely token is from how often it is right,
            on average over 15 bins of that probability.
        kl_by_position: the same by place in the row, a mean for each bin of `position_edges`; None for an empty bin.
        position_edges: [bins + 1] the first place of each bin, and the end.
        tokens: how many counted.
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


@dataclass
class _Sums:
    """Running sums of one model, in float64."""

    loss: float = 0.0
    agreed: int = 0
    kl: float = 0.0
    js: float = 0.0
    shared: float = 0.0
    overconfidence: Tensor = field(default_factory=lambda: torch.zeros(BINS, dtype=torch.float64))
    kl_at: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    count_at: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    tokens: int = 0


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

    Args:
        reference: whose distribution the others are compared with, or None where there is no such model here.
        models: name -> model.
        batches: input_ids, attention_mask, labels, [B, T] each.
        vocabulary: compare over the first tokens only; see `LMHead.slice`.
        bins: how many bins the places in a row are put in.
        task: causal, or masked: then perplexity is the pseudo-perplexity, of masked tokens alone.

    Returns:
        name -> Quality, with the reference itself as "teacher".
    """
    everyone = dict(models) if reference is None else {"teacher": reference, **models}
    was_training = {name: model.training for name, model in everyone.items()}
    sums = {name: _Sums() for name in everyone}
    for model in everyone.values():
        model.eval()
    for batch in batches:
        alignment = align(batch["labels"], task)
        expected: Any = None if reference is None else logits_at(reference, batch, alignment, vocabulary)
        for name, model in everyone.items():
            again = expected is None or model is not reference
            logits = logits_at(model, batch, alignment, vocabulary) if again else expected
            _add(sums[name], logits, expected, alignment)
    for name, model in everyone.items():
        model.train(was_training[name])
    return {name: _finish(one, bins) for name, one in sums.items()}


def logits_at(model: Any, batch: Mapping[str, Tensor], alignment: Alignment, vocabulary: int | None) -> Tensor:
    """The model's logits [N, V] at the counting positions, on the CPU's or the batch's device, float32."""
    device = next(model.parameters()).device
    return (
        forward_targets(model, None, inputs(batch, device), alignment)
        .dense()[:, :vocabulary]
        .float()
        .to(batch["labels"].device)
    )


def _add(sums: _Sums, logits: Tensor, expected: Tensor | None, alignment: Alignment) -> None:
    sums.loss += float(token_cross_entropy(logits, alignment.labels).double().sum())
    sums.tokens += len(alignment)
    sums.overconfidence += overconfidence(logits, alignment.labels)
    if expected is None:
        return
    sums.js += float(token_divergence(logits, DenseTargets(expected), JSD(0.5)).double().sum())
    top = min(TOP, logits.shape[-1])
    mine, theirs = (each.topk(top, -1).indices for each in (logits, expected))
    sums.shared += float((mine[:, :, None] == theirs[:, None, :]).any(1).double().mean(-1).sum())
    kl = token_divergence(logits, DenseTargets(expected), ForwardKL()).double().cpu()
    sums.agreed += int((logits.argmax(-1) == expected.argmax(-1)).sum())
    sums.kl += float(kl.sum())
    places = max(len(sums.kl_at), alignment.length)
    column = alignment.column.cpu()
    sums.kl_at = _padded(sums.kl_at, places).index_add(0, column, kl)
    sums.count_at = _padded(sums.count_at, places).index_add(0, column, torch.ones_like(kl))


def overconfidence(logits: Tensor, labels: Tensor) -> Tensor:
    """[BINS] by how sure a model is: the sum of its confidence beyond how often it is right.

    The absolute values, added and divided by the number of positions, are the expected calibration error.
    """
    confidence, said = logits.softmax(-1).max(-1)
    excess = confidence.double() - (said == labels.to(said.device)).double()
    bins = (confidence * BINS).long().clamp_max(BINS - 1)
    return torch.zeros(BINS, dtype=torch.float64).index_add_(0, bins.cpu(), excess.cpu())


def _padded(values: Tensor, size: int) -> Tensor:
    return torch.cat([values, values.new_zeros(size - len(values))])


def _finish(sums: _Sums, bins: int) -> Quality:
    count = max(sums.tokens, 1)
    compared = len(sums.kl_at) > 0
    places = max(len(sums.kl_at) - 1, 0)  # the last place of a row predicts nothing
    edges = [round(i * places / min(bins, max(places, 1))) for i in range(min(bins, max(places, 1)) + 1)]
    by_position = []
    for start, end in pairwise(edges):
        tokens = float(sums.count_at[start:end].sum())
        by_position.append(float(sums.kl_at[start:end].sum()) / tokens if tokens else None)
    loss = sums.loss / count
    return Quality(
        loss=loss,
        perplexity=math.exp(min(loss, 700.0)),
        agreement=sums.agreed / count if compared else None,
        kl=max(sums.kl / count, 0.0) if compared else None,
        js=max(sums.js / count, 0.0) if compared else None,
        top_k_agreement=sums.shared / count if compared else None,
        ece=float(sums.overconfidence.abs().sum()) / count,
        kl_by_position=by_position,
        position_edges=edges,
        tokens=sums.tokens,
    )


def gap_closed(teacher: float, baseline: float, student: float) -> float | None:
    """The share of the distance from baseline to teacher that the student went.

        (baseline - student) / (baseline - teacher)

    Args:
        teacher: held-out loss; the others likewise.
        baseline: of the same student from labels alone.
        student: of the distilled one.

    Returns:
        1 is the teacher's own loss, 0 the baseline's, below 0 is worse than it; None where the teacher is no better
        than the baseline.
    """
    return (baseline - student) / (baseline - teacher) if baseline > teacher else None


@torch.no_grad()
def continuation(model: Any, prompt: list[int], new_tokens: int) -> list[int]:
    """The most likely continuation of a prompt, token by token.

    Args:
        model: a causal language model of transformers.
        prompt: token ids.
        new_tokens: how many at most.

    Returns:
        The new token ids alone.
    """
    ids = torch.tensor([prompt], device=next(model.parameters()).device)
    pad = model.generation_config.pad_token_id
    end = model.generation_config.eos_token_id
    if pad is None:  # generate() warns about it, though one row needs no padding
        pad = end[0] if isinstance(end, list) else end
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False, pad_token_id=pad
    )
    new: list[int] = output[0, len(prompt) :].tolist()
    return new
