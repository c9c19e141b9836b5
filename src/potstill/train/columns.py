"""Columns of a batch that a model would read, and that are not given to it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import cache
from typing import Any

from torch import Tensor, nn

from potstill.data.right_padding import PACKING
from potstill.errors import ShapeError
from potstill.models.split import INPUTS, reads_token_types


def check_columns(batch: Mapping[str, Tensor], model: Any) -> None:
    """Raise ShapeError for a column that a model would read and that is not passed on to it."""
    unread = columns_not_read(model).intersection(batch)
    # Types of tokens go to models that tell several of them apart. Others add an embedding of the same number's token.
    types, base = batch.get("token_type_ids"), _base(model)
    if (
        types is not None
        and "token_type_ids" in _parameters(type(base))
        and not reads_token_types(base)
        and types.any()
    ):
        unread |= {"token_type_ids"}
    if unread:
        raise ShapeError(
            f"data: expected batches without {min(unread)}, got some: {type(base).__name__} would read it, and it is "
            "not passed on. Remove the column."
        )


def columns_not_read(model: Any) -> frozenset[str]:
    """Names that a model's forward takes, without those that are passed on."""
    return _parameters(type(_base(model))) - {*INPUTS, *PACKING, "labels", "self"}


def _base(model: Any) -> Any:
    """The model under its adapter."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@cache
def _parameters(model: type[nn.Module]) -> frozenset[str]:
    return frozenset(inspect.signature(model.forward).parameters)
