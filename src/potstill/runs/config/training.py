"""The part `train`: any field of transformers.TrainingArguments, checked before anything is loaded."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, TypeAdapter, ValidationError

from potstill.errors import nearest


def _training_arguments(values: Any) -> Any:
    """Check the keys and types of `train` against transformers.TrainingArguments."""
    from transformers import TrainingArguments

    if not isinstance(values, Mapping):
        raise ValueError("expected a mapping of transformers.TrainingArguments fields")
    types = typing.get_type_hints(TrainingArguments) | _TYPES
    settable = argument_names()
    mistakes, checked = [], {}
    for name, value in values.items():
        if not isinstance(name, str):
            mistakes.append(f"train.{name}: unknown key. Keys are text.")
        elif name in _OWN_ARGUMENTS:
            mistakes.append(f"train.{name}: expected it not to be set here. {_OWN_ARGUMENTS[name]}")
        elif name not in settable:
            mistakes.append(f"train.{name}: unknown key.{nearest(name, settable)}")
        else:
            try:
                kind = TypeAdapter(types[name])
                if isinstance(value, bool):
                    kind.validate_python(str(value).lower())  # which is no number, where a truth value is read as one
                checked[name] = kind.validate_python(value)
            except ValidationError:
                wanted = getattr(types[name], "__name__", str(types[name]))
                mistakes.append(f"train.{name}: expected {wanted}, got {value!r}.")
            except Exception:  # a type that pydantic does not know is left to transformers
                checked[name] = value
    if mistakes:
        raise ValueError("\n".join(mistakes))
    return checked


def argument_names() -> set[str]:
    """The keys of the part `train`."""
    from transformers import TrainingArguments

    return {field.name for field in dataclasses.fields(TrainingArguments) if field.init} - set(_OWN_ARGUMENTS)


_TYPES = {"fsdp": bool | str | None}  # transformers takes true, and says str
_OWN_ARGUMENTS = {
    "output_dir": "The recipe's output says where the run goes.",
    "seed": "The recipe's seed is used.",
    "data_seed": "The recipe's seed is used.",
    "auto_find_batch_size": "Set per_device_train_batch_size and gradient_accumulation_steps.",
    "label_smoothing_factor": "The objective is the loss.",
    "remove_unused_columns": "The columns are the batch.",
    "push_to_hub": "Push the finished student/ folder instead.",
    "hub_token": "Recipes are kept: log in with `hf auth login`.",
}

TrainPart = Annotated[dict[str, Any], BeforeValidator(_training_arguments)]
