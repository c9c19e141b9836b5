"""The algorithm of `linear_divergence`: chunks of tokens times the whole vocabulary, gradient in the forward pass.

For each chunk of tokens: the student's and the teacher's logits into two buffers, one tail in place (normalisers, loss,
and the gradient over the student's buffer), and from that the gradients of hidden states, weight and bias. Nothing is
computed twice and nothing of size [N, V] exists.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from potstill.losses.divergences import Divergence
from potstill.losses.targets import HeadTargets, LMHead, MixtureTargets, SparseTargets, Targets
from potstill.losses.token import compute_dtype

# What the buffers of one chunk may take. Each chunk goes through the weights and their gradient once more, so larger is
# faster; on a CPU they stay below a third of one matrix of logits all the same.
CPU_BYTES, CPU_SHARE, CPU_LEAST = 208 * 2**20, 1 / 3, 16 * 2**20
ACCELERATOR_BYTES = 2 * 2**30
MIXING = 3  # more buffers of a chunk's logits while teachers are mixed
# Rows of a head's weight in one product on a CPU: its panel stays in the cache.
CPU_ROWS = 1024
# Rows of a buffer begin at multiples of this many elements, so that vectors and products find them aligned and whole.
ROUND = 64


@dataclass(frozen=True)
class Job:
    """What is to be computed, checked and in the right dtype.

    Args:
        hidden: [N, H] in the dtype of the products.
        head: the student's; its tensors in the dtype of the products.
        targets: the teacher's, of N tokens; None for cross-entropy alone.
        divergence: None for cross-entropy alone.
        temperature: of the divergence.
        labels: [N] int64, -100 does not count; None without cross-entropy.
        label_weight: the weight of the cross-entropy in the gradient.
    """

    hidden: Tensor
    head: LMHead
    targets: Targets | None
    divergence: Divergence | None
    temperature: float
    labels: Tensor | None
    label_weight: float


class Chunk(NamedTuple):
    """One chunk on its way through a tail.

    Args:
        student: [C, V] the student's logits. The tail leaves d(sum_n scale_n loss_n) / d logits there.
        teacher: [C, V] the teacher's logits, to be overwritten; for sparse targets their events [C, K + 1].
        scale: [C] float32, or None where no gradient is wanted.
        labels: [C] or None.
        ids, used: [C, K] of sparse targets.
    """

    student: Tensor
    teacher: Tensor | None
    scale: Tensor | None
    labels: Tensor | None
    ids: Tensor | None
    used: Tensor | None


class Tail(Protocol):
    """From the logits of a chunk to its losses and its gradient, in place."""

    def buffer_dtype(self, products: torch.dtype) -> torch.dtype:
        """The dtype that the logits are wanted in."""

    def __call__(self, chunk: Chunk, job: Job) -> tuple[Tensor | None, Tensor | None]:
        """The divergence [C] and the cross-entropy [C], each None where it is not asked for."""


class Wanted(NamedTuple):
    """Which gradients."""

    hidden: bool
    weight: bool
    bias: bool


class Result(NamedTuple):
    """Losses by token, and gradients of sum_n scale_n loss_n, all float32 (float64)."""

    divergence: Tensor | None
    cross_entropy: Tensor | None
    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


def run(job: Job, tail: Tail, scale: Tensor | None, wanted: Wanted, chunk_tokens: int | None) -> Result:
    """Go through the tokens.

    Args:
        job: what to compute.
        tail: how.
        scale: [N] float32, the weight of each token in the gradient; None where none is wanted.
        wanted: which gradients.
        chunk_tokens: tokens at a time; None for what the byte budget gives.
    """
    N, H = job.hidden.shape
    V, products = job.head.vocabulary, job.hidden.dtype
    device, total = job.hidden.device, compute_dtype(products)
    buffer = tail.buffer_dtype(products)
    sparse = isinstance(job.targets, SparseTargets)
    has_teacher = job.targets is not None and not sparse
    buffers = 2 if has_teacher else 1
    if isinstance(job.targets, MixtureTargets):
        buffers += MIXING
    rows = chunk_tokens or _chunk_tokens(N, V * buffer.itemsize * buffers, N * V * buffer.itemsize, device)
    rows = max(1, min(rows, N))

    wide = -(-V // ROUND) * ROUND
    student = _empty(rows, wide, dtype=buffer, device=device)[:, :V]
    teacher = _empty(rows, wide, dtype=buffer, device=device)[:, :V] if has_teacher else None
    losses = [torch.zeros(N, dtype=total, device=device) for _ in range(2)]
    d_hidden = torch.empty(N, H, dtype=total, device=device) if wanted.hidden else None
    d_weight = _empty_like(job.head.weight, V, total) if wanted.weight else None
    d_bias = _empty_like(job.head.bias, 0, total) if wanted.bias and job.head.bias is not None else None
    if N == 0 and d_weight is not None:
        d_weight.zero_()

    events = job.targets.events(job.temperature) if isinstance(job.targets, SparseTargets) else None
    used = job.targets.used() if isinstance(job.targets, SparseTargets) else None
    for start in range(0, N, rows):
        part = slice(start, min(start + rows, N))
        hidden = job.hidden[part]
        logits = student[: hidden.shape[0]]
        _project(hidden, job.head, logits)
        cap_slope = _soft_cap_(logits, job.head.softcap, scale is not None)
        said = events[part] if events is not None else None
        if teacher is not None:
            said = _teacher_logits(job.targets, part, teacher[: hidden.shape[0]], job.temperature)
        chunk = Chunk(
            logits,
            said,
            None if scale is None else scale[part],
            None if job.labels is None else job.labels[part],
            job.targets.ids[part] if isinstance(job.targets, SparseTargets) else None,
            None if used is None else used[part],
        )
        for kept, value in zip(losses, tail(chunk, job), strict=True):
            if value is not None:
                kept[part] = value
        if scale is None:
            continue
        if cap_slope is not None:
            logits.mul_(cap_slope)
        if job.head.logit_scale != 1.0:
            logits.mul_(job.head.logit_scale)
        if d_bias is not None:
            d_bias[:V] += logits.sum(0, dtype=total)
        gradient = logits.to(products)
        if d_hidden is not None:
            _accumulate(d_hidden[part], gradient, job.head.weight[:V], first=True)
        if d_weight is not None:
            for tile in _tiles(V, device):
                _accumulate(d_weight[tile], gradient[:, tile].t(), hidden, first=start == 0)
    return Result(
        losses[0] if job.divergence is not None else None,
        losses[1] if job.labels is not None else None,
        d_hidden,
        d_weight,
        d_bias,
    )


def _chunk_tokens(tokens: int, bytes_per_token: int, logits_bytes: int, device: torch.device) -> int:
    """Tokens at a time under the byte budget; on a CPU in chunks of one size."""
    if device.type != "cpu":
        return max(128, ACCELERATOR_BYTES // bytes_per_token // 128 * 128)
    budget = max(CPU_LEAST, min(CPU_BYTES, int(CPU_SHARE * logits_bytes)))
    most = max(1, budget // bytes_per_token)
    return -(-tokens // -(-tokens // most)) if tokens else 1


def _empty(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """torch.empty, with large pages: the first touch of a page costs more than the arithmetic on it."""
    tensor = torch.empty(shape, dtype=dtype, device=device)
    if device.type == "cpu" and sys.platform == "linux" and tensor.nbytes >= 2**25:
        start, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        start += -start % mmap.PAGESIZE
        # The answer does not matter: it is advice, and nothing but time is lost where it is not taken.
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_HUGEPAGE)
    return tensor


def _empty_like(tensor: Tensor, real: int, dtype: torch.dtype) -> Tensor:
    """A buffer for a gradient, whose rows behind the real ones are 0."""
    gradient = _empty(*tensor.shape, dtype=dtype, device=tensor.device)
    gradient[real:].zero_()
    return gradient


def _tiles(vocabulary: int, device: torch.device) -> Iterator[slice]:
    step = CPU_ROWS if device.type == "cpu" else vocabulary
    for start in range(0, vocabulary, step):
        yield slice(start, min(start + step, vocabulary))


def _project(hidden: Tensor, head: LMHead, out: Tensor) -> None:
    """logit_scale * (hidden @ weight.T + bias) into `out`."""
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
    """softcap * tanh(logits / softcap) in place; its derivative 1 - tanh^2, if asked for."""
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
    """total += a @ b, or = for the first; the sum stays in total's dtype."""
    if total.dtype == a.dtype:
        total.addmm_(a, b, beta=0 if first else 1)
    elif first:
        total.copy_(a @ b)
    else:
        total.add_(a @ b)
