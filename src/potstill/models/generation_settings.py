"""The settings by which a model generates text, saved in its generation_config.json: sampling, stop strings, tokens."""

from __future__ import annotations

import copy

from transformers import GenerationConfig

from potstill.models.trimming import names_tokens

METADATA = ("transformers_version",)  # beside fields with an underscore: of the file, not of the model


def take_settings(model: GenerationConfig, source: GenerationConfig, *, tokens: bool) -> None:
    """Take a source's settings, those that name tokens only with `tokens`; tokens that the source lacks stay."""
    for name, value in vars(source).items():
        if name.startswith("_") or name in METADATA:
            continue
        if names_tokens(name) and (not tokens or value is None):
            continue
        setattr(model, name, copy.deepcopy(value))


def make_savable(config: GenerationConfig) -> None:
    """Resolve what transformers loads with a warning and refuses to save: settings that others have no effect beside.

    A temperature, top_p or similar beside `do_sample: false` has an effect in vLLM: it gets one in transformers too.
    """
    if _is_savable(config):
        return
    if config.pad_token_id is not None and config.pad_token_id < 0:
        config.pad_token_id = None
    if config.num_beams in (None, 1):
        config.early_stopping = config.length_penalty = None
    if not _is_savable(config):
        config.do_sample = True
        if config.temperature == 0:  # greedy
            config.temperature, config.top_k = None, 1


def _is_savable(config: GenerationConfig) -> bool:
    try:
        config.validate(strict=True)
    except ValueError:
        return False
    return True
