"""What a teacher's distributions say about the tokens: how sure it is, and which tokens it finds likely.

Heads are multiplied a few tokens at a time: the logits of all of them never exist together.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from potstill.errors import ShapeError
from potstill.losses.token import compute_dtype, log_probabilities_
from potstill.targets import DenseTargets, HeadTargets, SparseTargets, Targets

ELEMENTS = 2**24  # of logits at a time


def teacher_entropy(targets: Targets, temperature: float = 1.0) -> Tensor:
    """The entropy of the teacher's distributions: [N] nats; of K + 1 events for sparse targets."""
    return torch.cat([-(x.exp() * x).sum(-1) for x in _log_probs(targets, temperature)])


def teacher_confidence(targets: Targets, temperature: float = 1.0) -> Tensor:
    """The probability of the teacher's likeliest token: [N]."""
    return torch.cat([x.amax(-1).exp() for x in _log_probs(targets, temperature)])


def top_share(values: Tensor, share: float) -> Tensor:
    """1 for the largest share of values, 0 for the others: [N], of the values' dtype; at least one for any share > 0.

    Args:
        values: [N].
        share: in [0, 1].

    Raises:
        ShapeError: the share is out of range.
    """
    if not 0 <= share <= 1:
        raise ShapeError(f"top_share: expected a share in [0, 1], got {share}.")
    count = min(len(values), -int(-share * len(values) // 1))
    return torch.zeros_like(values).index_fill_(0, values.topk(count).indices, 1.0)


def top_tokens(targets: Targets, count: int, temperature: float = 1.0) -> Targets:
    """The teacher's `count` likeliest tokens, and all others as one event; sparse targets stay as they are.

    Raises:
        ShapeError: the count is not positive.
    """
    if count < 1:
        raise ShapeError(f"top_tokens: expected a count of at least 1, got {count}.")
    if isinstance(targets, SparseTargets):
        return targets
    kept = [x.topk(min(count, x.shape[-1])) for x in _log_probs(targets, temperature)]
    ids, log_probs = torch.cat([x.indices for x in kept]), torch.cat([x.values for x in kept])
    return SparseTargets(ids, log_probs, "bucket", temperature)


@torch.no_grad()
def _log_probs(targets: Targets, temperature: float) -> Iterator[Tensor]:
    """The log-probabilities [n, V] of some tokens after others; for no token at all, those of none."""
    if isinstance(targets, SparseTargets):
        yield targets.events(temperature)
        return
    rows = max(1, ELEMENTS // targets.vocabulary)
    states = targets.hidden if isinstance(targets, HeadTargets) else targets.logits
    for start in range(0, max(len(states), 1), rows):
        some = states[start : start + rows]
        part = HeadTargets(some, targets.head) if isinstance(targets, HeadTargets) else DenseTargets(some)
        with torch.autocast(some.device.type, enabled=False):
            logits = part.dense()
        yield log_probabilities_(logits.to(compute_dtype(logits.dtype), copy=True).div_(temperature))
