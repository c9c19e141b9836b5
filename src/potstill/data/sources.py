"""Data sources: where rows are, and which of their columns have which meaning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from glob import has_magic
from pathlib import Path
from typing import Annotated, Literal

from potstill.data.token_weights import SpanWeights
from potstill.errors import DataError
from potstill.losses.declared import Range, Record

SourceKind = Literal["text", "completion", "messages", "input_ids", "labelled"]

LongRows = Literal["cut", "drop", "split"]

# The prompt that the teacher reads in place of the student's: its standard column by kind. Of ids both or none.
TEACHER_PROMPT_COLUMNS: dict[SourceKind, str] = {"completion": "teacher_prompt", "messages": "teacher_messages"}
TEACHER_ID_COLUMNS = ("teacher_input_ids", "teacher_labels")

# The tokens that a teacher read and wrote, in rows that would be encoded as others.
WRITTEN_COLUMNS = ("prompt_ids", "completion_ids")


@dataclass(frozen=True)
class Source(Record):
    """Data, and the names of its columns. Without names the usual ones are looked for: docs/data.md shows each shape.

    Args:
        path: a file (.jsonl, .json, .csv, .tsv, .parquet, .arrow or .txt; those of text also as .gz, .bz2 or .zst), a
            folder or a glob of such files, a folder written by `Dataset.save_to_disk`, or, with a split, the name of a
            data set on the hub. A .txt is one document, in a column named text.
        split: of a data set on the hub or of a folder with several, such as train.
        config: of a data set on the hub or of a folder with several.
        revision: of a data set on the hub: a branch, a tag or a commit.
        streaming: read a data set on the hub without storing its files.
        limit: read that many rows, the first ones.
        long_rows: what becomes of rows of more than max_length tokens: cut loses their end, drop leaves them out, split
            makes several rows of each. By default plain text is split, and all others are cut.
        share: of the training rows, where there are several sources; only the ratio matters.
        field: the column of plain text.
        prompt: the column of prompts, texts or lists of messages; needs completion. Only completions have a loss. A
            list of columns is joined by blank lines, with one before the completion.
        completion: the column of completions; needs prompt.
        system: the column of system prompts, beside prompts or messages.
        history: the column of earlier turns, beside prompts: lists of [user, assistant].
        chat: render prompt and completion as messages of the user and the assistant by the chat template; by default
            only those named instruction, question, query or problem.
        messages: the column of conversations, each a list of {role, content, ...} or {from, value}, or that list as
            JSON text; only the assistant's turns have a loss. Columns named tools, documents and chat_template_kwargs
            are read with it.
        input_ids: the column of token ids; columns named labels and weights are read with it, and teacher_input_ids
            with teacher_labels.
        teacher_prompt: the column of what the teacher reads before the same answer, in place of the prompt: text beside
            prompts; a list of messages beside conversations, in place of all before the assistant's first turn.
        pair: the column of second texts, for classification and regression; a column named text_pair is read by itself.
        label: the column of classes (names or numbers) or of numbers, for classification and regression; false for
            training rows without labels, from which only the teacher's outputs are learnt.
        weight: the column of loss weights of rows, which all tokens of a row have; not for plain text.
        span_weights: loss weights of tokens by the spans of the row; see `potstill.data.token_weights`.
        ignore: columns that are left out on purpose; others that are not used are named in a note, or refused if they
            would change what a model reads.
    """

    path: str | Path
    field: str | None = None
    prompt: str | tuple[str, ...] | None = None
    completion: str | None = None
    messages: str | None = None
    input_ids: str | None = None
    teacher_prompt: str | None = None
    pair: str | None = None
    label: str | Literal[False] | None = None
    weight: str | None = None
    span_weights: SpanWeights | None = None
    _: KW_ONLY
    system: str | None = None
    history: str | None = None
    chat: bool | None = None
    ignore: tuple[str, ...] = ()
    split: str | None = None
    config: str | None = None
    revision: str | None = None
    streaming: bool = False
    limit: Annotated[int, Range(ge=1)] | None = None
    long_rows: LongRows | None = None
    share: Annotated[float, Range(gt=0, lt=float("inf"))] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("prompt", "ignore"):
            if isinstance(value := getattr(self, name), list):
                object.__setattr__(self, name, tuple(value))
        if isinstance(self.span_weights, Mapping):
            object.__setattr__(self, "span_weights", SpanWeights(**self.span_weights))

    @property
    def title(self) -> str:
        """Its name in messages: that of a file, or the whole path where it is no file."""
        path = Path(self.path)
        return str(self.path) if path.is_dir() or self.split or is_glob(path) else path.name


def as_source(data: Source | str | Path) -> Source:
    """The source itself, or that of a path.

    Raises:
        DataError: it is neither.
    """
    if not isinstance(data, Source | str | Path):
        raise DataError(f"data: expected a Source or a path, got a {type(data).__name__}. Give one.")
    return data if isinstance(data, Source) else Source(data)


def in_parts(sources: Source | Sequence[Source]) -> tuple[Source, ...]:
    """The sources that are given alone or as a list."""
    return (sources,) if isinstance(sources, Source) else tuple(sources)


def is_glob(path: Path) -> bool:
    """Whether a path is a pattern, and no file that happens to have its name."""
    return has_magic(str(path)) and not path.exists()


def listed(names: Sequence[str], most: int = 12) -> str:
    """Join names for an error, the first dozen of them."""
    return (", ".join(names[:most]) or "none") + (f" and {len(names) - most} more" if len(names) > most else "")
