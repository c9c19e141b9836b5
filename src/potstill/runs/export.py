"""Export a student to files for other programs, each measured there before it takes its name."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

from rich.console import Console

from potstill.data.batches import encode
from potstill.data.sources import Source, as_source
from potstill.embedding.encoders import module_paths
from potstill.errors import UserError, nearest
from potstill.evaluate.exported import FOLDER, ExportedFile, Exports, ExportTask, read_exports, write_exports
from potstill.evaluate.report.embedding import write_embedding_report
from potstill.evaluate.report.page import write_report, write_student_card
from potstill.evaluate.speed import bytes_on_disk, weight_bytes
from potstill.evaluate.summary import is_finished
from potstill.files import atomic_path, explain_disk_full, lock_folder
from potstill.losses.alignment import Task
from potstill.models.adapted import is_adapted, merged
from potstill.models.chat import end_token_ids
from potstill.models.checksums import digest
from potstill.models.loading import load_model, load_tokenizer, suppress_warnings
from potstill.runs.export_inputs import STUDENT, ModelToExport, RunToExport, load_same_teacher, recipe_of
from potstill.runs.formats.llama_cpp import model_file
from potstill.runs.formats.measure import Bench, measured_rows
from potstill.runs.formats.table import FORMATS, FileFormat, FileType, Format, format_of
from potstill.runs.progress import part

MEASURED_TOKENS = 2048  # held-out tokens that the files are measured on


@suppress_warnings()
def export(
    student: str | Path,
    to: Format = "gguf",
    quantize: FileType | Sequence[FileType] = (),
    *,
    data: Source | str | Path | None = None,
    teacher: str | Path | None = None,
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
        data: held-out data, or its path, to measure a model on; a run has its own.
        teacher: a model with the same tokens to compare a model with; a run has its own.
        task: of a model, by default causal; a run has its own, and a folder with modules.json gives sentence vectors.
        max_length: tokens of a row of `data`.
        tokens: held-out tokens to measure on, about.
        out: folder for a model's files; by default `export` in its own.
    """
    form = _format(to)
    named: Any = [quantize] if isinstance(quantize, str) else quantize or [form.default]
    kinds = [*dict.fromkeys(named)]
    folder, console = Path(student).expanduser(), console or Console(quiet=True)
    source: RunToExport | ModelToExport
    if (recipe := recipe_of(folder)) is None:
        held_out, beside = data if data is None else as_source(data), teacher if teacher is None else str(teacher)
        source = ModelToExport(str(student), held_out, beside, task, max_length)
        out = Path(out).expanduser() if out else folder / FOLDER if folder.is_dir() else None
        lock = nullcontext() if out is None else lock_folder(out, "--out")
    else:
        if not data is teacher is out is task is None:
            raise UserError(
                f"export: expected no data, teacher, task or out with a run, got some with {folder}. It has its own."
            )
        source, out, lock = RunToExport(folder, recipe), folder / FOLDER, lock_folder(folder, "run")
    for mistake in chain.from_iterable(form.mistakes("--quantize", kind, source.task) for kind in kinds):
        raise UserError(mistake)
    with lock:
        with part(console, "reading models and data"):
            bench = source.read()
        if out is None:
            raise UserError(f"--out: expected a folder for the files of {student}, got none. Name one.")
        exports = export_model(bench, {to: kinds}, out, saved=source.student, tokens=tokens, console=console)
        if recipe is not None and is_finished(folder):  # else --resume writes the report
            _write_pages(folder, source.task)
    return exports


def _write_pages(directory: Path, task: ExportTask) -> None:
    """Write the report, and the card, of a run that has new files."""
    if task == "embedding":
        write_embedding_report(directory)
        return
    write_student_card(directory)
    write_report(directory)


def export_model(
    bench: Bench,
    kinds: Mapping[Format, Sequence[FileType]],
    out: Path,
    *,
    saved: Path,
    tokens: int = MEASURED_TOKENS,
    console: Console,
) -> Exports:
    """Export a loaded student to files of some kinds in each format, and measure them.

    Args:
        bench: the student, in float32, and what its files are measured on and beside.
        saved: the student's own folder.
        tokens: held-out tokens to measure on, about.
    """
    _check_free(out, is_folder=True)
    for to, quantize in kinds.items():
        FORMATS[to].program()  # a missing package is an error before anything is measured
        for kind in quantize:
            _check_free(out / FORMATS[to].file.format(kind), is_folder=FORMATS[to].main is not None)
    before = read_exports(out) or Exports()  # records that are damaged are an error before that too
    model, tokenizer, task = bench.student, bench.tokenizer, bench.task
    # A student's adapter is copied before it is merged.
    prepared = {form.prepare: form.prepare(model, task) for form in map(FORMATS.__getitem__, kinds) if form.adapter}
    size = sum(weight_bytes(saved / path) for path in module_paths(saved) or [""])
    if is_adapted(model):
        size = bytes_on_disk(saved, model)
        model = merged(model)
    bench = replace(bench, student=model, rows=None if bench.rows is None else measured_rows(bench.rows, tokens))
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


@suppress_warnings()
def evaluate_files(
    files: Sequence[Path],
    data: Source | str | Path,
    teacher: str | Path | None = None,
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
        bench = Bench(tokenizer, rows, model)
        if teacher is not None:
            bench = replace(bench, teacher=load_same_teacher(str(teacher), bench, name))
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
