"""From a source to padded or packed batches of a causal language model."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import pyarrow as pa
import tokenizers
import torch
import transformers
from datasets import Dataset
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from potstill.atomic import write_text
from potstill.data.kept import BATCH, kept_file, write_arrow
from potstill.data.rows import Encoding, Row
from potstill.data.sources import Kind, Source, load
from potstill.data.weighing import SPANS, SpanWeights
from potstill.errors import DataError
from potstill.targets import IGNORE, counting


@dataclass(frozen=True)
class Examples:
    """Encoded examples.

    Args:
        dataset: [i] is {"input_ids": list of int, "labels": list of int}, memory-mapped, with "weights", a list of
            float, where the source says how much tokens count. Every example has a token that counts.
        tokens: how many tokens count in all, by `potstill.targets.counting`.
        notes: what the run should say: what was cut, skipped or left out.
    """

    dataset: Dataset
    tokens: int
    notes: tuple[str, ...]


def encode(source: Source, tokenizer: PreTrainedTokenizerBase, *, max_length: int, packing: bool = False) -> Examples:
    """Tokenise a source into examples of at most `max_length` tokens.

    - text: the document with the tokenizer's special tokens, closed by EOS. Every token counts. A longer document
      is cut into windows and nothing of it is lost.
    - text with `packing`: all documents in one stream, in rows of exactly `max_length`; the last may be shorter.
    - prompt and completion: the prompt with special tokens, the completion without them, EOS. The prompt does
      not count. Cut on the right.
    - messages: by the chat template. Every turn of the assistant counts, with the tokens that end it, from the
      first token on that the prompt alone does not have. Cut on the right.
    - input_ids: as they are; without labels all of them count. Cut on the right.

    Tokens that the source gives a weight of 0 do not count; see `Source` for weights. Prompts and text have none.

    Rows without text are skipped, examples without a token that counts left out; the notes say how many. What was
    encoded is kept on disk under a name made of the content, the tokenizer and the options.

    Args:
        source: the file and its columns.
        tokenizer: of the student.
        max_length: tokens of the longest example, >= 2.
        packing: for text only, because the examples in a row see one another.

    Raises:
        DataError: the source is not usable (see `load`), something else than text is to be packed, a prompt
            leaves no room for its answer, a conversation has no assistant or no usable template, ids are outside
            the vocabulary, or nothing counts.
    """
    if max_length < 2:
        raise DataError(
            f"data: expected max_length >= 2, got {max_length}. The first token of a row is never predicted. "
            "Raise max_length."
        )
    dataset, kind = load(source)
    file = Path(source.path).name
    _require_suitable(kind, tokenizer, packing, file)
    kept = _kept_file(dataset, tokenizer, max_length, packing, source.span_weights)
    kept_facts = kept.with_suffix(".json")  # written last: it vouches for the other
    if not (kept.exists() and kept_facts.exists()):
        facts: Counter[str] = Counter()
        rows = Encoding(tokenizer, max_length, packing, file, facts, source.span_weights).rows(dataset, kind)
        schema = _WEIGHED if {"weight", "weights", *SPANS} & {*dataset.column_names} else _SCHEMA
        write_arrow(kept, schema, _counted(rows, schema, facts))
        write_text(kept_facts, json.dumps(facts))
    facts = Counter(json.loads(kept_facts.read_text()))
    if not facts["tokens"]:
        raise DataError(
            f"data: expected a token that counts in {file}, got empty data: none in {_many(len(dataset), 'row')}. "
            "Give longer texts, or labels that are not all -100."
        )
    notes = _notes(facts, kind, tokenizer, max_length, file)
    return Examples(Dataset.from_file(str(kept)), facts["tokens"], notes)


_SCHEMA = pa.schema({"input_ids": pa.list_(pa.int32()), "labels": pa.list_(pa.int32())})
_WEIGHED = _SCHEMA.append(pa.field("weights", pa.list_(pa.float32())))


def _require_suitable(kind: Kind, tokenizer: PreTrainedTokenizerBase, packing: bool, file: str) -> None:
    if packing and kind != "text":
        raise DataError(
            f"data: expected text to pack, got {kind} in {file}. Packed examples would see one another. "
            "Set packing to false."
        )
    if kind == "messages" and tokenizer.chat_template is None:
        raise DataError(
            f"data: expected a tokenizer with a chat template for the messages in {file}, got none. "
            "Set tokenizer.chat_template, or give prompt and completion."
        )


def _kept_file(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    packing: bool,
    span_weights: SpanWeights | None,
) -> Path:
    loaded = Path(dataset.cache_files[0]["filename"]).stem
    versions = transformers.__version__, tokenizers.__version__
    weights = sorted((span_weights or {}).items())
    return kept_file(["encoded", loaded, tokenizer, versions, max_length, packing, weights])


def _counted(rows: Iterator[Row], schema: pa.Schema, facts: Counter[str]) -> Iterator[pa.RecordBatch]:
    """The rows that have a token that counts, in batches; adds `tokens` and `left_out` to the facts."""
    while chunk := list(islice(rows, BATCH)):
        labels = [torch.tensor(row.labels, dtype=torch.int32) for row in chunk]
        tokens = counting(pad_sequence(labels, batch_first=True, padding_value=IGNORE)).sum(dim=1).tolist()
        kept = [row for row, count in zip(chunk, tokens, strict=True) if count]
        facts["tokens"] += sum(tokens)
        facts["left_out"] += len(chunk) - len(kept)
        arrays = [pa.array([getattr(row, field.name) for row in kept], field.type) for field in schema]
        yield pa.record_batch(arrays, schema=schema)


def _notes(
    facts: Counter[str], kind: Kind, tokenizer: PreTrainedTokenizerBase, max_length: int, file: str
) -> tuple[str, ...]:
    notes = []
    if kind in ("text", "completion") and tokenizer.eos_token_id is None:
        notes.append(f"tokenizer: expected an EOS token, got none: nothing closes the texts of {file}.")
    if facts["empty"]:
        notes.append(f"{file}: {_many(facts['empty'], 'empty row')} skipped.")
    if facts["cut"]:
        notes.append(f"{file}: {_many(facts['cut'], 'example')} cut at max_length {max_length}.")
    if facts["left_out"]:
        notes.append(f"{file}: {_many(facts['left_out'], 'example')} without a token that counts left out.")
    return tuple(notes)


def _many(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


@dataclass(frozen=True)
class PaddingCollator:
    """Examples to one batch, padded on the right to the longest.

    Labels come from the examples and are never compared with the pad id: EOS may pad, and still counts as data.

    Args:
        pad_token_id: see `pad_token_id`.
    """

    pad_token_id: int

    def __call__(self, examples: Sequence[Mapping[str, Sequence[float]]]) -> dict[str, Tensor]:
        """Input_ids, attention_mask (1 on tokens, 0 on padding) and labels, each [B, T] int64.

        Weights [B, T] float32 where examples have them.
        """
        ids = [torch.tensor(example["input_ids"], dtype=torch.long) for example in examples]
        labels = [torch.tensor(example["labels"], dtype=torch.long) for example in examples]
        mask = [torch.ones_like(row) for row in ids]
        batch = {
            "input_ids": pad_sequence(ids, batch_first=True, padding_value=self.pad_token_id),
            "attention_mask": pad_sequence(mask, batch_first=True, padding_value=0),
            "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORE),
        }
        if "weights" in examples[0]:
            weights = [torch.tensor(example["weights"], dtype=torch.float32) for example in examples]
            batch["weights"] = pad_sequence(weights, batch_first=True)
        return batch


def pad_token_id(tokenizer: PreTrainedTokenizerBase) -> tuple[int, str | None]:
    """The id that pads, and a note to show when it is not that of a pad token.

    Raises:
        DataError: the tokenizer has neither a pad nor an EOS token.
    """
    if tokenizer.pad_token_id is not None:
        return tokenizer.pad_token_id, None
    if tokenizer.eos_token_id is not None:
        note = f"tokenizer: expected a pad token, got none: its EOS token {tokenizer.eos_token} pads."
        return tokenizer.eos_token_id, note
    raise DataError(
        "tokenizer: expected a pad or an EOS token, got neither. Rows of different length need one. "
        "Set tokenizer.pad_token."
    )


def in_batches(
    examples: Iterable[Mapping[str, Sequence[float]]], tokenizer: PreTrainedTokenizerBase, rows: int
) -> Iterator[dict[str, Tensor]]:
    """Padded batches of at most so many rows each, in order."""
    collate, remaining = PaddingCollator(pad_token_id(tokenizer)[0]), iter(examples)
    while batch := list(islice(remaining, rows)):
        yield collate(batch)
