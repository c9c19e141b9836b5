"""Complete requests batch by batch, with a journal on disk: a run that was killed goes on without repeating a batch."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO, Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from potstill.engines.sampling import Completion, Engine, Prompt, Sampling
from potstill.errors import DataError
from potstill.generation.requests import GenerationRequest
from potstill.models.chat import names_argument, render_chat
from potstill.models.checksums import with_checksum, without_checksum


class RequestCompletions(NamedTuple):
    """The teacher's texts for one request, and the seed of the batch that they were sampled in."""

    texts: list[Completion]
    seed: int


def render(request: GenerationRequest, tokenizer: PreTrainedTokenizerBase | None) -> Prompt:
    """Render a request by the chat template, as token ids; without a template, as plain text.

    Without one, a conversation and tools are a DataError, and so is an argument that the template never reads.
    """
    content, arguments, where = request.messages[0]["content"], request.template_arguments, f"row {request.number}"
    if tokenizer is None or tokenizer.chat_template is None:
        if len(request.messages) > 1 or arguments or not isinstance(content, str):
            raise DataError(
                f"generate: expected a teacher with a chat template for the conversation in {where}, got none. Name "
                "one in teacher.chat_template, or use plain prompts."
            )
        return content
    if unread := [name for name in arguments if not names_argument(tokenizer, name)]:
        raise DataError(
            f"generate: expected a chat template that reads {unread[0]}, got one that does not, for {where}. Name "
            "another in teacher.chat_template, or remove it from the row."
        )
    expected = "generate: expected messages that the teacher's chat template takes"
    text = render_chat(tokenizer, request.messages, where, expected, add_generation_prompt=True, **arguments)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


class PromptBatch(NamedTuple):
    """Prompts that are completed together, the index of the first among all prompts, and the seed of the batch."""

    start: int
    prompts: list[Prompt]
    seed: int


# Completes each batch once, in any order.
BatchCompleter = Callable[[Sequence[PromptBatch]], Iterable[tuple[PromptBatch, list[list[Completion]]]]]


def complete_in_order(engine: Engine, sampling: Sampling) -> BatchCompleter:
    """Complete batches one after the other with an engine."""

    def complete(batches: Iterable[PromptBatch]) -> Iterator[tuple[PromptBatch, list[list[Completion]]]]:
        for batch in batches:
            yield batch, engine.complete(batch.prompts, replace(sampling, seed=batch.seed))

    return complete


def complete_requests(
    prompts: Sequence[Prompt],
    complete: BatchCompleter,
    seed: int,
    journal: Path,
    *,
    batch_size: int,
    settings: Any,
    progress: Callable[[int], None] = lambda done: None,
) -> list[RequestCompletions]:
    """Complete every prompt that is not in the journal, and return all completions in order.

    The journal is a file of JSON lines: a hash of all that decides the texts (`settings`, as JSON, and the prompts),
    then a line for each prompt, in the order of completion. A batch is appended and synced as a whole; a line that a
    kill cut in two is removed. The seed of a batch depends on `seed` and the batch's place alone, so that a run that
    was killed, or that many processes share, writes what it would have written.

    Raises:
        DataError: the journal was written with other settings.
    """
    head = {"made_of": hashlib.sha256(json.dumps([settings, list(prompts)]).encode()).hexdigest()}
    with journal.open("a+b") as file:
        done = _read(file, head, journal)
        progress(len(done))
        missing = []
        for start in range(0, len(prompts), batch_size):
            batch_prompts = list(prompts[start : start + batch_size])
            if not done.keys() >= {*range(start, start + len(batch_prompts))}:
                batch_seed = int.from_bytes(hashlib.sha256(f"{seed} {start}".encode()).digest()[:4])
                missing.append(PromptBatch(start, batch_prompts, batch_seed))
        for batch, completions in complete(missing):
            new = {i: texts for i, texts in enumerate(completions, batch.start) if i not in done}
            lines = [
                {"ask": i, "seed": batch.seed, "texts": [[text.text, text.ended, text.ids] for text in texts]}
                for i, texts in new.items()
            ]
            _append(file, lines)
            done |= {i: RequestCompletions(texts, batch.seed) for i, texts in new.items()}
            progress(len(done))
    return [done[i] for i in range(len(prompts))]


def _read(file: IO[bytes], head: dict[str, str], journal: Path) -> dict[int, RequestCompletions]:
    file.seek(0)
    content = file.read()
    whole = content[: content.rfind(b"\n") + 1]  # what follows was cut in two
    try:
        lines = [without_checksum(json.loads(line)) for line in whole.splitlines()]
    except ValueError:
        raise DataError(
            f"generate: expected a journal of texts in {journal} as it was written, got a line of something else. "
            "Choose another output, or delete that file."
        ) from None
    if lines and lines[0] != head:
        raise DataError(
            f"generate: expected the texts in {journal} to be of this recipe, got those of another. Its teacher, task, "
            "sampling, seed or data differ. Choose another output, or delete that file."
        )
    file.truncate(len(whole))
    if not lines:
        _append(file, [head])
    return {line["ask"]: RequestCompletions(read_texts(line["texts"]), line["seed"]) for line in lines[1:]}


def read_texts(texts: Sequence[tuple[str, bool, Sequence[int]]]) -> list[Completion]:
    """Read completions that were written as JSON."""
    return [Completion(text, ended, tuple(ids)) for text, ended, ids in texts]


def _append(file: IO[bytes], lines: Sequence[dict[str, Any]]) -> None:
    # ASCII: half a surrogate pair, which a model may write, is stored as its escape.
    file.write(b"".join(json.dumps(with_checksum(line)).encode() + b"\n" for line in lines))
    file.flush()
    os.fsync(file.fileno())
