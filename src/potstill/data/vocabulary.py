"""Check that teacher and student have one vocabulary."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

from transformers import PreTrainedTokenizerBase

from potstill.errors import VocabularyError
from potstill.models.loading import vocabulary_size


def shared_vocabulary(
    teacher: PreTrainedTokenizerBase, student: PreTrainedTokenizerBase, rows: Mapping[str, int]
) -> int:
    """Check that the token -> id maps are equal, for an equal size is no equal vocabulary; see `checked_vocabulary`."""
    teacher_ids, student_ids = teacher.get_vocab(), student.get_vocab()
    if teacher_ids != student_ids:
        raise VocabularyError(
            "vocabulary: expected one token -> id map for teacher and student, got two: "
            f"{_difference(teacher_ids, student_ids)}. Per-token divergence needs one vocabulary. Give the student "
            "the teacher's tokenizer, or use the cross-tokenizer terms chunks or mapped_logits of a recipe in place of "
            "logits."
        )
    return checked_vocabulary(student, rows)


def checked_vocabulary(tokenizer: PreTrainedTokenizerBase, rows: Mapping[str, int]) -> int:
    """Check that heads have a row for each token, and return the highest token id + 1.

    Heads may have more rows than there are tokens (padding): they are sliced to this size. `rows` are those of each
    model's head, by the name of the model in errors.
    """
    size = vocabulary_size(tokenizer)
    for name, count in rows.items():
        if count < size:
            raise VocabularyError(
                f"vocabulary: expected a {name} head with a row for each of {size} tokens, got {count}. "
                f"Resize the {name} with resize_token_embeddings({size}), or use the tokenizer it was trained with."
            )
    return size


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Compute the sha256 of the token -> id map and the chat template."""
    content = [sorted(tokenizer.get_vocab().items()), tokenizer.chat_template]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _difference(teacher: dict[str, int], student: dict[str, int]) -> str:
    parts = [f"{len(teacher)} and {len(student)} tokens"]
    for owner, ids, others in (("teacher", teacher, student), ("student", student, teacher)):
        if only := [token for token in ids if token not in others]:
            parts.append(f"{len(only)} only the {owner} has (such as {only[0]!r})")
    if moved := [token for token in teacher if token in student and teacher[token] != student[token]]:
        token = moved[0]
        parts.append(f"{len(moved)} under another id (such as {token!r}: {teacher[token]} and {student[token]})")
    return ", ".join(parts)
