"""A teacher with another tokenizer: it reads the student's text in its own tokens, aligned in chunks of bytes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from potstill.errors import ShapeError
from potstill.losses.alignment import IGNORE, Alignment, causal_alignment
from potstill.losses.cross_tokenizer import chunk_log_probs
from potstill.losses.fused_linear import linear_cross_entropy
from potstill.losses.targets import DenseTargets, HeadTargets
from potstill.losses.token_losses import token_cross_entropy
from potstill.models.packing import PACKED_LENGTH
from potstill.teachers.byte_alignment import NONE, AlignedChunks, AlignedRow, AlignmentStats, TokenizerPair, renumber
from potstill.teachers.model import ModelTeacher
from potstill.teachers.pieces import TokenBytes
from potstill.teachers.teacher import Teacher, TeacherOutput

CACHED_ROWS = 1 << 16  # alignments that are kept in memory


class CrossTokenizerTeacher(Teacher):
    """A teacher that reads the student's text in tokens of its own.

    The bytes of the student's tokens are tokenized again by the teacher's tokenizer; a chunk ends where both have a
    token boundary. A chunk is used if all of the student's tokens in it are target tokens and the teacher predicts all
    of its own. For the terms `Chunks`, `MappedLogits` and `ULD`.

    Args:
        teacher: a model, or a teacher with full distributions over its own vocabulary. Both tokenizers are fast.
        max_length: maximum number of the teacher's tokens in a row; later chunks are not used. None: no limit.

    Raises:
        VocabularyError: a tokenizer does not keep the bytes of a text.
    """

    other_tokenizer = True
    needs_trial = False
    without_own_prompts = "one with another tokenizer"

    def __init__(
        self,
        teacher: Teacher | nn.Module,
        teacher_tokenizer: PreTrainedTokenizerBase,
        student_tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int | None = None,
    ) -> None:
        self.teacher = ModelTeacher(teacher) if isinstance(teacher, nn.Module) else teacher
        self.pair = TokenizerPair(TokenBytes(student_tokenizer, "student"), TokenBytes(teacher_tokenizer, "teacher"))
        self._limit = max_length  # in the teacher's tokens, unlike `max_length` of `Teacher`
        self._vocabulary = max(self.pair.teacher.bytes_of) + 1
        self._rows: dict[tuple[int, ...], AlignedRow] = {}

    def align(self, ids: Sequence[int]) -> AlignedRow:
        key = tuple(ids)
        if key not in self._rows:
            if len(self._rows) >= CACHED_ROWS:
                self._rows.clear()
            self._rows[key] = self.pair.align(list(key))
        return self._rows[key]

    @torch.no_grad()
    def __call__(self, batch: Mapping[str, Tensor], alignment: Alignment) -> TeacherOutput:
        home = batch["input_ids"].device
        ids, mask = batch["input_ids"].cpu(), batch["attention_mask"].bool().cpu()
        is_target = torch.zeros_like(mask)
        predicted = alignment.positions.cpu() + 1
        is_target.view(-1)[predicted] = True
        rows: list[AlignedRow] = []
        chunks = 0
        for row_ids, attended, row_targets in zip(ids, mask, is_target, strict=True):
            rows.append(self._chunks_of(row_ids[attended].tolist(), row_targets[attended].numpy(), chunks))
            chunks += len(rows[-1].sizes)
        names = ("student", "teacher", "continues", "spaced", "sizes")
        joined = {
            name: torch.from_numpy(np.concatenate([getattr(row, name) for row in rows])).to(home) for name in names
        }
        student = torch.full(ids.shape, NONE, device=home).masked_scatter_(mask.to(home), joined.pop("student"))
        in_chunk = joined.pop("teacher")
        teacher = in_chunk[in_chunk >= 0]
        teacher_batch, teacher_alignment = _batch(rows, home)
        teacher_batch |= {name: batch[name] for name in (PACKED_LENGTH,) if name in batch}
        targets = self.teacher(teacher_batch, teacher_alignment).targets
        if not isinstance(targets, HeadTargets | DenseTargets):
            raise ShapeError(
                "CrossTokenizerTeacher: expected one teacher's full distributions, got a mixture or a few tokens of "
                "each. Use a teacher that is a model."
            )
        targets = targets.slice(min(self._vocabulary, targets.vocabulary))
        student, labels = student.view(-1)[predicted.to(home)], teacher_alignment.labels
        log_probs = chunk_log_probs(-_cross_entropy(targets, labels), teacher, chunks)
        tokens = {"student_tokens": alignment.labels, "teacher_tokens": labels}
        aligned = AlignedChunks(targets, student, teacher, **tokens, log_probs=log_probs, pair=self.pair, **joined)
        return TeacherOutput(targets, chunks=aligned)

    def alignment_stats(self, rows: Iterable[Any]) -> AlignmentStats:
        sums = np.zeros(5, int)
        for row in rows:
            ids, is_target = row["input_ids"], np.array(row["labels"]) != IGNORE
            is_target[:1] = False  # nothing predicts it
            chunks = self._chunks_of(ids, is_target)
            count = len(chunks.sizes)
            counts = [np.bincount(x[x >= 0], minlength=count) for x in (chunks.student, chunks.teacher)]
            one_to_one = ((counts[0] == 1) & (counts[1] == 1)).sum()
            sizes = np.array([span.size for span in self.pair.student.spans(ids)], int)
            sums += [sizes[is_target].sum(), chunks.sizes.sum(), is_target.sum(), count, one_to_one]
        return AlignmentStats._make([*sums.tolist(), self.pair.num_shared])

    def _chunks_of(self, ids: list[int], is_target: np.ndarray, start: int = 0) -> AlignedRow:
        """The chunks of a row in which both predict every token, numbered anew from `start`."""
        row = self.align(ids)
        limit = len(row.ids) if self._limit is None else self._limit
        predicted = np.arange(len(row.ids)) < limit
        predicted[:1] = False
        good = np.ones(len(row.sizes), bool)
        for chunk, counts in ((row.student, is_target), (row.teacher, predicted)):
            good[chunk[(chunk >= 0) & ~counts]] = False
        number = renumber(good, start)
        student, teacher = number[row.student], number[row.teacher][:limit]
        continues = (row.continues & np.append(good, False)[1:])[good]
        return AlignedRow(row.ids[:limit], student, teacher, continues, row.spaced[good], row.sizes[good])


def _batch(rows: Sequence[AlignedRow], device: torch.device) -> tuple[dict[str, Tensor], Alignment]:
    """The teacher's batch, padded on the right, and its positions that predict a token of a chunk."""
    ids = [torch.tensor(row.ids or [0]) for row in rows]
    chunks = [torch.tensor(row.teacher.tolist() or [NONE]) for row in rows]
    padded, mask = (pad_sequence(parts, True).to(device) for parts in (ids, [torch.ones_like(row) for row in ids]))
    in_chunk = pad_sequence(chunks, True, NONE).to(device) >= 0
    return {"input_ids": padded, "attention_mask": mask}, causal_alignment(padded.masked_fill(~in_chunk, IGNORE))


def _cross_entropy(targets: HeadTargets | DenseTargets, labels: Tensor) -> Tensor:
    if isinstance(targets, HeadTargets):
        with torch.autocast(targets.hidden.device.type, enabled=False):
            return linear_cross_entropy(targets.hidden, targets.head, labels, reduction="none").loss
    return token_cross_entropy(targets.logits, labels)
