"""The record of what a teacher writes: its task, how its texts are drawn, and what is kept of them."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from potstill.runs.config.document import Document, Part
from potstill.engines.endpoint import ServerEndpoint

ChooseKey = Literal["all", "majority", "verified"]
TargetKey = Literal["chain", "answer", "both"]


class WriterPart(Part):
    """Who writes: a model here, or one behind a server."""

    model: str | None = Field(None, description="a folder with a model and its tokenizer, or a name on the hub")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="its precision; auto is the one it is saved in"
    )
    device: str | None = Field(None, description="such as cuda:1; by default the first accelerator, else the processor")
    server: ServerEndpoint | None = None
    tokenizer: str | None = Field(
        None,
        description="with server: a folder with the model's tokenizer, whose chat template is used; else plain text",
    )

    @model_validator(mode="after")
    def _one_of(self) -> Self:
        if (self.model is None) == (self.server is None):
            raise ValueError("expected one of model and server")
        if self.model is not None and self.tokenizer is not None:
            raise ValueError("expected a tokenizer with server alone; a model brings its own")
        return self

    @property
    def name(self) -> str:
        """What rows say of who wrote them; a server may move."""
        return self.model or self.server.model  # type: ignore[union-attr]  # one of them is there


class QuestionsPart(Part):
    """A file of questions, and of their answers where these are known."""

    path: str = Field(description=".jsonl, .json, .csv, .parquet, or a folder saved by datasets")
    field: str = Field("question", description="the column of questions")
    answer: str | None = Field(None, description="the column of known answers; worked solutions are parsed")


class PromptsPart(Part):
    """A file of prompts or of conversations in which it is the assistant's turn."""

    path: str = Field(description=".jsonl, .json, .csv, .parquet, or a folder saved by datasets")
    field: str | None = Field(None, description="the column of prompts")
    messages: str | None = Field(None, description="the column of conversations")

    @model_validator(mode="after")
    def _one_of(self) -> Self:
        if (self.field is None) == (self.messages is None):
            raise ValueError("expected one of field and messages")
        return self


class TaskWeightsPart(Part):
    """How much a token counts in the rows of each of the two tasks of `target: both`: their column weight, which a run
    takes with `weight: weight`. Only the ratio matters.
    """

    chain: float = Field(gt=0, allow_inf_nan=False)
    answer: float = Field(gt=0, allow_inf_nan=False)


class _Questioned(Part):
    task: str  # each kind's own word; it stands first, where messages look for it
    target: TargetKey = Field("chain", description="what the rows teach: the chain, the answer alone, or both")
    task_weights: TaskWeightsPart | None = Field(
        None, description="with target both: how much a token counts in rows of each; by default 1"
    )

    @model_validator(mode="after")
    def _two_tasks(self) -> Self:
        if self.task_weights is not None and self.target != "both":
            raise ValueError(f"expected task_weights with target: both alone, got target: {self.target}")
        return self

    def _with_answers(self, questions: QuestionsPart, choose: str) -> None:
        if choose == "verified" and questions.answer is None:
            raise ValueError("expected questions.answer, the column of known answers, for choose: verified")


class ChainPart(_Questioned):
    """Chains of thought: worked solutions in prose."""

    task: Literal["chain_of_thought"]
    questions: QuestionsPart
    template: str = Field("step_by_step", description="step_by_step, structured, socratic, or a text with {question}")
    choose: ChooseKey = Field("all", description="which texts become rows: all with an answer, majority, verified")

    @model_validator(mode="after")
    def _complete(self) -> Self:
        self._with_answers(self.questions, self.choose)
        return self


class ProgramPart(_Questioned):
    """Programs of thought: Python that prints the answer, run in a sandbox."""

    task: Literal["program_of_thought"]
    questions: QuestionsPart
    template: str = Field("python", description="python, or a text with {question}")
    choose: ChooseKey = "all"

    @model_validator(mode="after")
    def _complete(self) -> Self:
        self._with_answers(self.questions, self.choose)
        return self


class MixedPart(_Questioned):
    """Chains and programs for each question, which vote together or are verified."""

    task: Literal["mixed"]
    questions: QuestionsPart
    template: str = Field("step_by_step", description="of the chains")
    program_template: str = Field("python", description="of the programs")
    choose: Literal["majority", "verified"] = "majority"

    @model_validator(mode="after")
    def _complete(self) -> Self:
        self._with_answers(self.questions, self.choose)
        return self


class InstructionsPart(Part):
    """Instructions: every kind of task for every topic."""

    task: Literal["instructions"]
    topics: list[str] = Field(min_length=1)
    kinds: list[str] = Field(
        ["explain", "summarise", "analyse", "compare", "list", "evaluate"],
        min_length=1,
        description="explain, summarise, analyse, compare, list, evaluate, or texts with {question}, the topic's place",
    )


class ResponsesPart(Part):
    """Responses to prompts, and to conversations."""

    task: Literal["responses"]
    prompts: PromptsPart


TaskPart = Annotated[
    ChainPart | ProgramPart | MixedPart | InstructionsPart | ResponsesPart, Field(discriminator="task")
]


class SamplingPart(Part):
    """How texts are drawn."""

    sampling_temperature: float = Field(0.7, ge=0, description="0 takes the likeliest token each time")
    top_p: float = Field(0.95, gt=0, le=1)
    top_k: int = Field(0, ge=0, description="0 for all tokens")
    max_new_tokens: int = Field(512, ge=1)
    stop: list[str] = Field([], description="texts that end a text")
    samples: int = Field(1, ge=1, description="texts for each prompt")

    @model_validator(mode="after")
    def _drawn(self) -> Self:
        if self.samples > 1 and self.sampling_temperature == 0:
            raise ValueError("expected a sampling_temperature > 0 for more than one text a prompt, got 0")
        if not all(self.stop):
            raise ValueError("expected stop texts that are not empty")
        return self


class ContaminationPart(Part):
    """Rows that share a run of words with test files are dropped."""

    files: list[str] = Field(min_length=1)
    words: int = Field(13, ge=5)


class FilterPart(Part):
    """What is dropped; null or false switches a filter off."""

    cut: bool = Field(True, description="texts that max_new_tokens cut")
    min_characters: int = Field(1, ge=0)
    max_characters: int | None = Field(None, ge=1)
    repetition: float | None = Field(5.0, gt=1, description="texts that zlib makes more than so many times smaller")
    scripts: list[str] = Field([], description="scripts that letters may be of, such as latin; empty for all")
    refusals: bool = Field(True, description="texts that begin with a refusal, in English")
    near_duplicates: float | None = Field(None, gt=0, le=1, description="rows so alike an earlier one; 0.9 is strict")
    contamination: ContaminationPart | None = None


class LimitsPart(Part):
    """What a program may use."""

    cpu_seconds: int = Field(5, ge=1)
    wall_seconds: float = Field(10.0, gt=0)
    memory_mib: int = Field(512, ge=64)
    output_kib: int = Field(64, ge=1)


class GenerateRecipe(Document):
    """What a teacher writes, and where it goes."""

    kind: Literal["generate"]
    name: str = Field(min_length=1)
    seed: int = Field(0, ge=0)
    teacher: WriterPart
    task: TaskPart
    sampling: SamplingPart = Field(default_factory=lambda: SamplingPart.model_validate({}))
    filter: FilterPart = Field(default_factory=lambda: FilterPart.model_validate({}))
    programs: LimitsPart = Field(default_factory=lambda: LimitsPart.model_validate({}))
    rows: Literal["auto", "completion", "messages"] = Field(
        "auto", description="the form of the rows; auto is messages where the teacher has a chat template"
    )
    format: Literal["jsonl", "parquet"] = "jsonl"
    skip_bad_rows: bool = Field(False, description="go on without rows that cannot be used, and list them")
    batch_size: int = Field(16, ge=1, description="prompts asked, and written down, at once")
    output: str = Field(min_length=1, description="the folder for rows, dropped rows and the data card")
