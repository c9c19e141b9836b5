"""The part `student` of a recipe: a model, or a design, and how it starts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from potstill.data.sources import Source
from potstill.models.adapters import Adapter
from potstill.models.capacity import TaskKind
from potstill.runs.config.document import Part

LIMITS = ("params", "active_params", "compression", "memory_gb", "latency_ms", "target", "min_share")


class BudgetPart(Part):
    """The largest student of the teacher's family within all given limits; with min_share alone the smallest."""

    params: int | float | str | None = Field(
        None, description="about so many parameters, with all experts, such as 100M"
    )
    active_params: int | float | str | None = Field(
        None, description="at most so many that a token passes through, such as 30M: of a mixture of experts its own"
    )
    compression: float | None = Field(None, gt=1, description="so many times fewer parameters than the teacher's")
    memory_gb: float | None = Field(None, gt=0, description="to serve one row of context tokens in half precision")
    latency_ms: float | None = Field(
        None, gt=0, description="for a forward pass over one row of context tokens, timed where the run begins"
    )
    target: Literal["browser", "edge", "mobile", "server"] | None = Field(None, description="a kind of device")
    min_share: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="with enough parameters for this share of the teacher's score, by published results",
    )
    task: TaskKind = Field("general", description="kind of task, for min_share")
    keep: Literal["balanced", "depth", "width", "attention"] | None = Field(
        None,
        description="what stays as in the teacher; attention: all but feed-forward units, then layers. By default "
        "attention for a causal language model where it can meet the limits, else balanced: depth and width",
    )
    context: int | None = Field(
        None,
        ge=1,
        description="tokens in a row, for memory_gb and latency_ms; default: 2048, or the teacher's positions if fewer",
    )
    search: int | None = Field(
        None,
        ge=2,
        description="prune the teacher to so many shapes of this size, and take the best of them after short trainings",
    )

    @model_validator(mode="after")
    def _some_limit(self) -> Self:
        if all(getattr(self, name) is None for name in LIMITS):
            raise ValueError(f"expected at least one of {', '.join(LIMITS)}, got none")
        return self


def _is_budget(value: Any) -> str:
    names = {*value} if isinstance(value, Mapping) else {"params"} if isinstance(value, BudgetPart) else set()
    return "<budget>" if names & BudgetPart.model_fields.keys() else "<fields>"


Fields = dict[str, Any]
Design = Annotated[
    Annotated[Fields, Tag("<fields>")] | Annotated[BudgetPart, Tag("<budget>")], Discriminator(_is_budget)
]


def _named_method(value: Any) -> Any:
    return {"method": value} if isinstance(value, str) else value


class InitializePart(Part):
    """The first weights of a designed student."""

    method: Literal["random", "copy", "truncate", "prune", "selective"] = Field(
        description="random; whole layers of the teacher; its first heads, units and channels; its most active ones; "
        "its parameters whose shape matches, and random ones"
    )
    layers: Literal["grouped", "importance", "uniform", "skip", "first_last"] | list[int] | None = Field(
        None,
        description="which of the teacher's; by default the most influential of each group of neighbours for copy and "
        "prune where half of the layers stay, else evenly spaced",
    )
    fit: bool = Field(
        True,
        description="fit the last matrix of each layer to the teacher's hidden states by least squares, where layers "
        "add its output; not for random and selective",
    )
    experts: Literal["prune", "merge"] = Field(
        "prune",
        description="of a student with fewer experts than the teacher: those that add most, or means of those whose "
        "outputs are most alike; for prune",
    )
    rounds: int = Field(
        1,
        ge=1,
        le=16,
        description="cut in so many rounds, with a short training between; for prune, copy and truncate",
    )
    calibration_rows: int = Field(
        128,
        ge=1,
        description="rows of the training data on which importance is measured and layers are fitted; fewer of long "
        "ones, about 32,768 tokens",
    )

    @model_validator(mode="after")
    def _layers_of_the_teacher(self) -> Self:
        if self.method == "random" and self.layers is not None:
            raise ValueError("expected no layers with random weights, got some")
        if self.experts == "merge" and self.method != "prune":
            raise ValueError(f"expected prune with experts: merge, got {self.method}")
        if self.rounds > 1 and self.method in ("random", "selective"):
            raise ValueError(f"expected prune, copy or truncate with rounds, got {self.method}")
        if self.rounds > 1 and isinstance(self.layers, list):
            raise ValueError("expected a choice of layers such as uniform with rounds, got numbers. Each round chooses")
        return self


class VocabularyPart(Part):
    """The tokens of a student that is to have fewer than its tokenizer; those of its teacher are cut with them."""

    keep: Literal["data", "auto"] | Annotated[int, Field(ge=1)] = Field(
        description="data, all tokens of the text; or a number: the most frequent; or auto: the number with which a "
        "pruned student of the design's size loses least. Added tokens and the alphabet stay"
    )
    text: Source | None = Field(None, description="where tokens are counted, as a source of data; default: data.train")

    def describe(self) -> str:
        names = {"data": "the tokens of its text alone", "auto": "as many tokens as lose least"}
        return names[self.keep] if isinstance(self.keep, str) else f"{self.keep:,} tokens"


class StudentPart(Part):
    """Who learns: an existing model, or a new one of the teacher's kind."""

    model: str | None = Field(
        None,
        description="a folder with a model and its tokenizer, or a name on the hub; with a design, the student is cut "
        "from it",
    )
    design: Design | None = Field(
        None,
        description="the shape of a new student: a budget, or fields to change in the config of the teacher, or of "
        "model, such as hidden_size",
    )
    tokenizer: str | None = Field(
        None, description="of a new student: a folder or a name on the hub; by default the teacher's"
    )
    vocabulary: VocabularyPart | None = Field(
        None, description="fewer tokens: for smaller embeddings and a smaller head"
    )
    initialize: Annotated[InitializePart, BeforeValidator(_named_method)] = Field(
        default_factory=lambda: InitializePart.model_validate({"method": "random"}),
        description="a method, or a method with its options",
    )
    adapter: Adapter | None = Field(
        None, description="a kind, or a kind with its options: the model is frozen, and this is trained on it"
    )

    quantize: Literal["q4_0", "q8_0", "int8", "int4"] | None = Field(
        None,
        description="train for this kind of file, of GGUF, or int8 and int4 of ONNX and OpenVINO: the student computes "
        "with the weights that the file will have",
    )
    save_dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="precision of the saved weights, whatever that of training: auto is that of the student's own "
        "checkpoint, else of its teacher's; adapters stay as trained",
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for mistake in chain(self._start_mistakes(), self._choice_mistakes(), self._adapter_mistakes()):
            raise ValueError(mistake)
        return self

    def _start_mistakes(self) -> Iterator[str]:
        """Find a shape, a start and a tokenizer that do not go together."""
        model, method = self.model, self.initialize.method
        if model is None and self.design is None:
            yield "expected model or design, got neither"
        if model is not None and self.design is None and method != "random":
            yield "expected initialize with a design, got it beside a model that keeps its shape"
        if model is not None and self.design is not None and method == "random":
            yield (
                "expected initialize (prune, copy, truncate or selective) with model and design, which says what the "
                "student keeps of the model, got random weights"
            )
        if model is not None and self.tokenizer is not None:
            yield "expected tokenizer with a design alone, got it beside model, which has its own"
        if self.tokenizer is not None and method != "random":
            yield f"expected random weights with a tokenizer of its own, got {method}"

    def _choice_mistakes(self) -> Iterator[str]:
        """Find shapes, numbers of tokens and rounds that a run cannot choose or cut."""
        method = self.initialize.method
        if self.searches and method != "prune":
            yield (
                f"expected initialize: prune with design.search, got {method}. Shapes are compared as what pruning "
                "leaves"
            )
        if self.searches and isinstance(self.initialize.layers, list):
            yield (
                "expected a choice of layers such as importance with design.search, got numbers. Shapes differ in depth"
            )
        if self.chooses_tokens and (not isinstance(self.design, BudgetPart) or method in ("random", "selective")):
            yield (
                "expected vocabulary.keep: auto with a budget such as design: {compression: 2} and initialize: prune, "
                "got another design or start. Sizes are compared as what pruning leaves"
            )
        if self.rounds and (self.adapter or self.vocabulary):
            what = "an adapter" if self.adapter else "vocabulary"
            yield f"expected initialize.rounds without {what}, got both. Cut first, with a run of its own"
        if self.quantize is not None and self.adapter is not None:
            yield f"expected no adapter with quantize, which trains all weights, got {self.adapter.name}"
        if self.quantize is not None and self.save_dtype not in ("auto", "float32"):
            yield f"expected save_dtype float32 with quantize, got {self.save_dtype}, which does not hold the weights"

    def _adapter_mistakes(self) -> Iterator[str]:
        """Find an adapter on a model that is on no disk, or has learnt nothing."""
        adapter = self.adapter
        if adapter is None or (self.design is None and self.vocabulary is None):
            return
        if self.design is not None and self.initialize.method == "random":
            yield (
                "expected an adapter on a model that has learnt something, got one on a design with random weights, "
                "which would stay frozen. Name a model, begin with the teacher's weights (initialize), or leave it out"
            )
        if adapter.base_bits is not None or not adapter.merge:
            what, of = ("on a design", "a design") if self.design is not None else ("with vocabulary", "the cut model")
            yield (
                f"expected lora or ia3 with merge: true {what}, got {adapter.name}: {of} is on no disk, so that an "
                "adapter alone could not be loaded again"
            )

    @property
    def searches(self) -> int:
        """The number of shapes among which a search chooses; 0 where the design is one shape."""
        return (self.design.search or 0) if isinstance(self.design, BudgetPart) else 0

    @property
    def chooses_tokens(self) -> bool:
        """Whether a run chooses how many tokens the student keeps."""
        return self.vocabulary is not None and self.vocabulary.keep == "auto"

    @property
    def is_timed(self) -> bool:
        """Whether a run times students to choose the shape."""
        return isinstance(self.design, BudgetPart) and self.design.latency_ms is not None

    @property
    def open_choices(self) -> list[str]:
        """Notes about what a run chooses before it trains, for figures that are computed without it."""
        notes = {
            "vocabulary.keep: these are figures of all tokens; potstill run chooses how many to keep.": (
                self.chooses_tokens
            ),
            "design.search: these are figures of the first shape; potstill run searches for a better one.": (
                self.searches
            ),
            "design.latency_ms: these are figures of a student that was timed now; potstill run times its own.": (
                self.is_timed
            ),
            "initialize.rounds: these are figures of one cut; potstill run makes several.": self.rounds,
        }
        return [f"student.{note}" for note, is_open in notes.items() if is_open]

    @property
    def rounds(self) -> bool:
        """Whether the student is cut in several rounds."""
        return self.initialize.rounds > 1

    @property
    def merges(self) -> bool:
        return self.adapter is not None and self.adapter.merge

    def describe(self) -> str:
        """The student in a few words, for reports."""
        model = self.model or "the teacher's architecture"
        if self.design is not None:
            within, fields = "with", self.design
            if isinstance(fields, BudgetPart):
                within, fields = "within", fields.model_dump(exclude_none=True, exclude_defaults=True)
            shape = ", ".join(f"{key} {value}" for key, value in fields.items())
            model = f"{model} {within} {shape}"
            model += "" if self.initialize.method == "random" else f"; initialized by {self.initialize.method}"
        if self.vocabulary is not None:
            model += f", with {self.vocabulary.describe()}"
        if self.quantize is not None:
            model += f", trained for {self.quantize}"
        return model if self.adapter is None else f"{model}, with {self.adapter.title}"
