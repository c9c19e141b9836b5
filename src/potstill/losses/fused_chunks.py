"""Algorithm of `linear_divergence`: a kernel turns logits of a chunk of tokens into losses and gradient in place."""

from __future__ import annotations

import ctypes
import mmap
import sys
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

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
    """What a kernel reads and overwrites for one chunk of C tokens; the dtype of the losses is float32 or float64."""

    student: Tensor  # [C, V] logits; overwritten with d(sum_n scale_n loss_n) / d logits
    teacher: Tensor | None  # [C, V] logits, to be overwritten; for sparse targets their events [C, K + 1]
    scale: Tensor | None  # [C] in the losses' dtype, or None if no gradient is needed
    labels: Tensor | None  # [C] int64
    divergence: Tensor | None  # [C] to write, or None
    cross_entropy: Tensor | None  # [C] to write, or None
    ids: Tensor | None = None  # [C, K] of sparse targets, and which of them are used
    used: Tensor | None = None

    def rows(self, part: slice) -> ChunkBuffers:
        """Return views of some of the rows."""
        return ChunkBuffers(*(None if x is None else x[part] for x in self))  # type: ignore[arg-type]


class LossKernel(ABC):
    """Computes losses and gradient from the logits of a chunk, in place."""

    takes_half: ClassVar[bool] = False  # logits in the dtype of the products; otherwise in that of the losses

    @abstractmethod
    def __call__(self, chunk: ChunkBuffers, inputs: FusedInputs) -> None: ...


FusedResult = tuple[Tensor | None, ...]  # divergence and cross-entropy [N]; gradients in hidden, weight and bias


def run_chunks(inputs: FusedInputs, kernel: LossKernel, scale: Tensor | None, *needs: bool) -> FusedResult:
    """Compute losses, and with a `scale` [N] the gradients of sum_n scale_n loss_n that hidden, weight, bias need."""
    head, targets, products, device = inputs.head, inputs.targets, inputs.products, inputs.hidden.device
    (N, H), V, total = inputs.hidden.shape, head.vocabulary, compute_dtype(products)
    buffer = products if kernel.takes_half else total
    has_logits = targets is not None and not isinstance(targets, SparseTargets)
    buffers = 1 + has_logits + (MIXING if isinstance(targets, MixtureTargets) else 0)
    rows = inputs.chunk_tokens or _chunk_tokens(N, V * buffer.itemsize * buffers, N * V * buffer.itemsize, device)
    rows = max(1, min(rows, N))

    width = -(-V // ROUND) * ROUND
    student = _empty(rows, width, dtype=buffer, device=device)[:, :V]
    teacher = _empty(rows, width, dtype=buffer, device=device)[:, :V] if has_logits else student
    divergence, cross_entropy = (
        None if x is None else torch.zeros(N, dtype=total, device=device) for x in (inputs.divergence, inputs.labels)
    )
    labels = None if inputs.labels is None else inputs.labels.to(torch.int64).contiguous()
    scale = None if scale is None else scale.to(total).contiguous()
    needs_hidden, needs_weight, needs_bias = needs or (False, False, False)
    d_hidden = torch.empty(N, H, dtype=total, device=device) if needs_hidden else None
    d_weight = d_bias = None
    if needs_weight:
        d_weight = _empty(*head.weight.shape, dtype=total, device=device)
        d_weight[V if N else 0 :].zero_()
    if needs_bias and head.bias is not None:
        d_bias = torch.zeros_like(head.bias, dtype=total)

    for start in range(0, N, rows):
        part = slice(start, min(start + rows, N))
        hidden = inputs.hidden[part]
        logits = student[: len(hidden)]
        cap_slope = _project(hidden, head, logits, scale is not None)
        taught = _teacher(targets, part, teacher[: len(hidden)], inputs.temperature)
        by_token = (None if x is None else x[part] for x in (scale, labels, divergence, cross_entropy))
        kernel(ChunkBuffers(logits, taught[0], *by_token, *taught[1:]), inputs)
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
    return divergence, cross_entropy, d_hidden, d_weight, d_bias


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


def _tiles(vocabulary: int, device: torch.device) -> list[slice]:
    step = CPU_ROWS if device.type == "cpu" else vocabulary
    return [slice(start, min(start + step, vocabulary)) for start in range(0, vocabulary, step)]


def _project(hidden: Tensor, head: LMHead, out: Tensor, needs_slope: bool = False) -> Tensor | None:
    """Write the logits into `out`; return the derivative 1 - tanh^2 of a soft cap if requested."""
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
    if head.softcap is None:
        return None
    out.div_(head.softcap).tanh_()
    slope = 1 - out * out if needs_slope else None
    out.mul_(head.softcap)
    return slope


def _teacher(targets: Targets | None, part: slice, out: Tensor, temperature: float) -> tuple[Tensor | None, ...]:
    """Return a chunk's `teacher`, `ids` and `used`; logits are written into `out`."""
    rows = None if targets is None else targets.rows(part)
    if isinstance(rows, SparseTargets):
        return rows.events(temperature), rows.ids, rows.used()
    if isinstance(rows, HeadTargets):
        _project(rows.hidden, rows.head, out)
    elif rows is not None:
        out.copy_(rows.dense(temperature))
    return None if rows is None else out, None, None


def _accumulate(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """Compute total += a @ b, or = for the first; the sum stays in total's dtype."""
    if total.dtype == a.dtype:
        total.addmm_(a, b, beta=0 if first else 1)
    elif first:
        total.copy_(a @ b)
    else:
        total.add_(a @ b)
