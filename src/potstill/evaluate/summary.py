"""What a run's records say: summary.json and metrics.jsonl, checked and typed."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path

from pydantic import BaseModel, ValidationError, field_validator, model_validator

from potstill.errors import DataError
from potstill.losses.alignment import Task

MODELS = ("teacher", "baseline", "student")
RUNS = ("baseline", "student")

# A missing optional thing leaves its part of the report out.


class Row(BaseModel):
    """What was measured of one model: losses and KL in nats per token, or what `measures.WORDS` says of the task."""

    loss: float
    perplexity: float | None = None
    agreement: float | None = None
    kl: float | None = None
    accuracy: float | None = None
    f1_macro: float | None = None
    ece: float | None = None
    pearson: float | None = None
    spearman: float | None = None
    to_teacher: float | None = None
    all_pairs: float | None = None
    recall: float | None = None
    parameters: int | None = None
    bytes: int | None = None
    latency_ms: float | None = None
    bits_per_byte: float | None = None

    @field_validator("loss", mode="before")
    @classmethod
    def _null_is_not_a_number(cls, value: object) -> object:
        return math.nan if value is None else value


class Rows(BaseModel):
    teacher: Row | None = None
    baseline: Row | None = None
    student: Row

    def named(self) -> list[tuple[str, Row]]:
        """The models that there are, always in the same order."""
        return [(model, row) for model in MODELS if (row := getattr(self, model)) is not None]


class Positions(BaseModel):
    """Mean KL to the teacher between edges[i] and edges[i + 1]."""

    edges: list[float]
    baseline: list[float | None] | None = None
    student: list[float | None]

    @model_validator(mode="after")
    def _one_edge_more(self) -> Positions:
        for values in (self.student, self.baseline):
            if values is not None and len(self.edges) != len(values) + 1:
                raise ValueError(f"one edge more than values, got {len(self.edges)} and {len(values)}")
        return self


class Continuation(BaseModel):
    prompt: str
    truth: str | None = None
    teacher: str | None = None
    baseline: str | None = None
    student: str

    def written(self) -> list[tuple[str, str]]:
        return [(model, text) for model in MODELS if (text := getattr(self, model)) is not None]

    def last_line(self, most: int = 44) -> str:
        """Where the prompt leaves off, so that a continuation in the middle of a line can be read."""
        line = self.prompt.rsplit("\n", 1)[-1]
        if len(line) <= most:
            return line
        tail = line[-most:]
        return "…" + (tail.partition(" ")[2] or tail)


class OwnFigures(BaseModel):
    """What the student's own text was like when it was logged last; see `potstill.train.samples`."""

    step: int
    own_length: float
    own_ended: float
    own_repetition: float
    own_entropy: float
    logits_own: float | None = None
    logits_data: float | None = None


class OwnText(BaseModel):
    """What the student wrote while it learned."""

    step: int
    prompt: str
    text: str


class Data(BaseModel):
    train_tokens: int | None = None
    train_examples: int | None = None
    eval_tokens: int | None = None
    eval_examples: int | None = None
    train: str | None = None
    eval: str | None = None


class Training(BaseModel):
    steps: int | None = None
    tokens_per_step: int | None = None
    seconds: dict[str, float] = {}


class CurveRows(BaseModel):
    """The held-out rows of the learning curves: fewer than those of the table."""

    rows: int | None = None
    teacher_loss: float | None = None


class Adapter(BaseModel):
    """What was trained of the student, where it is not all of it; with bytes and base where it is saved by itself."""

    title: str
    trained: int
    share: float
    bytes: int | None = None
    base: str | None = None
    quantized: bool = False

    @property
    def hub(self) -> str | None:
        """The base's name on the hub, if it has one."""
        return self.base if self.base and not Path(self.base).is_absolute() else None


class Summary(BaseModel):
    name: str = "a run"
    seed: int | None = None
    task: Task = "causal"
    created: datetime | None = None
    rows: Rows
    gap_closed: float | None = None
    curve: CurveRows = CurveRows()
    kl_by_position: Positions | None = None
    continuations: list[Continuation] = []
    own_text: OwnFigures | None = None
    own_texts: list[OwnText] = []
    data: Data = Data()
    training: Training = Training()
    objective: str | None = None
    models: dict[str, str] = {}
    adapter: Adapter | None = None
    teacher_weights: dict[str, float] | None = None
    notes: list[str] = []
    versions: dict[str, str] = {}


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise DataError(
            f"report: expected {path.name} in {path.parent}, got no such file. "
            "Give a finished run directory, or finish it with `potstill run --resume`."
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"report: expected a readable text file, got {path}: {error}. Check it.") from None


def read_summary(run_directory: Path) -> Summary:
    path = run_directory / "summary.json"
    try:
        return checked(json.loads(read_text(path)), str(path))
    except json.JSONDecodeError as error:
        raise DataError(
            f"report: expected JSON in {path}, got something that breaks off or is not JSON at line "
            f"{error.lineno}. Run it again with `potstill run --resume`."
        ) from None


def checked(summary: object, where: str) -> Summary:
    try:
        return Summary.model_validate(summary)
    except ValidationError as error:
        first = error.errors()[0]
        what = ".".join(str(part) for part in first["loc"]) or "an object"
        raise DataError(
            f"report: expected a usable {what} in {where}, got {first['input']!r:.60}. {first['msg']}. "
            "Write the summary with this version of potstill."
        ) from None


Curves = dict[str, list[tuple[float, float]]]


def read_metrics(path: Path) -> tuple[Curves, Curves]:
    """The held-out and the training loss of each run: (step, nats), rising steps, finite values."""
    lines = read_text(path).split("\n")
    held_out: dict[str, dict[float, float]] = {run: {} for run in RUNS}
    training: dict[str, dict[float, float]] = {run: {} for run in RUNS}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            run, step = record["run"], record["step"]
        except (json.JSONDecodeError, KeyError, TypeError):
            if number == len(lines):
                break  # the run was stopped while it wrote this line
            raise DataError(
                f"report: expected a JSON object with run and step in {path}, line {number}, got {line!r:.60}. "
                "Remove the line, or run again."
            ) from None
        if run in RUNS:
            # A resumed run logs some steps again: the last word counts.
            _note(held_out[run], step, record.get("eval_cross_entropy", record.get("eval_squared_error")))
            _note(training[run], step, record.get("loss"))
    return _as_curves(held_out), _as_curves(training)


def _note(values: dict[float, float], step: float, value: object) -> None:
    if isinstance(value, int | float) and math.isfinite(value):
        values[step] = value


def _as_curves(values: Mapping[str, Mapping[float, float]]) -> Curves:
    return {run: sorted(by_step.items()) for run, by_step in values.items() if by_step}
