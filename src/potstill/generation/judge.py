"""From what a teacher wrote to rows: answers found, programs run, answers compared, and a verdict on each."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Literal, TypedDict

from potstill.engines.sampling import Completion
from potstill.generation.journal import Answered
from potstill.generation.reasoning import Span, parse
from potstill.generation.requests import GenerationRequest
from potstill.generation.sandbox import Limits, require_sandbox, run_program
from potstill.generation.verify import same_answer, vote

Choice = Literal["all", "majority", "verified"]
Target = Literal["chain", "answer", "both"]
Form = Literal["completion", "messages"]


@dataclass(frozen=True)
class Candidate:
    """One text, read.

    Args:
        ask: what was asked.
        sample: its place among the texts for that.
        seed: of the batch.
        completion: the text without the space around it (before it, only where a chat template puts its own).
        ended: it was not cut.
        reasoning_span: the chain or the program, in characters of the completion; None where there is neither.
        answer_span: the answer, where the completion says it.
        answer: what it says, or what its program printed.
        trouble: why there is no answer, where there should be one.
    """

    ask: GenerationRequest
    sample: int
    seed: int
    completion: str
    ended: bool
    reasoning_span: Span | None = None
    answer_span: Span | None = None
    answer: str | None = None
    trouble: str | None = None


@dataclass(frozen=True)
class Judged:
    """A candidate and what is thought of it.

    Args:
        candidate: the text.
        verdict: right or wrong, where the answer is known; else majority or minority, where a vote was asked for; else
            unchecked.
        dropped: what dropped it and why, or None.
    """

    candidate: Candidate
    verdict: str
    dropped: tuple[str, str] | None


def read_candidates(
    asks: Sequence[GenerationRequest], answered: Sequence[Answered], form: Form, limits: Limits
) -> list[Candidate]:
    """Every text read: chains parsed, programs run. In the order of the asks.

    Raises:
        DataError: there are programs and no sandbox.
    """
    if any(ask.task == "program_of_thought" for ask in asks):
        require_sandbox()

    def read(work: tuple[GenerationRequest, int, Completion, int]) -> Candidate:
        ask, sample, one, seed = work
        text = one.text.strip() if form == "messages" else one.text.rstrip()
        return _READERS[ask.task](Candidate(ask, sample, seed, text, one.ended), limits)

    work = [
        (ask, sample, text, one.seed)
        for ask, one in zip(asks, answered, strict=True)
        for sample, text in enumerate(one.texts)
    ]
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # a program waits in its own process
        return list(pool.map(read, work))


def _chain(candidate: Candidate, limits: Limits) -> Candidate:
    found = parse(candidate.completion)
    trouble = "no answer" if found.answer is None else None
    return replace(
        candidate,
        reasoning_span=found.reasoning_span,
        answer_span=found.answer_span,
        answer=found.answer,
        trouble=trouble,
    )


def _program(candidate: Candidate, limits: Limits) -> Candidate:
    span = code_span(candidate.completion)
    candidate = replace(candidate, reasoning_span=span)
    if not candidate.ended:  # half a program is not run
        return replace(candidate, trouble="not run, because it was cut")
    outcome = run_program(candidate.completion[slice(*span)], limits)
    printed = outcome.output.strip().splitlines()
    if outcome.ending != "done":
        said = (outcome.errors.strip().splitlines() or [""])[-1]
        return replace(candidate, trouble=f"program: {outcome.ending}{f' ({said[:200]})' if said else ''}")
    if not printed:
        return replace(candidate, trouble="program: printed nothing")
    return replace(candidate, answer=printed[-1].strip())


def _plain(candidate: Candidate, limits: Limits) -> Candidate:
    return candidate


_READERS: dict[str, Callable[[Candidate, Limits], Candidate]] = {
    "chain_of_thought": _chain,
    "program_of_thought": _program,
    "instructions": _plain,
    "responses": _plain,
}
_FENCE = re.compile(
    r"^[ \t]*```[ \t]*(?:python|py)?[ \t]*\n(?P<code>.*?)^[ \t]*```", re.DOTALL | re.MULTILINE | re.IGNORECASE
)


def code_span(text: str) -> Span:
    """Where the program stands: in the last block between fences, or everywhere, where there is none."""
    blocks = [*_FENCE.finditer(text)]
    return blocks[-1].span("code") if blocks else (0, len(text))


def judge(candidates: Iterable[Candidate], choose: Choice, *, drop_cut: bool) -> list[Judged]:
    """A verdict for each candidate, in order.

    Args:
        candidates: of one or more kinds; the answers to one question vote together.
        choose: all with an answer, those that give the answer of most, or those that give the known answer.
        drop_cut: whether a text that max_new_tokens cut is dropped.

    References:
        Majority: Wang et al. 2022, arXiv 2203.11171. Verified: Zelikman et al. 2022, arXiv 2203.14465.
    """
    groups: dict[int, list[Candidate]] = defaultdict(list)
    for candidate in candidates:
        groups[candidate.ask.number].append(candidate)
    judged = {id(one): verdict for group in groups.values() for one, verdict in _judge_group(group, choose, drop_cut)}
    return [judged[id(one)] for group in groups.values() for one in group]


def _judge_group(group: list[Candidate], choose: Choice, drop_cut: bool) -> list[tuple[Candidate, Judged]]:
    most = vote([one.answer for one in group])
    found = []
    for one in group:
        gold = one.ask.gold
        right = same_answer(one.answer, gold)
        common = same_answer(one.answer, most.answer)
        verdict = "unchecked"
        if gold is not None:
            verdict = "right" if right else "wrong"
        elif choose == "majority":
            verdict = "majority" if common else "minority"
        dropped = None
        if drop_cut and not one.ended:
            dropped = ("cut", "max_new_tokens came before the end")
        elif one.trouble is not None:
            dropped = ("answer", one.trouble)
        elif choose == "majority" and one.answer is not None and not common:
            dropped = ("answer", f"{one.answer!r}, where {most.share:.0%} say {most.answer!r}")
        elif choose == "verified" and not right:
            dropped = ("answer", f"{one.answer!r}, not {gold!r}")
        found.append((one, Judged(one, verdict, dropped)))
    return found


# Rows


class TaskWeights(TypedDict):
    """How much a token counts in rows of each task of `both`."""

    chain: float
    answer: float


def rows_of(
    judged: Judged, form: Form, target: Target, provenance: dict[str, Any], weights: TaskWeights | None = None
) -> list[dict[str, Any]]:
    """The rows that a candidate becomes, ready for `potstill run`.

    - chain: the prompt as the teacher saw it, and what it wrote.
    - answer: the question alone, and the answer alone.
    - both: one row of each, two tasks that the prompt tells apart (Distilling Step-by-Step), with their `weight`.

    Conversations keep their messages and all columns of their row.

    Args:
        judged: what it is.
        form: prompt and completion, or messages.
        target: for chains and programs; everything else is one row.
        provenance: of the whole run.
        weights: of the two tasks; default: 1 each.

    References:
        Hsieh et al. 2023, arXiv 2305.02301.
    """
    one = judged.candidate
    reasons = one.reasoning_span is not None
    rows = [_whole(judged, form, provenance)] if not reasons or target != "answer" else []
    if reasons and target != "chain" and one.answer is not None:
        rows.append(_answer_alone(judged, form, provenance))
    if target == "both":
        two = weights or TaskWeights(chain=1.0, answer=1.0)
        rows = [row | {"weight": weight} for row, weight in zip(rows, (two["chain"], two["answer"]), strict=False)]
    return rows


def _whole(judged: Judged, form: Form, provenance: dict[str, Any]) -> dict[str, Any]:
    one = judged.candidate
    row = dict(one.ask.source) if one.ask.task in ("responses", "instructions") else {}
    row |= _said(one.ask.messages, one.completion, form)
    if one.reasoning_span is not None:
        row |= {"question": one.ask.question, "answer": one.answer, "gold": one.ask.gold}
        row |= {
            "reasoning_span": list(one.reasoning_span),
            "answer_span": list(one.answer_span) if one.answer_span else None,
        }
    return row | {"provenance": _origin(judged, one.ask.task, provenance)}


def _answer_alone(judged: Judged, form: Form, provenance: dict[str, Any]) -> dict[str, Any]:
    one = judged.candidate
    asked, said = (
        (one.ask.question, one.answer) if form == "messages" else (f"{one.ask.question}\nAnswer:", f" {one.answer}")
    )
    assert said is not None
    row = _said([{"role": "user", "content": asked}], said, form)
    row |= {"question": one.ask.question, "answer": one.answer, "gold": one.ask.gold}
    row |= {"reasoning_span": None, "answer_span": [len(said) - len(said.lstrip()), len(said)]}
    return row | {"provenance": _origin(judged, "answer", provenance)}


def _said(asked: list[dict[str, Any]], completion: str, form: Form) -> dict[str, Any]:
    if form == "messages":
        return {"messages": [*asked, {"role": "assistant", "content": completion}]}
    return {"prompt": asked[0]["content"], "completion": completion}


def _origin(judged: Judged, task: str, provenance: dict[str, Any]) -> dict[str, Any]:
    one = judged.candidate
    place = {"row": one.ask.number, "sample": one.sample, "seed": one.seed, "template": one.ask.template}
    return {"task": task, **place, "verdict": judged.verdict, **provenance}
