"""draft(wish): a commented recipe that `potstill check` accepts. Read it from top to bottom."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from pydantic import ValidationError

from potstill.embedding.vectors import open_vectors
from potstill.errors import RecipeError, UserError
from potstill.losses.alignment import SEQUENCE_TASKS, Task
from potstill.models.loading import has_bfloat16, load_config, suppress_warnings
from potstill.models.size import count_parameters
from potstill.models.structure import design_shape
from potstill.runs.build_student import design_of
from potstill.runs.config.document import Document
from potstill.runs.config.embedding import EmbeddingRecipe
from potstill.runs.config.generate import GenerateRecipe
from potstill.runs.config.run import Recipe
from potstill.runs.config.student import StudentPart
from potstill.runs.init.models import VECTORS, Model, is_embedder, look_at_model, speak_alike
from potstill.runs.init.rows import LOOKED_AT, TEXTS, Rows, find_columns, look_at_rows, table_of

Kind = Literal["distillation", "embedding", "generate"]
LONGEST = 2048  # tokens in a row, unless more are asked for
STREAM = 512  # the same of plain text that is packed
BATCH_TOKENS = 8192  # in one batch, at most
STEPS = 8  # in an epoch, at least
PROMPTED = {"prompt": 20, "prefix": 20}  # positions that an adapter's virtual tokens take
# Adapters want larger rates than weights do, the more the fewer they are.
ADAPTER_RATES = {"lora": 2e-4, "qlora": 2e-4, "ia3": 3e-3, "prefix": 1e-2, "prompt": 3e-2}


@dataclass(frozen=True)
class Wish:
    """What someone wants to have made.

    Args:
        teacher: a folder with a model, a name on the hub, or a file of vectors.
        data: what is learnt from; of a teacher that writes, its questions.
        eval: what is held out; embedding students can do without.
        kind: of recipe; default: embedding for vectors and folders of sentence-transformers, else distillation.
        task: what the models are asked for; default: what the teacher was made for.
        student: a model that is there; default: one of the teacher's kind.
        budget: one limit (params, compression, memory_gb, target), with keep and context; default: half of the layers.
        adapter: what is trained on a student that stays as it is.
        columns: the recipe's key -> the column of the data; default: found by their names.
        dimensions: of an embedding student.
        max_length: tokens in a row at most; default: what the rows need.
        name: of the run; default: by the teacher's.
        output: the run directory; default: by the name.
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
    dimensions: int | None = None
    max_length: int | None = None
    name: str | None = None
    output: str | None = None

    @property
    def made(self) -> Kind:
        """The kind of recipe."""
        return self.kind or ("embedding" if is_embedder(self.teacher) else "distillation")

    @property
    def title(self) -> str:
        """What the run is called."""
        return self.name or f"{Path(self.teacher).stem}-{'texts' if self.made == 'generate' else 'small'}"

    @property
    def directory(self) -> str:
        """Where the run goes."""
        return self.output or f"runs/{self.title}"


def draft(wish: Wish) -> str:
    """The recipe as commented YAML. Nothing is trained, and no weights are read.

    Raises:
        UserError: what is asked for cannot be made.
    """
    makers: dict[Kind, tuple[Callable[[Wish], dict[str, Any]], type[Document]]] = {
        "distillation": (_distillation, Recipe),
        "embedding": (_embedding, EmbeddingRecipe),
        "generate": (_generate, GenerateRecipe),
    }
    make, document = makers[wish.made]
    _refuse_what_is_not_read(wish)
    with suppress_warnings():
        facts = make(wish)
    text = _page(f"{wish.made}.yaml.j2", {"wish": wish, **facts})
    document.parse(yaml.safe_load(text), "init")
    return text


def _refuse_what_is_not_read(wish: Wish) -> None:
    """A flag without effect is a mistake."""
    reads: dict[Kind, set[str]] = {
        "distillation": {"eval", "task", "student", "budget", "adapter", "columns", "max_length"},
        "embedding": {"eval", "columns", "dimensions"},
        "generate": {"columns"},
    }
    given = [name for name in sorted(set().union(*reads.values())) if getattr(wish, name)]
    wrong = [name for name in given if name not in reads[wish.made]]
    if wrong:
        raise UserError(
            f"init: expected no {' and '.join(wrong)} for a recipe of kind {wish.made}, got it. "
            "Leave it out, or choose another --kind."
        )


def _distillation(wish: Wish) -> dict[str, Any]:
    teacher = look_at_model(wish.teacher, "teacher", wish.task)
    there = None if wish.student is None else look_at_model(wish.student, "student")
    if wish.data is None or wish.eval is None:
        raise UserError(
            f"init: expected --data FILE and --eval FILE, got no {'--eval' if wish.data else '--data'}. What is "
            "held out tells what the student is worth: put some rows aside in a file of their own."
        )
    student, design, copies = _student(wish, teacher)
    reader = there or teacher
    positions = min(teacher.positions, reader.positions) - PROMPTED.get(wish.adapter or "", 0)
    rows = look_at_rows(wish.data, wish.columns, teacher, reader.tokenizer, positions)
    look_at_rows(wish.eval, rows.columns, teacher, reader.tokenizer, positions)
    packing = teacher.task == "causal" and "field" in rows.columns
    max_length = wish.max_length or _max_length(rows, positions, packing)
    if max_length > positions:
        raise UserError(f"init: expected --max-length of at most {positions}, the models' positions, got {max_length}.")
    batch = max(1, min(32, BATCH_TOKENS // max_length))
    if rows.whole:  # so that few rows are some steps, too
        batch = max(1, min(batch, (rows.tokens // max_length if packing else rows.count) // STEPS))
    return {
        "teacher": teacher,
        "task": teacher.task,
        "student": student,
        "design": design,
        "copies": copies,
        "across": there is not None and not speak_alike(teacher, there),
        "rows": rows,
        "train": {"path": str(wish.data), **rows.columns},
        "held_out": {"path": str(wish.eval), **rows.columns},
        "judged": teacher.task in SEQUENCE_TASKS,
        "text": "field" in rows.columns,
        "packing": packing,
        "max_length": max_length,
        "positions": positions,
        "batch": batch,
        "accumulation": 1 if rows.whole else math.ceil(8 / batch),
        "rate": _rate(wish, teacher, copies),
        "bf16": has_bfloat16(),
    }


def _student(wish: Wish, teacher: Model) -> tuple[dict[str, Any], str | None, bool]:
    """The part of the recipe, a new student's shape in words, and whether it begins with its teacher's weights."""
    if wish.student is not None:
        if wish.budget:
            raise UserError("init: expected --student or a budget, got both. A model that is there has its size.")
        return {"model": wish.student, **({"adapter": wish.adapter} if wish.adapter else {})}, None, False
    if wish.adapter:
        raise UserError(
            "init: expected --student with --adapter, got none. An adapter stands on a model that has learnt "
            "something. Name a smaller one that has."
        )
    part: dict[str, Any] = {"design": dict(wish.budget) or _half(teacher)}
    if teacher.copies:
        part["initialize"] = "prune" if wish.budget else "copy"
    made = design_of(_validated(part), teacher.config, teacher.tokenizer)
    assert made is not None
    shape, parameters = design_shape(made), count_parameters(made)
    words = f"{shape.layers} layers of width {shape.hidden}, {parameters:,} parameters"
    return part, f"{words}: {teacher.parameters / parameters:.1f} times fewer than the teacher", teacher.copies


def _half(teacher: Model) -> dict[str, Any]:
    """Half of the layers, under the family's own name for their number."""
    field_name = teacher.config.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    return {field_name: max(1, design_shape(teacher.config).layers // 2)}


def _validated(part: dict[str, Any]) -> StudentPart:
    """The part itself, with its mistakes told as the command's."""
    try:
        return StudentPart.model_validate(part)
    except ValidationError as error:
        reason = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise RecipeError(f"init: expected a budget that a recipe can have, got: {reason}.") from None


def _max_length(rows: Rows, positions: int, packing: bool) -> int:
    """As long as the longest row that was seen, in steps of 32; of a stream of text what is usual."""
    return min(positions, STREAM if packing else min(LONGEST, 32 * math.ceil(rows.longest / 32)))


def _rate(wish: Wish, teacher: Model, copies: bool) -> float:
    """Where learning rates begin: what has learnt something takes smaller steps than random weights."""
    if wish.adapter is not None:
        return ADAPTER_RATES.get(wish.adapter, 1e-3)
    if teacher.task in SEQUENCE_TASKS or wish.student is not None:
        return 5e-5
    if copies:
        return 5e-4 if teacher.parameters < 500_000_000 else 1e-4
    return 1e-3


def _embedding(wish: Wish) -> dict[str, Any]:
    vectors = Path(wish.teacher).suffix in VECTORS
    if vectors:
        dimensions = open_vectors(wish.teacher).dimensions
    else:
        dimensions = load_config(wish.teacher, "teacher").hidden_size
        if wish.data is None:
            raise UserError("init: expected --data FILE, texts for the teacher to read, got none.")
    if vectors and wish.eval is not None:
        raise UserError("init: expected no --eval with vectors, got one. Name teacher.eval_vectors in the recipe.")
    columns = None
    if wish.data is not None:
        columns = find_columns(wish.data, table_of(wish.data).columns, "encoder", wish.columns)
    asked = wish.dimensions or (64 if dimensions > 128 else max(1, dimensions // 2))
    return {
        "vectors": vectors,
        "columns": columns,
        "of": dimensions,
        "dimensions": asked,
        "layers": None if vectors else max(1, design_shape(load_config(wish.teacher, "teacher")).layers // 2),
    }


def _generate(wish: Wish) -> dict[str, Any]:
    teacher = look_at_model(wish.teacher, "teacher", "causal")
    if wish.data is None:
        raise UserError("init: expected --data FILE with questions, got none.")
    names = table_of(wish.data).columns
    question = wish.columns.get("field") or next(
        (name for name in ("question", "prompt", *TEXTS) if name in names), None
    )
    if question not in names:
        raise UserError(
            f"init: expected a column of questions in {wish.data.name}, got {', '.join(names)}. Say which with --field."
        )
    answer = wish.columns.get("completion") or ("answer" if "answer" in names else None)
    questions = {"path": str(wish.data), "field": question, **({"answer": answer} if answer else {})}
    return {"questions": questions, "answer": answer, "new": min(256, teacher.positions // 2)}


def _page(template: str, values: Mapping[str, Any]) -> str:
    environment = Environment(
        loader=PackageLoader("potstill.runs.init", "."),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # it is YAML; `yaml` quotes
    )
    environment.filters["yaml"] = _in_yaml
    return environment.get_template(template).render(looked_at=LOOKED_AT, **values)


def _in_yaml(value: Any) -> str:
    """A value on one line."""
    plain = str(value) if isinstance(value, Path) else value
    return (
        yaml.safe_dump(plain, default_flow_style=True, sort_keys=False, allow_unicode=True, width=10**6)
        .removesuffix("\n...\n")
        .strip()
    )
