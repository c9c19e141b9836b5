"""What is learnt from, and what is held out."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator

from potstill.runs.config.document import Part

MASKED_SHARE = 0.15  # BERT's
TokenWeight = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class SpanWeightsPart(Part):
    """How much a token counts in means over tokens, by the spans of its row: the columns reasoning_span and
    answer_span, as `potstill generate` writes them. Only the ratio matters; with 0 a token does not count at all.
    """

    reasoning: TokenWeight
    answer: TokenWeight
    other: TokenWeight | None = Field(None, description="all other tokens of completions; by default as the answer")

    @model_validator(mode="after")
    def _something(self) -> Self:
        if not (self.reasoning or self.answer or self.other):
            raise ValueError("expected a weight above 0, got 0 for all tokens")
        return self


class SourcePart(Part):
    """A file of examples. Without a column's name the standard ones are looked for: text, prompt and completion,
    messages, input_ids; text, text_pair and label where rows are judged.
    """

    path: str = Field(description=".jsonl, .json, .csv, .parquet, .txt, or a folder saved by datasets")
    field: str | None = Field(None, description="the column of plain text")
    prompt: str | None = Field(None, description="the column of prompts; only completions count")
    completion: str | None = Field(None, description="the column of completions")
    messages: str | None = Field(None, description="the column of chats; only the assistant's turns count")
    input_ids: str | None = Field(None, description="the column of token ids")
    teacher_prompt: str | None = Field(
        None, description="the column of what the teacher reads before the same answer, in place of the prompt"
    )
    pair: str | None = Field(None, description="the column of second texts, where rows are judged")
    label: str | None = Field(None, description="the column of classes (names or numbers) or of numbers")
    weight: str | None = Field(None, description="the column of how much a row's tokens count")
    span_weights: SpanWeightsPart | None = Field(None, description="how much tokens count by the spans of the row")


class DataPart(Part):
    """What is learnt from, and what is held out."""

    train: SourcePart
    eval: SourcePart
    max_length: int = Field(512, ge=2, description="tokens in a row at most")
    packing: bool = Field(False, description="join plain text into rows of max_length instead of padding")
    masked_share: float = Field(MASKED_SHARE, gt=0, lt=1, description="of the tokens, for the task masked")
