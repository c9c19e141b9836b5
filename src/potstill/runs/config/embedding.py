"""The recipe of a run that trains an embedding student: `kind: embedding`."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from potstill.embedding.objective import Focus
from potstill.embedding.students import EmbeddingStudent, StaticStudent
from potstill.embedding.teachers import EmbeddingTeacher, FileTeacher
from potstill.losses.schedule import Schedule
from potstill.runs.config.document import Document, Folder, Part
from potstill.runs.config.export import ExportPart, export_mistakes


class TextsPart(Part):
    """A file of texts, or of pairs of texts with human similarity scores."""

    path: str = Field(description="a file, a folder, a glob or a data set on the hub, as for other recipes")
    split: str | None = Field(default=None, description="of a data set on the hub or of a folder with several")
    config: str | None = Field(default=None, description="of a data set on the hub or of a folder with several")
    fields: list[str] = Field(default=["text"], min_length=1, description="the columns of texts")
    prompts: dict[str, str] = Field(
        default={}, description="column -> what teacher and student read before its texts, such as 'query: '"
    )
    score: str | None = Field(default=None, description="the column with the similarity of the two texts of a row")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.score and len(self.fields) != 2:
            raise ValueError(f"expected two fields with a score, got {len(self.fields)}")
        if unknown := self.prompts.keys() - set(self.fields):
            raise ValueError(f"expected prompts for columns of fields, got one for {min(unknown)}")
        return self


class EmbeddingDataPart(Part):
    """The texts, if any, of the vectors to learn from and of those held out."""

    train: TextsPart | None = None
    eval: TextsPart | None = Field(default=None, description="default: some of train")


class TemperatureStages(Part):
    """A factor of the temperature for each stage of training: 1 is the focus's own, 4 is four times as soft."""

    schedule: Literal["linear", "exponential", "cosine"] = "linear"
    start: float = Field(default=4.0, gt=0)
    end: float = Field(default=0.5, gt=0)
    stages: int = Field(default=5, ge=2)

    def values(self) -> list[float]:
        """The factor of each stage."""
        curve: Schedule = Schedule.kinds[self.schedule](self.start, self.end, self.stages - 1)
        return [curve(stage) for stage in range(self.stages)]


class EmbeddingTrainPart(Part):
    """How an embedding student is trained."""

    epochs: int = Field(default=20, ge=1, description="passes over the vectors in a stage")
    batch_size: int = Field(default=512, ge=2, description="rows whose pairs are compared with each other")
    learning_rate: float | None = Field(default=None, gt=0, description="default: the best for the kind of student")
    temperature: TemperatureStages | None = Field(default=None, description="stages of temperature; default: one, at 1")
    reconstruction: float = Field(default=0.0, ge=0, le=1, description="weight of a decoder's error in the loss")
    device: str = Field(default="cpu", description="that the student is trained on, such as cuda")
    patience: int = Field(default=5, ge=1, description="epochs without a better held-out metric that end a stage")


class EmbeddingEvaluatePart(Part):
    """What the report shows besides the student's own metrics."""

    front: bool = Field(default=False, description="train a student with each other focus too, and show the trade-off")
    texts: int = Field(default=6, ge=0, description="held-out rows whose neighbours are shown")


class EmbeddingRecipe(Document):
    """A run that trains an embedding student."""

    kind: Literal["embedding"]
    name: str = Field(min_length=1)
    seed: int = Field(default=0, ge=0)
    focus: Focus = Field(default="balanced", description="close pairs, the order of all pairs, or both")
    teacher: EmbeddingTeacher
    student: EmbeddingStudent
    data: EmbeddingDataPart = EmbeddingDataPart()
    train: EmbeddingTrainPart = EmbeddingTrainPart()
    evaluate: EmbeddingEvaluatePart = EmbeddingEvaluatePart()
    export: list[ExportPart] = Field(default=[], description="files of the student, in export/")
    output: Folder = Field(description="the run directory")

    @property
    def trains(self) -> bool:
        """Whether the student is trained; a static one can be made of the teacher's vocabulary alone."""
        return self.data.train is not None or self.student.needs_data or not self.teacher.has_vocabulary

    @model_validator(mode="after")
    def _check_exports(self) -> Self:
        if mistakes := [*export_mistakes(self.export, "embedding")]:
            raise ValueError("\n".join(mistakes))
        if self.export and not self.student.reads_text and not self.teacher.has_vocabulary:
            raise ValueError(
                "export: expected a student that reads text, got a head over vectors of a server or a file. Name "
                "teacher.embedder, or a static or encoder student."
            )
        return self

    @model_validator(mode="after")
    def _check_texts(self) -> Self:
        if self.student.start is not None and self.teacher.has_vocabulary and not self.student.needs_data:
            raise ValueError("expected no student.start, as the student starts from the teacher's tokens. Remove it")
        if not self.trains:
            needs_texts = {
                "train": self.train != EmbeddingTrainPart(),
                "evaluate.front": self.evaluate.front,
                "static.vocabulary: data": isinstance(self.student, StaticStudent)
                and self.student.static.vocabulary == "data",
            }
            for key in [key for key, given in needs_texts.items() if given]:
                raise ValueError(f"expected data.train with texts beside {key}, got none. Add texts, or remove {key}")
            return self
        if (self.teacher.reads_text or self.student.reads_text) and self.data.train is None:
            raise ValueError("expected data.train with texts, got none")
        if self.data.eval and isinstance(self.teacher, FileTeacher) and self.teacher.eval_vectors is None:
            raise ValueError("expected teacher.eval_vectors beside data.eval, got none")
        return self
