"""The record of a run that makes an embedding student: `kind: embedding`."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from potstill.losses import schedule as schedules
from potstill.runs.config.document import Document, Part


class EmbeddingServerPart(Part):
    """An OpenAI-style server; the key is taken from POTSTILL_API_KEY or OPENAI_API_KEY."""

    url: str
    model: str


class EmbeddingTeacherPart(Part):
    """Whose vectors are learnt from."""

    vectors: str | None = Field(None, description=".npy, .safetensors or .pt; row i is the vector of text i")
    eval_vectors: str | None = Field(None, description="those held out; default: some of the vectors")
    key: str | None = Field(None, description="which matrix of the file, where it holds several")
    embedder: str | None = Field(None, description="a sentence-transformers model: folder, or name on the hub")
    server: EmbeddingServerPart | None = Field(None, description="a server with /v1/embeddings")

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        given = [name for name in ("vectors", "embedder", "server") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"expected one of vectors, embedder and server, got {' and '.join(given) or 'none'}")
        if self.vectors is None and (self.eval_vectors or self.key):
            raise ValueError("expected eval_vectors and key only beside vectors")
        return self


class EncoderPart(Part):
    """Some layers of a sentence-transformers model and a linear map."""

    model: str | None = Field(None, description="whose layers; default: the teacher's embedder")
    layers: int = Field(2, ge=1)


class StaticPart(Part):
    """A vector for each token."""

    tokenizer: str | None = Field(None, description="a folder, or a name on the hub; default: the embedder's")


def _empty_is_default(value: object) -> object:
    """`static:` with nothing after it is a static student with every default."""
    return {} if value is None else value


class EmbeddingStudentPart(Part):
    """Who learns: a head over the teacher's vectors, or a model that reads text."""

    head: Literal["linear", "mlp"] | None = None
    hidden: int = Field(256, ge=1, description="width of the mlp head")
    start: Literal["centred", "uncentred", "whitened"] | None = Field(
        None, description="which PCA it begins as; default: what suits the focus"
    )
    encoder: Annotated[EncoderPart | None, BeforeValidator(_empty_is_default)] = Field(None)
    static: Annotated[StaticPart | None, BeforeValidator(_empty_is_default)] = Field(None)
    dimensions: int = Field(ge=1, description="of its vectors")
    prefixes: dict[int, float] | None = Field(
        None, description="length -> weight: the first so many dimensions are to be good vectors too"
    )

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        given = [name for name in ("head", "encoder", "static") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"expected one of head, encoder and static, got {' and '.join(given) or 'none'}")
        wrong = [d for d, weight in (self.prefixes or {}).items() if not (1 <= d <= self.dimensions and weight > 0)]
        if wrong:
            raise ValueError(f"expected prefixes of 1 to {self.dimensions} dimensions with weights > 0, got {wrong}")
        return self


class TextsPart(Part):
    """A file of texts, or of pairs of texts with people's scores."""

    path: str = Field(description=".jsonl, .json, .csv or .parquet")
    fields: list[str] = Field(default_factory=lambda: ["text"], min_length=1, description="the columns of texts")
    score: str | None = Field(None, description="the column with the similarity of the two texts of a row")

    @model_validator(mode="after")
    def _two_for_a_score(self) -> Self:
        if self.score and len(self.fields) != 2:
            raise ValueError(f"expected two fields with a score, got {len(self.fields)}")
        return self


class EmbeddingDataPart(Part):
    """What is learnt from, and what is held out."""

    train: TextsPart | None = None
    eval: TextsPart | None = Field(None, description="default: some of train")


class StagesPart(Part):
    """A temperature that changes from stage to stage, as a factor: 1 is the focus's own, 4 four times as soft."""

    schedule: Literal["linear", "exponential", "cosine"] = "linear"
    start: float = Field(4.0, gt=0)
    end: float = Field(0.5, gt=0)
    stages: int = Field(5, ge=2)

    def values(self) -> list[float]:
        """One for each stage."""
        curve: schedules.Schedule = getattr(schedules, self.schedule)(self.start, self.end, self.stages - 1)
        return [curve(stage) for stage in range(self.stages)]


class EmbeddingTrainPart(Part):
    """How long and how fast."""

    epochs: int = Field(20, ge=1, description="passes over the vectors, a stage")
    batch_size: int = Field(512, ge=2, description="rows whose pairs are compared with each other")
    learning_rate: float | None = Field(None, gt=0, description="default: what suits the student")
    temperature: StagesPart | None = Field(None, description="stages of temperature; default: one, at 1")
    reconstruction: float = Field(0.0, ge=0, le=1, description="share of a decoder's error in the loss")
    device: str = Field("cpu", description="where the student learns, such as cuda")
    patience: int = Field(5, ge=1, description="epochs without a better held-out correlation that end a stage")


class EmbeddingEvaluatePart(Part):
    """What the report says beside the student's own figures."""

    front: bool = Field(False, description="train a student with each other focus too, and show what is traded")
    texts: int = Field(6, ge=0, description="held-out rows whose neighbours are shown")


class EmbeddingRecipe(Document):
    """A whole run that makes an embedding student."""

    kind: Literal["embedding"]
    name: str = Field(min_length=1)
    seed: int = Field(0, ge=0)
    focus: Literal["local", "balanced", "global"] = Field(
        "balanced", description="close pairs, the order of all pairs, or both"
    )
    teacher: EmbeddingTeacherPart
    student: EmbeddingStudentPart
    data: EmbeddingDataPart = Field(default_factory=lambda: EmbeddingDataPart.model_validate({}))
    train: EmbeddingTrainPart = Field(default_factory=lambda: EmbeddingTrainPart.model_validate({}))
    evaluate: EmbeddingEvaluatePart = Field(default_factory=lambda: EmbeddingEvaluatePart.model_validate({}))
    output: str = Field(min_length=1, description="the run directory")

    @model_validator(mode="after")
    def _texts_where_they_are_read(self) -> Self:
        reads = self.teacher.vectors is None or self.student.head is None
        if reads and self.data.train is None:
            raise ValueError("expected data.train with texts, got none")
        if self.data.eval is not None and self.teacher.vectors is not None and self.teacher.eval_vectors is None:
            raise ValueError("expected teacher.eval_vectors beside data.eval, got none")
        return self
