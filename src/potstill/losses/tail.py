"""The tail of a chunk in plain torch: works on any device, for any divergence."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from potstill.losses.alignment import IGNORE
from potstill.losses.chunked import Chunk, Job
from potstill.losses.token import (
    Row,
    compute_dtype,
    event_divergence,
    exponentials_,
    log_probabilities_,
    spread_,
    student_events_,
)

# Elements of a block. On a CPU it stays in the cache from pass to pass; elsewhere few launches matter more.
CPU_ELEMENTS, ACCELERATOR_ELEMENTS = 2**18, 2**27


class TorchTail:
    """A few whole passes over blocks of rows.

    Args:
        exponentials: a faster `exponentials_`, for sparse targets.
    """

    def __init__(self, exponentials: Callable[[Tensor], Row] = exponentials_) -> None:
        self._exponentials = exponentials

    def buffer_dtype(self, products: torch.dtype) -> torch.dtype:
        """float32, float64 for float64: the log-probabilities are made in place."""
        return compute_dtype(products)

    def __call__(self, chunk: Chunk, job: Job) -> tuple[Tensor | None, Tensor | None]:
        """See `Tail`."""
        C, V = chunk.student.shape
        elements = CPU_ELEMENTS if chunk.student.device.type == "cpu" else ACCELERATOR_ELEMENTS
        rows = max(2, elements // V)
        blocks = [
            _block(Chunk(*(None if x is None else x[start : start + rows] for x in chunk)), job, self._exponentials)  # type: ignore[arg-type]
            for start in range(0, C, rows)
        ]
        divergences, entropies = zip(*blocks, strict=True)
        return (
            None if job.divergence is None else torch.cat(divergences),
            None if chunk.labels is None else torch.cat(entropies),
        )


def _block(chunk: Chunk, job: Job, exponentials: Callable[[Tensor], Row]) -> tuple[Tensor | None, Tensor | None]:
    z = chunk.student
    hard = None  # the student's log-probabilities at temperature 1, where the divergence does not have them
    if chunk.labels is not None and (job.divergence is None or chunk.ids is not None or job.temperature != 1):
        hard = log_probabilities_(z.clone())
    if job.temperature != 1 and job.divergence is not None:
        z.div_(job.temperature)

    value = gradient = None
    if job.divergence is not None:
        assert chunk.teacher is not None
        weight = None if chunk.scale is None else (chunk.scale / job.temperature).unsqueeze(-1).to(z.dtype)
        if chunk.ids is not None:
            assert chunk.used is not None
            events = student_events_(z, chunk.ids, chunk.used, exponentials)
            value, by_event = event_divergence(events, chunk.teacher, job.divergence)
            if weight is not None:
                gradient = spread_(z, events, by_event * weight)
        else:
            log_q = log_probabilities_(z)
            log_p = log_probabilities_(chunk.teacher.div_(job.temperature))
            terms, slope = job.divergence.pointwise(log_q, log_p)
            value = terms.sum(-1)
            if chunk.labels is not None and hard is None:
                hard = log_q
            if weight is not None:
                gradient = log_q.exp().mul_(-slope.sum(-1, keepdim=True)).add_(slope).mul_(weight)

    cross_entropy = None
    if chunk.labels is not None:
        assert hard is not None
        counts = (chunk.labels != IGNORE).unsqueeze(-1)
        index = chunk.labels.unsqueeze(-1).to(torch.int64) * counts
        cross_entropy = -(hard.gather(-1, index) * counts).squeeze(-1)
        if chunk.scale is not None and job.label_weight:
            of_label = hard.exp_().scatter_add_(-1, index, -torch.ones_like(index, dtype=z.dtype))
            of_label.mul_((chunk.scale.unsqueeze(-1) * counts).to(z.dtype).mul_(job.label_weight))
            gradient = of_label if gradient is None else gradient.add_(of_label)
    if chunk.scale is not None and gradient is not z:
        z.zero_() if gradient is None else z.copy_(gradient)
    return value, cross_entropy
