"""Bring any batch into one form: one sequence in each row, padded on the right.

Models differ in what they make of padding on the left and of several sequences in a row: positions may count the
padding, and states run on from one sequence to the next. They all read a row of one sequence alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from potstill.errors import DataError
from potstill.losses.alignment import IGNORE, SAMPLER_LOG_PROBS, STUDENT_LOG_PROBS, TOKEN_TASKS, Task
from potstill.losses.torch_compile import disable_compile

POSITIONS = "position_ids"  # [B, T], 0 at the beginning of each sequence
NUMBERS = ("seq_idx", "segment_ids", "sequence_ids")  # [B, T], the number of each token's sequence
BOUNDARIES = ("cu_seq_lens_q", "cu_seq_lens_k", "cu_seqlens")  # where the sequences of a batch of one row begin
LENGTHS = ("max_length_q", "max_length_k")
PACKING = (POSITIONS, *NUMBERS, *BOUNDARIES, *LENGTHS)  # columns that say where sequences begin
FILL = {"labels": IGNORE, STUDENT_LOG_PROBS: float("nan"), SAMPLER_LOG_PROBS: float("nan")}
OWNER = "teacher_"  # before the names of columns with a prompt of the teacher's own


@disable_compile
def right_padded(batch: Mapping[str, Any], task: Task | None = None) -> dict[str, Tensor]:
    """Return a batch with one sequence in each row, padded on the right; with its own tensors where it is so.

    Rows with padding on the left or on both sides are shifted. Packed rows are split where position_ids begin again at
    0, where seq_idx or the number in the attention_mask changes, and at cu_seq_lens_q. Columns of values by token move
    along. Without an attention_mask there is no padding.

    Args:
        batch: input_ids [B, T], and any other columns.
        task: adds labels to a batch of a causal model that has none: each token is its own; None leaves them out.

    Raises:
        DataError: a target stands on padding, padding stands between the tokens of a sequence, positions do not count
            from 0, columns have another shape, labels are missing, or rows with one label each are packed.
    """
    if "input_ids" not in batch:
        raise DataError(f"data: expected input_ids in a batch, got {', '.join(batch)}. Tokenize the rows.")
    if f"{OWNER}input_ids" not in batch:
        split = _split(_complete(batch, task))
        return split if split.get("labels", batch["input_ids"]).ndim > 1 else _check_rows(split, batch)
    student = {name: column for name, column in batch.items() if not name.startswith(OWNER)}
    teacher = {name.removeprefix(OWNER): column for name, column in batch.items() if name.startswith(OWNER)}
    student, teacher = (_check_rows(_split(_complete(part, task)), part) for part in (student, teacher))
    return student | {f"{OWNER}{name}": column for name, column in teacher.items()}


def _complete(batch: Mapping[str, Any], task: Task | None) -> dict[str, Any]:
    """Add a mask and labels where there are none, and check the shapes of the columns that a model reads."""
    ids = batch["input_ids"]
    if not isinstance(ids, Tensor) or ids.ndim != 2:
        got = list(ids.shape) if isinstance(ids, Tensor) else f"a {type(ids).__name__}"
        raise DataError(f"data: expected input_ids as a tensor of shape [B, T], got {got}. Give a batch of rows.")
    columns = {name: column for name, column in batch.items() if column is not None}
    columns.setdefault("attention_mask", torch.ones_like(ids))
    if task == "causal" and "labels" not in columns:
        columns["labels"] = ids.masked_fill(columns["attention_mask"] == 0, IGNORE)
    if task is not None and "labels" not in columns:
        raise DataError(
            f"data: expected labels for the task {task}, got none. Give a column labels, as `encode` makes it, or a "
            "collator that makes it."
        )
    for name in ("attention_mask", "labels", POSITIONS, *NUMBERS, "token_type_ids", "weights"):
        shapes = [ids.shape[:1], ids.shape] if name in ("labels", "weights") else [ids.shape]
        if task is not None and len(shapes) > 1:
            shapes = shapes[1:] if task in TOKEN_TASKS else shapes[:1]
        if name in columns and columns[name].shape not in shapes:
            raise DataError(
                f"data: expected {name} of shape {list(shapes[-1])}, as the input_ids, got "
                f"{list(columns[name].shape)}. Give a value for each {'token' if shapes[-1] == ids.shape else 'row'}."
            )
    if "weights" in columns and not bool((columns["weights"] >= 0).all()):
        raise DataError("data: expected weights >= 0, got a negative number or NaN in a batch. Correct the weights.")
    return columns


def _split(batch: dict[str, Any]) -> dict[str, Any]:
    """Move each sequence of a batch to the beginning of a row of its own."""
    ids, mask, labels = batch["input_ids"], batch["attention_mask"], batch.get("labels")
    if labels is not None and labels.ndim > 1 and (row := _first((labels != IGNORE) & (mask == 0))) is not None:
        raise DataError(
            f"data: expected labels of -100 where attention_mask is 0, got a target on padding in row {row} of a "
            "batch. Set it to -100, or leave labels out where all tokens are targets."
        )
    if batch.keys().isdisjoint(PACKING) and bool(
        ((mask == 0) | (mask == 1)).all() & (mask[:, 1:] <= mask[:, :-1]).all()
    ):
        return batch
    width = ids.shape[1]
    tokens = (mask != 0).flatten().nonzero().squeeze(1)  # of padding nothing remains
    starts = _starts(batch, tokens, width)
    if (gap := _first(~starts & _differs(tokens - torch.arange(len(tokens), device=ids.device)))) is not None:
        raise DataError(
            f"data: expected an attention_mask that is 0 on padding at the ends of a sequence, got 0 between tokens in "
            f"row {int(tokens[gap - 1]) // width + 1} of a batch. Remove these tokens from the row."
        )
    sequence = starts.cumsum(0) - 1
    begin = starts.nonzero().squeeze(1)
    column = torch.arange(len(tokens), device=ids.device) - begin[sequence]
    lengths = torch.bincount(sequence, minlength=len(begin))
    shape = (len(begin), int(lengths.max()) if len(begin) else 0)
    padding = ids[mask == 0]
    fill = FILL | {"input_ids": int(padding[0]) if len(padding) else 0}
    rows = {name: values for name, values in batch.items() if name not in PACKING}
    for name, values in rows.items():
        if isinstance(values, Tensor) and values.shape[:2] == ids.shape:
            rows[name] = values.new_full((*shape, *values.shape[2:]), fill.get(name, 0))
            rows[name][sequence, column] = values.flatten(0, 1)[tokens]
    rows["attention_mask"] = (torch.arange(shape[1], device=ids.device) < lengths[:, None]).to(ids.dtype)
    return rows


def _starts(batch: Mapping[str, Any], tokens: Tensor, width: int) -> Tensor:
    """Find the tokens at which a sequence begins, [N] bool, of N tokens by their places in the flattened batch."""

    def of_tokens(name: str) -> Tensor:
        return batch[name].flatten()[tokens]

    starts = _differs(tokens // width) | _differs(of_tokens("attention_mask"))
    for name in NUMBERS:
        if name in batch:
            starts |= _differs(of_tokens(name))
    for name in BOUNDARIES:
        if name in batch:
            if len(batch["input_ids"]) != 1 or int(batch[name][-1]) != width:
                raise DataError(
                    f"data: expected {name} for a batch of one row, up to its end, got {batch[name].tolist()[-1]} at "
                    f"the end for {list(batch['input_ids'].shape)} tokens. Give position_ids instead."
                )
            starts |= torch.isin(tokens, batch[name].to(tokens))
    if POSITIONS in batch:
        positions = of_tokens(POSITIONS)
        starts |= _differs(positions - torch.arange(len(tokens), device=tokens.device))
        if (wrong := _first(starts & (positions != 0))) is not None:
            raise DataError(
                f"data: expected position_ids that count 0, 1, 2 from the beginning of each sequence, got "
                f"{int(positions[wrong - 1])} at one in row {int(tokens[wrong - 1]) // width + 1} of a batch. Leave "
                "position_ids out where a row is one sequence."
            )
    if bool((of_tokens("attention_mask") < 0).any()):
        raise DataError("data: expected an attention_mask of 1 on tokens and 0 on padding, got a number below 0.")
    return starts


def _differs(values: Tensor) -> Tensor:
    """Where a value differs from the one before it, [N] bool; True at the first."""
    return torch.cat([values.new_ones(1).bool(), values[1:] != values[:-1]])[: len(values)]


def _first(flags: Tensor) -> int | None:
    """The number of the first row that has a flag, from 1."""
    places = flags.nonzero()
    return int(places[0, 0]) + 1 if len(places) else None


def _check_rows(split: dict[str, Any], batch: Mapping[str, Any]) -> dict[str, Any]:
    """Check that no row was split, where rows have something that belongs to all of their tokens."""
    if len(split["input_ids"]) != len(batch["input_ids"]):
        raise DataError(
            f"data: expected one sequence in each of {len(batch['input_ids'])} rows, got {len(split['input_ids'])} by "
            "the columns attention_mask, position_ids and seq_idx. Rows with a label each, or with a prompt of the "
            "teacher's own, are not packed: give each sequence a row."
        )
    return split
