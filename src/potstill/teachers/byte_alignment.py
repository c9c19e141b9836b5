"""Alignment of two tokenizers by byte offsets: the chunks of a text at whose ends both have a token boundary."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from potstill.losses.cross_tokenizer import boundary_bias
from potstill.losses.targets import DenseTargets, HeadTargets, SparseTargets
from potstill.losses.token_losses import compute_dtype, log_softmax_
from potstill.teachers.pieces import TokenBytes, TokenSpan

ELEMENTS = 1 << 24  # of the teacher's logits at a time
NONE = -1  # the chunk of a token that is in none


@dataclass(frozen=True)
class AlignedRow:
    """A row of the student's tokens in the teacher's tokens, with their chunks.

    A chunk is the shortest run of bytes at whose start and end both have a boundary, or a special token of both. Every
    byte that both can represent is in one chunk.
    """

    ids: list[int]  # the teacher's tokens
    student: np.ndarray  # the chunk of each of the student's tokens, or -1
    teacher: np.ndarray
    continues: np.ndarray  # [chunks] whether the next chunk follows within the same text
    spaced: np.ndarray  # [chunks] whether one of the tokenizers puts a space before it
    sizes: np.ndarray  # [chunks] bytes


def align_sizes(student: Sequence[int], teacher: Sequence[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Find the chunks of one text, from the bytes of each of the student's and of the teacher's tokens of it.

    Returns the chunk of each of the student's tokens, that of each of the teacher's, and the bytes of each chunk. A
    token without bytes belongs to the chunk after it.
    """
    sizes = [np.asarray(tokens, dtype=np.int64) for tokens in (student, teacher)]
    offsets = [np.cumsum(tokens) for tokens in sizes]
    ends = np.intersect1d(offsets[0], offsets[1])
    ends = ends[ends > 0]
    chunks = [np.searchsorted(ends, after + (size == 0)) for size, after in zip(sizes, offsets, strict=True)]
    # -1 where there is no byte at all
    return *(np.minimum(chunk, len(ends) - 1) for chunk in chunks), np.diff(ends, prepend=0)


class TokenizerPair:
    """A student's and a teacher's tokenizer.

    Special tokens have no bytes. They are matched by role (bos, eos) or by name, or left out of the teacher's row.
    """

    def __init__(self, student: TokenBytes, teacher: TokenBytes) -> None:
        self.student, self.teacher = student, teacher
        self._longer: dict[tuple[int, int], np.ndarray] = {}
        tokenizer, other = student.tokenizer, teacher.tokenizer
        vocabulary = other.get_vocab()
        self._counterparts = {
            id: vocabulary[token]
            for token, id in tokenizer.get_vocab().items()
            if student.bytes_of[id] is None and id != tokenizer.unk_token_id
            if token in vocabulary and teacher.bytes_of[vocabulary[token]] is None
        }
        for role in ("bos_token_id", "eos_token_id"):  # eos last: it decides where one token is both
            if getattr(tokenizer, role) is not None and getattr(other, role) is not None:
                self._counterparts[getattr(tokenizer, role)] = getattr(other, role)
        self._prefix = teacher.prefix()
        self._sorted = sorted(teacher.ids.items())

    def align(self, ids: list[int]) -> AlignedRow:
        """Tokenize a row of the student's tokens with the teacher's tokenizer, and find the chunks."""
        first = self._counterparts.get(ids[0]) if ids else None
        row = [] if self._prefix and first == self._prefix[0] else [*self._prefix]
        student: list[int] = []
        teacher = [NONE] * len(row)
        continues: list[bool] = []
        sizes: list[int] = []
        for _, run in groupby(ids, key=lambda id: self.student.bytes_of[id] is None):
            tokens, of_student, of_teacher, lengths = self._align_run([*run])
            row += [token.id for token in tokens]
            good = np.ones(len(lengths), bool)
            good[of_teacher[np.array([not token.exact for token in tokens], bool)]] = False
            number = renumber(good, len(sizes))
            student += number[of_student].tolist()
            teacher += number[of_teacher].tolist()
            continues += (np.append(good, False)[1:] & (lengths > 0))[good].tolist()
            sizes += lengths[good].tolist()
        follows, lengths = np.array(continues, bool), np.array(sizes, int)
        opens = ~np.append(False, follows)[:-1] & (lengths > 0)
        spaced = opens & (self.student.adds_space != self.teacher.adds_space)
        return AlignedRow(row, np.array(student, int), np.array(teacher, int), follows, spaced, lengths)

    def _align_run(self, ids: list[int]) -> tuple[list[TokenSpan], np.ndarray, np.ndarray, np.ndarray]:
        """The teacher's tokens for a run of text or of special tokens, and the chunks as in `align_sizes`."""
        if self.student.bytes_of[ids[0]] is None:
            tokens = [TokenSpan(self._counterparts[id], 0) for id in ids if id in self._counterparts]
            matched = np.array([id in self._counterparts for id in ids])
            return tokens, renumber(matched)[:-1], np.arange(len(tokens)), np.zeros(len(tokens), int)
        spans = self.student.spans(ids)
        text = self.teacher.tokenize(self.student.text(spans))
        if text is None:  # the teacher has no tokens for it
            return [], np.full(len(ids), NONE), np.empty(0, int), np.empty(0, int)
        return text, *align_sizes([span.size for span in spans], [token.size for token in text])

    def longer_tokens(self, teacher: int, student: int) -> np.ndarray:
        """Tokens that extend the teacher's last token of a chunk as no longer token extends the student's last one."""
        key = (teacher, student)
        if key not in self._longer:
            piece, of_student = self.teacher.bytes_of[teacher], self.student.bytes_of[student]
            longer: list[int] = []
            if piece and of_student:
                for i in range(bisect_left(self._sorted, (piece, -1)), len(self._sorted)):
                    other, id = self._sorted[i]
                    if not other.startswith(piece):
                        break
                    if len(other) > len(piece) and of_student + other[len(piece) :] not in self.student.ids:
                        longer.append(id)
            self._longer[key] = np.array(longer, dtype=np.int64)
        return self._longer[key]

    @cached_property
    def num_shared(self) -> int:
        """Number of the student's tokens that the teacher has too, by their bytes or as special tokens."""
        return len(self.student.ids.keys() & self.teacher.ids.keys()) + len(self._counterparts)

    @cached_property
    def first_student_token(self) -> list[int]:
        """For each of the teacher's token ids, the student's first token of its bytes; -1 where there is none."""
        first = {id: self._first(piece) for id, piece in self.teacher.bytes_of.items() if piece}
        first |= {of_teacher: of_student for of_student, of_teacher in self._counterparts.items()}
        return [first.get(id, NONE) for id in range(max(self.teacher.bytes_of) + 1)]

    def _first(self, piece: bytes) -> int:
        """The student's first token of some bytes within a text."""
        if piece in self.student.ids:
            return self.student.ids[piece]
        for first in (self.student.tokenize(piece) or [])[:1]:
            if first.exact and first.size == len(self.student.bytes_of[first.id] or b""):
                return first.id
        # The student would put a space before them: the longest token then.
        starts = (piece[:size] for size in range(len(piece) - 1, 0, -1))
        return next((self.student.ids[start] for start in starts if start in self.student.ids), NONE)


def renumber(good: np.ndarray, start: int = 0) -> np.ndarray:
    """New numbers of the good chunks, from `start`; the entry behind the last is for tokens of no chunk."""
    return np.append(np.where(good, np.cumsum(good) - 1 + start, NONE), NONE)


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
        """[C] the teacher's share on longer tokens across each chunk's end, unknown to the student: `boundary_bias`."""
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
        probs, ids = (torch.cat(parts) for parts in zip(*kept, strict=True))
        return SparseTargets(ids, probs.log(), "bucket", temperature)

    def logits(self, positions: Tensor) -> Tensor:
        """The teacher's logits [n, V] at some of its positions, without gradient."""
        with torch.no_grad(), torch.autocast(positions.device.type, enabled=False):
            if isinstance(self.targets, DenseTargets):
                return self.targets.logits[positions]
            return HeadTargets(self.targets.hidden[positions], self.targets.head).dense()

    @property
    def _batch_rows(self) -> int:
        return max(1, ELEMENTS // self.targets.vocabulary)


def _edge(chunk: Tensor, chunks: int, reduce: str) -> Tensor:
    index = (chunk >= 0).nonzero()[:, 0]
    edge = torch.zeros(chunks, dtype=torch.long, device=chunk.device)
    return edge.scatter_reduce(0, chunk[index], index, reduce, include_self=False)
