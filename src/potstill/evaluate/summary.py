"""Records of a run, typed and checked; an optional field that is missing leaves its part out of the report."""

from __future__ import annotations

import json
import math
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError, model_validator

from potstill.errors import DataError
from potstill.files import write_text
from potstill.losses.alignment import Task

MODELS = ("teacher", "random", "baseline", "student")
RUNS = ("random", "baseline", "student")  # trained on the same rows

Curves = dict[str, list[tuple[float, float]]]


class ModelScores(BaseModel):
    """Measurements of one model; `measures.TASK_LABELS` has the unit of the loss."""

    loss: Annotated[float, BeforeValidator(lambda value: math.nan if value is None else value)]
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
    active_parameters: int | None = None  # where a model has experts
    bytes: int | None = None
    saved_as: str | None = None
    latency_ms: float | None = None
    bits_per_byte: float | None = None


class ScoresByModel(BaseModel):
    whole_teacher: ModelScores | None = None  # with all its tokens, where the teacher has those that its student keeps
    teacher: ModelScores | None = None
    random: ModelScores | None = None
    baseline: ModelScores | None = None
    student: ModelScores

    @property
    def uncut_teacher(self) -> ModelScores | None:
        """The teacher with all its tokens."""
        return self.whole_teacher or self.teacher

    def present(self) -> dict[str, ModelScores]:
        """The models that were measured, always in the same order."""
        return {model: scores for model in MODELS if (scores := getattr(self, model)) is not None}

    def columns(self) -> dict[str, ModelScores]:
        """The columns of the table: the models, after the whole of a teacher whose vocabulary was cut."""
        whole = {} if self.whole_teacher is None else {"whole teacher": self.whole_teacher}
        return whole | self.present()


class PositionKL(BaseModel):
    """Mean KL to the teacher between positions edges[i] and edges[i + 1]."""

    edges: list[float]
    random: list[float | None] | None = None
    baseline: list[float | None] | None = None
    student: list[float | None]

    @model_validator(mode="after")
    def _check_edges(self) -> PositionKL:
        for values in (self.student, self.baseline, self.random):
            if values is not None and len(self.edges) != len(values) + 1:
                raise ValueError(f"one edge more than values, got {len(self.edges)} and {len(values)}")
        return self


class Continuation(BaseModel):
    """A held-out prompt and how each model continues it."""

    prompt: str
    truth: str | None = None
    teacher: str | None = None
    random: str | None = None
    baseline: str | None = None
    student: str

    def texts(self) -> dict[str, str]:
        return {model: text for model in MODELS if (text := getattr(self, model)) is not None}

    def last_line(self, limit: int = 44) -> str:
        """The end of the prompt, as context for a continuation that starts in the middle of a line."""
        line = self.prompt.rsplit("\n", 1)[-1]
        tail = line[-limit:]
        return line if len(line) <= limit else "…" + (tail.partition(" ")[2] or tail)


class SampleFacts(BaseModel):
    """Statistics of the student's on-policy samples when last logged; see `potstill.train.samples`."""

    model_config = ConfigDict(extra="allow")
    step: int
    own_length: float
    own_ended: float
    own_repetition: float
    own_entropy: float
    logits_own: float | None = None
    logits_data: float | None = None


class Sample(BaseModel):
    model_config = ConfigDict(extra="allow")
    step: int
    prompt: str
    text: str


class DataFacts(BaseModel):
    train: str | None = None
    train_tokens: int | None = None
    train_examples: int | None = None
    eval: str | None = None
    eval_tokens: int | None = None
    eval_examples: int | None = None
    eval_in_train: float | None = None  # share of held-out rows that are training rows
    eval_measured: int | None = None  # of them: fewer where evaluate.time_limit ended the measurement
    eval_bytes_per_token: float | None = None  # of their text, in the student's tokens


class TrainingFacts(BaseModel):
    steps: int | None = None
    tokens_per_step: int | None = None
    seconds: dict[str, float] = {}
    flops: dict[str, float] = {}  # estimated, see `potstill.runs.compute.training_flops`


class LatencyFacts(BaseModel):
    """Forward passes over one row, in ms: a quarter of them was below `low_ms`, a quarter above `high_ms`."""

    median_ms: float
    low_ms: float
    high_ms: float
    passes: int


class CurveFacts(BaseModel):
    rows: int | None = None  # held-out rows behind the learning curves: fewer than those behind the table
    teacher_loss: float | None = None


class AdapterFacts(BaseModel):
    """The trained part of a student with an adapter; bytes and base are None where it was merged."""

    title: str
    trained: int
    share: float
    bytes: int | None = None
    base: str | None = None
    quantized: bool = False

    @property
    def hub(self) -> str | None:
        """The base model's name on the Hub, if it has one."""
        return self.base if self.base and not Path(self.base).is_absolute() else None


class Summary(BaseModel):
    name: str = "a run"
    seed: int | None = None
    task: Task = "causal"
    created: datetime | None = None
    rows: ScoresByModel
    gap_closed: float | None = None
    gain_error: float | None = None  # standard error of the baseline's loss minus the student's, over held-out rows
    latency: dict[str, LatencyFacts] = {}
    curve: CurveFacts = CurveFacts()
    kl_by_position: PositionKL | None = None
    continuations: list[Continuation] = []
    own_texts: list[Sample] = []
    own_text: SampleFacts | None = None
    data: DataFacts = DataFacts()
    training: TrainingFacts = TrainingFacts()
    objective: str | None = None
    models: dict[str, str] = {}
    adapter: AdapterFacts | None = None
    teacher_weights: dict[str, float] | None = None
    notes: list[str] = []
    versions: dict[str, str] = {}


def is_finished(run_directory: Path) -> bool:
    """Whether a run took all its steps: the report is the last one."""
    return (run_directory / "report.html").exists()


def write_summary(summary: Summary, run_directory: Path) -> None:
    """Write summary.json, without fields that were never set."""
    values = summary.model_dump(exclude_unset=True)
    text = json.dumps(values, indent=2, ensure_ascii=False, default=datetime.isoformat)
    write_text(run_directory / "summary.json", text + "\n")


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
        return check_summary(json.loads(read_text(path)), str(path))
    except json.JSONDecodeError as error:
        raise DataError(
            f"report: expected JSON in {path}, got something that breaks off or is not JSON at line "
            f"{error.lineno}. Run it again with `potstill run --resume`."
        ) from None


def check_summary(summary: object, source: str) -> Summary:
    """Validate the content of summary.json; `source` names it in errors."""
    try:
        return Summary.model_validate(summary)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"])) or "an object"
        raise DataError(
            f"report: expected a usable {key} in {source}, got {first['input']!r:.60}. {first['msg']}. "
            "Write the summary with this version of potstill."
        ) from None


def read_record(path: Path, kind: str, expected: str, advice: str, got: str = "something else") -> dict[str, Any]:
    """Read a JSON object whose key `kind` has this value; the DataError for any other file has the remaining words."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        record = None
    if not isinstance(record, dict) or record.get("kind") != kind:
        raise DataError(f"report: expected {expected} in {path}, got {got}. {advice}")
    return record


def read_metrics(path: Path) -> tuple[Curves, Curves]:
    """Read the held-out and training loss of each run: finite (step, loss) pairs with rising steps."""
    lines = read_text(path).split("\n")
    held_out, training = ({run: dict[float, float]() for run in RUNS} for _ in range(2))
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
        evaluated = record.get("eval_cross_entropy", record.get("eval_squared_error"))
        for losses, value in ((held_out, evaluated), (training, record.get("loss"))):
            if run in RUNS and isinstance(value, int | float) and math.isfinite(value):
                losses[run][step] = value  # a resumed run logs some steps again: the last value counts
    held_out_curves, training_curves = (
        {run: sorted(by_step.items()) for run, by_step in losses.items() if by_step} for losses in (held_out, training)
    )
    return held_out_curves, training_curves
