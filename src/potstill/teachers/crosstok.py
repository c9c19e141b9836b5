"""A teacher with another tokenizer: it reads the student's text in its own tokens, and both meet in chunks of bytes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from potstill.errors import ShapeError
from potstill.losses.alignment import IGNORE, Alignment
from potstill.losses.cross_tokenizer import chunk_log_probs
from potstill.losses.fused_linear import linear_cross_entropy
from potstill.losses.targets import DenseTargets, HeadTargets
from potstill.losses.token_losses import token_cross_entropy
from potstill.teachers.byte_alignment import Across
from potstill.teachers.chunks import NONE, Pair, Reading
from potstill.teachers.model import ModelTeacher
from potstill.teachers.pieces import Pieces
from potstill.teachers.teacher import Teacher, TeacherOutput

KEPT_ROWS = 1 << 16  # readings that are remembered


class AlignmentStats(NamedTuple):
    """How far two tokenizers meet in some rows.

    Args:
        bytes: of the student's counting tokens.
        covered: of them, in chunks that count.
        tokens: the student's counting tokens.
        chunks: how many.
        alike: of them, one token for both.
    """

    bytes: int
    covered: int
    tokens: int
    chunks: int
    alike: int


class _Row(NamedTuple):
    """One row of a batch, as it counts."""

    ids: list[int]  # the teacher's
    student: np.ndarray  # chunk of each of the student's tokens, of those that count in this row, or -1
    teacher: np.ndarray
    goes_on: np.ndarray
    spaced: np.ndarray
    sizes: np.ndarray


class CrossTokenizerTeacher(Teacher):
    """A teacher that reads what the student reads, in its own tokens.

    The student's tokens are spelt in bytes, which the teacher's tokenizer reads; both meet where they have a boundary
    at the same byte. A chunk counts where all of the student's tokens in it count and the teacher predicts all of its
    own. For the terms `Chunks`, `MappedLogits` and `ULD`. How rows are read is remembered.

    Args:
        teacher: a model, or a teacher that gives whole distributions over its own vocabulary.
        teacher_tokenizer: its tokenizer, a fast one.
        student_tokenizer: the student's.
        max_length: tokens that the teacher can read in a row; what is behind them does not count. None: any number.

    Raises:
        VocabularyError: a tokenizer does not keep the bytes of a text.
    """

    other_tokenizer = True

    def __init__(
        self,
        teacher: Teacher | nn.Module,
        teacher_tokenizer: PreTrainedTokenizerBase,
        student_tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int | None = None,
    ) -> None:
        self.through = ModelTeacher(teacher) if isinstance(teacher, nn.Module) else teacher
        self.pair = Pair(Pieces(student_tokenizer, "student"), Pieces(teacher_tokenizer, "teacher"))
        self._most = max_length  # of its own tokens: what a row of the student's may have is another matter
        self._vocabulary = max(self.pair.teacher.of) + 1
        self._readings: dict[tuple[int, ...], Reading] = {}

    def reading(self, ids: Sequence[int]) -> Reading:
        """How the teacher reads a row of the student's tokens."""
        key = tuple(ids)
        if key not in self._readings:
            if len(self._readings) >= KEPT_ROWS:
                self._readings.clear()
            self._readings[key] = self.pair.read(list(key))
        return self._readings[key]

    @torch.no_grad()
    def __call__(self, batch: Mapping[str, Tensor], alignment: Alignment) -> TeacherOutput:
        home = batch["input_ids"].device
        ids, mask = batch["input_ids"].cpu(), batch["attention_mask"].bool().cpu()
        counts = torch.zeros_like(mask)
        positions = alignment.positions.cpu()
        counts.view(-1)[positions + 1] = True  # the token that is predicted
        rows = [
            self._row(row_ids[there].tolist(), row_counts[there].numpy())
            for row_ids, there, row_counts in zip(ids, mask, counts, strict=True)
        ]
        chunks = 0
        student, teacher = torch.full(ids.shape, NONE), []
        for i, row in enumerate(rows):
            student[i][mask[i]] = torch.from_numpy(np.where(row.student >= 0, row.student + chunks, NONE))
            teacher.append(row.teacher[row.teacher >= 0] + chunks)
            chunks += len(row.sizes)
        read, its = self._batch(rows, home)
        said = self.through(read, its).targets
        if not isinstance(said, HeadTargets | DenseTargets):
            raise ShapeError(
                "CrossTokenizerTeacher: expected one teacher's whole distributions, got a mixture or a few tokens of "
                "each. What it gives the tokens of the text is not among them. Use a teacher that is a model."
            )
        said = said.slice(min(self._vocabulary, said.vocabulary))

        def whole(parts: Sequence[np.ndarray]) -> Tensor:
            return torch.from_numpy(np.concatenate(parts)).to(home)

        of_teacher = whole(teacher)
        across = Across(
            said=said,
            student=student.view(-1)[positions + 1].to(home),
            teacher=of_teacher,
            student_tokens=alignment.labels,
            teacher_tokens=its.labels,
            log_probs=chunk_log_probs(-_cross_entropy(said, its.labels), of_teacher, chunks),
            goes_on=whole([row.goes_on for row in rows]),
            spaced=whole([row.spaced for row in rows]),
            sizes=whole([row.sizes for row in rows]),
            pair=self.pair,
        )
        return TeacherOutput(said, across=across)

    def meeting(self, dataset: Iterable[Any]) -> AlignmentStats:
        """How far the two tokenizers meet in rows of the student's data."""
        found = [self._met(row["input_ids"], np.array(row["labels"]) != IGNORE) for row in dataset]
        return AlignmentStats(*(sum(each) for each in zip(*found, strict=True)))

    def _met(self, ids: list[int], counts: np.ndarray) -> AlignmentStats:
        counts[:1] = False  # nothing predicts it
        row, spelled = self._row(ids, counts), self.pair.student.spell(ids)
        single = [np.bincount(x[x >= 0], minlength=len(row.sizes)) == 1 for x in (row.student, row.teacher)]
        return AlignmentStats(
            bytes=sum(token.size for token, count in zip(spelled, counts, strict=True) if count),
            covered=int(row.sizes.sum()),
            tokens=int(counts.sum()),
            chunks=len(row.sizes),
            alike=int((single[0] & single[1]).sum()),
        )

    def _row(self, ids: list[int], counts: np.ndarray) -> _Row:
        """The chunks of a row in which every token counts, numbered anew."""
        reading = self.reading(ids)
        most = len(reading.ids) if self._most is None else self._most
        predicted = np.arange(len(reading.ids)) < most
        predicted[:1] = False
        good = np.ones(len(reading.sizes), bool)
        for chunk, count in ((reading.student, counts), (reading.teacher, predicted)):
            good[chunk[(chunk >= 0) & ~count]] = False
        number = np.append(np.where(good, np.cumsum(good) - 1, NONE), NONE)  # the last for tokens of no chunk
        follows = reading.goes_on & np.append(good, False)[1:]
        opens = ~np.append(False, reading.goes_on)[:-1] & (reading.sizes > 0)
        spaced = opens & (self.pair.student.adds_space != self.pair.teacher.adds_space)
        return _Row(
            reading.ids[:most],
            number[reading.student],
            number[reading.teacher][:most],
            follows[good],
            spaced[good],
            reading.sizes[good],
        )

    def _batch(self, rows: Sequence[_Row], device: torch.device) -> tuple[dict[str, Tensor], Alignment]:
        """The teacher's batch, padded on the right, and its positions that predict a token of a chunk."""
        ids = [torch.tensor(row.ids or [0]) for row in rows]
        read = pad_sequence(ids, batch_first=True)
        mask = pad_sequence([torch.ones_like(one) for one in ids], batch_first=True)
        length = read.shape[1]
        places = [torch.from_numpy(np.flatnonzero(row.teacher >= 0)) for row in rows]
        positions = torch.cat([i * length + at - 1 for i, at in enumerate(places)])
        its = Alignment(positions.to(device), read.view(-1)[positions + 1].to(device), length)
        return {"input_ids": read.to(device), "attention_mask": mask.to(device)}, its


def _cross_entropy(said: HeadTargets | DenseTargets, labels: Tensor) -> Tensor:
    """What the teacher's tokens cost it, [Nt] nats."""
    if isinstance(said, HeadTargets):
        with torch.autocast(said.hidden.device.type, enabled=False):
            return linear_cross_entropy(said.hidden, said.head, labels, reduction="none").loss
    return token_cross_entropy(said.logits, labels)
