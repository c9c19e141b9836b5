"""Notes on encoded data: what a user should know of how rows became tokens."""

from __future__ import annotations

from collections.abc import Iterator

from transformers import PreTrainedTokenizerBase

from potstill.data.rows import RowEncoder
from potstill.data.sources import listed
from potstill.errors import one_line

OFTEN = 0.05  # of the rows: a token over the border of prompt and completion is noted from here on
SAMPLED_CHARACTERS = 1000  # of a text


def altered_text(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> str | None:
    """Describe the first text that the tokenizer does not keep: other characters, or other white space."""
    for text in (text[:SAMPLED_CHARACTERS] for text in texts):
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        read = str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))
        if read.strip() != text.strip():
            words = zip(text.split(), read.split(), strict=False)
            got, kept = next(((a, b) for a, b in words if a != b), (text, read))
            return f"{one_line(got, 40)!r} is read as {one_line(kept, 40)!r}"
    return None


def encoding_notes(encoder: RowEncoder, rows: int) -> Iterator[str]:
    """Say what the encoder counted, of so many rows."""
    counts, examples, file, tokenizer = encoder.counts, encoder.examples, encoder.file, encoder.tokenizer
    for name, singular, rest in (
        ("empty", "empty row", "skipped"),
        ("cut", "example", f"truncated to max_length {encoder.max_length}"),
        ("drop", "example", f"longer than max_length {encoder.max_length} left out"),
        ("split", "example", f"longer than max_length {encoder.max_length} split"),
        ("left_out", "example", "without a target token left out"),
        ("written", "row", "learnt as the token ids that their teacher wrote"),
        ("retokenized", "row", "tokenized anew: their token ids are behind another prompt, or of another text"),
    ):
        if counts[name]:
            yield f"{file}: {plural(counts[name], singular)} {rest}."
    if keys := [name.removeprefix("unread ") for name in counts if name.startswith("unread ")]:
        first = examples[f"unread {keys[0]}"]
        yield f"{file}: keys of messages that the chat template does not read: {listed(keys)} (first in {first})."
    if counts["end_within"]:
        yield (
            f"{file}: in {plural(counts['end_within'], 'conversation')} a message has the end of a turn in its text "
            f"(first {examples['end_within']}). It is read and learnt as that token. Remove it where it is only text."
        )
    if "altered" in examples:
        yield f"tokenizer: it changes text before it reads it: {examples['altered']} ({file})."
    if counts["over_border"] > OFTEN * rows:
        yield (
            f"{file}: in {plural(counts['over_border'], 'example')} a token stands on both sides of the border of "
            f"prompt and completion, such as {examples['over_border']}; it is learnt as part of the completion. In "
            "generation the prompt ends before it. End prompts without a space."
        )
    if counts["turn"]:
        yield (
            f"{file}: the chat template changes earlier turns when others follow (first in {examples['turn']}). These "
            f"conversations give one example for each turn of the assistant, {counts['turn']} in all."
        )
    if counts["marked"]:
        yield (
            f"{file}: the targets of {plural(counts['marked'], 'conversation')} are those that the chat template marks "
            "with {% generation %}, because it changes earlier turns."
        )
    if counts["opened"]:
        yield (
            f"{file}: in {plural(counts['opened'], 'example')} the chat template opens the assistant's turn otherwise "
            f"than it renders it: it opens {examples['opened']}. The student learns behind another prompt than it is "
            "given later. Set data.chat_template_kwargs, such as enable_thinking, or data.chat_template."
        )
    if counts["unclosed"]:
        end = tokenizer.eos_token
        yield (
            f"{file}: the chat template ends no turn of the assistant; "
            + (f"{end} is learnt as the end of {plural(counts['unclosed'], 'turn')}." if end else "none is learnt.")
        )


def plural(count: int, noun: str) -> str:
    """Write a number and its noun."""
    return f"{count} {noun}{'' if count == 1 else 's'}"
