"""Text from a model of transformers: in batches, with its KV cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from potstill.engines.engine import Prompt
from potstill.engines.sampling import Completion, Sampling
from potstill.errors import DataError


class LocalEngine:
    """Continues prompts with a model beside us.

    Args:
        model: a causal language model, on its device and in its precision.
        tokenizer: the model's.
        batch_size: continuations that are written together.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int = 32) -> None:
        self._model = model.eval()
        self._tokenizer = tokenizer
        self._batch_size = batch_size
        ends = model.generation_config.eos_token_id if model.generation_config is not None else None
        self._ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}

    def complete(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[list[Completion]]:
        """For each prompt, in order, its `sampling.samples` continuations.

        Rows of one batch are padded on the left, where the attention mask and the positions leave it out. The same
        prompts and seed give the same texts; another batch size, another draw.

        Raises:
            DataError: see `check`.
        """
        ids = [self._ids(prompt) for prompt in prompts]
        self.check(ids, sampling)
        # Rows of like length in one batch: little padding.
        order = sorted((i for i in range(len(ids)) for _ in range(sampling.samples)), key=lambda i: len(ids[i]))
        written: list[list[Completion]] = [[] for _ in ids]
        devices = [self._model.device] if self._model.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), torch.inference_mode():
            if sampling.seed is not None:
                torch.manual_seed(sampling.seed)
            else:
                torch.seed()
            for start in range(0, len(order), self._batch_size):
                places = order[start : start + self._batch_size]
                for place, one in zip(places, self._batch([ids[i] for i in places], sampling), strict=True):
                    written[place].append(one)
        return written

    def _ids(self, prompt: Prompt) -> list[int]:
        return list(self._tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else prompt)

    def check(self, prompts: Sequence[Prompt], sampling: Sampling) -> None:
        """Make sure that the prompts can be continued.

        Raises:
            DataError: a prompt is empty, or leaves no room for max_new_tokens.
        """
        positions = getattr(self._model.config, "max_position_embeddings", None)
        for number, ids in enumerate(map(self._ids, prompts), 1):
            if not ids:
                raise DataError(f"generate: expected a prompt with a token, got none in prompt {number}.")
            if positions is not None and len(ids) + sampling.max_new_tokens > positions:
                raise DataError(
                    f"generate: expected at most {positions} tokens, the teacher's positions, got {len(ids)} of prompt "
                    f"{number} and {sampling.max_new_tokens} new ones. Lower max_new_tokens, or shorten the prompt."
                )

    def _batch(self, prompts: list[list[int]], sampling: Sampling) -> list[Completion]:
        width = max(map(len, prompts))
        pad = next((i for i in (self._tokenizer.pad_token_id, *sorted(self._ends)) if i is not None), 0)
        rows = torch.tensor([[pad] * (width - len(ids)) + ids for ids in prompts])
        mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts])
        with self._only(GenerationConfig(**self._settings(sampling, pad))):
            out = self._model.generate(
                input_ids=rows.to(self._model.device),
                attention_mask=mask.to(self._model.device),
                **({"tokenizer": self._tokenizer} if sampling.stop else {}),
            )
        return [self._completion(new, sampling) for new in out[:, width:].tolist()]

    @contextmanager
    def _only(self, settings: GenerationConfig) -> Iterator[None]:
        """The model with these settings alone: transformers fills what equals its defaults with the model's own."""
        own, self._model.generation_config = self._model.generation_config, settings
        try:
            yield
        finally:
            self._model.generation_config = own

    def _settings(self, sampling: Sampling, pad: int) -> dict[str, Any]:
        drawn = {"temperature": sampling.sampling_temperature, "top_p": sampling.top_p, "top_k": sampling.top_k}
        return {
            "do_sample": sampling.sampling_temperature > 0,
            **(drawn if sampling.sampling_temperature > 0 else {"temperature": 1.0, "top_p": 1.0, "top_k": 50}),
            "repetition_penalty": 1.0,
            "num_beams": 1,
            "use_cache": True,
            "max_new_tokens": sampling.max_new_tokens,
            "eos_token_id": sorted(self._ends) or None,
            "pad_token_id": pad,
            "stop_strings": list(sampling.stop) or None,
        }

    def _completion(self, new: list[int], sampling: Sampling) -> Completion:
        end = next((place for place, token in enumerate(new) if token in self._ends), None)
        text = str(self._tokenizer.decode(new[:end], skip_special_tokens=True))
        stops = [place for place in map(text.find, sampling.stop) if place >= 0]
        return Completion(text[: min(stops, default=len(text))], ended=end is not None or bool(stops))
