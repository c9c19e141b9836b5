"""Encode a data source, and collate its rows into padded batches."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
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
from potstill.data.encoding_notes import altered_text, encoding_notes, plural
from potstill.data.labelled import has_token_types, numbered_classes, sequence_rows
from potstill.data.loading import load
from potstill.data.right_padding import NUMBERS, OWNER, POSITIONS, right_padded
from potstill.data.rows import EncodedRow, RowEncoder
from potstill.data.sources import TEACHER_ID_COLUMNS, TEACHER_PROMPT_COLUMNS, Source, SourceKind, as_source
from potstill.data.token_weights import WEIGHT_COLUMNS
from potstill.errors import DataError, EmptyDataError
from potstill.files import write_text
from potstill.losses.alignment import IGNORE, SEQUENCE_TASKS, Task, target_positions
from potstill.models.checksums import is_whole, write_checksum


@dataclass(frozen=True)
class Examples:
    """Encoded examples.

    Args:
        dataset: a memory-mapped Dataset, or a MaskedRows: [i] is {"input_ids": list of int, "labels": list of int}.
            Every example has a target token. For classification and regression, labels are one number, and pairs have
            token_type_ids. Where the teacher has prompts of its own, also teacher_input_ids and teacher_labels. Where
            the source has token weights, also weights, a list of float.
        tokens: number of target tokens in all, by `potstill.losses.alignment.target_positions`.
        notes: what to print: examples that were truncated, skipped or left out.
        teacher_longest: tokens of the longest row with a prompt of the teacher's own; 0 where there is none.
        joined: whether its rows are joined plain text, which is not packed again.
        sources: the titles of the sources, and their rows before they were encoded, empty ones included.
        max_length: that they were encoded with; a rehearsal takes shorter pieces.
    """

    dataset: Any
    tokens: int
    notes: tuple[str, ...]
    teacher_longest: int = 0
    joined: bool = False
    sources: tuple[tuple[str, Dataset], ...] = ()
    max_length: int = 0


def encode(
    source: Source | str | Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    packing: bool = False,
    task: Task = "causal",
    classes: Mapping[str, int] | None = None,
) -> Examples:
    """Tokenize a source into examples of at most `max_length` tokens.

    - text: the document with the tokenizer's special tokens, closed by EOS. Every token is a target. A longer document
      is split into windows and nothing of it is lost.
    - text with `packing`: all documents in one stream, in rows of exactly `max_length`; the last may be shorter. The
      documents in a row see one another. Rows of all other kinds stay as they are, and are packed in training, where no
      row sees another: see `potstill.data.packing.PackedRows`.
    - prompt and completion: tokenized as one text, with special tokens, closed by EOS. The prompt has no labels; a
      token over the border of both is the completion's.
    - messages: by the chat template. Every turn of the assistant has labels, with the token that ends it; what the
      template opens for the assistant has none. A template that changes earlier turns gives several examples, see
      `potstill.data.chat_texts.ChatRenderer`.
    - input_ids: as they are; without labels all of them are targets.
    - a prompt of the teacher's own (`Source.teacher_prompt`): encoded as the student's, before the same answer, as much
      of it as the student's row holds; `max_length` is the student's alone.

    Rows other than text are truncated on the right; `Source.long_rows` says otherwise.

    For the task masked the labels are those of tokens that may be masked, special ones excepted, and each window of a
    document has the special tokens around it; see `MaskedRows`. For classification and regression a row is a text, or a
    pair of texts, and its label; for encoder it is a text. They are truncated on the right.

    Tokens of weight 0 are no targets; see `Source` for weights. Empty rows are skipped and examples without a target
    token left out; the notes give their numbers. The encoded examples are cached on disk under a name made of the
    content, the tokenizer and the options.

    Args:
        source: or its path alone.
        tokenizer: of the student.
        max_length: tokens of the longest example, >= 2.
        packing: joins plain text, see above.
        classes: for classification, the numbers of classes by their names: label2id of the model's config.

    Raises:
        DataError: the source is not usable (see `load`), other rows than text are to be packed for a task that is not
            causal, a prompt leaves no room for its answer, a conversation has no assistant or no usable template, ids
            are outside the vocabulary, a label is not known, no token is a target, or the answer is tokenized
            differently behind the teacher's own prompt.
    """
    if max_length < 2:
        raise DataError(
            f"data: expected max_length >= 2, got {max_length}. The first token of a row is never predicted. "
            "Raise max_length."
        )
    source = as_source(source)
    dataset, kind, loading_notes, class_names = load(source, task, has_template=tokenizer.chat_template is not None)
    columns, file, span_weights = set(dataset.column_names), source.title, source.span_weights
    _check_suitable(source, kind, columns, tokenizer, packing, task)
    classes, class_notes = numbered_classes(classes or {}, class_names, file)
    joined = packing and kind == "text"
    options = [max_length, joined, task, sorted(classes.items()), str(span_weights), source.long_rows]
    loaded = Path(dataset.cache_files[0]["filename"]).stem
    path = cache_path(["encoded", loaded, tokenizer, transformers.__version__, tokenizers.__version__, *options])
    counts_path = path.with_suffix(".json")  # written last: while it is there the other is whole
    encoder = RowEncoder(tokenizer, max_length, joined, file, Counter(), task, classes, span_weights, source.long_rows)
    if not (is_whole(path) and is_whole(counts_path)):
        whole_texts = task in SEQUENCE_TASKS or task == "encoder"
        rows = sequence_rows(dataset, encoder) if whole_texts else encoder.rows(dataset, kind)
        rows = encoder.maskable(rows) if task == "masked" else rows
        schema = _schema(columns, tokenizer, task)
        write_arrow(path, schema, _batches_with_targets(rows, encoder.counts, task, schema))
        if task == "causal" and (altered := altered_text(tokenizer, encoder.sample)):
            encoder.examples["altered"] = altered
        write_text(counts_path, json.dumps([encoder.counts, encoder.examples]))
        write_checksum(counts_path)
    saved_counts, examples = json.loads(counts_path.read_text())
    encoder = replace(encoder, counts=Counter(saved_counts), examples=examples)
    if not encoder.counts["tokens"]:
        if encoder.counts["drop"]:
            raise EmptyDataError(
                f"data: expected rows of at most max_length {max_length} tokens in {file}, got longer ones alone, "
                "which long_rows: drop leaves out. Raise max_length, or take long_rows: split."
            )
        raise EmptyDataError(
            f"data: expected a target token in {file}, got empty data: none in {plural(len(dataset), 'row')}. "
            "Give longer texts, or labels that are not all -100."
        )
    notes = [*loading_notes, *class_notes, *encoding_notes(encoder, len(dataset))]
    if task == "causal" and kind in ("text", "completion") and tokenizer.eos_token_id is None:
        notes = [f"tokenizer: expected an EOS token, got none: the texts of {file} have no end token.", *notes]
    encoded, sources, counts = Dataset.from_file(str(path)), ((file, dataset),), encoder.counts
    return Examples(encoded, counts["tokens"], tuple(notes), counts["teacher_longest"], joined, sources, max_length)


def _check_suitable(
    source: Source, kind: SourceKind, columns: set[str], tokenizer: PreTrainedTokenizerBase, packing: bool, task: Task
) -> None:
    file = source.title
    if task == "encoder" and kind != "text":
        raise DataError(
            f"data: expected text for the task encoder, got {kind} in {file}. Name its column, as in `field: text`."
        )
    if packing and task != "causal" and (kind != "text" or task == "encoder"):
        raise DataError(
            f"data: expected text to pack for the task {task}, got {kind} in {file}. Packed rows would see one "
            "another. Set packing to false."
        )
    if kind == "messages" and tokenizer.chat_template is None:
        raise DataError(
            f"data: expected a tokenizer with a chat template for the messages in {file}, got none. "
            "Set tokenizer.chat_template, or give prompt and completion."
        )
    own_prompts = not columns.isdisjoint({*TEACHER_PROMPT_COLUMNS.values(), *TEACHER_ID_COLUMNS})
    if source.long_rows == "split" and own_prompts:
        raise DataError(
            f"data: expected long_rows cut or drop beside prompts of the teacher's own, got split for {file}: only the "
            "first part would have the prompt."
        )
    if source.long_rows is not None and (task in SEQUENCE_TASKS or task == "encoder"):
        raise DataError(
            f"data: expected no long_rows for the task {task}, got {source.long_rows} for {file}. Long texts are cut."
        )
    if task != "causal" and (not columns.isdisjoint(WEIGHT_COLUMNS) or source.weight or source.span_weights):
        raise DataError(
            f"data: expected no token weights for the task {task}, got some for {file}. They are for causal models. "
            "Leave out weight, span_weights and the column weights."
        )


def _schema(columns: set[str], tokenizer: PreTrainedTokenizerBase, task: Task) -> pa.Schema:
    ids = pa.list_(pa.int32())
    labels = {"classification": pa.int32(), "regression": pa.float64(), "encoder": pa.int32()}
    types = {"input_ids": ids, "labels": labels.get(task, ids)}
    if not columns.isdisjoint({*TEACHER_PROMPT_COLUMNS.values(), *TEACHER_ID_COLUMNS}):
        types |= dict.fromkeys(TEACHER_ID_COLUMNS, ids)
    if not columns.isdisjoint(WEIGHT_COLUMNS):
        types["weights"] = pa.list_(pa.float32())
    if has_token_types(columns, tokenizer):
        types["token_type_ids"] = ids
    return pa.schema(types)


def _batches_with_targets(
    rows: Iterator[EncodedRow], counts: Counter[str], task: Task, schema: pa.Schema
) -> Iterator[pa.RecordBatch]:
    """The rows that have a target token, in batches; adds `tokens` and `left_out` to the counts."""
    while chunk := list(islice(rows, BATCH)):
        tokens = target_positions(_stack_labels([row.labels for row in chunk]), task).sum(dim=1).tolist()
        kept = [row for row, count in zip(chunk, tokens, strict=True) if count]
        counts["tokens"] += sum(tokens)
        counts["left_out"] += len(chunk) - len(kept)
        arrays = [pa.array([getattr(row, field.name) for row in kept], field.type) for field in schema]
        yield pa.record_batch(arrays, schema=schema)


def _stack_labels(labels: Sequence[Any]) -> Tensor:
    """Labels of several rows: [B, T], padded, or [B] where each is one number."""
    tensors = [torch.as_tensor(label) for label in labels]
    if tensors[0].ndim:
        return _pad(tensors, IGNORE)
    return torch.stack(tensors).to(torch.float32 if tensors[0].is_floating_point() else torch.long)


def _pad(rows: Iterable[Any], value: int, dtype: torch.dtype = torch.long) -> Tensor:
    tensors = [torch.as_tensor(row, dtype=dtype) for row in rows]
    return pad_sequence(tensors, batch_first=True, padding_value=value)


# Columns of examples with a value for each token, beside input_ids and labels.
BY_TOKEN = dict.fromkeys(("attention_mask", "token_type_ids", POSITIONS, *NUMBERS), torch.long)
BY_TOKEN |= {f"{OWNER}attention_mask": torch.long, "weights": torch.float32}
PACKED_ROWS = "packed_rows"  # of an example that is several, see `potstill.data.packing`
COLLATED = {*BY_TOKEN, *TEACHER_ID_COLUMNS, "input_ids", "labels", "seq_lengths"}


@dataclass(frozen=True)
class PaddingCollator:
    """Collate examples into one batch, padded on the right to the longest.

    Labels come from the examples and are never compared with the pad id: EOS may pad, and still be a target. Examples
    that come with padding, by their attention_mask, lose it, and packed ones are split into their sequences, which
    position_ids, seq_idx or seq_lengths give: see `potstill.data.right_padding`. Other columns are left out.
    """

    pad_token_id: int

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Return input_ids, attention_mask (1 on tokens, 0 on padding) and labels, each [B, T] int64.

        Of `PackedRows` each row of each bin is a row of the batch, in order: models pack them again when they read it.
        Labels are there if the examples have them. For classification and regression they are [B], float32 for numbers;
        token_type_ids are there if the examples have them. With prompts of the teacher's own, the first three once more
        with teacher_ before the names, of another T. With token weights, these too, [B, T] float32.

        Raises:
            DataError: only some of the examples have a column, a column is not as long as input_ids, or padding has no
                attention_mask; see also `right_padded`.
        """
        examples = [row for example in examples for row in example.get(PACKED_ROWS, (example,))]
        given = [{name for name in COLLATED if example.get(name) is not None} for example in examples]
        names = set.intersection(*given)
        if "input_ids" not in names:
            without = next(example for example in examples if example.get("input_ids") is None)
            raise DataError(
                f"data: expected input_ids in every example of a batch, got {', '.join(without)}. Encode the rows."
            )
        for number, example in enumerate(examples, 1):
            self._check(example, given[number - 1], names, f"example {number} of a batch")
        columns = {name: [example[name] for example in examples] for name in names}
        if "seq_lengths" in columns:
            packed = columns.pop("seq_lengths")
            columns[POSITIONS] = [[i for length in lengths for i in range(length)] for lengths in packed]
        batch = {}
        for owner in ("", OWNER) if f"{OWNER}input_ids" in columns else ("",):
            ids = columns[f"{owner}input_ids"]
            batch[f"{owner}input_ids"] = _pad(ids, self.pad_token_id)
            batch[f"{owner}attention_mask"] = _pad(([1] * len(row) for row in ids), 0)
            if f"{owner}labels" in columns:
                batch[f"{owner}labels"] = _stack_labels(columns[f"{owner}labels"])
        batch |= {name: _pad(columns[name], 0, dtype) for name, dtype in BY_TOKEN.items() if name in columns}
        return right_padded(batch)

    def _check(self, example: Mapping[str, Any], names: set[str], of_all: set[str], where: str) -> None:
        """Check that an example has the columns of all others, each as long as its token ids."""
        if missing := names - of_all:
            raise DataError(
                f"data: expected the column {min(missing)} in every example of a batch or in none, got {where} with "
                "it. Give all of them the same columns."
            )
        for name in names:
            ids = example[f"{OWNER if name.startswith(OWNER) else ''}input_ids"]
            value = example[name]
            if isinstance(value, int | float) or getattr(value, "ndim", 1) == 0:
                continue  # the label of a row
            length = sum(value) if name == "seq_lengths" else len(value)
            if length != len(ids):
                raise DataError(
                    f"data: expected {name} for each of the {len(ids)} input_ids, got {length} in {where}. Correct the "
                    "column."
                )
        ids = [int(i) for i in (*example["input_ids"][:2], *example["input_ids"][-2:])]
        if [self.pad_token_id] * 2 in (ids[:2], ids[2:]) and names.isdisjoint(("labels", "attention_mask")):
            raise DataError(
                f"data: expected input_ids without padding, or with an attention_mask, got several "
                f"pad tokens ({self.pad_token_id}) in {where} and no mask. Give the attention_mask of the tokenizer."
            )


def pad_token_id(tokenizer: PreTrainedTokenizerBase) -> tuple[int, str | None]:
    """Find the id to pad with, and a note to print when the tokenizer has no pad token, but an EOS token."""
    if tokenizer.pad_token_id is not None:
        return tokenizer.pad_token_id, None
    if tokenizer.eos_token_id is not None:
        note = f"tokenizer: expected a pad token, got none: its EOS token {tokenizer.eos_token} is used."
        return tokenizer.eos_token_id, note
    raise DataError(
        "tokenizer: expected a pad or an EOS token, got neither. Rows of different length need one. "
        "Set tokenizer.pad_token."
    )


def in_batches(
    examples: Iterable[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    rows: int,
    device: torch.device | str | None = None,
) -> Iterator[dict[str, Tensor]]:
    """Yield padded batches of at most `rows` examples each, in order, on a device; default: the processor."""
    collate, remaining = PaddingCollator(pad_token_id(tokenizer)[0]), iter(examples)
    while batch := list(islice(remaining, rows)):
        yield {name: value.to(device) for name, value in collate(batch).items()}
