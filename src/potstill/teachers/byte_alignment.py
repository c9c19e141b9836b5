"""Where a student and a teacher with another tokenizer meet in a batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from potstill.losses.cross_tokenizer import boundary_bias
from potstill.losses.targets import DenseTargets, HeadTargets, SparseTargets
from potstill.losses.token_losses import compute_dtype, log_softmax_
from potstill.teachers.chunks import Pair

ELEMENTS = 1 << 24  # of the teacher's logits at a time


@dataclass(frozen=True)
class Across:
    """C chunks of bytes, in which every token counts: each is some tokens of the student and some of the teacher.

    Args:
        said: what the teacher says at its own Nt positions.
        student: [N] the chunk of each of the student's counting tokens, or -1.
        teacher: [Nt] the chunk of each of the teacher's tokens.
        student_tokens: [N] the student's tokens; teacher_tokens [Nt] likewise.
        log_probs: [C] the teacher's log-probability of each chunk, nats.
        goes_on: [C] whether the next chunk follows within the same text.
        spaced: [C] whether a space is put before the chunk that one of both does not have.
        sizes: [C] how many bytes each chunk has.
        pair: the two tokenizers.
    """

    said: HeadTargets | DenseTargets
    student: Tensor
    teacher: Tensor
    student_tokens: Tensor
    teacher_tokens: Tensor
    log_probs: Tensor
    goes_on: Tensor
    spaced: Tensor
    sizes: Tensor
    pair: Pair

    def __len__(self) -> int:
        return len(self.log_probs)

    def first(self) -> tuple[Tensor, Tensor]:
        """[C] the student's first token of each chunk, and the teacher's: places in N and in Nt."""
        return _edge(self.student, len(self), "amin"), _edge(self.teacher, len(self), "amin")

    def last(self) -> tuple[Tensor, Tensor]:
        """[C] likewise the last."""
        return _edge(self.student, len(self), "amax"), _edge(self.teacher, len(self), "amax")

    def bias(self) -> Tensor:
        """[C] how much the teacher keeps from each chunk for tokens that would go on over its end, where the student's
        would not; see `boundary_bias`.
        """
        mine, theirs = self.last()
        ends = zip(self.teacher_tokens[theirs].tolist(), self.student_tokens[mine].tolist(), strict=True)
        longer = [self.pair.longer(*end) for end in ends]
        bias = torch.zeros(len(self), device=self.log_probs.device)
        several = [i for i, ids in enumerate(longer) if len(ids)]
        for at in self._some(several):
            ids = [longer[i] for i in at]
            position = np.repeat(np.arange(len(at)), [len(one) for one in ids])
            given = (torch.from_numpy(x).to(bias.device) for x in (np.concatenate(ids), position))
            found = boundary_bias(self.logits(theirs[at]), self.teacher_tokens[theirs[at]], *given)
            bias[at] = found.to(bias.dtype)
        return bias

    def mapped(self, places: Tensor, top_k: int, temperature: float) -> SparseTargets:
        """What the teacher says of the next token, in the student's tokens: the `top_k` likeliest, and all others.

            P(student's token s) = sum of P(t) over the teacher's tokens t that begin with s; see `Pair.begins`

        Args:
            places: [n] into Nt.
            top_k: how many.
            temperature: the softmax temperature of the teacher's distribution.
        """
        begins = torch.tensor(self.pair.begins[: self.said.vocabulary], device=places.device)
        known = begins >= 0
        size = max(self.pair.student.of) + 1
        ids = [torch.empty(0, min(top_k, size), dtype=torch.long, device=places.device)]
        log_probs = [torch.empty(0, min(top_k, size), dtype=self.log_probs.dtype, device=places.device)]
        for at in self._some(range(len(places))):
            logits = self.logits(places[at])
            of_teacher = log_softmax_(logits.to(compute_dtype(logits.dtype), copy=True).div_(temperature)).exp_()
            mine = of_teacher.new_zeros(len(at), size).index_add_(1, begins[known], of_teacher[:, known])
            best = mine.div_(mine.sum(-1, keepdim=True)).topk(min(top_k, size))
            ids.append(best.indices)
            log_probs.append(best.values.log())
        return SparseTargets(torch.cat(ids), torch.cat(log_probs), "bucket", temperature)

    def logits(self, places: Tensor) -> Tensor:
        """The teacher's logits [n, V] at some of its positions, without gradient."""
        with torch.no_grad(), torch.autocast(places.device.type, enabled=False):
            if isinstance(self.said, DenseTargets):
                return self.said.logits[places]
            return HeadTargets(self.said.hidden[places], self.said.head).dense()

    def _some(self, items: Sequence[int]) -> Iterator[list[int]]:
        """The items, so many at a time that the teacher's logits for them are small."""
        rows = max(1, ELEMENTS // self.said.vocabulary)
        return (list(items[start : start + rows]) for start in range(0, len(items), rows))


def _edge(chunk: Tensor, chunks: int, which: str) -> Tensor:
    there = (chunk >= 0).nonzero()[:, 0]
    edge = torch.zeros(chunks, dtype=torch.long, device=chunk.device)
    return edge.scatter_reduce(0, chunk[there], there, which, include_self=False)
