"""From generated texts to rows: parse answers, run programs, compare answers, and give a verdict on each text."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Literal

from potstill.data.token_weights import Span
from potstill.engines.sampling import Completion
from potstill.generation.journal import RequestCompletions
from potstill.generation.reasoning import parse
from potstill.generation.requests import GenerationRequest
from potstill.generation.sandbox import ProgramLimits, require_sandbox, run_program
from potstill.generation.tasks import Choice, Target, TaskWeights
from potstill.generation.verify import same_answer, vote

RowFormat = Literal["completion", "messages"]


@dataclass(frozen=True)
class GeneratedText:
    """One text of the teacher, parsed and judged.

    Args:
        request: what it completes.
        sample: its index among the texts of that request.
        seed: of the batch.
        completion: the text without the space around it (before it, only where a chat template puts its own).
        ended: False where max_new_tokens cut it off.
        reasoning_span: the chain or the program, in characters of the completion; None where there is neither.
        answer_span: the answer, where it stands in the completion.
        answer: as written, or what its program printed.
        problem: why a chain or a program has no answer.
        verdict: right or wrong, where the answer is known; else majority or minority, where texts vote; else unchecked.
        dropped: the name of what dropped it, and the reason; None where it may become a row.
    """

    request: GenerationRequest
    sample: int
    seed: int
    completion: str
    ended: bool
    reasoning_span: Span | None = None
    answer_span: Span | None = None
    answer: str | None = None
    problem: str | None = None
    verdict: str = "unchecked"
    dropped: tuple[str, str] | None = None


def parse_texts(
    requests: Sequence[GenerationRequest],
    completions: Sequence[RequestCompletions],
    row_format: RowFormat,
    limits: ProgramLimits,
) -> list[GeneratedText]:
    """Parse chains and run programs, in the order of the requests.

    Raises:
        DataError: there are programs and no sandbox.
    """
    if any(request.task == "program_of_thought" for request in requests):
        require_sandbox()

    def read(work: tuple[GenerationRequest, int, Completion, int]) -> GeneratedText:
        request, sample, text, seed = work
        completion = text.text.strip() if row_format == "messages" else text.text.rstrip()
        return _PARSERS[request.task](GeneratedText(request, sample, seed, completion, text.ended), limits)

    work = [
        (request, sample, text, completed.seed)
        for request, completed in zip(requests, completions, strict=True)
        for sample, text in enumerate(completed.texts)
    ]
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # each program runs in its own process
        return list(pool.map(read, work))


def _chain(text: GeneratedText, limits: ProgramLimits) -> GeneratedText:
    solution = parse(text.completion)
    return replace(
        text,
        reasoning_span=solution.reasoning_span,
        answer_span=solution.answer_span,
        answer=solution.answer,
        problem="no answer" if solution.answer is None else None,
    )


def _program(text: GeneratedText, limits: ProgramLimits) -> GeneratedText:
    span = code_span(text.completion)
    text = replace(text, reasoning_span=span)
    if not text.ended:  # half a program is not run
        return replace(text, problem="not run, because it was cut")
    outcome = run_program(text.completion[slice(*span)], limits)
    printed = outcome.output.strip().splitlines()
    if outcome.ending != "done":
        last_line = (outcome.errors.strip().splitlines() or [""])[-1]
        return replace(text, problem=f"program: {outcome.ending}{f' ({last_line[:200]})' if last_line else ''}")
    if not printed:
        return replace(text, problem="program: printed nothing")
    return replace(text, answer=printed[-1].strip())


def _unparsed(text: GeneratedText, limits: ProgramLimits) -> GeneratedText:
    return text


_PARSERS: dict[str, Callable[[GeneratedText, ProgramLimits], GeneratedText]] = {
    "chain_of_thought": _chain,
    "program_of_thought": _program,
    "instructions": _unparsed,
    "responses": _unparsed,
}
_FENCE = re.compile(
    r"^[ \t]*```[ \t]*(?:python|py)?[ \t]*\n(?P<code>.*?)^[ \t]*```", re.DOTALL | re.MULTILINE | re.IGNORECASE
)


def code_span(text: str) -> Span:
    """Find the program: the last fenced block, or the whole text where there is none."""
    blocks = [*_FENCE.finditer(text)]
    return blocks[-1].span("code") if blocks else (0, len(text))


def judge(texts: Iterable[GeneratedText], choose: Choice, *, drop_cut: bool) -> list[GeneratedText]:
    """Set verdict and `dropped` of each text; texts of one question stand together in the result.

    Args:
        texts: of one or more tasks; the answers to one question vote together.
        choose: all with an answer, those with the majority's answer, or those with the known answer.
        drop_cut: drop texts that max_new_tokens cut off.

    References:
        Majority: Wang et al. 2022, arXiv 2203.11171. Verified: Zelikman et al. 2022, arXiv 2203.14465.
    """
    groups: dict[int, list[GeneratedText]] = defaultdict(list)
    for text in texts:
        groups[text.request.number].append(text)
    return [text for group in groups.values() for text in _judge_group(group, choose, drop_cut)]


def _judge_group(group: list[GeneratedText], choose: Choice, drop_cut: bool) -> list[GeneratedText]:
    majority = vote([text.answer for text in group])
    judged = []
    for text in group:
        answer, gold = text.answer, text.request.gold
        is_right, is_common = same_answer(answer, gold), same_answer(answer, majority.answer)
        verdict = "unchecked"
        if gold is not None:
            verdict = "right" if is_right else "wrong"
        elif choose == "majority":
            verdict = "majority" if is_common else "minority"
        dropped = None
        if drop_cut and not text.ended:
            dropped = ("cut", "max_new_tokens came before the end")
        elif text.problem is not None:
            dropped = ("answer", text.problem)
        elif choose == "majority" and answer is not None and not is_common:
            dropped = ("answer", f"{answer!r}, where {majority.share:.0%} say {majority.answer!r}")
        elif choose == "verified" and not is_right:
            dropped = ("answer", f"{answer!r}, not {gold!r}")
        judged.append(replace(text, verdict=verdict, dropped=dropped))
    return judged


def rows_of(
    text: GeneratedText,
    row_format: RowFormat,
    target: Target,
    provenance: dict[str, Any],
    weights: TaskWeights | None = None,
) -> list[dict[str, Any]]:
    """Make the rows of a text, ready for `potstill run`.

    - chain: the prompt of the teacher, and its completion.
    - answer: the question alone, and the answer alone.
    - both: one row of each, two tasks that the prompt tells apart (Distilling Step-by-Step), with their `weight`.

    Conversations keep their messages and all columns of their row.

    Args:
        text: parsed and judged.
        row_format: prompt and completion, or messages.
        target: for chains and programs; any other text is one row.
        provenance: of the whole run.
        weights: of the two tasks; 1 each by default.

    References:
        Hsieh et al. 2023, arXiv 2305.02301.
    """
    request, rows = text.request, []
    if text.reasoning_span is None or target != "answer":
        row = dict(request.source) if request.task in ("responses", "instructions") else {}
        row |= _dialogue(request.messages, text.completion, row_format)
        if text.reasoning_span is not None:
            row |= _solution(text, text.reasoning_span, text.answer_span)
        rows.append(row | {"provenance": _origin(text, request.task, provenance)})
    if text.reasoning_span is not None and target != "chain" and text.answer is not None:
        question, answer = f"{request.question}\nAnswer:", f" {text.answer}"
        if row_format == "messages":
            question, answer = str(request.question), text.answer
        row = _dialogue([{"role": "user", "content": question}], answer, row_format)
        row |= _solution(text, None, (len(answer) - len(answer.lstrip()), len(answer)))
        rows.append(row | {"provenance": _origin(text, "answer", provenance)})
    if target == "both":
        both = weights or TaskWeights(chain=1.0, answer=1.0)
        rows = [row | {"weight": weight} for row, weight in zip(rows, (both.chain, both.answer), strict=False)]
    return rows


def _dialogue(messages: list[dict[str, Any]], completion: str, row_format: RowFormat) -> dict[str, Any]:
    if row_format == "messages":
        return {"messages": [*messages, {"role": "assistant", "content": completion}]}
    return {"prompt": messages[0]["content"], "completion": completion}


def _solution(text: GeneratedText, reasoning_span: Span | None, answer_span: Span | None) -> dict[str, Any]:
    return {
        "question": text.request.question,
        "answer": text.answer,
        "gold": text.request.gold,
        "reasoning_span": reasoning_span and list(reasoning_span),
        "answer_span": answer_span and list(answer_span),
    }


def _origin(text: GeneratedText, task: str, provenance: dict[str, Any]) -> dict[str, Any]:
    request = text.request
    place = {"row": request.number, "sample": text.sample, "seed": text.seed, "template": request.template}
    return {"task": task, **place, "verdict": text.verdict, **provenance}
