"""From a source to padded or packed batches."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import tokenizers
import torch
import transformers
from datasets import Dataset
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from potstill.data.disk_cache import BATCH, cache_path, write_arrow
from potstill.data.files import write_text
from potstill.data.labelled import bare_rows, labelled_rows
from potstill.data.rows import Encoding, Row
from potstill.data.sources import OWN_IDS, OWN_PROMPT, Kind, Source, load
from potstill.data.weighing import WEIGHING
from potstill.errors import DataError
from potstill.losses.alignment import IGNORE, Task, target_positions


@dataclass(frozen=True)
class Examples:
    """Encoded examples.

    Args:
        dataset: a Dataset, memory-mapped, or a MaskedRows: [i] is {"input_ids": list of int, "labels": list of int}.
            Every example has a token that counts. Where rows are judged labels are one number, and pairs have
            token_type_ids. Where the teacher has prompts of its own, also teacher_input_ids and teacher_labels. Where
            the source says how much tokens count, also weights, a list of float.
        tokens: how many tokens count in all, by `potstill.losses.alignment.target_positions`.
        notes: what the run should say: what was cut, skipped or left out.
        teacher_longest: tokens of the longest row that the teacher reads in place of the student's; 0 where none is.
    """

    dataset: Any
    tokens: int
    notes: tuple[str, ...]
    teacher_longest: int = 0


def encode(
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    packing: bool = False,
    task: Task = "causal",
    classes: Mapping[str, int] | None = None,
) -> Examples:
    """Tokenise a source into examples of at most `max_length` tokens.

    - text: the document with the tokenizer's special tokens, closed by EOS. Every token counts. A longer document
      is cut into windows and nothing of it is lost.
    - text with `packing`: all documents in one stream, in rows of exactly `max_length`; the last may be shorter.
    - prompt and completion: the prompt with special tokens, the completion without them, EOS. The prompt does
      not count. Cut on the right.
    - messages: by the chat template. Every turn of the assistant counts, with the tokens that end it, from the
      first token on that the prompt alone does not have. Cut on the right.
    - input_ids: as they are; without labels all of them count. Cut on the right.
    - a prompt of the teacher's own (`Source.teacher_prompt`): encoded as the student's, before the same answer, as much
      of it as is left of the student's row; `max_length` is the student's alone.

    For the task masked these are the tokens that may be masked, special ones excepted, and each window of a document
    has the special tokens around it; see `MaskedRows`. For classification and regression a row is a text, or a pair of
    texts, and its label; for encoder it is a text. They are cut on the right.

    Tokens that the source gives a weight of 0 do not count; see `Source` for weights.

    Rows without text are skipped, examples without a token that counts left out; the notes say how many. What was
    encoded is kept on disk under a name made of the content, the tokenizer and the options.

    Args:
        source: the file and its columns.
        tokenizer: of the student.
        max_length: tokens of the longest example, >= 2.
        packing: for text only, because the examples in a row see one another.
        task: what the model will be asked for.
        classes: for classification, the numbers of classes by their names: label2id of the model's config.

    Raises:
        DataError: the source is not usable (see `load`), something else than text is to be packed, a prompt
            leaves no room for its answer, a conversation has no assistant or no usable template, ids are outside
            the vocabulary, a label is not known, nothing counts, or the answer is tokenized otherwise behind the
            teacher's own prompt.
    """
    if max_length < 2:
        raise DataError(
            f"data: expected max_length >= 2, got {max_length}. The first token of a row is never predicted. "
            "Raise max_length."
        )
    dataset, kind = load(source, task)
    file = Path(source.path).name
    _require_suitable(kind, tokenizer, packing, file, task)
    named, by_span = dict(classes or {}), source.span_weights
    weighed = not WEIGHING.isdisjoint(dataset.column_names)
    if task != "causal" and (weighed or source.weight or by_span):
        raise DataError(
            f"data: expected no token weights for the task {task}, got some for {file}. They are for causal models. "
            "Leave out weight, span_weights and the column weights."
        )
    options = [max_length, packing, task, sorted(named.items()), sorted((by_span or {}).items())]
    kept = _kept_file(dataset, tokenizer, options)
    kept_facts = kept.with_suffix(".json")  # written last: it vouches for the other
    if not (kept.exists() and kept_facts.exists()):
        facts: Counter[str] = Counter()
        encoding = Encoding(tokenizer, max_length, packing, file, facts, task, named, by_span)
        own = not {*OWN_PROMPT.values(), *OWN_IDS}.isdisjoint(dataset.column_names)
        beside = dict.fromkeys(OWN_IDS if own else (), _IDS) | ({"weights": _WEIGHTS} if weighed else {})
        write_arrow(kept, *_counted(_rows(dataset, kind, encoding), facts, task, beside))
        write_text(kept_facts, json.dumps(facts))
    facts = Counter(json.loads(kept_facts.read_text()))
    if not facts["tokens"]:
        raise DataError(
            f"data: expected a token that counts in {file}, got empty data: none in {_many(len(dataset), 'row')}. "
            "Give longer texts, or labels that are not all -100."
        )
    notes = _notes(facts, kind if task == "causal" else None, tokenizer, max_length, file)
    return Examples(Dataset.from_file(str(kept)), facts["tokens"], notes, facts["teacher_longest"])


_IDS, _WEIGHTS = pa.list_(pa.int32()), pa.list_(pa.float32())
_LABELS = {"classification": pa.int32(), "regression": pa.float64(), "encoder": pa.int32()}


def _rows(dataset: Dataset, kind: Kind, encoding: Encoding) -> Iterator[Row]:
    if kind == "labelled":
        return labelled_rows(dataset, encoding)
    if encoding.task == "encoder":
        return bare_rows(dataset, encoding)
    rows = encoding.rows(dataset, kind)
    return encoding.maskable(rows) if encoding.task == "masked" else rows


def _require_suitable(kind: Kind, tokenizer: PreTrainedTokenizerBase, packing: bool, file: str, task: Task) -> None:
    if task == "encoder" and kind != "text":
        raise DataError(
            f"data: expected text for the task encoder, got {kind} in {file}. Name its column, as in `field: text`."
        )
    if packing and (kind != "text" or task == "encoder"):
        raise DataError(
            f"data: expected text to pack, got {kind} in {file}. Packed examples would see one another. "
            "Set packing to false."
        )
    if kind == "messages" and tokenizer.chat_template is None:
        raise DataError(
            f"data: expected a tokenizer with a chat template for the messages in {file}, got none. "
            "Set tokenizer.chat_template, or give prompt and completion."
        )


def _kept_file(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, options: list[Any]) -> Path:
    loaded = Path(dataset.cache_files[0]["filename"]).stem
    versions = transformers.__version__, tokenizers.__version__
    return cache_path(["encoded", loaded, tokenizer, versions, *options])


def _counted(
    rows: Iterator[Row], facts: Counter[str], task: Task, beside: Mapping[str, pa.DataType]
) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
    """The rows that have a token that counts, in batches; adds `tokens` and `left_out` to the facts."""
    first = list(islice(rows, 1))
    typed = bool(first) and first[0].token_type_ids is not None
    types = {"input_ids": _IDS, "labels": _LABELS.get(task, _IDS)} | ({"token_type_ids": _IDS} if typed else {})
    types |= beside
    schema = pa.schema(types)

    def batches() -> Iterator[pa.RecordBatch]:
        remaining = chain(first, rows)
        while chunk := list(islice(remaining, BATCH)):
            tokens = target_positions(_stacked([row.labels for row in chunk]), task).sum(dim=1).tolist()
            kept = [row for row, count in zip(chunk, tokens, strict=True) if count]
            facts["tokens"] += sum(tokens)
            facts["left_out"] += len(chunk) - len(kept)
            arrays = [pa.array([getattr(row, name) for row in kept], type) for name, type in types.items()]
            yield pa.record_batch(arrays, schema=schema)

    return schema, batches()


def _stacked(labels: Sequence[Any]) -> Tensor:
    """Labels of several rows: [B, T], padded, or [B] where each is one number."""
    if not isinstance(labels[0], Sequence):
        return torch.tensor(labels, dtype=torch.float32 if isinstance(labels[0], float) else torch.long)
    several = [torch.tensor(row, dtype=torch.long) for row in labels]
    return pad_sequence(several, batch_first=True, padding_value=IGNORE)


def _notes(
    facts: Counter[str], kind: Kind | None, tokenizer: PreTrainedTokenizerBase, max_length: int, file: str
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

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Input_ids, attention_mask (1 on tokens, 0 on padding) and labels, each [B, T] int64.

        Labels are [B] where rows are judged, float32 for numbers; token_type_ids are there if the examples have them.
        Where the rows have a prompt of the teacher's own, the first three once more with teacher_ before the names, of
        another T. Where they have weights, these too, [B, T] float32.
        """
        batch = self._padded(examples, "")
        if "token_type_ids" in examples[0]:
            kinds = [torch.tensor(example["token_type_ids"], dtype=torch.long) for example in examples]
            batch["token_type_ids"] = pad_sequence(kinds, batch_first=True, padding_value=0)
        if "weights" in examples[0]:
            weights = [torch.tensor(example["weights"], dtype=torch.float32) for example in examples]
            batch["weights"] = pad_sequence(weights, batch_first=True)
        return batch | (self._padded(examples, "teacher_") if "teacher_input_ids" in examples[0] else {})

    def _padded(self, examples: Sequence[Mapping[str, Any]], whose: str) -> dict[str, Tensor]:
        ids = [torch.tensor(example[f"{whose}input_ids"], dtype=torch.long) for example in examples]
        mask = [torch.ones_like(row) for row in ids]
        return {
            f"{whose}input_ids": pad_sequence(ids, batch_first=True, padding_value=self.pad_token_id),
            f"{whose}attention_mask": pad_sequence(mask, batch_first=True, padding_value=0),
            f"{whose}labels": _stacked([example[f"{whose}labels"] for example in examples]),
        }


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
    examples: Iterable[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, rows: int
) -> Iterator[dict[str, Tensor]]:
    """Padded batches of at most so many rows each, in order."""
    collate, remaining = PaddingCollator(pad_token_id(tokenizer)[0]), iter(examples)
    while batch := list(islice(remaining, rows)):
        yield collate(batch)
