"""Write a commented recipe that `potstill check` accepts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from pydantic import ValidationError
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from potstill.data.encoding_notes import plural
from potstill.data.locate import locate
from potstill.data.sources import Source
from potstill.embedding.vectors import open_vectors
from potstill.errors import RecipeError, UserError
from potstill.losses.alignment import SEQUENCE_TASKS, Task
from potstill.models.budget import loses_least_with_units
from potstill.models.loading import has_bfloat16, load_config, suppress_warnings
from potstill.models.shapes import FFN_FIELDS, design_shape, text_config
from potstill.models.size import count_parameters, size_of
from potstill.runs.build_student import design_of
from potstill.runs.config.document import Document
from potstill.runs.config.embedding import EmbeddingRecipe
from potstill.runs.config.generate import GenerateRecipe
from potstill.runs.config.run import Recipe
from potstill.runs.config.student import StudentPart
from potstill.runs.init import inspection
from potstill.teachers.byte_alignment import TokenizerPair
from potstill.teachers.pieces import TokenBytes

Kind = Literal["distillation", "embedding", "generate"]
MAX_LENGTH = 2048  # default limit for rows with prompts or labels
PACKED_LENGTH = 512  # default for packed plain text
BATCH_TOKENS = 8192  # most tokens in a batch
MIN_STEPS = 8  # of an epoch
OWN_TEXTS, OWN_TOKENS = 1000, 384  # that a teacher writes where there is no data, and of one of them at most
OPENING_TOKENS = 64  # of a chat, with a system prompt
VIRTUAL_TOKENS = 20  # positions that prompt and prefix adapters take
ADAPTER_RATES = {"lora": 2e-4, "qlora": 2e-4, "ia3": 3e-3, "prefix": 1e-2, "prompt": 3e-2}  # fewer weights, larger rate

# For students cut from a teacher of at most so many parameters: measured for 5M and 135M, a guess above.
CUT_RATES = ((20e6, 5e-4), (500e6, 2e-4), (math.inf, 1e-4))

ALIKE = 0.75  # chunks for each of the student's tokens; 1 where all of them are tokens of the teacher

# The recipe suggests fewer tokens to students of a teacher with at least so many, and such a share of embeddings.
MANY_TOKENS, TOKEN_SHARE = 40_000, 0.15


@dataclass(frozen=True)
class DraftRequest:
    """The options of `potstill init`, whose help describes them.

    Args:
        split: of `data` where that is a folder or a data set on the hub with several; eval_split and config likewise.
        budget: limits (params, active_params, compression, memory_gb, latency_ms, target), with keep and context;
            default: half of the layers.
        columns: column key of the recipe -> column; default: found by their names.
        no_data: the teacher writes the data by the recipe of `texts`.
    """

    teacher: str
    data: Path | None
    eval: Path | None = None
    kind: Kind | None = None
    task: Task | None = None
    student: str | None = None
    budget: Mapping[str, Any] = field(default_factory=dict)
    adapter: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    max_length: int | None = None
    dimensions: int | None = None
    split: str | None = None
    eval_split: str | None = None
    config: str | None = None
    name: str | None = None
    output: str | None = None
    no_data: bool = False

    @property
    def texts(self) -> DraftRequest:
        """The request for the recipe by which the teacher writes the data."""
        name = f"{self.name or Path(self.teacher).stem}-texts"
        return DraftRequest(self.teacher, None, kind="generate", name=name, no_data=True)

    @property
    def cache(self) -> str | None:
        """The directory of the teacher's signals on text of its own; a student of other tokens cannot read one."""
        return f"{self.directory}-cache" if self.no_data and self.student is None else None

    @property
    def recipe_kind(self) -> Kind:
        return self.kind or ("embedding" if inspection.is_embedder(self.teacher) else "distillation")

    @property
    def run_name(self) -> str:
        return self.name or f"{Path(self.teacher).stem}-{'texts' if self.recipe_kind == 'generate' else 'small'}"

    @property
    def train(self) -> dict[str, Any]:
        """Where the training data is, as keys of a Source."""
        return self._place(self.data, self.split, "train")

    @property
    def held_out(self) -> dict[str, Any]:
        return self._place(self.eval, self.eval_split, "eval")

    def _place(self, path: Path | None, split: str | None, written: str) -> dict[str, Any]:
        if self.no_data:
            return {"path": f"{self.texts.directory}/{written}.jsonl"}
        place = {"path": str(path), "split": split, "config": self.config if split else None}
        return {key: value for key, value in place.items() if value is not None}

    @property
    def directory(self) -> str:
        return self.output or f"runs/{self.run_name}"


def draft(request: DraftRequest) -> str:
    """Write a recipe as commented YAML. Nothing is trained, and no weights are read."""
    make, document, allowed = KINDS[request.recipe_kind]
    if request.no_data and (request.data or request.eval or request.columns):
        raise UserError(
            "init: expected no data and no columns with --no-data, for which the teacher writes the text, got some. "
            "Leave them out, or leave --no-data out."
        )
    wrong = [name for name in sorted(OPTIONS - allowed) if getattr(request, name)]
    if wrong:
        raise UserError(
            f"init: expected no {' and '.join(wrong)} for a recipe of kind {request.recipe_kind}, got it. "
            "Leave it out, or choose another --kind."
        )
    with suppress_warnings():
        values = make(request)
    lines: Any = dict.fromkeys(("keep_trailing_newline", "trim_blocks", "lstrip_blocks"), True)
    loader = PackageLoader("potstill.runs.init", ".")  # without autoescape: the filter `yaml` quotes values
    environment = Environment(loader=loader, undefined=StrictUndefined, autoescape=False, **lines)
    environment.filters["yaml"] = _one_line_yaml
    text = environment.get_template(f"{request.recipe_kind}.yaml.j2").render(request=request, **values)
    document.parse(yaml.safe_load(text), "init")
    return text


def _distillation(request: DraftRequest) -> dict[str, Any]:
    teacher = inspection.inspect_model(request.teacher, "teacher", request.task)
    existing = None if request.student is None else inspection.inspect_model(request.student, "student")
    if not request.no_data and (request.data is None or request.eval is None):
        raise UserError(
            f"init: expected --data FILE and --eval FILE, got no {'--eval' if request.data else '--data'}. "
            "Hold some rows out in a file of their own, to measure what the student is worth."
        )
    student, design, config = _student(request, teacher)
    reader = existing or teacher
    positions = min(teacher.max_length, reader.max_length)
    positions -= VIRTUAL_TOKENS if request.adapter in ("prompt", "prefix") else 0
    if request.no_data:
        rows = _own_rows(request, teacher)
    else:
        rows = _sample(request.train, request.columns, teacher, reader.tokenizer, positions)
        _sample(request.held_out, rows.columns, teacher, reader.tokenizer, positions)
    joins = teacher.task == "causal" and "field" in rows.columns
    needed = PACKED_LENGTH if joins else min(MAX_LENGTH, 32 * math.ceil(rows.longest / 32))
    max_length = request.max_length or min(positions, needed)
    if max_length > positions:
        raise UserError(f"init: expected --max-length of at most {positions}, the models' positions, got {max_length}.")
    unpacked = None  # why rows that stay whole are padded
    if teacher.task == "causal" and not joins:
        unpacked = inspection.unpacked(config or reader.config, max_length, request.adapter)
    packing = teacher.task == "causal" and unpacked is None
    batch = max(1, min(32, BATCH_TOKENS // max_length))
    if rows.is_whole_file:
        num_rows = rows.num_tokens // max_length if packing else rows.num_rows
        batch = max(1, min(batch, num_rows // MIN_STEPS))
    over_bytes = None  # the term for a teacher with another tokenizer
    if teacher.task == "causal" and reader.tokenizer.get_vocab() != teacher.tokenizer.get_vocab():
        over_bytes = _term_over_bytes(rows, reader.tokenizer, teacher.tokenizer)
    train, held_out = ({**place, **rows.columns} for place in (request.train, request.held_out))
    accumulation = 1 if rows.is_whole_file else math.ceil(8 / batch)
    models = {"teacher": teacher, "student": student, "design": design, "over_bytes": over_bytes}
    tasks = {"task": teacher.task, "sequence_level": teacher.task in SEQUENCE_TASKS}
    data = {"rows": rows, "train": train, "held_out": held_out, "positions": positions}
    data |= {"joins": joins, "packing": packing, "unpacked": unpacked}
    training = {"batch": batch, "accumulation": accumulation, "rate": _learning_rate(request, teacher)}
    share = _token_share(request, teacher) if rows.kind != "input_ids" else 0.0
    return {
        **models,
        **tasks,
        **data,
        **training,
        "token_share": share,
        "kept_tokens": "auto" if request.budget else 32_768,
        "max_length": max_length,
        "bf16": has_bfloat16(),
    }


def _sample(place: dict[str, Any], columns: Mapping[str, Any], *models: Any) -> inspection.RowSample:
    """Sample the rows of a source; of a data set on the hub, no more is downloaded."""
    return inspection.sample_rows(Source(**place, streaming=True), columns, *models)


def _own_rows(request: DraftRequest, teacher: inspection.ModelInfo) -> inspection.RowSample:
    """The rows that the recipe of `request.texts` will write, with its numbers."""
    if teacher.task != "causal":
        raise UserError(
            f"init: expected a causal language model for --no-data, got {request.teacher}, for {teacher.task}. Give "
            "texts with --data and --eval."
        )
    values = _own_text(teacher)
    columns = {"messages": "messages"} if values["chat"] else {"field": "text"}
    longest = OPENING_TOKENS + values["question_tokens"] + values["max_new_tokens"]
    return inspection.RowSample(columns, (), OWN_TEXTS, True, longest, OWN_TEXTS * values["max_new_tokens"])


def _own_text(teacher: inspection.ModelInfo) -> dict[str, Any]:
    new = min(OWN_TOKENS, teacher.max_length // 2)
    return {
        "chat": teacher.tokenizer.chat_template is not None,
        "number": OWN_TEXTS,
        "question_tokens": min(128, teacher.max_length // 4),
        "max_new_tokens": new,
    }


def _student(
    request: DraftRequest, teacher: inspection.ModelInfo
) -> tuple[dict[str, Any], str | None, PretrainedConfig | None]:
    """The recipe's student; for a new one also its size in words, and its config."""
    if request.student is not None:
        if request.budget:
            raise UserError("init: expected --student or a budget, got both. An existing model has its size.")
        return {"model": request.student, **({"adapter": request.adapter} if request.adapter else {})}, None, None
    if request.adapter:
        raise UserError("init: expected --student with --adapter, got none. An adapter needs a trained model.")
    units = _fewer_units(teacher)
    design: dict[str, Any] = dict(request.budget) or units or _fewer_layers(teacher)
    if request.budget and teacher.keeps_attention:
        design.setdefault("keep", "attention")
    student: dict[str, Any] = {"design": design}
    if teacher.can_initialize:
        student["initialize"] = "prune" if request.budget or units else "copy"
    try:
        part = StudentPart.model_validate(student)
    except ValidationError as error:
        reason = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise RecipeError(f"init: expected a budget that a recipe can have, got: {reason}.") from None
    config = design_of(part, teacher.config, teacher.tokenizer)
    assert config is not None
    shape, parameters = design_shape(config), count_parameters(config)
    ratio = f"{teacher.parameters / parameters:.1f} times smaller than the teacher"
    wide = f"{plural(shape.layers, 'layer')} of width {shape.hidden}"
    wide += f" with {shape.ffn} feed-forward units" if units else ""
    return student, f"{wide}, {parameters:,} parameters: {ratio}", config


def _fewer_units(teacher: inspection.ModelInfo) -> dict[str, int]:
    """A third of the feed-forward units of each layer, about half the weights of all layers.

    That keeps more of a language model than half of its layers. Empty where it is another model, or a small one.
    """
    config = text_config(teacher.config)
    if teacher.task != "causal" or not (teacher.can_initialize and loses_least_with_units(teacher.config)):
        return {}
    units = design_shape(config).ffn // 3 // 32 * 32  # whole blocks of a quantized file
    name = next((name for name in FFN_FIELDS if hasattr(config, name)), None)
    return {name: units} if name and units else {}


def _fewer_layers(teacher: inspection.ModelInfo) -> dict[str, int]:
    own_name = text_config(teacher.config).attribute_map.get("num_hidden_layers", "num_hidden_layers")
    return {own_name: max(1, design_shape(teacher.config).layers // 2)}


def _term_over_bytes(
    rows: inspection.RowSample, student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase
) -> str:
    """The term for two tokenizers: distributions over the student's tokens where most are also the teacher's.

    Measured for one pair whose tokens are alike, and for a student that reads bytes (docs/benchmarks.md).
    """
    pair = TokenizerPair(TokenBytes(student, "student"), TokenBytes(teacher, "teacher"))
    chunks = sum(len(pair.align(ids).sizes) for ids in rows.ids)
    return "mapped_logits" if chunks and chunks >= ALIKE * sum(map(len, rows.ids)) else "chunks"


def _token_share(request: DraftRequest, teacher: inspection.ModelInfo) -> float:
    """The embeddings' share of the teacher's parameters, or 0 where a student is not to have fewer tokens."""
    if teacher.task != "causal" or not teacher.can_initialize or request.student is not None or request.no_data:
        return 0.0
    size = size_of(teacher.config, 1)
    share = size.token_parameters / size.parameters
    return share if text_config(teacher.config).vocab_size >= MANY_TOKENS and share >= TOKEN_SHARE else 0.0


def _learning_rate(request: DraftRequest, teacher: inspection.ModelInfo) -> float:
    """Choose a first learning rate: trained weights take smaller steps than random ones, large models smaller ones."""
    if request.adapter is not None:
        return ADAPTER_RATES[request.adapter]
    if teacher.task in SEQUENCE_TASKS or request.student is not None:
        return 5e-5
    if teacher.can_initialize:
        return next(rate for largest, rate in CUT_RATES if teacher.parameters < largest)
    return 1e-3


def _embedding(request: DraftRequest) -> dict[str, Any]:
    vectors = request.teacher.endswith(inspection.VECTORS)
    if vectors and request.eval is not None:
        raise UserError("init: expected no --eval with vectors, got one. Name teacher.eval_vectors in the recipe.")
    if not vectors and request.data is None:
        raise UserError("init: expected --data FILE, texts for the teacher to embed, got none.")
    config = None if vectors else load_config(request.teacher, "teacher")
    dimensions = open_vectors(request.teacher).dimensions if config is None else text_config(config).hidden_size
    columns = None
    if request.data is not None:
        source = Source(request.data)
        rows = locate(source)
        given = request.columns
        columns = inspection.find_columns(source, rows.columns, rows.first, "encoder", given, has_template=False)
    return {
        "vectors": vectors,
        "columns": columns,
        "teacher_dimensions": dimensions,
        "dimensions": request.dimensions or (64 if dimensions > 128 else max(1, dimensions // 2)),
        "layers": None if config is None else max(1, design_shape(config).layers // 2),
    }


def _generate(request: DraftRequest) -> dict[str, Any]:
    teacher = inspection.inspect_model(request.teacher, "teacher", "causal")
    if request.no_data:
        return _own_text(teacher)
    if request.data is None:
        raise UserError("init: expected --data FILE with questions, or --no-data, got none.")
    names = locate(Source(request.data)).columns
    question = request.columns.get("field") or inspection.first_of(("question", "prompt", *inspection.TEXTS), names)
    if question not in names:
        raise UserError(
            f"init: expected a column of questions in {request.data.name}, got {', '.join(names)}. "
            "Say which with --field."
        )
    answer = request.columns.get("completion") or inspection.first_of(["answer"], names)
    questions = {"path": str(request.data), "field": question, **({"answer": answer} if answer else {})}
    return {"questions": questions, "answer": answer, "max_new_tokens": min(256, teacher.max_length // 2)}


# For each kind: the values of its template, its recipe, and the options that have an effect.
OPTIONS = {"eval", "task", "student", "budget", "adapter", "columns", "max_length", "dimensions"}
OPTIONS |= {"split", "eval_split", "config", "no_data"}
KINDS: dict[Kind, tuple[Callable[[DraftRequest], dict[str, Any]], type[Document], set[str]]] = {
    "distillation": (_distillation, Recipe, OPTIONS - {"dimensions"}),
    "embedding": (_embedding, EmbeddingRecipe, {"eval", "columns", "dimensions"}),
    "generate": (_generate, GenerateRecipe, {"columns", "no_data"}),
}


def _one_line_yaml(value: Any) -> str:
    if isinstance(value, dict):
        value = {key: list(part) if isinstance(part, tuple) else part for key, part in value.items()}
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, allow_unicode=True, width=10**6)
    return text.removesuffix("\n...\n").strip()
