"""A teacher with another tokenizer: wrapped for terms over bytes, and what the run notes about the alignment."""

from __future__ import annotations

from dataclasses import replace

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from potstill.data.vocabulary import checked_vocabulary
from potstill.errors import RecipeError
from potstill.runs.config.run import Recipe
from potstill.teachers.byte_alignment import AlignmentStats
from potstill.teachers.crosstok import CrossTokenizerTeacher
from potstill.teachers.source import LoadedTeacher
from potstill.teachers.teacher import Teacher

ROWS = 256  # on which the alignment is measured
MIN_COVERAGE = 0.9  # of the bytes in chunks: below it the run notes it


def across_tokenizers(recipe: Recipe, loaded: LoadedTeacher, student: PreTrainedTokenizerBase) -> LoadedTeacher:
    """Let the teacher read the student's text in tokens of its own, for terms over bytes.

    Raises:
        RecipeError: other terms compare tokens, or the teacher is not a single model.
        VocabularyError: a tokenizer does not keep the bytes of a text.
    """
    wrong = [term.name for term in recipe.objective if term.needs_teacher and not term.other_tokenizer]
    if wrong:
        raise RecipeError(
            f"objective: expected chunks, mapped_logits and uld without terms over tokens, got {', '.join(wrong)} too. "
            "Use terms over bytes, for a teacher with another tokenizer, or terms over tokens."
        )
    if not recipe.teacher.other_tokenizer:
        raise RecipeError(
            f"teacher: expected a model alone for terms that compare bytes, got {recipe.teacher.title}. Name it with "
            "teacher.model."
        )
    assert loaded.model is not None
    checked_vocabulary(loaded.tokenizer, {"teacher": int(loaded.model.get_output_embeddings().weight.shape[0])})
    limit = getattr(loaded.model.config, "max_position_embeddings", None)
    return replace(loaded, teacher=CrossTokenizerTeacher(loaded.teacher, loaded.tokenizer, student, max_length=limit))


def measure_alignment(teacher: Teacher, dataset: Dataset) -> AlignmentStats | None:
    """Measure a teacher's alignment on evenly spaced rows; None for a teacher of the student's tokens.

    Raises:
        RecipeError: there is no chunk at all.
    """
    count = min(ROWS, len(dataset))
    stats = teacher.alignment_stats(dataset[i * len(dataset) // count] for i in range(count))
    if stats is not None and not stats.chunks:
        raise RecipeError(
            f"objective: expected text that both tokenizers can read, got none in {count} rows of the training data. "
            "Use a teacher whose tokenizer knows these characters."
        )
    return stats


def notes(stats: AlignmentStats, tokens: int) -> tuple[str, ...]:
    """Notes on the alignment, for a student of so many tokens."""
    lines = [
        f"tokenizers: compared by bytes; {stats.shared:,} of the student's {tokens:,} tokens are the teacher's too. "
        f"{stats.chunks / stats.tokens:.2f} chunks per token cover {stats.covered / max(stats.bytes, 1):.1%} of the "
        f"text; {stats.one_to_one / stats.chunks:.0%} of them are one token for both."
    ]
    if stats.covered < MIN_COVERAGE * stats.bytes:
        lines.append(
            f"tokenizers: the teacher has no targets for {1 - stats.covered / stats.bytes:.0%} of the text: it cannot "
            "read it, or the row is too long for it. Labels alone are learned there."
        )
    lines.append(
        "tokenizers: agreement and KL are left out, which compare distributions over the same tokens. The teacher's "
        "loss is that of the same text, divided by the student's tokens."
    )
    return tuple(lines)
