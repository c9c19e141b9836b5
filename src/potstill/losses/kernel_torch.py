"""Loss kernel in plain torch: any device, any divergence."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from potstill.losses import token_losses
from potstill.losses.alignment import IGNORE
from potstill.losses.fused_chunks import ChunkBuffers, FusedInputs
from potstill.losses.token_losses import log_softmax_

# Elements of a block. On a CPU a block stays in the cache from pass to pass; elsewhere few launches matter more.
CPU_ELEMENTS, ACCELERATOR_ELEMENTS = 2**18, 2**27


class TorchKernel:
    """Several passes over blocks of rows; `exponentials` may be a faster `exponentials_`, for sparse targets."""

    def __init__(self, exponentials: Callable[[Tensor], tuple[Tensor, Tensor]] = token_losses.exponentials_) -> None:
        self._exponentials = exponentials

    def buffer_dtype(self, products: torch.dtype) -> torch.dtype:
        return token_losses.compute_dtype(products)

    def __call__(self, chunk: ChunkBuffers, inputs: FusedInputs) -> tuple[Tensor | None, Tensor | None]:
        C, V = chunk.student.shape
        elements = CPU_ELEMENTS if chunk.student.device.type == "cpu" else ACCELERATOR_ELEMENTS
        rows = max(2, elements // V)
        blocks = [self._block(chunk.rows(slice(start, start + rows)), inputs) for start in range(0, C, rows)]
        divergences, entropies = zip(*blocks, strict=True)
        return (
            None if inputs.divergence is None else torch.cat(divergences),
            None if chunk.labels is None else torch.cat(entropies),
        )

    def _block(self, chunk: ChunkBuffers, inputs: FusedInputs) -> tuple[Tensor | None, Tensor | None]:
        z, temperature = chunk.student, inputs.temperature
        hard = value = gradient = cross_entropy = None
        # The student's log-probabilities at temperature 1, where the divergence does not compute them.
        if chunk.labels is not None and (inputs.divergence is None or chunk.ids is not None or temperature != 1):
            hard = log_softmax_(z.clone())
        if temperature != 1 and inputs.divergence is not None:
            z.div_(temperature)

        if inputs.divergence is not None:
            assert chunk.teacher is not None
            weight = None if chunk.scale is None else (chunk.scale / temperature).unsqueeze(-1).to(z.dtype)
            if chunk.ids is not None:
                assert chunk.used is not None
                events = token_losses.student_events_(z, chunk.ids, chunk.used, self._exponentials)
                value, by_event = token_losses.event_divergence(events, chunk.teacher, inputs.divergence)
                if weight is not None:
                    gradient = token_losses.token_gradient_(z, events, by_event * weight)
            else:
                log_q = log_softmax_(z)
                log_p = log_softmax_(chunk.teacher.div_(temperature))
                terms, slope = inputs.divergence.pointwise(log_q, log_p)
                value = terms.sum(-1)
                hard = log_q if hard is None else hard
                if weight is not None:
                    gradient = log_q.exp().mul_(-slope.sum(-1, keepdim=True)).add_(slope).mul_(weight)

        if chunk.labels is not None:
            assert hard is not None
            is_target = (chunk.labels != IGNORE).unsqueeze(-1)
            index = chunk.labels.unsqueeze(-1).to(torch.int64) * is_target
            cross_entropy = -(hard.gather(-1, index) * is_target).squeeze(-1)
            if chunk.scale is not None and inputs.label_weight:
                hard_gradient = hard.exp_().scatter_add_(-1, index, -torch.ones_like(index, dtype=z.dtype))
                hard_gradient.mul_((chunk.scale.unsqueeze(-1) * is_target).to(z.dtype).mul_(inputs.label_weight))
                gradient = hard_gradient if gradient is None else gradient.add_(hard_gradient)
        if chunk.scale is not None and gradient is not z:
            z.zero_() if gradient is None else z.copy_(gradient)
        return value, cross_entropy
