"""Worked solutions: prompt templates, and a parser for reasoning, steps and answer."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from potstill.data.token_weights import Span
from potstill.errors import DataError, nearest

TEMPLATES = {
    "step_by_step": (
        '{question}\n\nThink step by step. Then give the final answer on a last line that begins with "Answer:".'
    ),
    "structured": (
        "{question}\n\nWork in numbered steps:\n"
        "Step 1: what is known.\n"
        "Step 2: what is asked, and how to get there.\n"
        "Step 3: the calculation.\n"
        'Then give the final answer on a last line that begins with "Answer:".'
    ),
    "socratic": (
        "{question}\n\nAsk yourself one small question after the other, and answer each:\n"
        "- What do I know?\n"
        "- What must I find?\n"
        "- What follows from what I know?\n"
        'Then give the final answer on a last line that begins with "Answer:".'
    ),
}


def template(name_or_text: str, known: dict[str, str] = TEMPLATES) -> str:
    """Find the template of this name; a text with {question} in it is a template itself."""
    if name_or_text in known:
        return known[name_or_text]
    if "{question}" in name_or_text:
        return name_or_text
    raise DataError(
        f"template: expected one of {', '.join(known)}, or a text with {{question}} in it, got {name_or_text!r}."
        f"{nearest(name_or_text, known)}"
    )


def fill(text: str, question: str) -> str:
    """Put the question into a template; other braces stay, because questions and templates may hold code."""
    return text.replace("{question}", question)


@dataclass(frozen=True)
class Solution:
    """The parts of a worked solution. A number that merely comes last is no answer. Spans are in characters."""

    text: str
    steps: tuple[str, ...]  # the reasoning, split into steps without their marks
    answer: str | None  # without its mark
    reasoning_span: Span
    answer_span: Span | None


def parse(text: str) -> Solution:
    r"""Split a worked solution into reasoning and answer.

    The answer is what follows the last of these marks: GSM8K's "####", "\boxed{...}" with any braces in it, "Answer:",
    "the answer is". Without them, what the last sentence with "therefore", "thus", "hence", "finally" or
    "conclusion" at its beginning ends in. Steps begin at "Step 1:", numbers, bullets; else each line is one, and where
    there is one line, each sentence.
    """
    marked = max(_marked(text), key=lambda mark: mark[1][0], default=None) or _concluded(text)
    start, span = (len(text), None) if marked is None else marked
    reasoning = _trimmed(text, 0, start)
    steps = tuple(_steps(text[slice(*reasoning)]))
    return Solution(text, steps, None if span is None else text[slice(*span)], reasoning, span)


# The answer. Each function gives the place where its mark begins, and the span of the answer itself.

_MarkedAnswer = tuple[int, Span]

# Four hashes also open a heading of Markdown: what follows must look like a number or a formula, or be the last line.
_HASHES = re.compile(r"####[ \t]*(?P<answer>[-−+$€£¥(\\.\d][^\n]*|\S[^\n]*(?=\s*\Z))")
_HEADING = re.compile(
    r"^[ \t#*_]*(?:(?:final|the)[ \t]+)?(?:answer|conclusion)[ \t*_:]*\n+(?P<answer>[ \t]*\S[^\n]*)",
    re.IGNORECASE | re.MULTILINE,
)
# "Answer:", "**Final answer:** 5", "The answer is 5." The answer may stand on the next line.
_NAMED = re.compile(
    r"(?:^|(?<=[\s(*_#>]))(?:\*\*|__)?(?:the\s+)?(?:(?:final|correct)\s+)?answer(?:\*\*|__)?"
    r"(?:\s*(?P<colon>:)(?:\*\*|__)?|\s+is(?=[\s:])\s*:?)\s*(?P<answer>\S[^\n]*)",
    re.IGNORECASE,
)
_BOXED = re.compile(r"\\(?:boxed|fbox)\s*\{")
_CONCLUSION = re.compile(
    r"(?:^|(?<=[.!?]\s)|(?<=\n))[ \t*_#>-]*"
    r"(?:therefore|thus|hence|finally|so|in\s+conclusion|conclusion)\b[\s,:*_]*(?P<answer>\S[^\n]*)",
    re.IGNORECASE,
)
_SENTENCE_END = re.compile(r"[.!?](?=\s|$)")


def _marked(text: str) -> Iterator[_MarkedAnswer]:
    """Each answer that has a mark."""
    for match in (*_HASHES.finditer(text), *_HEADING.finditer(text)):
        yield match.start(), _bare(text, *match.span("answer"))
    for match in _NAMED.finditer(text):
        start, end = match.span("answer")
        if not match["colon"]:  # a sentence: it ends where sentences do
            end = _sentence_end(text, start, end)
        span = _bare(text, start, end)
        if span[0] < span[1]:
            yield match.start(), span
    for match in _BOXED.finditer(text):
        closing = _closing_brace(text, match.end())
        if closing is not None:
            yield _line_of_box(text, match.start()), _trimmed(text, match.end(), closing)


def _closing_brace(text: str, start: int) -> int | None:
    """Where the brace closes that was opened before `start`; None where the text ends first."""
    depth = 1
    for place in range(start, len(text)):
        if text[place - 1] == "\\":  # an escaped brace is a sign
            continue
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return place
    return None


def _line_of_box(text: str, box: int) -> int:
    """Where "Answer:" begins when it stands before the box; else where its formula does."""
    for match in _NAMED.finditer(text):
        if match.start() <= box <= match.end():
            return match.start()
    before = text[:box]
    return len(before.rstrip("$ \\([")) if before.rstrip(" ").endswith(("$", "\\(", "\\[")) else box


def _concluded(text: str) -> _MarkedAnswer | None:
    """The last number of the last sentence with a word of conclusion, or else the whole sentence."""
    matches = [*_CONCLUSION.finditer(text)]
    if not matches:
        return None
    match = matches[-1]
    start, end = match.span("answer")
    end = _sentence_end(text, start, end)
    numbers = [*_NUMBER.finditer(text, start, end)]
    span = numbers[-1].span() if numbers else _bare(text, start, end)
    return (match.start(), span) if span[0] < span[1] else None


_NUMBER = re.compile(r"(?:(?<!\w)[-−])?[$€£]?\d[\d,]*(?:\.\d+)?(?:\s?/\s?\d+)?%?(?!\w)")


def _sentence_end(text: str, start: int, end: int) -> int:
    match = _SENTENCE_END.search(text, start, end)
    return match.start() if match else end


def _bare(text: str, start: int, end: int) -> Span:
    """The span without Markdown, a formula's dollars, and the full stop."""
    start, end = _trimmed(text, start, end)
    while start < end:
        before = (start, end)
        if text[end - 1] in "*_`" or (text[end - 1] == "." and text[end - 3 : end] != "..."):
            end -= 1
        elif text[start] in "*_`":
            start += 1
        elif end - start > 1 and text[start] == text[end - 1] == "$":
            start, end = start + 1, end - 1
        start, end = _trimmed(text, start, end)
        if (start, end) == before:
            break
    return start, end


def _trimmed(text: str, start: int, end: int) -> Span:
    piece = text[start:end]
    if not piece.strip():
        return start, start
    return start + len(piece) - len(piece.lstrip()), end - len(piece) + len(piece.rstrip())


# The steps

_STEP = re.compile(
    r"^\s*(?:[#>*_]+\s*)?(?:step\s*\d+\s*(?:[:.)\-–—]|\*\*)[\s*_:–—-]*|\(?\d{1,3}[.)]\s+|[-*•‣–]\s+)", re.IGNORECASE
)
_SENTENCES = re.compile(r"(?<=[.!?])\s+(?=[\"'(]?[A-Z0-9$])")


def _steps(reasoning: str) -> list[str]:
    lines = [line.strip() for line in reasoning.splitlines() if line.strip()]
    if not any(_STEP.match(line) for line in lines):
        return _SENTENCES.split(lines[0]) if len(lines) == 1 else lines
    steps: list[str] = []
    for line in lines:
        mark = _STEP.match(line)
        if mark or not steps:
            steps.append(line[mark.end() :] if mark else line)
        else:  # a line without a mark goes on with the step above
            steps[-1] = f"{steps[-1]}\n{line}".strip()
    return [step for step in (step.strip() for step in steps) if step]
