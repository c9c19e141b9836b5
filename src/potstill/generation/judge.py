"""From generated texts to rows: parse answers, run programs, compare answers, and give a verdict on each text."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

from potstill.data.sources import WRITTEN_COLUMNS
from potstill.data.token_weights import Span
from potstill.engines.sampling import Prompt
from potstill.generation.journal import RequestCompletions
from potstill.generation.reasoning import parse
from potstill.generation.requests import GenerationRequest, Message
from potstill.generation.sandbox import ProgramLimits, require_sandbox, run_program
from potstill.generation.tasks import Choice, Target, TaskWeights
from potstill.generation.turns import RowFormat, TurnReader, WrittenTurn
from potstill.generation.verify import Vote, same_answer, vote

# The spans of reasoning and answer, the answer, and why there is none; see `GeneratedText`.
ParsedText = tuple[Span | None, Span | None, str | None, str | None]


@dataclass(frozen=True)
class GeneratedText:
    """One text of the teacher, parsed and judged.

    The verdict is right or wrong where the answer is known, else majority or minority where texts vote, or unchecked.
    """

    request: GenerationRequest
    sample: int  # its index among the texts of that request
    seed: int  # of the batch
    turn: WrittenTurn
    ended: bool  # False where max_new_tokens cut it off
    reasoning_span: Span | None = None  # the chain or the program, in characters of the completion
    answer_span: Span | None = None  # the answer, where it stands in the completion
    answer: str | None = None  # as written, or what its program printed
    problem: str | None = None  # why a chain or a program has no answer
    verdict: str = "unchecked"
    dropped: tuple[str, str] | None = None  # the name of what dropped it, and the reason

    @property
    def completion(self) -> str:
        """The content of its message."""
        return str(self.turn.message["content"])


def parse_texts(
    requests: Sequence[GenerationRequest],
    prompts: Sequence[Prompt],
    completions: Sequence[RequestCompletions],
    reader: TurnReader,
    limits: ProgramLimits,
) -> list[GeneratedText]:
    """Parse chains and run programs, in the order of the requests; a DataError without a sandbox for the programs."""
    if any(request.task == "program_of_thought" for request in requests):
        require_sandbox()

    def parsed(text: GeneratedText) -> GeneratedText:
        if text.request.task == "chain_of_thought":
            reasoning, span, answer, problem = _chain(text.completion)
        elif text.request.task == "program_of_thought":
            reasoning, span, answer, problem = _program(text.completion, text.ended, limits)
        else:
            return text
        return replace(text, reasoning_span=reasoning, answer_span=span, answer=answer, problem=problem)

    texts = [
        GeneratedText(request, sample, completed.seed, reader.read(request, prompt, text), text.ended)
        for request, prompt, completed in zip(requests, prompts, completions, strict=True)
        for sample, text in enumerate(completed.texts)
    ]
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # each program runs in its own process
        return [*pool.map(parsed, texts)]


def _chain(text: str) -> ParsedText:
    solution = parse(text)
    problem = "no answer" if solution.answer is None else None
    return solution.reasoning_span, solution.answer_span, solution.answer, problem


def _program(text: str, ended: bool, limits: ProgramLimits) -> ParsedText:
    span = code_span(text)
    if not ended:  # half a program is not run
        return span, None, None, "not run, because it was cut"
    outcome = run_program(text[slice(*span)], limits)
    if outcome.ending != "done":
        errors = outcome.errors.strip().splitlines()
        return span, None, None, f"program: {outcome.ending}{f' ({errors[-1][:200]})' if errors else ''}"
    printed = outcome.output.strip().splitlines()
    return (span, None, printed[-1].strip(), None) if printed else (span, None, None, "program: printed nothing")


_FENCE = re.compile(
    r"^[ \t]*```[ \t]*(?:python|py)?[ \t]*\n(?P<code>.*?)^[ \t]*```", re.DOTALL | re.MULTILINE | re.IGNORECASE
)


def code_span(text: str) -> Span:
    """Find the program: the last fenced block, or the whole text where there is none."""
    blocks = [*_FENCE.finditer(text)]
    return blocks[-1].span("code") if blocks else (0, len(text))


def judge(texts: Iterable[GeneratedText], choose: Choice, *, drop_cut: bool) -> list[GeneratedText]:
    """Set verdict and `dropped` of each text; texts of one question, of all tasks, vote and stand together.

    References:
        Majority: Wang et al. 2022, arXiv 2203.11171. Verified: Zelikman et al. 2022, arXiv 2203.14465.
    """

    def question(text: GeneratedText) -> int:
        return text.request.number

    judged = []
    for _, group in groupby(sorted(texts, key=question), question):
        answers = list(group)
        majority = vote([text.answer for text in answers])
        judged += [_judged(text, majority, choose, drop_cut) for text in answers]
    return judged


def _judged(text: GeneratedText, majority: Vote, choose: Choice, drop_cut: bool) -> GeneratedText:
    answer, gold = text.answer, text.request.gold
    is_right, is_common = same_answer(answer, gold), same_answer(answer, majority.answer)
    verdict, dropped = "unchecked", None
    if gold is not None:
        verdict = "right" if is_right else "wrong"
    elif choose == "majority":
        verdict = "majority" if is_common else "minority"
    if drop_cut and not text.ended:
        dropped = ("cut", "max_new_tokens came before the end")
    elif text.problem is not None:
        dropped = ("answer", text.problem)
    elif choose == "majority" and answer is not None and not is_common:
        dropped = ("answer", f"{answer!r}, where {majority.share:.0%} say {majority.answer!r}")
    elif choose == "verified" and not is_right:
        dropped = ("answer", f"{answer!r}, not {gold!r}")
    return replace(text, verdict=verdict, dropped=dropped)


def rows_of(
    text: GeneratedText,
    row_format: RowFormat,
    target: Target,
    provenance: dict[str, Any],
    weights: TaskWeights | None = None,
) -> list[dict[str, Any]]:
    """Make the rows of a text, ready for `potstill run`. Without a chain or a program it is one row for all targets.

    - chain: the prompt of the teacher, and its completion.
    - answer: the question alone, and the answer alone.
    - both: one row of each, two tasks that the prompt tells apart (Distilling Step-by-Step), with their `weight`.

    A text of the teacher's own has no prompt: its row is a `text` with its beginning.

    Conversations keep their messages and all columns of their row. A row that would be encoded as other tokens than the
    teacher's has these in `prompt_ids` and `completion_ids`.

    References:
        Hsieh et al. 2023, arXiv 2305.02301.
    """
    request, reasoning, rows = text.request, text.reasoning_span, []
    if reasoning is None or target != "answer":
        row = dict(request.source) if request.task in ("responses", "instructions") else {}
        if request.task == "own_text" and row_format == "completion":
            row["text"] = request.messages[0]["content"] + text.completion
        else:
            row |= _dialogue(request, request.messages, text.turn.message, row_format)
            row |= dict(zip(WRITTEN_COLUMNS, text.turn.token_ids or (), strict=False))
        rows.append(row | _description(text, request.task, reasoning, text.answer_span, provenance))
    if reasoning is not None and target != "chain" and text.answer is not None:
        question, answer = f"{request.question}\nAnswer:", f" {text.answer}"
        if row_format == "messages":
            question, answer = str(request.question), text.answer
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        row = _dialogue(request, messages[:1], messages[1], row_format)
        span = (len(answer) - len(answer.lstrip()), len(answer))
        rows.append(row | _description(text, "answer", None, span, provenance))
    if target == "both":
        both = weights or TaskWeights(chain=1.0, answer=1.0)
        rows = [row | {"weight": weight} for row, weight in zip(rows, (both.chain, both.answer), strict=False)]
    return rows


def _dialogue(
    request: GenerationRequest, messages: list[Message], message: Message, row_format: RowFormat
) -> dict[str, Any]:
    if row_format == "messages":
        # Earlier answers are not the teacher's: they have no loss.
        has_answers = any(earlier["role"] == "assistant" for earlier in messages)
        prompt = {"num_prompt_messages": len(messages)} if has_answers else {}
        return {"messages": [*messages, message], **request.chat, **prompt}
    return {"prompt": messages[0]["content"], "completion": message["content"]}


def _description(
    text: GeneratedText, task: str, reasoning: Span | None, answer: Span | None, provenance: dict[str, Any]
) -> dict[str, Any]:
    """The columns that describe a text, beside its dialogue."""
    request = text.request
    row: dict[str, Any] = {}
    if text.reasoning_span is not None:
        row = {"question": request.question, "answer": text.answer, "gold": request.gold}
        row |= {"reasoning_span": reasoning and list(reasoning), "answer_span": answer and list(answer)}
    origin: dict[str, Any] = {"task": task, "row": request.number, "sample": text.sample, "seed": text.seed}
    origin |= {"template": request.template, "verdict": text.verdict}
    return row | {"provenance": origin | provenance}
