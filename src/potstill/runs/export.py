"""Export a student to files for other programs, each measured there before it takes its name."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from itertools import chain
from pathlib import Path
from typing import Any

from datasets import Dataset
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from potstill.data.batches import encode, pad_token_id
from potstill.data.loading import load
from potstill.data.masking import MaskedRows
from potstill.data.sources import Source
from potstill.embedding.encoders import load_embedder, module_paths
from potstill.errors import UserError, nearest
from potstill.evaluate.exported import FOLDER, ExportedFile, Exports, ExportTask, read_exports, write_exports
from potstill.evaluate.report.embedding import write_embedding_report
from potstill.evaluate.report.page import write_report, write_student_card
from potstill.evaluate.speed import bytes_on_disk, weight_bytes
from potstill.evaluate.summary import is_finished
from potstill.files import atomic_path, explain_disk_full, lock_folder
from potstill.losses.alignment import SEQUENCE_TASKS, TASKS, Task
from potstill.models.adapted import is_adapted, merged
from potstill.models.chat import end_token_ids
from potstill.models.checksums import digest
from potstill.models.heads import class_ids, match_heads
from potstill.models.loading import is_adapter, load_model, load_tokenizer, suppress_warnings
from potstill.models.trimming import trim_model
from potstill.runs.config.document import read
from potstill.runs.config.embedding import EmbeddingRecipe
from potstill.runs.config.inputs import changed_inputs
from potstill.runs.config.run import Recipe
from potstill.runs.embedding_sources import held_out_texts
from potstill.runs.formats.llama_cpp import model_file
from potstill.runs.formats.measure import Bench, measured_rows
from potstill.runs.formats.sentences import SentenceModel
from potstill.runs.formats.table import FORMATS, FileFormat, FileType, Format, format_of
from potstill.runs.progress import part

STUDENT = "student"  # folder of a run's student
MEASURED_TOKENS = 2048  # held-out tokens that the files are measured on


@suppress_warnings()
def export(
    student: str | Path,
    to: Format = "gguf",
    quantize: FileType | Sequence[FileType] = (),
    *,
    data: Source | None = None,
    teacher: str | None = None,
    task: Task | None = None,
    max_length: int = 512,
    tokens: int = MEASURED_TOKENS,
    out: str | Path | None = None,
    console: Console | None = None,
) -> Exports:
    """Export the student of a run directory, or a model, and measure each file in the program that it is for.

    A run's files go to its `export/`, are measured on its held-out data beside its teacher, and stand in its report and
    model card. A file that cannot be loaded, or reads plain text as other tokens, is not left behind.

    Args:
        to: gguf for llama.cpp, gguf-adapter for a LoRA adapter and its base there, onnx for onnxruntime, or openvino.
        quantize: of the file, or of each of several: f32, f16, bf16, q8_0, q5_1, q5_0, q4_1, q4_0, q6_k, q5_k_m or
            q4_k_m for GGUF, by default f16; f32, int8 or, for ONNX, int4, by default f32. An adapter has float32, and
            its base this.
        data: held-out data to measure a model on; a run has its own.
        teacher: a model with the same tokens to compare a model with; a run has its own.
        task: of a model, by default causal; a run has its own, and a folder with modules.json gives sentence vectors.
        max_length: tokens of a row of `data`.
        tokens: held-out tokens to measure on, about.
        out: folder for a model's files; by default `export` in its own.
    """
    form = _format(to)
    named: Any = [quantize] if isinstance(quantize, str) else quantize or [form.default]
    quantize = [*dict.fromkeys(named)]
    folder, console = Path(student).expanduser(), console or Console(quiet=True)
    recipe = _recipe_of(folder)
    options: dict[str, Any] = {"max_length": max_length}
    masks: dict[str, Any] = {}
    name, cut = str(student), False
    if recipe is not None:
        if not data is teacher is out is task is None:
            raise UserError(
                f"export: expected no data, teacher, task or out with a run, got some with {folder}. It has its own."
            )
        name, out = str(folder / STUDENT), folder / FOLDER
        _check_inputs(folder, recipe)
    if isinstance(recipe, Recipe):
        data, task = recipe.data.eval, recipe.task
        options = {"max_length": recipe.data.max_length, "packing": recipe.data.packing}
        masks = {"share": recipe.data.masked_share, "seed": recipe.seed}
        teacher, own = recipe.teacher.model_path, recipe.student
        cut = own.vocabulary is not None and own.model is own.tokenizer is None  # tokens of the teacher
    embeds = isinstance(recipe, EmbeddingRecipe) or (task is None and (folder / "modules.json").exists())
    task = task or "causal"
    if task not in TASKS:
        raise UserError(f"--task: expected one of {', '.join(sorted(TASKS))}, got {task}.{nearest(task, TASKS)}")
    exported: ExportTask = "embedding" if embeds else task
    for mistake in chain.from_iterable(form.mistakes("--quantize", kind, exported) for kind in quantize):
        raise UserError(mistake)
    if embeds and teacher is not None:
        raise UserError(f"--teacher: expected none for a sentence-transformers model, got {teacher}. Leave it out.")
    if teacher is not None and data is None:
        raise UserError(f"--teacher: expected --data to compare a model on, got {teacher} without. Name held-out data.")
    out = Path(out).expanduser() if out else folder / FOLDER if folder.is_dir() else None
    with lock_folder(folder, "run") if recipe else nullcontext() if out is None else lock_folder(out, "--out"):
        with part(console, "reading models and data"):
            model: Any
            rows = other = None
            if embeds:
                model = load_sentence_model(name)
                tokenizer = model.tokenizer
                with _advise(folder if recipe else None):
                    rows = _texts(recipe, data, tokenizer)
            else:
                tokenizer, model = load_tokenizer(name, "student"), load_model(name, "student", "float32", task)
            if data is not None and not embeds:
                classes = class_ids(model.config) if task == "classification" else None
                with _advise(folder if recipe else None):
                    rows = encode(data, tokenizer, **options, task=task, classes=classes).dataset
                    if teacher is not None and recipe is None:
                        other = _same_teacher(teacher, tokenizer, name, task)
                    elif teacher is not None:
                        other = _teacher(teacher, tokenizer, task, cut=cut)
                rows = MaskedRows(rows, tokenizer, **masks).fixed() if task == "masked" else rows
            models = {"student": model} if other is None else {"student": model, "teacher": other}
            if task in SEQUENCE_TASKS:
                match_heads(task, models, pad_token_id(tokenizer)[0])
        if out is None:
            raise UserError(f"--out: expected a folder for the files of {student}, got none. Name one.")
        exports = export_model(
            model,
            tokenizer,
            {to: quantize},
            out,
            task=exported,
            rows=rows,
            teacher=other,
            student_folder=Path(name),
            tokens=tokens,
            console=console,
        )
        if recipe is not None and is_finished(folder):  # else --resume writes the report
            if not embeds:
                write_student_card(folder)
            (write_embedding_report if embeds else write_report)(folder)
    return exports


def export_model(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    kinds: Mapping[Format, Sequence[FileType]],
    out: Path,
    *,
    task: ExportTask = "causal",
    rows: Dataset | None,
    teacher: Any,
    student_folder: Path,
    tokens: int = MEASURED_TOKENS,
    console: Console,
) -> Exports:
    """Export a loaded model to files of some kinds in each format, and measure them on held-out rows."""
    _check_free(out, is_folder=True)
    for to, quantize in kinds.items():
        FORMATS[to].program()  # a missing package is an error before anything is measured
        for kind in quantize:
            _check_free(out / FORMATS[to].file.format(kind), is_folder=FORMATS[to].main is not None)
    before = read_exports(out) or Exports()  # records that are damaged are an error before that too
    # A student's adapter is copied before it is merged.
    prepared = {form.prepare: form.prepare(model, task) for form in map(FORMATS.__getitem__, kinds) if form.adapter}
    size = sum(weight_bytes(student_folder / path) for path in module_paths(student_folder) or [""])
    if is_adapted(model):
        size = bytes_on_disk(student_folder, model)
        model = merged(model)
    bench = Bench(tokenizer, None if rows is None else measured_rows(rows, tokens), model, teacher, task)
    with part(console, "measuring the student"):
        exports = together = bench.start(size)
        exports.sha256 = _sha256(bench)
    earlier = _earlier(before, exports, out)
    out.mkdir(parents=True, exist_ok=True)
    for to, quantize in kinds.items():
        form = FORMATS[to]
        if form.prepare not in prepared:  # a graph is traced once for all formats that are made of it
            with part(console, f"preparing {to}"):
                prepared[form.prepare] = form.prepare(model, task)
        for kind in quantize:
            path = out / form.file.format(kind)
            with explain_disk_full(out, form.disk * model.num_parameters()), atomic_path(path) as partial:
                with part(console, f"writing {path.name}"):
                    form.write(prepared[form.prepare], model, tokenizer, partial, kind)
                with part(console, f"measuring {path.name} in {form.program()}"):
                    file = form.measure(partial, kind, bench)
            exports.files.append(file.model_copy(update={"file": path.name}))
            exports.tokens = exports.tokens or file.tokens  # encoders without a teacher have no figures of their own
            new = {file.file for file in exports.files}
            kept = [file for file in earlier if file.file not in new]
            together = exports.model_copy(update={"files": [*kept, *exports.files]})
            write_exports(together, out)  # after each file, so that an interruption costs one
    for path in (out / file.file for file in before.files):
        if path.exists() and path.name not in {file.file for file in together.files}:
            left = "of another student, measured on other rows, or changed, and no longer listed. Export it again."
            console.print(f"{path.name}: {left}", highlight=False)
    return together


def load_sentence_model(name: str) -> SentenceModel:
    """Load the student of an embedding run as it is exported: a function of tokens."""
    return SentenceModel(load_embedder(name, "student"))


def text_rows(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Make rows of texts with their tokens, which sentence vectors are measured on."""
    texts = [*texts]
    return Dataset.from_dict({"text": texts, "input_ids": tokenizer(texts, truncation=True)["input_ids"]})


@suppress_warnings()
def evaluate_files(
    files: Sequence[Path],
    data: Source,
    teacher: str | None = None,
    *,
    max_length: int = 512,
    packing: bool = False,
    tokens: int = MEASURED_TOKENS,
    console: Console | None = None,
) -> Exports:
    """Measure exported files in their programs on held-out data, beside a teacher, and the student that they are of.

    The rows are read with the tokenizer of that student, else of the teacher, else of the first file.

    Args:
        files: of one tokenizer.
        tokens: held-out tokens to measure on, about.
    """
    console = console or Console(quiet=True)
    student = _student_beside(files[0])
    alone = model_file(files[0]) if format_of(files[0]).adapter else files[0]
    name = str(student or teacher or alone)
    with part(console, "reading models and data"):
        tokenizer = load_tokenizer(name, "student")
        rows = measured_rows(encode(data, tokenizer, max_length=max_length, packing=packing).dataset, tokens)
        model: Any = None if student is None else load_model(name, "student", "float32")
        size = None if student is None else bytes_on_disk(student, model)
        model = merged(model) if is_adapted(model) else model
        bench = Bench(tokenizer, rows, model, None if teacher is None else _same_teacher(teacher, tokenizer, name))
    with part(console, "measuring in transformers"):
        exports = bench.start(size)
    for path in files:
        form = format_of(path)
        with part(console, f"measuring {path.name} in {form.program()}"):
            exports.files.append(form.measure(path, form.kind(path), bench))
    exports.tokens = exports.tokens or exports.files[0].tokens
    return exports


def _student_beside(file: Path) -> Path | None:
    """The student that an export in a run directory, or in the folder of a model, is of."""
    run = file.absolute().parent.parent
    folders = (run / STUDENT, run) if file.absolute().parent.name == FOLDER else ()
    configs = (folder / name for folder in folders for name in ("config.json", "adapter_config.json"))
    return next((config.parent for config in configs if config.exists()), None)


def _check_free(path: Path, *, is_folder: bool) -> None:
    """Refuse a folder in place of a file, and the reverse, which a new one does not replace."""
    if path.exists() and path.is_dir() is not is_folder:
        kinds = ("a folder", "a file") if is_folder else ("a file", "a folder")
        raise UserError(f"export: expected {kinds[0]} to write, or nothing, at {path}, got {kinds[1]}. Move it away.")


def _earlier(before: Exports, exports: Exports, out: Path) -> list[ExportedFile]:
    """Files of an earlier export of this student that were measured on the same rows, and are as they were then."""
    if before.sha256 != exports.sha256:
        return []
    return [file for file in before.files if (out / file.file).exists() and digest(out / file.file) == file.sha256]


def _sha256(bench: Bench) -> str:
    """Compute the sha256 of what files are made of, and of the rows that they are measured on."""
    tokenizer, rows = bench.tokenizer, bench.rows
    described = [
        tokenizer.get_vocab(),
        tokenizer.chat_template,
        sorted(end_token_ids(tokenizer, bench.student)),
        None if rows is None else {name: [*rows[name]] for name in rows.column_names},
    ]
    sha = hashlib.sha256(json.dumps(described, sort_keys=True).encode())
    for name, weight in bench.student.state_dict().items():
        sha.update(name.encode())
        sha.update(weight.detach().float().contiguous().numpy().data)
    return sha.hexdigest()


def _format(to: str) -> FileFormat:
    if to not in FORMATS:
        raise UserError(f"--to: expected one of {', '.join(FORMATS)}, got {to}.{nearest(to, FORMATS)}")
    return FORMATS[to]


def _recipe_of(folder: Path) -> Recipe | EmbeddingRecipe | None:
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


def _check_inputs(folder: Path, recipe: Recipe | EmbeddingRecipe) -> None:
    """Refuse other held-out rows, another teacher or another base of an adapter than the run had."""
    read: Any = {"data": {"eval"} if recipe.data.eval is not None else {"train"}}
    read |= {"teacher": True} if isinstance(recipe, Recipe) else {}
    read |= {"student": {"model"}} if is_adapter(str(folder / STUDENT)) else {}
    named = recipe.model_dump(mode="json", include=read)
    if changed := changed_inputs(folder, named):
        raise UserError(
            f"export: expected {changed[0]} as it was when the run in {folder} began, got another content. Restore it, "
            f"or export {folder / STUDENT} with --data."
        )


@contextmanager
def _advise(folder: Path | None) -> Iterator[None]:
    """Add to an error in reading what a run's recipe names how to export its student without that."""
    try:
        yield
    except UserError as error:
        if folder is None:
            raise
        raise UserError(
            f"{error} A run is exported from where its recipe finds data and teacher. Without them, export "
            f"{folder / STUDENT} with --data."
        ) from None


def _texts(recipe: Any, data: Source | None, tokenizer: PreTrainedTokenizerBase) -> Dataset | None:
    """The held-out texts of an embedding run, or those of a file, with the tokens of each."""
    if recipe is not None:
        return text_rows(held_out_texts(recipe, tokenizer), tokenizer)
    if data is None:
        return None
    source = load(data)
    if "text" not in source.dataset.column_names:
        raise UserError(f"--data: expected a column of texts in {data.title}, got none. Name it with --field.")
    return text_rows(source.dataset["text"], tokenizer)


def _same_teacher(name: str, tokenizer: PreTrainedTokenizerBase, student: str, task: Task = "causal") -> Any:
    """Load a teacher that a user named, whose tokens are those of the student."""
    if (teacher := _teacher(name, tokenizer, task)) is None:
        raise UserError(f"--teacher: expected a model with the tokens of {student}, got {name}. Leave it out.")
    return teacher


def _teacher(name: str, tokenizer: PreTrainedTokenizerBase, task: Task = "causal", *, cut: bool = False) -> Any:
    """Load the teacher if it has the student's tokens, or is to be cut to them; else nothing compares them."""
    tokens, own = load_tokenizer(name, "teacher").get_vocab(), tokenizer.get_vocab()
    if tokens != own and not cut:
        return None
    teacher = load_model(name, "teacher", "float32", task)
    if tokens != own:
        trim_model(teacher, [tokens[token] for token in sorted(own, key=own.__getitem__)])
    return teacher
