"""Questions that a teacher writes itself, as the user of a chat."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from potstill.engines.sampling import Completion
from potstill.errors import DataError
from potstill.generation.filters import Charset, FewWords, Filter, Length, Repetition, TextPair
from potstill.models.chat import render_chat
from potstill.models.prompts import prompt_ids

_MARK = "potstill"  # no template trims or changes it
QUESTION_FILTERS: tuple[Filter, ...] = (Length(8), Charset(), Repetition(), FewWords())


def opening(tokenizer: PreTrainedTokenizerBase, arguments: Mapping[str, Any]) -> list[int]:
    """The tokens of a chat up to the first word of its user; arguments are the template's.

    Raises:
        DataError: the chat template puts the user's words elsewhere or twice, or nothing before them.
    """
    expected = "generate: expected a chat template that takes a user's message"
    messages = [{"role": "user", "content": _MARK}]
    rendered = render_chat(tokenizer, messages, "the opening of a chat", expected, **arguments)
    before, *rest = rendered.split(_MARK)
    ids = list(tokenizer(before, add_special_tokens=False)["input_ids"])
    if not ids or len(rest) != 1:
        raise DataError(
            f"generate: expected a chat template with an opening before a user's words, got {rendered[:80]!r}. Set "
            "rows: completion for texts without a chat, or name another in teacher.chat_template."
        )
    return ids


def first_tokens(tokenizer: PreTrainedTokenizerBase, beginning: str) -> list[int]:
    """The tokens that a text without a chat begins with: BOS, or EOS as the end of a text before it, at least."""
    start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    ids = prompt_ids(tokenizer, beginning)
    return ids if start is None or start in ids[:1] else [start, *ids]


def select_questions(texts: Iterable[Completion]) -> tuple[list[str], str]:
    """The questions that ended, are well formed and differ; and what became of the others, in words."""
    questions: dict[str, None] = {}
    dropped: Counter[str] = Counter()
    for text in texts:
        pair = TextPair("", text.text.strip())
        failed = next((rule.name for rule in QUESTION_FILTERS if rule.reason(pair) is not None), None)
        reason = "cut" if not text.ended else "repeated" if pair.completion in questions else failed
        if reason is None:
            questions[pair.completion] = None
        else:
            dropped[reason] += 1
    reasons = "".join(f", {count} {reason}" for reason, count in sorted(dropped.items()))
    return list(questions), f"questions: {len(questions):,} of {len(questions) + dropped.total():,} were kept{reasons}."
