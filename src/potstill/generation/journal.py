"""The teacher writes; what it wrote goes to a journal, so that nothing is asked twice whatever kills the process."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, NamedTuple

import jinja2
from transformers import PreTrainedTokenizerBase

from potstill.data.readers import one_line
from potstill.engines.engine import Engine, Prompt
from potstill.engines.sampling import Completion, Sampling
from potstill.errors import DataError
from potstill.generation.requests import GenerationRequest


@dataclass(frozen=True)
class Answered:
    """What the teacher wrote for one ask, and the seed of the batch that it was written in."""

    texts: list[Completion]
    seed: int


def render(ask: GenerationRequest, tokenizer: PreTrainedTokenizerBase | None) -> Prompt:
    """The prompt for an ask: by the chat template, as token ids; or, without one, the text itself.

    Raises:
        DataError: there is no chat template and the ask is a conversation or has tools, or the template refuses it.
    """
    tools = ask.source.get("tools") if ask.task == "responses" else None
    if tokenizer is None or tokenizer.chat_template is None:
        if len(ask.messages) > 1 or tools or not isinstance(ask.messages[0]["content"], str):
            raise DataError(
                f"generate: expected a teacher with a chat template for the conversation in row {ask.number}, got "
                "none. Set tokenizer.chat_template, or ask plain prompts."
            )
        return str(ask.messages[0]["content"])
    try:
        text = tokenizer.apply_chat_template(
            ask.messages,
            tools=json.loads(tools) if isinstance(tools, str) else tools,
            tokenize=False,
            add_generation_prompt=True,
        )
    except (jinja2.TemplateError, TypeError, ValueError, LookupError) as error:
        raise DataError(
            f"generate: expected messages that the teacher's chat template takes, got {one_line(error)!r} in row "
            f"{ask.number}. Correct the row, or use another chat template."
        ) from None
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


class Batch(NamedTuple):
    """Prompts that are answered at once.

    Args:
        start: the place of the first among all.
        prompts: as the engine takes them.
        seed: of the batch.
    """

    start: int
    prompts: list[Prompt]
    seed: int


Answer = Callable[[Sequence[Batch]], Iterable[tuple[Batch, list[list[Completion]]]]]  # each batch once, in any order


def in_turn(engine: Engine, sampling: Sampling) -> Answer:
    """An engine that is asked batch after batch."""

    def answer(batches: Iterable[Batch]) -> Iterator[tuple[Batch, list[list[Completion]]]]:
        for batch in batches:
            yield batch, engine.complete(batch.prompts, replace(sampling, seed=batch.seed))

    return answer


def write(
    asks: Sequence[GenerationRequest],
    prompts: Sequence[Prompt],
    answer: Answer,
    seed: int,
    journal: Path,
    *,
    batch_size: int,
    made_of: Any,
    progress: Callable[[int], None] = lambda done: None,
) -> list[Answered]:
    """Have every ask answered, and give the answers in order.

    The journal is a file of JSON lines: one that says what it is made of, then one for each ask, in the order in which
    they are answered. A batch is appended and synced when it is whole; a line that a kill cut in two is removed. The
    seed of a batch is made of the recipe's and of its place, so that a run that was killed, or that many processes
    share, writes what it would have written.

    Args:
        asks: what is asked.
        prompts: the same, as the engine takes it.
        answer: what answers batches, such as `in_turn(engine, sampling)`.
        seed: of the whole run.
        journal: the file; what is in it is not asked again.
        batch_size: asks at a time.
        made_of: whatever decides the texts, as JSON; a journal that was made of something else is an error.
        progress: is told how many asks are answered.

    Raises:
        DataError: the journal belongs to another recipe, or another process is writing it.
    """
    head = {"made_of": hashlib.sha256(json.dumps([made_of, list(prompts)]).encode()).hexdigest()}
    with _locked(journal) as file:
        answered = _read(file, head, journal)
        progress(len(answered))
        missing = [
            Batch(start, list(prompts[start : start + batch_size]), _seed(seed, start))
            for start in range(0, len(asks), batch_size)
            if not answered.keys() >= {*range(start, min(start + batch_size, len(asks)))}
        ]
        for batch, texts in answer(missing):
            fresh = {i: Answered(said, batch.seed) for i, said in enumerate(texts, batch.start) if i not in answered}
            lines = [
                {"ask": place, "seed": one.seed, "texts": [[text.text, text.ended] for text in one.texts]}
                for place, one in fresh.items()
            ]
            _append(file, lines)
            answered |= fresh
            progress(len(answered))
    return [answered[place] for place in range(len(asks))]


def _seed(seed: int, start: int) -> int:
    """The seed of a batch, of that of the run and of its place."""
    return int.from_bytes(hashlib.sha256(f"{seed} {start}".encode()).digest()[:4])


@contextmanager
def _locked(journal: Path) -> Iterator[IO[bytes]]:
    with journal.open("a+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise DataError(
                f"generate: expected to be the only one who writes {journal}, got another process. Wait for it."
            ) from None
        yield file


def _read(file: IO[bytes], head: dict[str, str], journal: Path) -> dict[int, Answered]:
    file.seek(0)
    content = file.read()
    whole = content[: content.rfind(b"\n") + 1]  # what follows was cut in two
    try:
        lines = [json.loads(line) for line in whole.splitlines()]
    except ValueError:
        raise DataError(
            f"generate: expected a journal of texts in {journal}, got something else. Choose another output."
        ) from None
    if lines and lines[0] != head:
        raise DataError(
            f"generate: expected the texts in {journal} to be of this recipe, got those of another. Its teacher, task, "
            "sampling, seed or data differ. Choose another output, or delete that file."
        )
    file.truncate(len(whole))
    if not lines:
        _append(file, [head])
    return {line["ask"]: Answered([Completion(*text) for text in line["texts"]], line["seed"]) for line in lines[1:]}


def _append(file: IO[bytes], lines: Sequence[dict[str, Any]]) -> None:
    # ASCII: half a surrogate pair, which a model may write, is kept as its escape.
    file.write(b"".join(json.dumps(line).encode() + b"\n" for line in lines))
    file.flush()
    os.fsync(file.fileno())
