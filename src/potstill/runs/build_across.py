"""From a recipe whose teacher may have another tokenizer to who speaks, and how far both meet in the data."""

from __future__ import annotations

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from potstill.data.vocabulary import checked_vocabulary
from potstill.errors import RecipeError
from potstill.models.spacing import evenly_spaced
from potstill.runs.build_teacher import Speaker
from potstill.runs.config.run import Recipe
from potstill.teachers.crosstok import AlignmentStats, CrossTokenizerTeacher
from potstill.teachers.model import ModelTeacher

ROWS = 256  # on which it is seen how far two tokenizers meet
MIN_COVERAGE = 0.9  # of the bytes in chunks: below it the run says so


def reading_bytes(recipe: Recipe, speaker: Speaker, student: PreTrainedTokenizerBase) -> Speaker:
    """The speaker, reading the student's text in tokens of its own, for terms that compare bytes.

    Raises:
        RecipeError: other terms compare tokens, or the teacher is no model here.
        VocabularyError: a tokenizer does not keep the bytes of a text.
    """
    wrong = [term.name for term in recipe.objective if term.needs_teacher and not term.other_tokenizer]
    if wrong:
        raise RecipeError(
            f"objective: expected chunks, mapped_logits and uld without terms over tokens, got {', '.join(wrong)} too. "
            "They compare bytes, with a teacher that may have other tokens. Leave out the ones or the others."
        )
    if not isinstance(speaker.teacher, ModelTeacher):
        raise RecipeError(
            f"teacher: expected a model alone for terms that compare bytes, got {recipe.teacher.title}. It reads the "
            "student's text in tokens of its own. Name it with teacher.model."
        )
    assert speaker.model is not None
    checked_vocabulary(speaker.tokenizer, {"teacher": int(speaker.model.get_output_embeddings().weight.shape[0])})
    limit = getattr(speaker.model.config, "max_position_embeddings", None)
    teacher = CrossTokenizerTeacher(speaker.teacher, speaker.tokenizer, student, max_length=limit)
    return speaker._replace(teacher=teacher)


def meeting(teacher: CrossTokenizerTeacher, dataset: Dataset) -> AlignmentStats:
    """How far both tokenizers meet, on rows that are evenly spread.

    Raises:
        RecipeError: nowhere.
    """
    wanted = min(ROWS, len(dataset))
    found = teacher.meeting(dataset[i] for i in evenly_spaced(wanted, len(dataset)))
    if not found.chunks:
        raise RecipeError(
            f"objective: expected text that both tokenizers can read, got none in {wanted} rows of the training data. "
            "No chunk of it counts for both. Use a teacher whose tokenizer knows these characters."
        )
    return found


def notes(found: AlignmentStats, shared: int, tokens: int) -> tuple[str, ...]:
    """What the run should say of it.

    Args:
        found: how far they meet.
        shared: how many tokens both have.
        tokens: how many the student has.
    """
    said = [
        f"tokenizers: compared by bytes; {shared:,} of the student's {tokens:,} tokens are the teacher's too. "
        f"{found.chunks / found.tokens:.2f} chunks to a token hold {found.covered / max(found.bytes, 1):.1%} of the "
        f"text; {found.alike / found.chunks:.0%} of them are one token for both."
    ]
    if found.covered < MIN_COVERAGE * found.bytes:
        said.append(
            f"tokenizers: the teacher says nothing of {1 - found.covered / found.bytes:.0%} of the text: it cannot "
            "read it, or it reads no further. Labels alone teach it there."
        )
    said.append(
        "tokenizers: agreement and KL are left out, which compare distributions over the same tokens. The teacher's "
        "loss is that of the same text, divided by the student's tokens."
    )
    return tuple(said)
