"""The first weights of a student."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, set_seed

from potstill.errors import ModelError
from potstill.students.design import last_line


def random_student(config: PretrainedConfig, seed: int) -> PreTrainedModel:
    """A student with the random weights of its own initialisation: the same for the same seed.

    Args:
        config: the student's config.
        seed: of all random numbers, Python's, NumPy's and torch's.

    Returns:
        A causal language model in float32.

    Raises:
        ModelError: no model can be made from the config.
    """
    set_seed(seed)
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except Exception as error:  # each architecture has its own words for a shape that cannot be
        raise ModelError(f"student.design: expected a shape that a model can have, got: {last_line(error)}") from None
    return model
