"""The recipe of `potstill generate`."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from potstill.engines.sampling import Sampling
from potstill.engines.server import ServerConfig
from potstill.generation.filters import FilterOptions
from potstill.generation.sandbox import ProgramLimits
from potstill.generation.tasks import GenerationTask
from potstill.runs.config.document import Document, Folder, Part


class GenerationTeacherPart(Part):
    """The model that writes: a local one, or one behind a server."""

    model: str | None = Field(None, description="a folder with a model and its tokenizer, or a name on the hub")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="its precision; auto is the one it is saved in"
    )
    device: str | None = Field(None, description="such as cuda:1; by default the first accelerator, else the processor")
    server: ServerConfig | None = None
    tokenizer: str | None = Field(
        None,
        description="with server: a folder with the model's tokenizer, whose chat template is used; else plain text",
    )
    chat_template: str | None = Field(None, description="a Jinja file, in place of the tokenizer's own chat template")
    chat_template_kwargs: dict[str, Any] = Field(
        {}, description="arguments of the chat template, such as enable_thinking; rows keep them"
    )

    @model_validator(mode="after")
    def _one_of(self) -> Self:
        if (self.model is None) == (self.server is None):
            raise ValueError("expected one of model and server")
        if self.model is not None and self.tokenizer is not None:
            raise ValueError("expected a tokenizer with server alone; a model brings its own")
        if self.model is None and self.tokenizer is None and (self.chat_template or self.chat_template_kwargs):
            raise ValueError("expected a tokenizer for chat_template and chat_template_kwargs, got none")
        return self

    @property
    def name(self) -> str:
        """The model's name in rows and cards, without the server's address."""
        return self.model or self.server.model  # type: ignore[union-attr]  # one of them is there


class SamplingPart(Part):
    """How texts are sampled."""

    sampling_temperature: float = Field(0.7, ge=0, description="0 takes the likeliest token each time")
    top_p: float = Field(0.95, gt=0, le=1)
    top_k: int = Field(0, ge=0, description="0 for all tokens")
    max_new_tokens: int = Field(512, ge=1)
    stop: list[str] = Field([], description="texts that end a text")
    samples: int = Field(1, ge=1, description="texts for each prompt")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.samples > 1 and self.sampling_temperature == 0:
            raise ValueError("expected a sampling_temperature > 0 for more than one text a prompt, got 0")
        if not all(self.stop):
            raise ValueError("expected stop texts that are not empty")
        return self


class GenerateRecipe(Document):
    """What a teacher writes, and where it goes."""

    kind: Literal["generate"]
    name: str = Field(min_length=1)
    seed: int = Field(0, ge=0)
    teacher: GenerationTeacherPart
    task: GenerationTask
    sampling: SamplingPart = Field(default_factory=lambda: SamplingPart.model_validate({}))
    filter: FilterOptions = FilterOptions()
    programs: ProgramLimits = ProgramLimits()
    rows: Literal["auto", "completion", "messages"] = Field(
        "auto", description="the form of the rows; auto is messages where the teacher has a chat template"
    )
    format: Literal["jsonl", "parquet"] = "jsonl"
    held_out: float = Field(
        0.0, ge=0, lt=1, description="share of the requests whose rows go to eval.jsonl in place of train.jsonl"
    )
    skip_bad_rows: bool = Field(False, description="go on without rows that cannot be used, and list them")
    batch_size: int = Field(16, ge=1, description="prompts that are completed, and saved, together")
    output: Folder = Field(description="the folder for rows, dropped rows and the data card")

    @property
    def engine_sampling(self) -> Sampling:
        values = self.sampling.model_dump()
        return Sampling(**{**values, "stop": tuple(values["stop"])}, seed=self.seed)
