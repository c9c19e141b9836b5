"""What is learnt from, and what is held out."""

from __future__ import annotations

from pydantic import Field

from potstill.recipe.document import Part


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


class DataPart(Part):
    """What is learnt from, and what is held out."""

    train: SourcePart
    eval: SourcePart
    max_length: int = Field(512, ge=2, description="tokens in a row at most")
    packing: bool = Field(False, description="join plain text into rows of max_length instead of padding")
    masked_share: float = Field(0.15, gt=0, lt=1, description="of the tokens, for the task masked")
