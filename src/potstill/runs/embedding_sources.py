"""Read the texts and vectors of an embedding recipe, and hold some out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from potstill.data.duplicates import Overlap, find_overlap, hash_rows
from potstill.data.loading import load
from potstill.data.sources import Source
from potstill.data.texts import StoredTexts
from potstill.embedding.static import TokenTable, vocabulary_words
from potstill.embedding.teachers import FileTeacher, TextEncoder, encode_texts
from potstill.embedding.vectors import TensorVectors, VectorArray, VectorSlice, check_vectors
from potstill.errors import DataError
from potstill.evaluate.space import MOST_ROWS
from potstill.runs.config.embedding import EmbeddingRecipe, TextsPart

# Rows of the first texts, of the second texts, and human similarity scores of the pairs.
ScoredPairs = tuple[list[int], list[int], list[float]]


class Texts(NamedTuple):
    """The texts of a file, and the pairs of them that have human scores."""

    texts: Sequence[str]
    pairs: ScoredPairs | None = None


class EmbeddingData(NamedTuple):
    """Everything that a student is trained and measured on."""

    vectors: VectorArray  # the teacher's, to learn from
    held_out: Tensor  # [M, H], the teacher's
    texts: Sequence[str] | None = None  # of the vectors
    held_out_texts: Sequence[str] | None = None
    pairs: ScoredPairs | None = None  # held-out rows with human scores
    teacher: Any = None  # the sentence-transformers model, if the teacher is one
    tokens: TokenTable | None = None  # what the teacher makes of single tokens, if the student starts from it
    notes: tuple[str, ...] = ()  # to print
    eval_in_train: float = 0.0  # share of the held-out rows that are training rows


def load_data(
    recipe: EmbeddingRecipe, on_progress: Callable[[int, int], None] = lambda done, total: None
) -> EmbeddingData:
    """Read texts and vectors, encode texts where the teacher does, and check that everything fits.

    `on_progress` is called with the number of texts that are encoded, and of all.
    """
    data = _read_data(recipe, on_progress)
    if not recipe.trains or (overlap := _find_overlap(data)) is None:
        return data
    warning = (
        f"data.eval: {overlap.rows:,} of {overlap.of:,} held-out rows are training rows too, such as held-out row "
        f"{overlap.held_out_row:,} and training row {overlap.train_row:,}. They are not held out: remove them."
    )
    return data._replace(notes=(warning, *data.notes), eval_in_train=overlap.share)


def _find_overlap(data: EmbeddingData) -> Overlap | None:
    """Find held-out rows that are training rows: by their texts, or by their vectors where there are no texts."""
    if data.texts is not None and data.held_out_texts is not None:
        texts = data.texts, data.held_out_texts
        return find_overlap(*(hash_rows(text.strip().encode() for text in rows) for rows in texts))
    vectors = data.vectors, TensorVectors(data.held_out)
    return find_overlap(
        *(hash_rows(row.tobytes() for block in rows.blocks() for row in block.numpy()) for rows in vectors)
    )


def _read_data(recipe: EmbeddingRecipe, on_progress: Callable[[int, int], None]) -> EmbeddingData:
    train, held = read_texts(recipe)
    encoder = recipe.teacher.load()
    model = encoder.model if encoder else None
    tokens = recipe.student.read_tokens(model, on_progress=on_progress)
    if not recipe.trains:
        assert encoder is not None and tokens is not None
        return tokens_alone(recipe, encoder, tokens, held)
    if isinstance(recipe.teacher, FileTeacher):
        vectors, eval_vectors = recipe.teacher.open()
    else:
        assert encoder is not None and train is not None
        encode = partial(encode_texts, encoder=encoder, folder=Path(recipe.output) / "vectors", on_progress=on_progress)
        vectors, eval_vectors = encode(train.texts), encode(held.texts) if held else None
    for key, part, array in (("data.train", train, vectors), ("data.eval", held, eval_vectors)):
        if part and array and len(part.texts) != array.rows:
            raise DataError(
                f"{key}: expected a text for each of the {array.rows} rows of {array.name}, got "
                f"{len(part.texts)}. Row i of both must be the same text."
            )
    notes = check_vectors(vectors, recipe.student.dimensions)
    texts = train.texts if train else None
    if eval_vectors is None:
        if train and train.pairs:
            notes.append("data.train.score: not used. Only pairs in data.eval are held out, and scored.")
        held_out = held_out_rows(vectors.rows)
        if held_out < 3:
            raise DataError(
                f"{vectors.name}: expected at least 30 rows, of which a tenth is held out, got {vectors.rows}. "
                "Give more, or name what is held out: teacher.eval_vectors or data.eval."
            )
        cut = vectors.rows - held_out
        first, rest = VectorSlice(vectors, 0, cut), vectors.read(cut, vectors.rows)
        texts, held_out_texts = texts and texts[:cut], texts and texts[cut:]
        return EmbeddingData(first, rest, texts, held_out_texts, None, model, tokens, tuple(notes))
    if eval_vectors.dimensions != vectors.dimensions:
        raise DataError(
            f"{eval_vectors.name}: expected vectors of {vectors.dimensions} dimensions as in {vectors.name}, got "
            f"{eval_vectors.dimensions}."
        )
    notes += check_vectors(eval_vectors, min(recipe.student.dimensions, eval_vectors.rows - 1))
    held_out_texts, pairs = held or (None, None)
    rest = eval_vectors.read(0, eval_vectors.rows)
    return EmbeddingData(vectors, rest, texts, held_out_texts or None, pairs, model, tokens, tuple(notes))


def tokens_alone(
    recipe: EmbeddingRecipe, encoder: TextEncoder, tokens: TokenTable, held: Texts | None
) -> EmbeddingData:
    """Data of a run without training texts: the tokens' vectors, measured on data.eval or else on words."""
    vectors = TensorVectors(tokens.vectors, "the vocabulary")
    notes = check_vectors(vectors, recipe.student.dimensions)
    if held is None:
        held = Texts(vocabulary_words(tokens.tokenizer, 2 * MOST_ROWS))
        if len(held.texts) < 3:
            raise DataError(
                "data.eval: expected texts, as the vocabulary has no words to measure on, got none. Name some."
            )
        notes.append("data.eval: none, so the metrics are of single words of the vocabulary. Name texts of your own.")
    held_out = TensorVectors(encoder.encode(held.texts), "data.eval")
    notes += check_vectors(held_out, min(recipe.student.dimensions, held_out.rows - 1))
    rest = held_out.read(0, held_out.rows)
    return EmbeddingData(vectors, rest, None, held.texts, held.pairs, encoder.model, tokens, tuple(notes))


def held_out_rows(rows: int) -> int:
    return min(rows // 10, 2 * MOST_ROWS)


def held_out_texts(recipe: EmbeddingRecipe, tokenizer: Any) -> Sequence[str]:
    """The texts that a student was measured on; without any in the recipe, words of its vocabulary."""
    train, held = read_texts(recipe)
    if held is not None:
        return held.texts
    if train is None:
        return vocabulary_words(tokenizer, 2 * MOST_ROWS)
    return train.texts[len(train.texts) - held_out_rows(len(train.texts)) :]


def read_texts(recipe: EmbeddingRecipe) -> tuple[Texts | None, Texts | None]:
    """Read the texts to learn from and the held-out ones, if the recipe names any."""
    return _read(recipe.data.train), _read(recipe.data.eval)


def _read(part: TextsPart | None) -> Texts | None:
    if part is None:
        return None
    place = Source(part.path, split=part.split, config=part.config)
    file = place.title
    columns = [load(replace(place, field=name)).dataset.data.column("text") for name in part.fields]
    for name, column in zip(part.fields, columns, strict=True):
        for row, text in enumerate(column, 1):
            if not text.as_py().strip():
                raise DataError(
                    f"data: expected text in column {name!r} of {file}, got none in row {row}. Remove the row."
                )
    texts = StoredTexts(
        [(column, part.prompts.get(name, "")) for name, column in zip(part.fields, columns, strict=True)]
    )
    if not part.score:
        return Texts(texts)
    first_name, second_name = part.fields
    pairs = replace(place, field=first_name, pair=second_name, label=part.score)
    try:
        scores = [float(score) for score in load(pairs, "regression").dataset["label"]]
    except ValueError as error:
        raise DataError(f"data: expected numbers in column {part.score!r} of {file}, got: {error}.") from None
    index = {text: i for i, text in enumerate(dict.fromkeys(texts))}
    first, second = ([index[text] for text in column] for column in (texts[: len(scores)], texts[len(scores) :]))
    return Texts(list(index), (first, second, scores))
