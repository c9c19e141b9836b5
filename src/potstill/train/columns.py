"""Columns of a batch that a model would read, or that choose its targets, and that are not read here."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping
from functools import cache
from typing import Any

from torch import Tensor, nn

from potstill.data.columns import chooses_loss
from potstill.data.right_padding import OWNER, PACKING
from potstill.errors import DataError, ShapeError
from potstill.losses.alignment import IGNORE, SAMPLER_LOG_PROBS, STUDENT_LOG_PROBS
from potstill.losses.torch_compile import disable_compile
from potstill.models.split import INPUTS, reads_token_types

logger = logging.getLogger(__name__)

READ = {*INPUTS, *PACKING, "labels", "weights", STUDENT_LOG_PROBS, SAMPLER_LOG_PROBS}

PADDING_RUN = 4  # pad tokens at an end of a row that are padding; fewer may be ends of texts


def check_columns(batch: Mapping[str, Tensor], model: Any) -> None:
    """Raise ShapeError for a column that would change the training and is not read; name all others once."""
    base, names = _base(model), {name for name in batch if name not in READ and not name.startswith(OWNER)}
    refused = {name for name in names if chooses_loss(name)} | names & columns_not_read(model)
    # Types of tokens go to models that tell several of them apart. Others add an embedding of the same number's token.
    types = batch.get("token_type_ids")
    if types is not None and "token_type_ids" in _parameters(base) and not reads_token_types(base) and types.any():
        refused |= {"token_type_ids"}
    if refused:
        raise ShapeError(
            f"data: expected batches without {min(refused)}, got some: {type(base).__name__} is not given it. Say "
            "which tokens are targets by labels, and remove the column."
        )
    if names:
        _note(frozenset(names))


def columns_not_read(model: Any) -> frozenset[str]:
    """Names that a model's forward takes, without those that are passed on."""
    return _parameters(_base(model)) - READ


@disable_compile
def check_padding(
    batch: Mapping[str, Tensor], pad: int | None, where: str = "a batch", *, layers: bool = False
) -> None:
    """Raise DataError for padding without an attention_mask that would be read.

    That is padding in front of a row's tokens, and behind them as a target, or by terms over `layers`.
    """
    if pad is None or not isinstance(batch.get("input_ids"), Tensor) or batch.get("attention_mask") is not None:
        return
    padding = behind = batch["input_ids"] == pad
    if batch.get("labels") is not None and not layers:
        behind = padding & (batch["labels"] != IGNORE)
    ends = (padding[..., :PADDING_RUN], behind[..., -PADDING_RUN:])
    if padding.shape[-1] > PADDING_RUN and any(end.all(-1).any() for end in ends):
        raise DataError(
            f"data: expected an attention_mask, got none in {where}, where several pad tokens ({pad}) stand at an end "
            "of a row and would be read. Give the attention_mask of the tokenizer."
        )


def padding_id(model: Any) -> int | None:
    """The token that pads by a model's config, or else its only EOS token; None where neither is known."""
    config = getattr(model, "config", None)
    ids = (getattr(config, name, None) for name in ("pad_token_id", "eos_token_id"))
    return next((token for token in ids if isinstance(token, int)), None)


def _base(model: Any) -> Any:
    """The model under its adapter."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _parameters(model: nn.Module) -> frozenset[str]:
    return frozenset(inspect.signature(model.forward).parameters)


@cache
def _note(names: frozenset[str]) -> None:
    logger.warning("data: columns of a batch that models and terms do not read: %s.", ", ".join(sorted(names)))
