"""Alignment of two tokenizers by byte offsets: the chunks of a text at whose ends both have a token boundary."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

import numpy as np

from potstill.teachers.pieces import TokenBytes, TokenSpan

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
        self._sorted = sorted((piece, id) for piece, id in teacher.ids.items())

    def align(self, ids: list[int]) -> AlignedRow:
        """Tokenize a row of the student's tokens with the teacher's tokenizer, and find the chunks."""
        first = self._counterparts.get(ids[0]) if ids else None
        row = [] if self._prefix and first == self._prefix[0] else [*self._prefix]
        student: list[int] = []
        teacher: list[int] = [NONE] * len(row)
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
        first = [NONE] * (max(self.teacher.bytes_of) + 1)
        for id, piece in self.teacher.bytes_of.items():
            if piece:
                first[id] = self._first(piece)
        for of_student, of_teacher in self._counterparts.items():
            first[of_teacher] = of_student
        return first

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
