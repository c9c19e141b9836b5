"""Loss kernel in plain torch: any device, any divergence."""

from __future__ import annotations

import torch

from potstill.losses.alignment import IGNORE
from potstill.losses.fused_chunks import ChunkBuffers, FusedInputs, LossKernel
from potstill.losses.token_losses import Exponentials, dense_divergence_, event_divergence_, exponentials_, log_softmax_

# Elements of a block. On a CPU a block stays in the cache from pass to pass; elsewhere few launches matter more.
CPU_ELEMENTS, ACCELERATOR_ELEMENTS = 2**18, 2**27


class TorchKernel(LossKernel):
    """Several passes over blocks of rows; `exponentials` may be a faster `exponentials_`, for sparse targets."""

    def __init__(self, exponentials: Exponentials = exponentials_) -> None:
        self._exponentials = exponentials

    def __call__(self, chunk: ChunkBuffers, inputs: FusedInputs) -> None:
        C, V = chunk.student.shape
        rows = max(2, (CPU_ELEMENTS if chunk.student.device.type == "cpu" else ACCELERATOR_ELEMENTS) // V)
        for start in range(0, C, rows):
            self._block(chunk.rows(slice(start, start + rows)), inputs)

    def _block(self, chunk: ChunkBuffers, inputs: FusedInputs) -> None:
        z, scale, labels, temperature = chunk.student, chunk.scale, chunk.labels, inputs.temperature
        hard, gradient = z, None
        # The student's log-probabilities at temperature 1, where the divergence does not leave them in its buffer.
        if labels is not None and (inputs.divergence is None or chunk.ids is not None or temperature != 1):
            hard = log_softmax_(z.clone())

        if inputs.divergence is not None:
            assert chunk.teacher is not None and chunk.divergence is not None
            if temperature != 1:
                z.div_(temperature)
            weight = None if scale is None else (scale / temperature).unsqueeze(-1)
            if chunk.ids is not None and chunk.used is not None:
                events = (chunk.teacher, chunk.ids, chunk.used)
                value = event_divergence_(z, *events, inputs.divergence, weight, self._exponentials)
                gradient = z
            else:
                teacher = chunk.teacher.div_(temperature)
                value, gradient = dense_divergence_(z, teacher, inputs.divergence, weight is not None)
                if gradient is not None and weight is not None:
                    gradient.mul_(weight)
            chunk.divergence.copy_(value)

        if labels is not None and chunk.cross_entropy is not None:
            is_target = (labels != IGNORE).unsqueeze(-1)
            index = labels.unsqueeze(-1) * is_target
            chunk.cross_entropy.copy_(-(hard.gather(-1, index) * is_target).squeeze(-1))
            if scale is not None and inputs.label_weight:
                hard_gradient = hard.exp_().scatter_add_(-1, index, -torch.ones_like(index, dtype=z.dtype))
                hard_gradient.mul_((scale.unsqueeze(-1) * is_target).mul_(inputs.label_weight))
                gradient = hard_gradient if gradient is None else gradient.add_(hard_gradient)
        if scale is not None and gradient is not z:
            z.zero_() if gradient is None else z.copy_(gradient)
