"""Algorithm of `linear_divergence`: chunks of tokens times the whole vocabulary, gradient in the forward pass.

For each chunk of tokens the logits of student and teacher go into two buffers. A kernel computes normalisers, loss and
gradient in place, from which those of hidden states, weight and bias follow. Nothing is computed twice, and nothing
of size [N, V] exists.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from potstill.losses.divergences import Divergence
from potstill.losses.targets import HeadTargets, LMHead, MixtureTargets, SparseTargets, Targets
from potstill.losses.token_losses import compute_dtype

# Byte budget for the buffers of one chunk. Each chunk reads the weights and updates their gradient once more, so larger
# is faster; on a CPU they still stay below a third of one matrix of logits.
CPU_BYTES, CPU_SHARE, CPU_LEAST = 208 * 2**20, 1 / 3, 16 * 2**20
ACCELERATOR_BYTES = 2 * 2**30
MIXING = 3  # additional buffers of a chunk's logits while teachers are mixed
CPU_ROWS = 1024  # of a head's weight in one product on a CPU, which then stay in the cache
ROUND = 64  # rows of a buffer begin at multiples of this many elements, so that they are aligned and hold whole vectors

Reduction = Literal["mean", "none"]


@dataclass(frozen=True)
class FusedInputs:
    """Arguments of `linear_divergence`; in `run_chunks` hidden states and heads are in the dtype of the products."""

    hidden: Tensor  # [N, H]
    head: LMHead
    targets: Targets | None
    divergence: Divergence | None
    temperature: float
    labels: Tensor | None
    label_weight: float
    token_weights: Tensor | None = None
    normalizer: Tensor | float | None = None
    reduction: Reduction = "mean"
    chunk_tokens: int | None = None
    products: torch.dtype = torch.float32  # of the matrix products


class ChunkBuffers(NamedTuple):
    """What a kernel reads and overwrites for one chunk of C tokens."""

    student: Tensor  # [C, V] logits; overwritten with d(sum_n scale_n loss_n) / d logits
    teacher: Tensor | None  # [C, V] logits, to be overwritten; for sparse targets their events [C, K + 1]
    scale: Tensor | None  # [C] float32, or None if no gradient is needed
    labels: Tensor | None  # [C]
    ids: Tensor | None = None  # [C, K] of sparse targets, and which of them are used
    used: Tensor | None = None

    def rows(self, part: slice) -> ChunkBuffers:
        """Return views of some of the rows."""
        return ChunkBuffers(*(None if x is None else x[part] for x in self))  # type: ignore[arg-type]


class LossKernel(Protocol):
    """Compute losses and gradient from the logits of a chunk, in place."""

    def buffer_dtype(self, products: torch.dtype) -> torch.dtype:
        """The dtype in which the kernel takes logits."""

    def __call__(self, chunk: ChunkBuffers, inputs: FusedInputs) -> tuple[Tensor | None, Tensor | None]:
        """Return the divergence [C] and the cross-entropy [C], None where the inputs have none."""


# Divergence and cross-entropy by token [N], and the gradients of sum_n scale_n loss_n in hidden, weight and bias.
FusedResult = tuple[Tensor | None, ...]


def run_chunks(inputs: FusedInputs, kernel: LossKernel, scale: Tensor | None, *needs: bool) -> FusedResult:
    """Compute losses and gradients chunk by chunk; without `chunk_tokens` the chunks follow from the byte budget.

    `scale`, [N] float32, weights each token in the gradient; None for no gradient. `needs` is whether hidden, weight
    and bias need one.
    """
    head, targets, device = inputs.head, inputs.targets, inputs.hidden.device
    (N, H), V = inputs.hidden.shape, head.vocabulary
    products = inputs.hidden.dtype
    total, buffer = compute_dtype(products), kernel.buffer_dtype(products)
    sparse = targets if isinstance(targets, SparseTargets) else None
    has_logits = targets is not None and sparse is None
    buffers = 1 + has_logits + (MIXING if isinstance(targets, MixtureTargets) else 0)
    rows = inputs.chunk_tokens or _chunk_tokens(N, V * buffer.itemsize * buffers, N * V * buffer.itemsize, device)
    rows = max(1, min(rows, N))

    width = -(-V // ROUND) * ROUND
    student = _empty(rows, width, dtype=buffer, device=device)[:, :V]
    teacher = _empty(rows, width, dtype=buffer, device=device)[:, :V] if has_logits else None
    losses = [torch.zeros(N, dtype=total, device=device) for _ in range(2)]
    needs_hidden, needs_weight, needs_bias = needs or (False, False, False)
    d_hidden = torch.empty(N, H, dtype=total, device=device) if needs_hidden else None
    d_weight = d_bias = None
    if needs_weight:
        d_weight = _empty(*head.weight.shape, dtype=total, device=device)
        d_weight[V if N else 0 :].zero_()
    if needs_bias and head.bias is not None:
        d_bias = torch.zeros_like(head.bias, dtype=total)

    events, used = (sparse.events(inputs.temperature), sparse.used()) if sparse else (None, None)
    by_token = (events, scale, inputs.labels, sparse.ids if sparse else None, used)
    for start in range(0, N, rows):
        part = slice(start, min(start + rows, N))
        hidden = inputs.hidden[part]
        logits = student[: len(hidden)]
        _project(hidden, head, logits)
        cap_slope = _soft_cap_(logits, head.softcap, scale is not None)
        chunk = ChunkBuffers(logits, *(None if x is None else x[part] for x in by_token))
        if teacher is not None:
            chunk = chunk._replace(teacher=_teacher_logits(targets, part, teacher[: len(hidden)], inputs.temperature))
        for loss, values in zip(losses, kernel(chunk, inputs), strict=True):
            if values is not None:
                loss[part] = values
        if scale is None:
            continue
        if cap_slope is not None:
            logits.mul_(cap_slope)
        if head.logit_scale != 1.0:
            logits.mul_(head.logit_scale)
        if d_bias is not None:
            d_bias[:V] += logits.sum(0, dtype=total)
        gradient = logits.to(products)
        if d_hidden is not None:
            _accumulate(d_hidden[part], gradient, head.weight[:V], first=True)
        if d_weight is not None:
            for tile in _tiles(V, device):
                _accumulate(d_weight[tile], gradient[:, tile].t(), hidden, first=start == 0)
    divergence = losses[0] if inputs.divergence is not None else None
    return divergence, losses[1] if inputs.labels is not None else None, d_hidden, d_weight, d_bias


def _chunk_tokens(tokens: int, bytes_per_token: int, logits_bytes: int, device: torch.device) -> int:
    """Choose the tokens at a time by the byte budget; on a CPU in chunks of one size."""
    if device.type != "cpu":
        return max(128, ACCELERATOR_BYTES // bytes_per_token // 128 * 128)
    budget = max(CPU_LEAST, min(CPU_BYTES, int(CPU_SHARE * logits_bytes)))
    most = max(1, budget // bytes_per_token)
    return -(-tokens // -(-tokens // most)) if tokens else 1


def _empty(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Call torch.empty with large pages: the first touch of a page costs more than the arithmetic on it."""
    tensor = torch.empty(shape, dtype=dtype, device=device)
    if device.type == "cpu" and sys.platform == "linux" and tensor.nbytes >= 2**25:
        start, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        start += -start % mmap.PAGESIZE
        # The result is ignored: this is advice, and only time is lost where it is not taken.
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_HUGEPAGE)
    return tensor


def _tiles(vocabulary: int, device: torch.device) -> Iterator[slice]:
    step = CPU_ROWS if device.type == "cpu" else vocabulary
    for start in range(0, vocabulary, step):
        yield slice(start, min(start + step, vocabulary))


def _project(hidden: Tensor, head: LMHead, out: Tensor) -> None:
    """Write logit_scale * (hidden @ weight.T + bias) into `out`."""
    for tile in _tiles(head.vocabulary, hidden.device):
        piece, weight = out[:, tile], head.weight[tile]
        if out.dtype == hidden.dtype:
            torch.mm(hidden, weight.t(), out=piece)
        else:
            piece.copy_(hidden @ weight.t())
        if head.bias is not None:
            piece.add_(head.bias[tile])
        if head.logit_scale != 1.0:
            piece.mul_(head.logit_scale)


def _soft_cap_(logits: Tensor, softcap: float | None, with_slope: bool) -> Tensor | None:
    """Compute softcap * tanh(logits / softcap) in place; return its derivative 1 - tanh^2 if requested."""
    if softcap is None:
        return None
    logits.div_(softcap).tanh_()
    slope = 1 - logits * logits if with_slope else None
    logits.mul_(softcap)
    return slope


def _teacher_logits(targets: Targets | None, part: slice, out: Tensor, temperature: float) -> Tensor:
    assert targets is not None and not isinstance(targets, SparseTargets)
    if not isinstance(targets, HeadTargets):
        return out.copy_(targets.rows(part).dense(temperature))
    _project(targets.hidden[part], targets.head, out)
    _soft_cap_(out, targets.head.softcap, with_slope=False)
    return out


def _accumulate(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """Compute total += a @ b, or = for the first; the sum stays in total's dtype."""
    if total.dtype == a.dtype:
        total.addmm_(a, b, beta=0 if first else 1)
    elif first:
        total.copy_(a @ b)
    else:
        total.add_(a @ b)
