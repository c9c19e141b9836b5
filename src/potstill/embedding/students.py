"""Kinds of embedding students, as a recipe names them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from potstill.embedding.by_key import ChosenByKey
from potstill.embedding.encoders import EmbeddingModel, TextStudent, encoder_student, load_embedder
from potstill.embedding.heads import PCA_ROWS, PCAKind, VectorHead
from potstill.embedding.objective import START, Focus
from potstill.embedding.static import (
    COMMON_DIRECTIONS,
    OnProgress,
    TokenTable,
    add_words,
    count_tokens,
    mean_of_texts,
    no_progress,
    read_words,
    reduce_rows,
    spread_tokens,
    static_student,
    token_names,
    token_table,
)
from potstill.embedding.token_fit import fit_tokens
from potstill.embedding.vectors import VectorArray
from potstill.errors import ShapeError, UserError
from potstill.losses.declared import Declared, Range, Record
from potstill.models.loading import load_tokenizer
from potstill.models.precision import as_dtype
from potstill.models.trimming import choose_tokens, trim_tokenizer


class StartData(NamedTuple):
    """What the first weights of a student are made of."""

    vectors: VectorArray  # the teacher's
    texts: Sequence[str]
    teacher: Any = None  # a sentence-transformers model, if it is one
    tokens: TokenTable | None = None  # what `EmbeddingStudent.read_tokens` made of it


@dataclass(frozen=True, kw_only=True)
class EmbeddingStudent(ChosenByKey, Declared):
    """A student, which starts near a PCA of the teacher's vectors.

    Args:
        dimensions: of its vectors.
        prefixes: length -> weight: the first so many dimensions are trained to be good vectors alone.
        start: which PCA it starts as; default: the best for the focus.
        hidden: width of an mlp head.
        save_dtype: precision of the saved weights; auto is that of the layers' checkpoint, and float32 without one.
    """

    reads_text: ClassVar[bool] = True
    needs_data: ClassVar[bool] = True  # beside a teacher that is an embedder
    learning_rate: ClassVar[float]  # the default, chosen on STS-B's dev split
    fitted_learning_rate: ClassVar[float | None] = (
        None  # the default of a student that starts from the teacher's tokens
    )
    dimensions: Annotated[int, Range(ge=1)]
    prefixes: dict[int, float] | None = None
    start: PCAKind | None = None
    hidden: Annotated[int, Range(ge=1)] = 256
    save_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        wrong = [d for d, weight in (self.prefixes or {}).items() if not (1 <= d <= self.dimensions and weight > 0)]
        if wrong:
            raise ShapeError(f"expected prefixes of 1 to {self.dimensions} dimensions with weights > 0, got {wrong}")
        if not self.reads_text and self.save_dtype not in ("auto", "float32"):
            raise ShapeError(f"expected save_dtype float32 for a head over vectors, got {self.save_dtype}")

    def as_saved(self, student: EmbeddingModel) -> EmbeddingModel:
        """Convert a trained student to the precision that it is saved and measured in."""
        dtype = as_dtype(self.save_dtype if self.save_dtype != "auto" else getattr(student, "saved_dtype", None))
        return student if dtype is None else student.to(dtype)

    @abstractmethod
    def build(self, data: StartData, focus: Focus, seed: int) -> EmbeddingModel:
        """Make the student with its first weights."""

    def read_tokens(
        self, teacher: Any, limit: int | None = None, on_progress: OnProgress = no_progress
    ) -> TokenTable | None:
        """Compute the teacher's vectors of tokens, if the student starts from them: of `limit` tokens, or of all."""
        return None

    def _pca_head(self, vectors: VectorArray, focus: Focus, seed: int, hidden: int = 0) -> VectorHead:
        sample, start = vectors.sample(PCA_ROWS), self.start or START[focus]
        return VectorHead.from_pca(sample, self.dimensions, hidden=hidden, start=start, seed=seed)

    def _first_vectors(self, vectors: VectorArray, focus: Focus, seed: int) -> Tensor:
        return torch.from_numpy(self._pca_head(vectors, focus, seed).transform(vectors))


@dataclass(frozen=True, kw_only=True)
class HeadStudent(EmbeddingStudent):
    """A head over the teacher's own vectors.

    Args:
        head: a linear map, or one with an MLP beside it.
    """

    head: Literal["linear", "mlp"]
    name = "head"
    reads_text = False
    learning_rate = 3e-3

    def build(self, data: StartData, focus: Focus, seed: int) -> VectorHead:
        return self._pca_head(data.vectors, focus, seed, self.hidden if self.head == "mlp" else 0)


@dataclass(frozen=True)
class EncoderLayers(Record):
    """Layers of a sentence-transformers model.

    Args:
        model: whose layers; default: the teacher's embedder.
        layers: how many.
        vocabulary: tokens to keep: data for all that the texts have, or a number of the most frequent; default: all.
    """

    model: str | None = None
    layers: Annotated[int, Range(ge=1)] = 2
    vocabulary: Literal["data"] | Annotated[int, Range(ge=1)] | None = None


@dataclass(frozen=True, kw_only=True)
class EncoderStudent(EmbeddingStudent):
    """Some layers of a sentence-transformers model and a linear map."""

    encoder: EncoderLayers = EncoderLayers()
    name = "encoder"
    empty_is_default = True
    learning_rate = 3e-4

    def build(self, data: StartData, focus: Focus, seed: int) -> TextStudent:
        if self.encoder.model is None and data.teacher is None:
            raise UserError("student.encoder.model: expected a sentence-transformers model, got none. Name one.")
        start, path = self._first_vectors(data.vectors, focus, seed), self.encoder.model
        model = load_embedder(path, "student.encoder.model", pooled=False) if path else data.teacher
        return encoder_student(model, self.encoder.layers, data.texts, start, keep=self.encoder.vocabulary)


@dataclass(frozen=True)
class TokenVectors(Record):
    """A vector for each token.

    Args:
        tokenizer: a folder, or a name on the hub; default: the embedder's.
        words: a text file with a word on each line, which become tokens of their own.
        vocabulary: tokens to keep: data for all that the texts have, or a number of the most frequent; default: all.
        max_mb: size of the saved vectors; as many of the most frequent tokens are kept; default: any size.
    """

    tokenizer: str | None = None
    words: str | None = None
    vocabulary: Literal["data"] | Annotated[int, Range(ge=1)] | None = None
    max_mb: Annotated[float, Range(gt=0)] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.vocabulary is not None and self.max_mb is not None:
            raise ShapeError("expected one of vocabulary and max_mb, got both")

    @cached_property
    def added_words(self) -> list[str]:
        """The words of the file, which is read once: all of a run has the same ones."""
        return read_words(self.words) if self.words else []


@dataclass(frozen=True, kw_only=True)
class StaticStudent(EmbeddingStudent):
    """A vector for each token, whose mean is the vector of a text: the fastest student that reads text."""

    static: TokenVectors = TokenVectors()
    name = "static"
    empty_is_default = True
    needs_data = False
    learning_rate = 1e-2
    fitted_learning_rate = 1e-3  # more makes tokens of the texts good for these texts alone

    def build(self, data: StartData, focus: Focus, seed: int) -> TextStudent:
        texts, tokens = data.texts, data.tokens
        if tokens is None:  # a server or a file of vectors, which cannot encode single tokens
            tokenizer, head = self._tokenizer(data.teacher), self._pca_head(data.vectors, focus, seed)
            blocks = (torch.from_numpy(head.transform(block)) for block in data.vectors.blocks())
            return self.from_table(tokenizer, mean_of_texts(tokenizer, texts, blocks, self.dimensions), texts)
        if texts:
            rows = fit_tokens(tokens, texts, data.vectors)
        else:
            most = tokens.vectors.shape[1] - COMMON_DIRECTIONS
            if self.dimensions > most:
                raise UserError(
                    f"student.dimensions: expected at most {most} without texts to learn from, as the teacher's "
                    f"{COMMON_DIRECTIONS} most common directions are removed, got {self.dimensions}. Ask for fewer, or "
                    "name data.train."
                )
            rows = spread_tokens(tokens)
        return self.from_table(tokens.tokenizer, tokens.table(reduce_rows(rows, self.dimensions)), texts)

    def from_table(self, tokenizer: Any, table: Tensor, texts: Sequence[str] = ()) -> TextStudent:
        """Make the student of a vector for each token, [V, d], and keep the tokens that `static` asks for."""
        keep, always = self.static.vocabulary, tokenizer.convert_tokens_to_ids(self.static.added_words)
        if (size := self.static.max_mb) is not None:
            dtype = as_dtype(self.save_dtype if self.save_dtype != "auto" else "float32")
            row_bytes = self.dimensions * torch.empty((), dtype=dtype).element_size()
            keep = int(min(size * 1e6 / row_bytes, len(token_names(tokenizer))))
            least = len(choose_tokens(tokenizer, {}, "data", always, "student.static.max_mb"))
            if keep < least:
                raise UserError(
                    f"student.static.max_mb: expected at least {least * row_bytes / 1e6:.3g} MB, for special tokens, "
                    f"single characters and words, got {size:g}. Allow more, or use fewer dimensions."
                )
        if keep is None or (keep != "data" and keep >= len(token_names(tokenizer))):
            return static_student(tokenizer, table)
        key = "student.static.vocabulary"
        kept = choose_tokens(tokenizer, count_tokens(tokenizer, texts), keep, always, key)
        return static_student(trim_tokenizer(tokenizer, kept, key), table[kept])

    def read_tokens(
        self, teacher: Any, limit: int | None = None, on_progress: OnProgress = no_progress
    ) -> TokenTable | None:
        return None if teacher is None else token_table(teacher, self._tokenizer(teacher), limit, on_progress)

    def _tokenizer(self, teacher: Any) -> Any:
        path = self.static.tokenizer
        if path is None and teacher is None:
            raise UserError("student.static.tokenizer: expected a folder with a tokenizer, got none. Name one.")
        tokenizer = load_tokenizer(path, "student.static.tokenizer") if path else teacher.tokenizer
        return add_words(tokenizer, self.static.added_words) if self.static.words else tokenizer
