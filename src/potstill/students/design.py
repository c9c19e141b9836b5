"""The shape of a student."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from transformers import PretrainedConfig

from potstill.errors import ModelError, nearest


def student_config(teacher: PretrainedConfig, changes: Mapping[str, Any], vocabulary: int) -> PretrainedConfig:
    """The teacher's own kind of model with some fields changed.

    Args:
        teacher: the teacher's config.
        changes: field name -> value, such as hidden_size or num_hidden_layers.
        vocabulary: the number of real tokens: the student has no padding rows.

    Raises:
        ModelError: the teacher's config has no such field, or the fields do not fit together.

    >>> from transformers import LlamaConfig
    >>> student_config(LlamaConfig(), {"num_hidden_layers": 2}, 1000).vocab_size
    1000
    """
    known = teacher.to_dict()
    config = copy.deepcopy(teacher)
    config.vocab_size = vocabulary
    for name, value in changes.items():
        if name not in known:
            hint = nearest(name, known) or f" Known: {', '.join(sorted(known))}."
            raise ModelError(
                f"student.design: expected a field of the teacher's {type(teacher).__name__}, got {name}.{hint}"
            )
        setattr(config, name, value)
    # Derived fields follow what they are derived from, unless they are given.
    if "num_attention_heads" in changes and "num_key_value_heads" in known and "num_key_value_heads" not in changes:
        config.num_key_value_heads = config.num_attention_heads
    if {"hidden_size", "num_attention_heads"} & set(changes) and "head_dim" in known and "head_dim" not in changes:
        config.head_dim = config.hidden_size // config.num_attention_heads
    if "num_hidden_layers" in changes and isinstance(known.get("layer_types"), list):
        config.layer_types = known["layer_types"][: config.num_hidden_layers]
    try:
        # Made anew, because only then a config checks that its fields fit together.
        made: PretrainedConfig = type(teacher).from_dict(config.to_dict())
    except Exception as error:  # each architecture has its own words for a shape that cannot be
        raise ModelError(f"student.design: expected a shape that a model can have, got: {last_line(error)}") from None
    return made


def last_line(error: Exception) -> str:
    """The last line of an error's text, where libraries put the reason."""
    return (str(error).strip() or type(error).__name__).splitlines()[-1].strip()
