"""What an embedding recipe names, as texts and vectors: what is learnt from, and what is held out."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from potstill.data.readers import SUFFIXES, open_table, describe_value, reading
from potstill.embedding.encoders import load_embedder
from potstill.embedding.teachers import Encode, encode_texts, model_encoder, server_encoder
from potstill.embedding.vectors import Part, Vectors, check_vectors, open_vectors
from potstill.errors import DataError, nearest
from potstill.evaluate.space import MOST_ROWS
from potstill.runs.config.embedding import EmbeddingRecipe, EmbeddingTeacherPart, TextsPart

Pairs = tuple[list[int], list[int], list[float]]


@dataclass(frozen=True)
class Texts:
    """Texts column by column, and the pairs of them that people have scored."""

    texts: list[str]
    pairs: Pairs | None


@dataclass(frozen=True)
class Material:
    """All that a student is made from.

    Args:
        vectors: the teacher's, to learn from.
        held_out: [M, H] the teacher's, to judge by.
        texts: of the vectors, where there are any.
        held_out_texts: of those held out.
        pairs: held-out rows with people's scores.
        embedder: the teacher, where it is a model that is loaded.
        notes: what the run should say.
    """

    vectors: Vectors
    held_out: Tensor
    texts: list[str] | None
    held_out_texts: list[str] | None
    pairs: Pairs | None
    embedder: Any
    notes: list[str]


def gather(recipe: EmbeddingRecipe, each: Callable[[int, int], None] = lambda done, total: None) -> Material:
    """Read, encode where that is needed, and check.

    Args:
        recipe: what is asked for.
        each: told how many texts are encoded, of how many.

    Raises:
        UserError: something is missing, or does not fit together.
    """
    teacher = recipe.teacher
    train, held = read_texts(recipe)
    embedder, encode, who = encoder_of(teacher)
    folder = Path(recipe.output) / "vectors"

    def spoken(texts: Texts, say: Encode) -> Vectors:
        return encode_texts(texts.texts, say, who, folder, lambda done: each(done, len(texts.texts)))

    if teacher.vectors is not None:
        whole = open_vectors(teacher.vectors, teacher.key)
        eval_ = open_vectors(teacher.eval_vectors, teacher.key) if teacher.eval_vectors else None
    else:
        assert encode is not None
        assert train is not None
        whole = spoken(train, encode)
        eval_ = spoken(held, encode) if held else None
    for what, texts, vectors in (("data.train", train, whole), ("data.eval", held, eval_)):
        if texts and vectors and len(texts.texts) != vectors.rows:
            raise DataError(
                f"{what}: expected a text for each of the {vectors.rows} rows of {vectors.name}, got "
                f"{len(texts.texts)}. Row i of both must be the same text."
            )
    notes = check_vectors(whole, recipe.student.dimensions)
    if eval_ is None:
        if train and train.pairs:
            notes.append("data.train.score: not used. Only pairs in data.eval are held out, and scored.")
        rows = min(whole.rows // 10, 2 * MOST_ROWS)
        if rows < 3:
            raise DataError(
                f"{whole.name}: expected at least 30 rows, of which a tenth is held out, got {whole.rows}. "
                "Give more, or name what is held out: teacher.eval_vectors or data.eval."
            )
        cut = whole.rows - rows
        held_out = whole.read(cut, whole.rows)
        mine, apart = (train.texts[:cut], train.texts[cut:]) if train else (None, None)
        return Material(Part(whole, 0, cut), held_out, mine, apart, None, embedder, notes)
    if eval_.dimensions != whole.dimensions:
        raise DataError(
            f"{eval_.name}: expected vectors of {whole.dimensions} dimensions as in {whole.name}, got "
            f"{eval_.dimensions}."
        )
    notes += check_vectors(eval_, min(recipe.student.dimensions, eval_.rows - 1))
    return Material(
        whole,
        eval_.read(0, eval_.rows),
        train.texts if train else None,
        held.texts if held else None,
        held.pairs if held else None,
        embedder,
        notes,
    )


def read_texts(recipe: EmbeddingRecipe) -> tuple[Texts | None, Texts | None]:
    """The texts to learn from and those held out, where the recipe names any."""
    data = recipe.data
    return (_read(data.train) if data.train else None), (_read(data.eval) if data.eval else None)


def encoder_of(teacher: EmbeddingTeacherPart) -> tuple[Any, Encode | None, str]:
    """A teacher that reads text: its model where that is loaded, how it encodes, and what its vectors depend on."""
    if teacher.embedder is not None:
        embedder = load_embedder(teacher.embedder, "teacher.embedder")
        return embedder, model_encoder(embedder), f"model {teacher.embedder}"
    if teacher.server is not None:
        return None, server_encoder(teacher.server.url, teacher.server.model), f"server {teacher.server}"
    return None, None, ""


def _read(part: TextsPart) -> Texts:
    path = Path(part.path).expanduser()
    if not path.is_file() or path.suffix.lower() not in SUFFIXES:
        beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise DataError(
            f"data: expected a file that ends in one of {', '.join(SUFFIXES)}, got {path}.{nearest(path.name, beside)}"
        )
    columns: dict[str, list[Any]] = {}
    wanted = [*part.fields, *([part.score] if part.score else [])]
    with reading(path):
        table = open_table(path)
        for name in wanted:
            if name not in table.columns:
                raise DataError(
                    f"data: expected a column {name!r} in {path.name}, got {', '.join(table.columns[:12])}."
                    f"{nearest(name, table.columns)}"
                )
        for batch in table.read(wanted):
            for name in wanted:
                columns.setdefault(name, []).extend(batch[name])
    if not columns or not columns[wanted[0]]:
        raise DataError(f"data: expected at least one row in {path.name}, got none. Give a file with data.")
    for name in part.fields:
        for row, text in enumerate(columns[name], 1):
            if not isinstance(text, str) or not text.strip():
                raise DataError(
                    f"data: expected text in column {name!r} of {path.name}, got {describe_value(text)} in row {row}. "
                    "Correct or remove the row."
                )
    distinct = list(dict.fromkeys(text for name in part.fields for text in columns[name]))
    if not part.score:
        return Texts([text for name in part.fields for text in columns[name]], None)
    number = {text: i for i, text in enumerate(distinct)}
    first, second = ([number[text] for text in columns[name]] for name in part.fields)
    return Texts(
        distinct, (first, second, [_score(value, row, path) for row, value in enumerate(columns[part.score], 1)])
    )


def _score(value: Any, row: int, path: Path) -> float:
    try:
        return float(json.loads(value) if isinstance(value, str) else value)
    except (TypeError, ValueError):
        raise DataError(
            f"data: expected a number as score in {path.name}, got {describe_value(value)} in row {row}. "
            "Correct or remove it."
        ) from None
