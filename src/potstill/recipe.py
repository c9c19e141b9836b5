"""The typed record of a run: one strict YAML file that says everything.

Every mistake of a file is reported at once, unknown keys with the nearest known one.
"""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from potstill import schedule as schedules
from potstill.divergence import KINDS, Divergence
from potstill.errors import RecipeError, nearest


class Part(BaseModel):
    """A part of a recipe: unknown keys are mistakes, and nothing changes after reading."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class TeacherPart(Part):
    """Who speaks."""

    model: str = Field(description="a folder with a model and its tokenizer, or a name on the hub")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="its precision; auto is the one it is saved in"
    )
    device: str | None = Field(None, description="such as cuda:1; by default where the student is")


class StudentPart(Part):
    """Who learns: an existing model, or a new one of the teacher's kind."""

    model: str | None = Field(None, description="a folder with a model and its tokenizer, or a name on the hub")
    design: dict[str, bool | int | float | str] | None = Field(
        None,
        description="fields of the teacher's config to change, such as hidden_size; random first weights",
    )

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if (self.model is None) == (self.design is None):
            raise ValueError("expected either model or design, got " + ("both" if self.model else "neither"))
        return self


class SourcePart(Part):
    """A file of examples. Without a column's name the standard ones are looked for: text, prompt and completion,
    messages, input_ids.
    """

    path: str = Field(description=".jsonl, .json, .csv, .parquet, .txt, or a folder saved by datasets")
    field: str | None = Field(None, description="the column of plain text")
    prompt: str | None = Field(None, description="the column of prompts; only completions count")
    completion: str | None = Field(None, description="the column of completions")
    messages: str | None = Field(None, description="the column of chats; only the assistant's turns count")
    input_ids: str | None = Field(None, description="the column of token ids")


class DataPart(Part):
    """What is learnt from, and what is held out."""

    train: SourcePart
    eval: SourcePart
    max_length: int = Field(512, ge=2, description="tokens in a row at most")
    packing: bool = Field(False, description="join plain text into rows of max_length instead of padding")


class SchedulePart(Part):
    """A number that changes over training. `steps` is train.max_steps when it is not given."""

    schedule: Literal["constant", "linear", "cosine", "exponential", "piecewise", "stages"]
    value: float | None = None
    start: float | None = None
    end: float | None = None
    steps: int | None = Field(None, gt=0)
    stages: int | None = Field(None, gt=1)
    values: list[float] | None = None
    boundaries: list[int] | None = None
    warmup: int = Field(0, ge=0, description="steps of a straight line from 0 before it")

    @model_validator(mode="after")
    def _complete(self) -> Self:
        self.build(steps=1)
        return self

    def build(self, steps: int) -> schedules.Schedule:
        """The schedule; `steps` is how long the run is."""
        needed = {
            "constant": {"value"},
            "linear": {"start", "end"},
            "cosine": {"start", "end"},
            "exponential": {"start", "end"},
            "piecewise": {"values", "boundaries"},
            "stages": {"start", "end", "stages"},
        }[self.schedule]
        spans = self.schedule in {"linear", "cosine", "exponential", "stages"}
        given = {name: value for name, value in self if value is not None and name not in {"schedule", "warmup"}}
        if needed - set(given) or set(given) - needed - ({"steps"} if spans else set()):
            raise ValueError(
                f"expected {self.schedule} with {', '.join(sorted(needed))}"
                f"{' (and steps)' if spans else ''}, got {', '.join(sorted(given)) or 'nothing'}"
            )
        if spans:
            given.setdefault("steps", max(steps - self.warmup, 1))
        built: schedules.Schedule = getattr(schedules, self.schedule)(**given)
        return schedules.warmup(built, self.warmup) if self.warmup else built


# A mapping is a schedule, all else must be a number: so that only one of the two reports a mistake.
Number = Annotated[
    Annotated[float, Tag("a number")] | Annotated[SchedulePart, Tag("a schedule")],
    Discriminator(lambda value: "a schedule" if isinstance(value, Mapping | SchedulePart) else "a number"),
]


def _positive(value: float | SchedulePart) -> float | SchedulePart:
    if isinstance(value, float) and not value > 0:
        raise ValueError(f"expected a number > 0, got {value}")
    return value


def _not_negative(value: float | SchedulePart) -> float | SchedulePart:
    if isinstance(value, float) and not value >= 0:
        raise ValueError(f"expected a number >= 0, got {value}")
    return value


Weight = Annotated[Number, AfterValidator(_not_negative)]
Temperature = Annotated[Number, AfterValidator(_positive)]


def _named_divergence(value: Any) -> Any:
    """`forward_kl` is short for `{kind: forward_kl}`."""
    return {"kind": value} if isinstance(value, str) else value


class DivergencePart(Part):
    """Which divergence, and its parameters (beta of jsd, alpha of the skewed ones, both of alpha_beta)."""

    kind: str
    alpha: float | None = None
    beta: float | None = None

    @model_validator(mode="after")
    def _buildable(self) -> Self:
        if self.kind not in KINDS:
            raise ValueError(f"expected one of {', '.join(KINDS)}, got {self.kind}.{nearest(self.kind, KINDS)}")
        self.build()
        return self

    def build(self) -> Divergence:
        """The divergence itself."""
        kind = KINDS[self.kind]
        fields = dataclasses.fields(kind)  # type: ignore[arg-type]  # every kind is a dataclass
        given = {n: v for n, v in (("alpha", self.alpha), ("beta", self.beta)) if v is not None}
        wrong = set(given) - {f.name for f in fields}
        missing = {f.name for f in fields if f.default is dataclasses.MISSING} - set(given)
        if wrong or missing:
            takes = ", ".join(f.name for f in fields) or "no parameter"
            raise ValueError(f"expected {self.kind} with {takes}, got {', '.join(sorted(given)) or 'none'}")
        return kind(**given)


class LogitsPart(Part):
    """Match the teacher's next-token distribution."""

    term: Literal["logits"]
    divergence: Annotated[DivergencePart, BeforeValidator(_named_divergence)] = DivergencePart(kind="forward_kl")
    weight: Weight = 1.0
    temperature: Temperature = 1.0


class LabelsPart(Part):
    """Match the data's own tokens."""

    term: Literal["labels"]
    weight: Weight = 1.0


TermPart = Annotated[LogitsPart | LabelsPart, Field(discriminator="term")]


class EvaluatePart(Part):
    """What the report says beside the student's own figures."""

    baseline: bool = Field(False, description="train the same student on labels alone, and compare")
    continuations: int = Field(3, ge=0, description="held-out beginnings that each model continues")
    curve_rows: int = Field(128, ge=1, description="held-out rows, evenly spread, for the learning curves")


def _training_arguments(values: Any) -> Any:
    """Check the keys and types of `train` against transformers.TrainingArguments."""
    from transformers import TrainingArguments

    if not isinstance(values, Mapping):
        raise ValueError("expected a mapping of transformers.TrainingArguments fields")
    types = typing.get_type_hints(TrainingArguments)
    settable = {f.name for f in dataclasses.fields(TrainingArguments) if f.init} - set(_OWN_ARGUMENTS)
    mistakes, checked = [], {}
    for name, value in values.items():
        if name in _OWN_ARGUMENTS:
            mistakes.append(f"train.{name}: expected it not to be set here. {_OWN_ARGUMENTS[name]}")
        elif name not in settable:
            mistakes.append(f"train.{name}: unknown key.{nearest(name, settable)}")
        else:
            try:
                checked[name] = TypeAdapter(types[name]).validate_python(value)
            except ValidationError:
                wanted = getattr(types[name], "__name__", str(types[name]))
                mistakes.append(f"train.{name}: expected {wanted}, got {value!r}.")
            except Exception:  # a type that pydantic does not know is left to transformers
                checked[name] = value
    if mistakes:
        raise ValueError("\n".join(mistakes))
    return checked


_OWN_ARGUMENTS = {
    "output_dir": "The recipe's output says where the run goes.",
    "seed": "The recipe's seed is used.",
    "data_seed": "The recipe's seed is used.",
    "label_smoothing_factor": "The objective is the loss.",
    "remove_unused_columns": "The columns are the batch.",
    "push_to_hub": "Push the finished student/ folder instead.",
}


class Recipe(Part):
    """A whole run."""

    name: str = Field(min_length=1)
    seed: int = Field(0, ge=0)
    teacher: TeacherPart
    student: StudentPart
    data: DataPart
    objective: list[TermPart] = Field(min_length=1)
    train: Annotated[dict[str, Any], BeforeValidator(_training_arguments)] = Field(
        default_factory=dict, description="any field of transformers.TrainingArguments"
    )
    evaluate: EvaluatePart = Field(default_factory=lambda: EvaluatePart.model_validate({}))
    output: str = Field(min_length=1, description="the run directory")

    @classmethod
    def load(cls, path: str | Path, sets: Iterable[str] = ()) -> Recipe:
        """Read a YAML file.

        Args:
            path: the file.
            sets: changes as KEY=VALUE, with dots between keys: `train.max_steps=100`, `objective.0.weight=0.5`.

        Raises:
            RecipeError: all that is wrong with it, a line each.
        """
        return cls.parse(_read(Path(path)), str(path), sets)

    @classmethod
    def parse(cls, values: Any, origin: str = "recipe", sets: Iterable[str] = ()) -> Recipe:
        """The same from values that are already read; `origin` is how errors call them."""
        if not isinstance(values, dict):
            raise RecipeError(f"{origin}: expected a mapping of keys, got {type(values).__name__}.")
        for change in sets:
            _set(values, change)
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            lines = [line for one in error.errors() for line in _explain(one)]
            count = "1 mistake" if len(lines) == 1 else f"{len(lines)} mistakes"
            raise RecipeError("\n  ".join([f"{origin}: {count}", *lines])) from None

    def dump(self) -> str:
        """The resolved recipe as YAML."""
        return yaml.safe_dump(self.model_dump(mode="json", exclude_none=True), sort_keys=False, allow_unicode=True)


class _Loader(yaml.SafeLoader):
    """YAML 1.1 with two repairs: 1e-3 is a number, and a key that stands twice is a mistake."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key} stands twice", node.start_mark)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def _read(path: Path) -> Any:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        folder = path.parent
        names = [p.name for p in folder.glob("*.y*ml")] if folder.is_dir() else []
        raise RecipeError(
            f"recipe: expected a file, got {path}, which is not there.{nearest(path.name, names)}"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"recipe: expected a readable YAML file, got {path}: {error}.") from None
    try:
        return yaml.load(text, _Loader)  # _Loader is a SafeLoader
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise RecipeError(f"{path}: expected YAML, got: {reason}") from None


def _set(values: dict[str, Any], change: str) -> None:
    """Apply KEY=VALUE in place; the value is read as YAML."""
    key, equals, text = change.partition("=")
    if not equals or not key:
        raise RecipeError(f"--set: expected KEY=VALUE such as train.max_steps=100, got {change}.")
    *path, last = key.split(".")
    here: Any = values
    for name in path:
        here = here[_index(here, name, change)] if isinstance(here, list) else here.setdefault(name, {})
        if not isinstance(here, dict | list):
            raise RecipeError(f"--set {change}: expected {name} to hold keys, got {here!r}.")
    try:
        value = yaml.load(text, _Loader)  # _Loader is a SafeLoader
    except yaml.YAMLError:
        value = text
    if isinstance(here, list):
        here[_index(here, last, change)] = value
    else:
        here[last] = value


def _index(values: list[Any], name: str, change: str) -> int:
    if not name.isdigit() or int(name) >= len(values):
        raise RecipeError(f"--set {change}: expected an index in 0..{len(values) - 1}, got {name}.")
    return int(name)


def _explain(error: Any) -> list[str]:
    """One pydantic error as lines `<key>: <what is wrong>`."""
    tags = {"logits", "labels", "a number", "a schedule"}  # which member of a union was tried, not a key
    place = [str(part) for part in error["loc"] if part not in tags]
    key = ".".join(place)
    if error["type"] == "extra_forbidden":
        return [f"{key}: unknown key.{nearest(place[-1], _keys_at(error['loc'][:-1]))}"]
    if error["type"] == "missing":
        return [f"{key}: expected a value, got none."]
    if error["type"] in {"union_tag_invalid", "union_tag_not_found"}:
        return [f"{key}: expected a term of logits, labels, got {error['input']!r}."]
    if error["type"] == "value_error":
        message = str(error["ctx"]["error"])
        return message.splitlines() if message.startswith("train.") else [f"{key}: {message.removesuffix('.')}."]
    return [f"{key}: {error['msg'].lower()}, got {error['input']!r}."]


def _keys_at(place: tuple[Any, ...]) -> list[str]:
    """The known keys of the part of a recipe at a place."""
    here: Any = Recipe
    for name in place:
        if name in {"logits", "labels"} and here is TermPart:
            here = LogitsPart if name == "logits" else LabelsPart
        elif name == "a schedule":
            here = SchedulePart
        elif isinstance(name, int):
            here = TermPart
        elif isinstance(here, type) and issubclass(here, Part) and name in here.model_fields:
            here = here.model_fields[name].annotation
    return list(here.model_fields) if isinstance(here, type) and issubclass(here, Part) else []
