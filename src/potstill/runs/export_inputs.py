"""What an export reads: a student, the held-out rows that its files are measured on, and its teacher."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from potstill.data.batches import encode, pad_token_id
from potstill.data.loading import load
from potstill.data.masking import MaskedRows
from potstill.data.sources import Source
from potstill.embedding.encoders import load_embedder
from potstill.errors import UserError, nearest
from potstill.evaluate.exported import ExportTask
from potstill.losses.alignment import SEQUENCE_TASKS, TASKS, Task
from potstill.models.heads import class_ids, match_heads
from potstill.models.loading import is_adapter, load_model, load_tokenizer
from potstill.models.trimming import trim_model
from potstill.runs.config.document import read
from potstill.runs.config.embedding import EmbeddingRecipe
from potstill.runs.config.inputs import changed_inputs
from potstill.runs.config.run import Recipe
from potstill.runs.embedding_sources import held_out_texts
from potstill.runs.formats.measure import Bench
from potstill.runs.formats.sentences import SentenceModel

STUDENT = "student"  # folder of a run's student


@dataclass(frozen=True)
class RunToExport:
    """A finished run, whose recipe names the held-out rows and the teacher."""

    directory: Path
    recipe: Recipe | EmbeddingRecipe

    @property
    def task(self) -> ExportTask:
        return self.recipe.task if isinstance(self.recipe, Recipe) else "embedding"

    @property
    def student(self) -> Path:
        return self.directory / STUDENT

    def read(self) -> Bench:
        """Load the student, encode the rows, and load the teacher if it has the student's tokens.

        Raises:
            UserError: what the recipe names is not there, or has another content than the run had.
        """
        self._check_inputs()
        name = str(self.student)
        if isinstance(self.recipe, EmbeddingRecipe):
            bench = sentence_bench(name)
            with self._advise():
                return replace(bench, rows=text_rows(held_out_texts(self.recipe, bench.tokenizer), bench.tokenizer))
        recipe, bench = self.recipe, _load_student(name, self.recipe.task)
        if recipe.data.eval is None:
            return bench
        cut = recipe.student.vocabulary is not None and recipe.student.model is recipe.student.tokenizer is None
        with self._advise():
            bench = _with_rows(bench, recipe.data.eval, recipe.data.max_length, recipe.data.packing)
            if recipe.teacher.model_path is not None:
                bench = _with_teacher(bench, load_teacher(recipe.teacher.model_path, bench, cut=cut))
        return _masked(bench, share=recipe.data.masked_share, seed=recipe.seed)

    def _check_inputs(self) -> None:
        """Refuse other held-out rows, another teacher or another base of an adapter than the run had."""
        named: Any = {"data": {"eval"} if self.recipe.data.eval is not None else {"train"}}
        named |= {"teacher": True} if isinstance(self.recipe, Recipe) else {}
        named |= {"student": {"model"}} if is_adapter(str(self.student)) else {}
        if changed := changed_inputs(self.directory, self.recipe.model_dump(mode="json", include=named)):
            raise UserError(
                f"export: expected {changed[0]} as it was when the run in {self.directory} began, got another content. "
                f"Restore it, or export {self.student} with --data."
            )

    @contextmanager
    def _advise(self) -> Iterator[None]:
        """Add to an error in reading what the recipe names how to export the student without that."""
        try:
            yield
        except UserError as error:
            raise UserError(
                f"{error} A run is exported from where its recipe finds data and teacher. Without them, export "
                f"{self.student} with --data."
            ) from None


@dataclass(frozen=True)
class ModelToExport:
    """A model that is not of a run, and what a caller names beside it.

    Args:
        model: a folder, or a name.
        data: held-out data; without any, files are not compared.
        teacher: one with the same tokens.
        of_task: by default causal; a folder of sentence-transformers gives sentence vectors.
        max_length: tokens of a row.
    """

    model: str
    data: Source | None = None
    teacher: str | None = None
    of_task: Task | None = None
    max_length: int = 512

    def __post_init__(self) -> None:
        if self.of_task not in {None, *TASKS}:
            hint = nearest(str(self.of_task), TASKS)
            raise UserError(f"--task: expected one of {', '.join(sorted(TASKS))}, got {self.of_task}.{hint}")
        if self.teacher is not None and self.task == "embedding":
            raise UserError(
                f"--teacher: expected none for a sentence-transformers model, got {self.teacher}. Leave it out."
            )
        if self.teacher is not None and self.data is None:
            raise UserError(
                f"--teacher: expected --data to compare a model on, got {self.teacher} without. Name held-out data."
            )

    @cached_property
    def task(self) -> ExportTask:
        if self.of_task is None and (self.student / "modules.json").exists():
            return "embedding"
        return self.of_task or "causal"

    @property
    def student(self) -> Path:
        return Path(self.model).expanduser()

    def read(self) -> Bench:
        """Load the student, encode the rows, and load the teacher.

        Raises:
            UserError: the teacher has other tokens.
        """
        task = self.task
        if task == "embedding":
            bench = sentence_bench(self.model)
            return bench if self.data is None else replace(bench, rows=_texts(self.data, bench.tokenizer))
        bench = _load_student(self.model, task)
        if self.data is not None:
            bench = _with_rows(bench, self.data, self.max_length)
        if self.teacher is not None:
            bench = _with_teacher(bench, load_same_teacher(self.teacher, bench, self.model))
        return _masked(bench)


def recipe_of(folder: Path) -> Recipe | EmbeddingRecipe | None:
    """The recipe of a run directory; None for a model."""
    if not (folder / "recipe.yaml").exists():
        return None
    values = read(folder / "recipe.yaml")
    values.pop("train", None)  # its arguments are done with, and checking them imports the Trainer: seconds
    if (kind := values.get("kind")) not in (None, "embedding"):
        raise UserError(f"export: expected a run that trains a student, got one of the kind {kind}.")
    recipe = Recipe.parse(values) if kind is None else EmbeddingRecipe.parse(values)
    if not (folder / STUDENT).is_dir():
        raise UserError(
            f"export: expected a finished run, got {folder} without student/. Put it back, or finish "
            "the run with --resume."
        )
    if kind is not None and not (folder / STUDENT / "modules.json").exists():
        raise UserError(
            f"export: expected a student that reads text, got a head over vectors of a server or a file in {folder}. "
            "Export one that is trained with teacher.embedder, or a static or encoder student."
        )
    return recipe


def sentence_bench(name: str) -> Bench:
    """Load the student of an embedding run as it is exported: a function of tokens."""
    model = SentenceModel(load_embedder(name, "student"))
    return Bench(model.tokenizer, student=model, task="embedding")


def text_rows(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Make rows of texts with their tokens, which sentence vectors are measured on; a text has one at least."""
    texts = [*texts]
    rows = zip(texts, tokenizer(texts, truncation=True)["input_ids"], strict=True)
    return Dataset.from_list([{"text": text, "input_ids": ids} for text, ids in rows if ids])


def load_same_teacher(name: str, bench: Bench, student: str) -> Any:
    """Load a teacher that a user named, whose tokens are those of the student."""
    if (teacher := load_teacher(name, bench)) is None:
        raise UserError(f"--teacher: expected a model with the tokens of {student}, got {name}. Leave it out.")
    return teacher


def load_teacher(name: str, bench: Bench, *, cut: bool = False) -> Any:
    """Load the teacher if it has the student's tokens, or is to be cut to them; else nothing compares them."""
    tokens, own = load_tokenizer(name, "teacher").get_vocab(), bench.tokenizer.get_vocab()
    if tokens != own and not cut:
        return None
    teacher = load_model(name, "teacher", "float32", bench.task)  # type: ignore[arg-type]  # no embedding has one
    if tokens != own:
        trim_model(teacher, [tokens[token] for token in sorted(own, key=own.__getitem__)])
    return teacher


def _load_student(name: str, task: Task) -> Bench:
    bench = Bench(load_tokenizer(name, "student"), student=load_model(name, "student", "float32", task), task=task)
    return _with_teacher(bench, None)


def _with_rows(bench: Bench, data: Source, max_length: int, packing: bool = False) -> Bench:
    classes = class_ids(bench.student.config) if bench.task == "classification" else None
    options: dict[str, Any] = {"max_length": max_length, "packing": packing, "task": bench.task, "classes": classes}
    return replace(bench, rows=encode(data, bench.tokenizer, **options).dataset)


def _with_teacher(bench: Bench, teacher: Any) -> Bench:
    """Add a teacher, with the student's classes, or none where there is none to compare."""
    if bench.task in SEQUENCE_TASKS:
        models = {"student": bench.student} if teacher is None else {"student": bench.student, "teacher": teacher}
        match_heads(bench.task, models, pad_token_id(bench.tokenizer)[0])
    return replace(bench, teacher=teacher)


def _masked(bench: Bench, **masks: Any) -> Bench:
    """Mask the rows of a masked language model as they are in an evaluation."""
    if bench.task != "masked" or bench.rows is None:
        return bench
    return replace(bench, rows=MaskedRows(bench.rows, bench.tokenizer, **masks).fixed())


def _texts(data: Source, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """The texts of a file, with the tokens of each."""
    source = load(data)
    if "text" not in source.dataset.column_names:
        raise UserError(f"--data: expected a column of texts in {data.title}, got none. Name it with --field.")
    return text_rows(source.dataset["text"], tokenizer)
