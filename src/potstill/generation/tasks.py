"""Generation tasks: worked solutions, programs, instructions, responses to prompts, and text without any data."""

from __future__ import annotations

import json
from abc import abstractmethod
from dataclasses import KW_ONLY, dataclass
from itertools import cycle, islice, product
from typing import Annotated, Any, Literal

from potstill.errors import ShapeError
from potstill.generation.reasoning import TEMPLATES, fill, parse, template
from potstill.generation.requests import GenerationRequest, Message, UnusableRow, chat_columns, read_rows
from potstill.losses.declared import Declared, NonEmpty, Range, Record

PROGRAM_TEMPLATES = {
    "python": (
        "{question}\n\nWrite a Python program that computes the answer and prints it, and nothing else, with print(). "
        "Use the standard library only, and read no input. Put the program between ```python and ```."
    )
}
INSTRUCTIONS = {
    "explain": "Explain {question} to someone who has never heard of it.",
    "summarize": "Summarise in a few sentences what matters most about {question}.",
    "analyze": "Analyse {question}: what it consists of, and how its parts work together.",
    "compare": "Compare the most common approaches to {question}, and say when each fits.",
    "list": "List the main parts of {question}, with one sentence on each.",
    "evaluate": "Evaluate {question}: what speaks for it, what against it, and what follows?",
}
BRITISH = {"summarise": "summarize", "analyse": "analyze"}

# What texts begin with where there is no data: nothing, and usual first words.
BEGINNINGS = ("", "The", "In", "A", "How", "What", "I", "When", "To", "There", "It", "This")

Choice = Literal["all", "majority", "verified"]
Target = Literal["chain", "answer", "both"]
TaskWeight = Annotated[float, Range(gt=0, lt=float("inf"))]


@dataclass(frozen=True)
class TaskWeights(Record):
    """Weights of tokens in the rows of each of the two tasks of `target: both`: their column weight, which a run reads
    with `weight: weight`. Only the ratio matters.
    """

    chain: TaskWeight
    answer: TaskWeight


@dataclass(frozen=True)
class Questions(Record):
    """A file of questions, and of their answers where these are known.

    Args:
        path: .jsonl, .json, .csv, .parquet, or a folder saved by datasets.
        field: the column of questions.
        answer: the column of known answers; worked solutions are parsed.
    """

    path: str
    field: str = "question"
    answer: str | None = None


@dataclass(frozen=True)
class Prompts(Record):
    """A file of prompts, or of conversations in which it is the assistant's turn.

    Args:
        path: .jsonl, .json, .csv, .parquet, or a folder saved by datasets.
        field: the column of prompts.
        messages: the column of conversations.
    """

    path: str
    field: str | None = None
    messages: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.field is None) == (self.messages is None):
            raise ShapeError("expected one of field and messages")


class GenerationTask(Declared):
    """A task of the teacher; without questions, all texts become rows as they are."""

    key = "task"
    choose: Choice = "all"
    target: Target = "chain"
    task_weights: TaskWeights | None = None

    @abstractmethod
    def requests(self, skip_bad: bool) -> tuple[list[GenerationRequest], list[UnusableRow]]:
        """Make the requests, and list the rows that none can be made of: an error, unless they are skipped."""


@dataclass(frozen=True)
class _QuestionTask(GenerationTask):
    """Questions with checked answers.

    Args:
        questions: the file.
        target: what the rows teach: the chain, the answer alone, or both.
        task_weights: with target both, weights of tokens in rows of each; by default 1.
        template: of the prompts: a name, or a text with {question} in it.
        choose: which texts become rows: all with an answer, majority, verified.
    """

    questions: Questions
    _: KW_ONLY
    target: Target = "chain"
    task_weights: TaskWeights | None = None
    template: str = "step_by_step"
    choose: Choice = "all"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.task_weights is not None and self.target != "both":
            raise ShapeError(f"expected task_weights with target: both alone, got target: {self.target}")
        if self.choose == "verified" and self.questions.answer is None:
            raise ShapeError("expected questions.answer, the column of known answers, for choose: verified")

    @property
    def _templates(self) -> dict[str, str]:
        return {self.name: self.template}

    def requests(self, skip_bad: bool) -> tuple[list[GenerationRequest], list[UnusableRow]]:
        field, answer = self.questions.field, self.questions.answer

        def problem(row: dict[str, Any]) -> str | None:
            return _text_problem(row, field) or (_answer_problem(row, answer) if answer else None)

        rows, bad = read_rows(self.questions.path, problem, skip_bad)
        requests = []
        for task, name in self._templates.items():
            text = template(name, PROGRAM_TEMPLATES if task == "program_of_thought" else TEMPLATES)
            for number, row in rows:
                known = None if answer is None else str(row[answer])
                gold = known if known is None else parse(known).answer or known.strip()
                messages = [{"role": "user", "content": fill(text, row[field])}]
                requests.append(GenerationRequest(number, task, name, messages, row, row[field], gold))
        return requests, bad


@dataclass(frozen=True)
class ChainOfThought(_QuestionTask):
    """Chains of thought: worked solutions in prose.

    Args:
        template: step_by_step, structured, socratic, or a text with {question}.
    """

    name = "chain_of_thought"


@dataclass(frozen=True)
class ProgramOfThought(_QuestionTask):
    """Programs of thought: Python that prints the answer, run in a sandbox.

    Args:
        template: python, or a text with {question}.
    """

    template: str = "python"
    name = "program_of_thought"


@dataclass(frozen=True)
class ChainsAndPrograms(_QuestionTask):
    """Chains and programs for each question, which vote together or are verified.

    Args:
        template: of the chains.
        program_template: of the programs.
        choose: which texts become rows: majority or verified.
    """

    program_template: str = "python"
    choose: Literal["majority", "verified"] = "majority"
    name = "mixed"

    @property
    def _templates(self) -> dict[str, str]:
        return {"chain_of_thought": self.template, "program_of_thought": self.program_template}


@dataclass(frozen=True)
class Instructions(GenerationTask):
    """Instructions: every kind of task for every topic.

    Args:
        topics: what the instructions are about.
        kinds: explain, summarize, analyze, compare, list, evaluate, or texts with {question}, the topic's place.
    """

    topics: Annotated[tuple[str, ...], NonEmpty()]
    kinds: Annotated[tuple[str, ...], NonEmpty()] = tuple(INSTRUCTIONS)  # type: ignore[assignment, misc]  # not the family's
    name = "instructions"

    def requests(self, skip_bad: bool) -> tuple[list[GenerationRequest], list[UnusableRow]]:
        requests = []
        kinds = [BRITISH.get(kind, kind) for kind in self.kinds]
        for number, (topic, kind) in enumerate(product(self.topics, kinds), 1):
            messages = [{"role": "user", "content": fill(template(kind, INSTRUCTIONS), topic)}]
            source = {"topic": topic, "kind": kind}
            requests.append(GenerationRequest(number, self.name, kind, messages, source, topic))
        return requests, []


@dataclass(frozen=True)
class Responses(GenerationTask):
    """Responses to prompts, and to conversations.

    Args:
        prompts: the file.
    """

    prompts: Prompts
    name = "responses"

    def requests(self, skip_bad: bool) -> tuple[list[GenerationRequest], list[UnusableRow]]:
        field, column = self.prompts.field or "", self.prompts.messages

        def problem(row: dict[str, Any]) -> str | None:
            problem = _turn_problem(row, column) if column else _text_problem(row, field)
            return problem or _chat_problem(row)

        def messages(row: dict[str, Any]) -> list[dict[str, Any]]:
            return _conversation(row[column]) if column else [{"role": "user", "content": row[field]}]

        rows, bad = read_rows(self.prompts.path, problem, skip_bad)
        requests = [
            GenerationRequest(number, self.name, "none", messages(row), row, chat=chat_columns(row))
            for number, row in rows
        ]
        return requests, bad


@dataclass(frozen=True)
class OwnText(GenerationTask):
    """Text of the teacher's own, without any data: for distillation where only the model is at hand.

    A teacher with a chat template writes the user's questions too, each behind the opening of a chat, and then answers
    them (MAGPIE). Any other continues a beginning, or its first token alone, and rows hold the whole text. Few such
    texts end by themselves: set `filter.cut` to false.

    Args:
        number: of questions, or of texts.
        question_tokens: of the longest question.
        beginnings: of texts, in turn; an empty one is the first token alone. Chats do not read them.

    References:
        Xu et al. 2024 (MAGPIE), arXiv 2406.08464; Liu et al. 2023 (LLM-QAT), arXiv 2305.17888.
    """

    number: Annotated[int, Range(ge=1)]
    question_tokens: Annotated[int, Range(ge=1)] = 128
    beginnings: Annotated[tuple[str, ...], NonEmpty()] = BEGINNINGS
    name = "own_text"

    def requests(self, skip_bad: bool) -> tuple[list[GenerationRequest], list[UnusableRow]]:
        """The texts of a teacher without a chat template."""
        turns = islice(cycle(self.beginnings), self.number)
        return [self.request(number, text) for number, text in enumerate(turns, 1)], []

    def request(self, number: int, text: str) -> GenerationRequest:
        return GenerationRequest(number, self.name, "none", [{"role": "user", "content": text}], {})


def _conversation(value: Any) -> list[Message]:
    """The messages of a list, or of that list as JSON text."""
    return list(json.loads(value) if isinstance(value, str) else value)


# Each check gives what is wrong with a row, or None.


def _text_problem(row: dict[str, Any], field: str) -> str | None:
    if field not in row:
        return f"expected a field {field!r}, got {', '.join(row) or 'none'}"
    if not isinstance(row[field], str) or not row[field].strip():
        return f"expected a text in {field!r}, got {str(row[field])[:40]!r}"
    return None


def _answer_problem(row: dict[str, Any], field: str) -> str | None:
    value = row.get(field)
    if isinstance(value, bool) or not isinstance(value, str | int | float) or not str(value).strip():
        return f"expected an answer in {field!r}, got {str(value)[:40]!r}"
    return None


def _turn_problem(row: dict[str, Any], field: str) -> str | None:
    """Check that a field holds a conversation in which it is the assistant's turn."""
    try:
        roles = [message["role"] for message in _conversation(row[field])]
    except (KeyError, TypeError, ValueError):
        return f"expected a list of messages in {field!r}, got {str(row.get(field))[:40]!r}"
    if not roles or roles[-1] in ("assistant", "system"):
        return f"expected a conversation that ends with the user or a tool, got {roles[-1] if roles else 'none'}"
    return None


def _chat_problem(row: dict[str, Any]) -> str | None:
    try:
        chat_columns(row)
    except ValueError as error:
        return str(error)
    return None
