"""Chunks of bytes at which a student and a teacher with another tokenizer are aligned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from potstill.losses.cross_tokenizer import boundary_bias
from potstill.losses.targets import DenseTargets, HeadTargets, SparseTargets
from potstill.losses.token_losses import compute_dtype, log_softmax_
from potstill.teachers.chunks import TokenizerPair

ELEMENTS = 1 << 24  # of the teacher's logits at a time


class AlignmentStats(NamedTuple):
    """How much of some rows is in chunks."""

    bytes: int  # of the student's target tokens
    covered: int  # those of them in chunks without an ignored token
    tokens: int  # the student's target tokens
    chunks: int
    one_to_one: int  # chunks that are one token for both
    shared: int  # tokens that both vocabularies have


@dataclass(frozen=True)
class AlignedChunks:
    """C chunks of bytes in a batch: each is some target tokens of the student and some tokens of the teacher."""

    targets: HeadTargets | DenseTargets  # the teacher's, at its own Nt positions
    student: Tensor  # [N] the chunk of each of the student's target tokens, or -1
    teacher: Tensor  # [Nt] the chunk of each of the teacher's tokens
    student_tokens: Tensor  # [N] ids
    teacher_tokens: Tensor  # [Nt] ids
    log_probs: Tensor  # [C] the teacher's log-probability of each chunk, nats
    continues: Tensor  # [C] whether the next chunk follows within the same text
    spaced: Tensor  # [C] whether one of the tokenizers puts a space before the chunk
    sizes: Tensor  # [C] bytes
    pair: TokenizerPair

    def __len__(self) -> int:
        return len(self.log_probs)

    def first(self) -> tuple[Tensor, Tensor]:
        """[C] the student's first token of each chunk, and the teacher's: indices into N and Nt."""
        return _edge(self.student, len(self), "amin"), _edge(self.teacher, len(self), "amin")

    def last(self) -> tuple[Tensor, Tensor]:
        """[C] likewise the last."""
        return _edge(self.student, len(self), "amax"), _edge(self.teacher, len(self), "amax")

    def bias(self) -> Tensor:
        """[C] the teacher's share of each chunk's probability on longer tokens that cross the chunk's end and that the
        student does not have; see `boundary_bias`.
        """
        student, teacher = self.last()
        ends = zip(self.teacher_tokens[teacher].tolist(), self.student_tokens[student].tolist(), strict=True)
        longer = [self.pair.longer_tokens(*end) for end in ends]
        bias = torch.zeros(len(self), device=self.log_probs.device)
        crossed = [i for i, ids in enumerate(longer) if len(ids)]
        for start in range(0, len(crossed), self._batch_rows):
            chunks = crossed[start : start + self._batch_rows]
            ids = [longer[i] for i in chunks]
            rows = np.repeat(np.arange(len(chunks)), [len(tokens) for tokens in ids])
            tensors = (torch.from_numpy(x).to(bias.device) for x in (np.concatenate(ids), rows))
            ends_of = teacher[chunks]
            bias[chunks] = boundary_bias(self.logits(ends_of), self.teacher_tokens[ends_of], *tensors).to(bias.dtype)
        return bias

    def mapped(self, positions: Tensor, top_k: int, temperature: float) -> SparseTargets:
        """Map next-token distributions at positions [n] of Nt to the student's tokens: the likeliest, and all others.

        P(student's token s) = sum of P(t) over the teacher's tokens t that begin with s
        """
        first = torch.tensor(self.pair.first_student_token[: self.targets.vocabulary], device=positions.device)
        known = first >= 0
        size = max(self.pair.student.bytes_of) + 1
        kept = []
        for chosen in positions.split(self._batch_rows):
            logits = self.logits(chosen)
            probs = log_softmax_(logits.to(compute_dtype(logits.dtype), copy=True).div_(temperature)).exp_()
            mapped = probs.new_zeros(len(chosen), size).index_add_(1, first[known], probs[:, known])
            kept.append(mapped.div_(mapped.sum(-1, keepdim=True)).topk(min(top_k, size)))
        ids, probs = torch.cat([best.indices for best in kept]), torch.cat([best.values for best in kept])
        return SparseTargets(ids, probs.log(), "bucket", temperature)

    def logits(self, positions: Tensor) -> Tensor:
        """The teacher's logits [n, V] at some of its positions, without gradient."""
        with torch.no_grad(), torch.autocast(positions.device.type, enabled=False):
            if isinstance(self.targets, DenseTargets):
                return self.targets.logits[positions]
            return HeadTargets(self.targets.hidden[positions], self.targets.head).dense()

    @property
    def _batch_rows(self) -> int:
        """Number of positions whose logits are small."""
        return max(1, ELEMENTS // self.targets.vocabulary)


def _edge(chunk: Tensor, chunks: int, reduce: str) -> Tensor:
    index = (chunk >= 0).nonzero()[:, 0]
    edge = torch.zeros(chunks, dtype=torch.long, device=chunk.device)
    return edge.scatter_reduce(0, chunk[index], index, reduce, include_self=False)
