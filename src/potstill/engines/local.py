"""Text from a model of transformers: in batches, with its KV cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from potstill.engines.decode import Rows, Written, ends_of, write
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
        self._ends = ends_of(model, tokenizer.eos_token_id)

    def complete(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[list[Completion]]:
        """For each prompt, in order, its `sampling.samples` continuations; see `potstill.engines.decode.write`.

        Raises:
            DataError: see `check`.
        """
        ids = [self._ids(prompt) for prompt in prompts]
        self.check(ids, sampling)
        stopped = self._stopped(sampling.stop) if sampling.stop else None
        each = [row for row in ids for _ in range(sampling.samples)]
        written = write(self._model, each, sampling, ends=self._ends, stopped=stopped, batch_size=self._batch_size)
        texts = [self._completion(one, sampling) for one in written]
        return [texts[i * sampling.samples : (i + 1) * sampling.samples] for i in range(len(ids))]

    def _stopped(self, stop: tuple[str, ...]) -> Callable[[Rows], list[bool]]:
        """Whether texts end in a stop text, seen in their last tokens: a character is at most four of them."""
        tail = 4 * max(map(len, stop)) + 1
        return lambda rows: [any(one in self._text(row[-tail:]) for one in stop) for row in rows]

    def _text(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode([i for i in ids if i not in self._ends], skip_special_tokens=True))

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

    def _completion(self, written: Written, sampling: Sampling) -> Completion:
        text = self._text(written.ids)
        stops = [place for place in map(text.find, sampling.stop) if place >= 0]
        return Completion(text[: min(stops, default=len(text))], written.ended)
