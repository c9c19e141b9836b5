"""The first weights of a student."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, set_seed

from potstill.errors import ModelError


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
    except (ValueError, TypeError, RuntimeError, ZeroDivisionError) as error:
        reason = str(error).strip().splitlines()[-1]
        raise ModelError(f"student.design: expected a shape that a model can have, got: {reason}") from None
    return model
