"""Text from a model of transformers in this process."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from potstill.engines.decode import GeneratedTokens, generate_tokens
from potstill.engines.sampling import Completion, Prompt, Sampling
from potstill.errors import DataError
from potstill.models.chat import end_token_ids
from potstill.models.heads import max_positions
from potstill.models.prompts import completion_text, prompt_ids


class LocalEngine:
    """Completes prompts with a model in this process, on its device and in its precision, in batches of texts."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int = 32) -> None:
        self._model, self._tokenizer, self._batch_size = model.eval(), tokenizer, batch_size
        self._eos_ids = end_token_ids(tokenizer, model)

    def complete(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[list[Completion]]:
        """Generate `sampling.samples` completions of each prompt, in order; see `check` and `generate_tokens`."""
        if isinstance(prompts, str):
            raise DataError("generate: expected a list of prompts, got one text. Put it into a list.")
        ids = [self._ids(prompt) for prompt in prompts]
        self.check(ids, sampling)
        outputs = generate_tokens(
            self._model,
            [row for row in ids for _ in range(sampling.samples)],
            sampling,
            eos_ids=self._eos_ids,
            is_stopped=self._ends_in(sampling.stop) if sampling.stop else None,
            batch_size=self._batch_size,
        )
        groups = [outputs[start : start + sampling.samples] for start in range(0, len(outputs), sampling.samples)]
        return [
            [self._completion(prompt, output, sampling) for output in group]
            for prompt, group in zip(ids, groups, strict=True)
        ]

    def _ends_in(self, stop: tuple[str, ...]) -> Callable[[list[list[int]]], list[bool]]:
        """Whether the last tokens of each row hold a stop string: a character is at most four tokens."""
        tail = 4 * max(map(len, stop)) + 1
        return lambda rows: [any(string in self._text(row[-tail:]) for string in stop) for row in rows]

    def _text(self, ids: list[int], prompt: Sequence[int] = ()) -> str:
        return completion_text(self._tokenizer, prompt, ids, self._eos_ids)

    def _ids(self, prompt: Prompt) -> list[int]:
        return prompt_ids(self._tokenizer, prompt) if isinstance(prompt, str) else list(prompt)

    def check(self, prompts: Sequence[Prompt], sampling: Sampling) -> None:
        """Check that no prompt is empty, and that each leaves room for max_new_tokens."""
        positions = max_positions(self._model)
        for number, ids in enumerate(map(self._ids, prompts), 1):
            if not ids:
                raise DataError(f"generate: expected a prompt with a token, got none in prompt {number}.")
            if positions is not None and len(ids) + sampling.max_new_tokens > positions:
                raise DataError(
                    f"generate: expected at most {positions} tokens, the teacher's positions, got {len(ids)} of prompt "
                    f"{number} and {sampling.max_new_tokens} new ones. Lower max_new_tokens, or shorten the prompt."
                )

    def _completion(self, prompt: list[int], output: GeneratedTokens, sampling: Sampling) -> Completion:
        text = self._text(output.ids, prompt)
        stops = [start for start in map(text.find, sampling.stop) if start >= 0]
        if stops:
            return Completion(text[: min(stops)], output.ended)
        return Completion(text, output.ended, tuple(output.ids))
