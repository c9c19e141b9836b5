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
from potstill.errors import ShapeError
from potstill.losses.alignment import SAMPLER_LOG_PROBS, STUDENT_LOG_PROBS
from potstill.models.split import INPUTS, reads_token_types

logger = logging.getLogger(__name__)

READ = {*INPUTS, *PACKING, "labels", "weights", STUDENT_LOG_PROBS, SAMPLER_LOG_PROBS}


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


def _base(model: Any) -> Any:
    """The model under its adapter."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _parameters(model: nn.Module) -> frozenset[str]:
    return frozenset(inspect.signature(model.forward).parameters)


@cache
def _note(names: frozenset[str]) -> None:
    logger.warning("data: columns of a batch that models and terms do not read: %s.", ", ".join(sorted(names)))
