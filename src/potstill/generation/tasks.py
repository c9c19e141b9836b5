"""Generation tasks: worked solutions, programs, instructions, and responses to prompts."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from potstill.errors import ShapeError
from potstill.generation.reasoning import TEMPLATES, fill, parse, template
from potstill.generation.requests import (
    GenerationRequest,
    NumberedRow,
    UnusableRow,
    answer_problem,
    conversation,
    read_rows,
    text_problem,
    turn_problem,
)
from potstill.losses.declared import Declared, NonEmpty, Range, Record

PROGRAM_TEMPLATES = {
    "python": (
        "{question}\n\nWrite a Python program that computes the answer and prints it, and nothing else, with print(). "
        "Use the standard library only, and read no input. Put the program between ```python and ```."
    )
}
INSTRUCTIONS = {
    "explain": "Explain {question} to someone who has never heard of it.",
    "summarise": "Summarise in a few sentences what matters most about {question}.",
    "analyse": "Analyse {question}: what it consists of, and how its parts work together.",
    "compare": "Compare the most common approaches to {question}, and say when each fits.",
    "list": "List the main parts of {question}, with one sentence on each.",
    "evaluate": "Evaluate {question}: what speaks for it, what against it, and what follows?",
}

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

    def read(self, skip_bad: bool) -> tuple[list[NumberedRow], list[UnusableRow]]:
        """See `read_rows`."""

        def problem(row: dict[str, Any]) -> str | None:
            return text_problem(row, self.field) or (answer_problem(row, self.answer) if self.answer else None)

        return read_rows(Path(self.path), problem, skip_bad)


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
    """A task of the teacher.

    Attributes:
        choose: which texts become rows: all (of questions, all with an answer), majority or verified.
        target: what the rows of questions teach.
        task_weights: weights of tokens in the rows of both targets.
    """

    key = "task"
    choose: Choice = "all"
    target: Target = "chain"
    task_weights: TaskWeights | None = None

    @abstractmethod
    def requests(self, skip_bad: bool) -> tuple[list[GenerationRequest], list[UnusableRow]]:
        """Make the requests, and list the rows that none can be made of.

        Args:
            skip_bad: go on without unusable rows.

        Raises:
            DataError: a file cannot be read or has unusable rows, or a template is not known.
        """


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
        """See `GenerationTask`."""
        rows, bad = self.questions.read(skip_bad)
        requests = []
        for task, name in self._templates.items():
            text = template(name, PROGRAM_TEMPLATES if task == "program_of_thought" else TEMPLATES)
            for number, row in rows:
                question = row[self.questions.field]
                known = None if self.questions.answer is None else str(row[self.questions.answer])
                gold = known if known is None else parse(known).answer or known.strip()
                messages = [{"role": "user", "content": fill(text, question)}]
                requests.append(GenerationRequest(number, task, name, messages, row, question, gold))
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
        kinds: explain, summarise, analyse, compare, list, evaluate, or texts with {question}, the topic's place.
    """

    topics: Annotated[tuple[str, ...], NonEmpty()]
    kinds: Annotated[tuple[str, ...], NonEmpty()] = tuple(INSTRUCTIONS)  # type: ignore[assignment, misc]  # not the family's
    name = "instructions"

    def requests(self, skip_bad: bool) -> tuple[list[GenerationRequest], list[UnusableRow]]:
        """See `GenerationTask`."""
        pairs = [(topic, kind) for topic in self.topics for kind in self.kinds]
        return [
            GenerationRequest(
                number,
                self.name,
                kind,
                [{"role": "user", "content": fill(template(kind, INSTRUCTIONS), topic)}],
                {"topic": topic, "kind": kind},
                topic,
            )
            for number, (topic, kind) in enumerate(pairs, 1)
        ], []


@dataclass(frozen=True)
class Responses(GenerationTask):
    """Responses to prompts, and to conversations.

    Args:
        prompts: the file.
    """

    prompts: Prompts
    name = "responses"

    def requests(self, skip_bad: bool) -> tuple[list[GenerationRequest], list[UnusableRow]]:
        """See `GenerationTask`."""
        field, column = self.prompts.field or "", self.prompts.messages

        def problem(row: dict[str, Any]) -> str | None:
            return turn_problem(row, column) if column else text_problem(row, field)

        def messages(row: dict[str, Any]) -> list[dict[str, Any]]:
            return conversation(row[column]) if column else [{"role": "user", "content": row[field]}]

        rows, bad = read_rows(Path(self.prompts.path), problem, skip_bad)
        return [GenerationRequest(number, self.name, "none", messages(row), row) for number, row in rows], bad
