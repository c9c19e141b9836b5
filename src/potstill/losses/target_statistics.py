"""Statistics of a teacher's distributions, a few tokens at a time: entropy, confidence, top tokens."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from potstill.errors import ShapeError
from potstill.losses.targets import SparseTargets, Targets
from potstill.losses.token_losses import compute_dtype, log_softmax_

ELEMENTS = 2**24  # of logits at a time


def teacher_entropy(targets: Targets, temperature: float = 1.0) -> Tensor:
    """Compute the entropy of each distribution: [N] nats; of K + 1 events for sparse targets."""
    return torch.cat([-(x.exp() * x).sum(-1) for x in _log_probs(targets, temperature)])


def teacher_confidence(targets: Targets, temperature: float = 1.0) -> Tensor:
    """Compute the probability of each top-1 token: [N]."""
    return torch.cat([x.amax(-1).exp() for x in _log_probs(targets, temperature)])


def top_share(values: Tensor, share: float) -> Tensor:
    """Return 1 for the largest share of values [N], 0 for the others; at least one for any share > 0."""
    if not 0 <= share <= 1:
        raise ShapeError(f"top_share: expected a share in [0, 1], got {share}.")
    count = min(len(values), -int(-share * len(values) // 1))
    return torch.zeros_like(values).index_fill_(0, values.topk(count).indices, 1.0)


def top_tokens(targets: Targets, count: int, temperature: float = 1.0) -> Targets:
    """Keep the top `count` tokens, and all others as one event; sparse targets stay as they are."""
    if count < 1:
        raise ShapeError(f"top_tokens: expected a count of at least 1, got {count}.")
    if isinstance(targets, SparseTargets):
        return targets
    if targets.sampled:
        got = "a mixture with a sample, whose top tokens are random"
        raise ShapeError(f"top_tokens: expected full distributions, got {got}. Leave top_k out.")
    kept = [x.topk(min(count, x.shape[-1])) for x in _log_probs(targets, temperature)]
    ids, log_probs = torch.cat([x.indices for x in kept]), torch.cat([x.values for x in kept])
    return SparseTargets(ids, log_probs, "bucket", temperature)


def token_log_probs(targets: Targets, ids: Tensor, temperature: float = 1.0) -> Tensor:
    """Look up the log-probabilities [N, K] of tokens [N, K]; `LOG_ZERO` for probability 0."""
    if isinstance(targets, SparseTargets):
        raise ShapeError("token_log_probs: expected full distributions, got sparse targets.")
    rows, start = [], 0
    for log_probs in _log_probs(targets, temperature):
        rows.append(log_probs.gather(-1, ids[start : start + len(log_probs)].to(torch.int64)))
        start += len(log_probs)
    return torch.cat(rows)


@torch.no_grad()
def _log_probs(targets: Targets, temperature: float) -> Iterator[Tensor]:
    """Yield the log-probabilities [n, V] of n positions at a time; for N = 0 one empty block."""
    if isinstance(targets, SparseTargets):
        yield targets.events(temperature)
        return
    rows = max(1, ELEMENTS // targets.vocabulary)
    for start in range(0, max(targets.leading[0], 1), rows):
        with torch.autocast(targets.device.type, enabled=False):
            logits = targets.rows(slice(start, start + rows)).dense(temperature)
        yield log_softmax_(logits.to(compute_dtype(logits.dtype), copy=True).div_(temperature))
