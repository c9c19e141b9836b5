"""Notes on chats: templates of teacher and student that differ, and plain prompts for a teacher of chats."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from potstill.data.chat_texts import ChatRenderer, Conversation
from potstill.data.loading import load
from potstill.data.sources import Source
from potstill.data.token_places import common_prefix, locate
from potstill.errors import DataError
from potstill.losses.alignment import IGNORE
from potstill.models.chat import end_token_ids, render_chat
from potstill.models.prompts import surrounding_tokens
from potstill.models.spacing import evenly_spaced
from potstill.teachers.source import LoadedTeacher

COMPARED_ROWS = 3  # rendered by the templates of teacher and student
PROBED_ROWS, PROBED_TOKENS = 3, 128  # on which the teacher reads plain prompts, and the same as chats
CANDIDATE_ROWS = 32  # of which the shortest are probed
OTHER_DAY = "{%- macro strftime_now(format) -%}another day{%- endmacro -%}"  # in place of the function of this name
MUCH = 0.5  # nats by which the teacher's loss is lower behind its chat template


def chat_notes(
    loaded: LoadedTeacher, tokenizer: PreTrainedTokenizerBase, train: Any, held_out: Source
) -> Iterator[str]:
    """Say where the chat templates of teacher and student differ, and where a teacher of chats reads plain prompts.

    Args:
        tokenizer: the student's.
        train: encoded training rows.
        held_out: the source of held-out conversations, which both templates render.
    """
    yield from _date_notes(held_out, tokenizer)
    if loaded.tokenizer.chat_template is None:
        return
    if tokenizer is not loaded.tokenizer and tokenizer.chat_template is not None:
        yield from _template_notes(held_out, loaded.tokenizer, tokenizer)
    if loaded.model is not None and not loaded.teacher.other_tokenizer:
        yield from _prompt_notes(loaded.model, tokenizer, train)


def _date_notes(held_out: Source, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """Report a template that writes the day on which rows are encoded into them."""
    template = tokenizer.chat_template
    if not isinstance(template, str) or "strftime_now" not in template:
        return
    dataset, kind = load(held_out, "causal")[:2]
    if kind != "messages":
        return
    other = copy.copy(tokenizer)
    other.chat_template = OTHER_DAY + template
    messages = json.loads(dataset[0]["messages"])
    with suppress(DataError):  # it is reported where the row is encoded
        text, of_other_day = (render_chat(one, messages, "a row") for one in (tokenizer, other))
        if text != of_other_day:
            start = common_prefix(text, of_other_day)
            yield (
                f"chat template: it writes the date into each row: {text[max(0, start - 20) : start + 20]!r}. A run "
                "that is resumed on another day, or reads a cache of another day, can have other rows. Give the date "
                "in data.chat_template_kwargs, as date_string for Llama 3, or write it into data.chat_template."
            )


def _template_notes(
    held_out: Source, teacher: PreTrainedTokenizerBase, student: PreTrainedTokenizerBase
) -> Iterator[str]:
    """Compare how both templates render the first conversations."""
    dataset, kind = load(held_out, "causal")[:2]
    if kind != "messages":
        return
    for number in range(min(COMPARED_ROWS, len(dataset))):
        messages = json.loads(dataset[number]["messages"])
        try:
            texts = [render_chat(tokenizer, messages, "a row") for tokenizer in (teacher, student)]
        except DataError:
            continue
        if texts[0] != texts[1]:
            start = common_prefix(*texts)
            of_teacher, of_student = (repr(text[max(0, start - 20) : start + 40]) for text in texts)
            yield (
                f"chat templates: the teacher's renders row {number + 1} of the held-out data with {of_teacher}, the "
                f"student's, which is used, with {of_student}. Name the teacher's in data.chat_template, or check that "
                "the teacher knows this form."
            )
            return


class _Read(NamedTuple):
    """How the teacher reads rows: its mean loss on their answers, and the most likely first token of each."""

    loss: float
    first: list[int]


def _prompt_notes(model: Any, tokenizer: PreTrainedTokenizerBase, train: Any) -> Iterator[str]:
    """Say where the teacher ends its answer at once behind plain prompts, or knows the answers better as a chat."""
    candidates = [train[i] for i in evenly_spaced(CANDIDATE_ROWS, len(train))]
    marks = _turn_marks(tokenizer)
    rows = sorted((row for row in candidates if _is_plain(row, marks)), key=lambda row: len(row["input_ids"]))
    rows = rows[:PROBED_ROWS]
    if not rows:
        return
    plain = _read(model, rows)
    ends = end_token_ids(tokenizer, model)
    chats = [_as_chat(row, tokenizer) for row in rows]
    behind_template = _read(model, [chat for chat in chats if chat is not None])
    ended = [token for token in plain.first if token in ends]
    most = f"; the most likely first token of {len(ended)} is {tokenizer.decode(ended[:1])}" if ended else ""
    better = bool(ended) or plain.loss - behind_template.loss > MUCH
    yield (
        f"teacher: it has a chat template, and the prompts are plain text. Its loss on {len(rows)} answers is "
        f"{plain.loss:.2f} nats behind the plain prompt, {behind_template.loss:.2f} behind the template{most}."
        + (" Set chat: true for the source, or give messages." if better else "")
    )


def _turn_marks(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The special tokens that open or end turns; of SmolLM2 they are its BOS and EOS, which it puts around no text."""
    messages = [{"role": role, "content": "a"} for role in ("user", "assistant")]
    try:
        text = render_chat(tokenizer, messages, "a row")
    except DataError:
        return set()
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    before, after = surrounding_tokens(tokenizer)
    return {*ids} & {*tokenizer.added_tokens_decoder} - {*before, *after}


def _is_plain(row: dict[str, Any], marks: set[int]) -> bool:
    """Whether a row has a prompt, and none of these tokens in it."""
    prompt = [i for i, label in zip(row["input_ids"], row["labels"], strict=True) if label == IGNORE]
    return len(prompt) > 1 and prompt == row["input_ids"][: len(prompt)] and marks.isdisjoint(prompt)


def _as_chat(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any] | None:
    """The same prompt and answer, rendered by the chat template; None where it does not take them."""
    ids = row["input_ids"]
    border = row["labels"].count(IGNORE)
    texts = [str(tokenizer.decode(part, skip_special_tokens=True)) for part in (ids[:border], ids[border:])]
    messages = [{"role": role, "content": text} for role, text in zip(("user", "assistant"), texts, strict=True)]
    try:
        (chat,) = ChatRenderer(tokenizer).render(Conversation(messages, "a row", 0, {}))
    except (DataError, ValueError):
        return None
    (tokens,) = locate(tokenizer, [chat.text], special=False)
    start = tokens.before(chat.targets[0][0])
    return {"input_ids": tokens.ids, "labels": [IGNORE] * start + tokens.ids[start:]}


@torch.no_grad()
def _read(model: Any, rows: list[dict[str, Any]]) -> _Read:
    """Run a teacher on rows, one by one."""
    losses, first = [], []
    for row in rows:
        ids = torch.tensor(row["input_ids"][:PROBED_TOKENS], device=model.device)
        border = row["labels"].count(IGNORE)
        if border >= len(ids):
            continue
        logits = model(input_ids=ids[None]).logits[0, border - 1 : -1].float()
        losses.append(torch.nn.functional.cross_entropy(logits, ids[border:]))
        first.append(int(logits[0].argmax()))
    return _Read(float(torch.stack(losses).mean()) if losses else float("nan"), first)
