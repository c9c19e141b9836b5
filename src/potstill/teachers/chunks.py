"""One text in the tokens of two tokenizers: which of them say the same bytes."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from potstill.teachers.pieces import Pieces

NONE = -1  # a token that belongs to no chunk


@dataclass(frozen=True)
class Reading:
    """A row of the student's tokens as the teacher reads it, and the chunks in which both meet.

    A chunk is the shortest stretch of bytes at whose start and end both have a boundary, or a special token that both
    have. Every byte that both can say is in one chunk, and so are the tokens that say it.

    Args:
        ids: [teacher's tokens].
        student: [student's tokens] the chunk of each, or -1.
        teacher: [teacher's tokens] likewise.
        goes_on: [chunks] whether the next chunk follows within the same text.
        sizes: [chunks] how many bytes each has.
    """

    ids: list[int]
    student: np.ndarray
    teacher: np.ndarray
    goes_on: np.ndarray
    sizes: np.ndarray


def meet(student: Sequence[int], teacher: Sequence[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The chunks of one text of which both say every byte.

    Args:
        student: how many bytes each of the student's tokens stands for.
        teacher: likewise; the sums are equal.

    Returns:
        The chunk of each of the student's tokens, that of each of the teacher's, and the bytes of each chunk. A token
        without a byte belongs to what comes after it.
    """
    mine, theirs = (np.cumsum(np.asarray(sizes, dtype=np.int64)) for sizes in (student, teacher))
    ends = np.intersect1d(mine, theirs)
    ends = ends[ends > 0]
    chunks = []
    for sizes, after in ((student, mine), (teacher, theirs)):
        empty = np.asarray(sizes, dtype=np.int64) == 0
        chunk = np.searchsorted(ends, np.where(empty, after + 1, after), side="left")
        chunks.append(np.minimum(chunk, len(ends) - 1))  # -1 where there is no byte at all
    return chunks[0], chunks[1], np.diff(ends, prepend=0)


class Pair:
    """Two tokenizers: how the teacher reads what the student has.

    Special tokens stand for no bytes. They meet by role (bos, eos) or by name; one that the teacher does not have is
    left out of what it reads.

    Args:
        student: its tokens' bytes; teacher likewise.
    """

    def __init__(self, student: Pieces, teacher: Pieces) -> None:
        self.student, self.teacher = student, teacher
        self._longer: dict[tuple[int, int], np.ndarray] = {}
        mine, theirs = self.student.tokenizer, self.teacher.tokenizer
        vocab = theirs.get_vocab()
        self._counterparts: dict[int, int] = {}
        for token, id in mine.get_vocab().items():
            named = token in vocab and self.teacher.of[vocab[token]] is None
            if self.student.of[id] is None and named and id != mine.unk_token_id:
                self._counterparts[id] = vocab[token]
        for role in ("bos_token_id", "eos_token_id"):  # eos last: it decides where one token is both
            ours, other = getattr(mine, role), getattr(theirs, role)
            if ours is not None and other is not None:
                self._counterparts[ours] = other
        self._opening = self.teacher.opening()
        self._sorted = sorted((piece, id) for piece, id in self.teacher.ids.items())

    def read(self, ids: list[int]) -> Reading:
        """The student's row as the teacher reads it."""
        first = self._counterparts.get(ids[0]) if ids else None
        read = [] if self._opening and first == self._opening[0] else [*self._opening]
        student = np.full(len(ids), NONE)
        teacher: list[int] = [NONE] * len(read)
        goes_on: list[bool] = []
        sizes: list[int] = []
        for start, end in self._stretches(ids):
            if self.student.of[ids[start]] is None:
                other = self._counterparts.get(ids[start])
                if other is not None:
                    student[start] = len(sizes)
                    teacher.append(len(sizes))
                    read.append(other)
                    goes_on.append(False)
                    sizes.append(0)
                continue
            said = self.student.spell(ids[start:end])
            text = self.student.text(said)
            spelled = self.teacher.read(text)
            if spelled is None:  # there is nothing to read it as
                continue
            mine, theirs, found = meet([one.size for one in said], [one.size for one in spelled])
            read += [one.id for one in spelled]
            good = np.ones(len(found), bool)
            good[[chunk for chunk, one in zip(theirs, spelled, strict=True) if not one.exact]] = False
            number = np.append(np.where(good, np.cumsum(good) - 1 + len(sizes), NONE), NONE)  # the last for NONE
            student[start:end] = number[mine]
            teacher += number[theirs].tolist()
            goes_on += np.append(good, False)[1:][good].tolist()
            sizes += found[good].tolist()
        return Reading(read, student, np.array(teacher, dtype=np.int64), np.array(goes_on, bool), np.array(sizes, int))

    def _stretches(self, ids: list[int]) -> list[tuple[int, int]]:
        """Where text is, and each special token by itself."""
        bounds: list[tuple[int, int]] = []
        start = 0
        for i, id in enumerate([*ids, None]):
            if id is None or self.student.of[id] is None:
                bounds += [(start, i)] if i > start else []
                bounds += [(i, i + 1)] if id is not None else []
                start = i + 1
        return bounds

    def longer(self, teacher: int, student: int) -> np.ndarray:
        """The teacher's tokens that begin with a token of its own and go on in a way in which the student cannot.

        What the student too would read as one longer token, it has learnt as the teacher has.

        Args:
            teacher: the teacher's last token of a chunk.
            student: the student's.
        """
        key = (teacher, student)
        if key not in self._longer:
            piece, mine = self.teacher.of[teacher], self.student.of[student]
            found: list[int] = []
            if piece and mine:
                at = bisect_left(self._sorted, (piece, -1))
                while at < len(self._sorted) and self._sorted[at][0].startswith(piece):
                    other, id = self._sorted[at]
                    at += 1
                    if len(other) > len(piece) and mine + other[len(piece) :] not in self.student.ids:
                        found.append(id)
            self._longer[key] = np.array(found, dtype=np.int64)
        return self._longer[key]

    def shared(self) -> int:
        """How many of the student's tokens say the bytes of one of the teacher's, or are its special token."""
        return len(self.student.ids.keys() & self.teacher.ids.keys()) + len(self._counterparts)

    @cached_property
    def begins(self) -> list[int]:
        """Teacher's token id -> the token with which the student begins to say it; -1 where there is none.

        It is the same token where the student has it. A special token is its counterpart.
        """
        found = [NONE] * (max(self.teacher.of) + 1)
        for id, piece in self.teacher.of.items():
            if piece:
                found[id] = self._first(piece)
        for mine, theirs in self._counterparts.items():
            found[theirs] = mine
        return found

    def _first(self, piece: bytes) -> int:
        """The student's first token of some bytes within a text."""
        if piece in self.student.ids:
            return self.student.ids[piece]
        for first in (self.student.read(piece) or [])[:1]:
            if first.exact and first.size == len(self.student.of[first.id] or b""):
                return first.id
        # It would put a space before them: the longest token then.
        starts = (piece[:size] for size in range(len(piece) - 1, 0, -1))
        return next((self.student.ids[start] for start in starts if start in self.student.ids), NONE)
