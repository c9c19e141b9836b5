"""From a recipe of kind embedding to a run directory, and what the run will need."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console
from torch import Tensor
from torch.nn.functional import pad

from potstill.embedding.encoders import EmbeddingModel, embedder_with_head
from potstill.embedding.heads import PCA_ROWS, VectorHead, fit_pca, random_projection
from potstill.embedding.objective import FOCUSES, Focus, PairObjective
from potstill.embedding.static import text_tokens
from potstill.embedding.students import StartData
from potstill.embedding.training import EmbeddingDistiller, Epoch, embed
from potstill.embedding.vectors import TensorVectors, VectorSlice
from potstill.errors import UserError, one_line
from potstill.evaluate.exported import FOLDER
from potstill.evaluate.formatting import duration
from potstill.evaluate.report.embedding import write_embedding_report
from potstill.evaluate.space import MOST_ROWS, SpaceEvaluator, cosines, domain_auc
from potstill.evaluate.versions import versions
from potstill.files import atomic_path, lock_folder, write_json, write_text
from potstill.models.checksums import write_checksums
from potstill.models.loading import suppress_warnings
from potstill.runs.config.embedding import EmbeddingRecipe
from potstill.runs.config.export import export_kinds
from potstill.runs.embedding_sources import (
    EmbeddingData,
    Texts,
    held_out_rows,
    load_data,
    read_texts,
    tokens_alone,
)
from potstill.runs.progress import PartProgress, part
from potstill.runs.ranks import alone_in_process
from potstill.runs.rehearsal import failing_early, temporary_folder
from potstill.runs.run import RunResult
from potstill.runs.terminal import Terminal

_PICTURE_ROWS = 1000  # held-out rows in the picture of the space
_NEIGHBOUR_ROWS = 4000  # held-out rows that neighbours are looked for among
_NEIGHBOURS = 5
_SAMPLE_TEXTS = 128  # that are encoded to time the teacher


@alone_in_process()
def run_embedding(recipe: EmbeddingRecipe, *, resume: bool = False, console: Console | None = None) -> RunResult:
    """Train an embedding student as a recipe says, and write the report; `resume` and `console` as for `run`.

    Raises:
        UserError: something in the recipe, the data or the models is to be corrected.
        RunError: the loss is NaN or infinite, or a server does not answer.
    """
    console = console or Terminal(stderr=True)
    directory = Path(recipe.output)
    with lock_folder(directory, "output"), suppress_warnings():
        recipe.check_directory(directory, resume)
        with PartProgress(console, "teacher") as progress:
            data = load_data(recipe, progress.update)
        for note in data.notes:
            console.print(note, style="dim", highlight=False, markup=False)
        if not (directory / "student").exists():
            with part(console, "trying every step on few rows"):
                _rehearse(recipe, data)
        return RunResult(directory, _walk(recipe, data, directory, console))


def _walk(recipe: EmbeddingRecipe, data: EmbeddingData, directory: Path, console: Console) -> dict[str, Any]:
    """Train, save, measure and report; return the content of summary.json."""
    recipe.start(directory)
    evaluator, metrics = SpaceEvaluator(data.held_out, data.pairs), directory / "metrics.jsonl"
    students: dict[Focus, EmbeddingModel] = {}
    lines: list[str] = []
    options: dict[str, Any] = {"evaluator": evaluator}
    if recipe.student.reads_text:
        options |= {"texts": data.texts, "held_out_texts": data.held_out_texts}
    for focus in dict.fromkeys((recipe.focus, *(FOCUSES if recipe.evaluate.front else ()))):
        name = "student" if focus == recipe.focus else focus
        options["checkpoints"] = directory / "checkpoints" / name
        write_text(metrics, "".join(lines))
        if recipe.trains:
            distiller = _distiller(recipe, focus, data)
            with PartProgress(console, name) as progress:
                history = distiller.fit(data.vectors, data.held_out, **options, on_step=progress.update)
            student = cast(EmbeddingModel, distiller.student)
        else:
            student = _build(recipe, focus, data)
            metrics_at_start = evaluator(embed(student, data.held_out, data.held_out_texts))
            history = [Epoch(0, 0, 1.0, None, metrics_at_start)]
        students[focus] = recipe.student.as_saved(student)
        lines += [json.dumps({"run": name, **epoch.as_dict()}) + "\n" for epoch in history]
    write_text(metrics, "".join(lines))
    _save(students[recipe.focus], directory / "student", data.teacher)
    with part(console, "measuring"):
        summary = _summarize(recipe, data, evaluator, students)
    write_json(directory / "summary.json", summary)
    _export(recipe, data, directory, console)
    write_embedding_report(directory)
    return summary


def _export(recipe: EmbeddingRecipe, data: EmbeddingData, directory: Path, console: Console) -> None:
    """Write the files that the recipe's `export` names, and measure them on the held-out texts."""
    if not recipe.export:
        return
    from potstill.runs.export import export_model  # needs packages of an extra
    from potstill.runs.export_inputs import sentence_bench, text_rows

    saved = directory / "student"
    bench = sentence_bench(str(saved))
    bench = replace(bench, rows=text_rows(data.held_out_texts or [], bench.tokenizer))
    export_model(bench, export_kinds(recipe.export), directory / FOLDER, saved=saved, console=console)


def _rehearse(recipe: EmbeddingRecipe, data: EmbeddingData) -> None:
    """Walk the run on few rows in a temporary folder, then once more, from its checkpoints."""
    rows = min(data.vectors.rows, max(_SAMPLE_TEXTS, 2 * recipe.student.dimensions))
    held_out = min(len(data.held_out), _SAMPLE_TEXTS)
    few = data._replace(
        vectors=VectorSlice(data.vectors, 0, rows),
        held_out=data.held_out[:held_out],
        texts=data.texts and data.texts[:rows],
        held_out_texts=data.held_out_texts and data.held_out_texts[:held_out],
        pairs=None,
        tokens=data.tokens and data.tokens.sample(rows),
    )
    train = {"epochs": 1, "batch_size": max(2, min(recipe.train.batch_size, rows // 2))}
    short = recipe.model_copy(update={"train": recipe.train.model_copy(update=train)})
    with temporary_folder(Path(recipe.output)) as folder:
        for exports in (recipe.export, []):  # once is enough, as it takes seconds
            with failing_early("train, save, measure, export or report", "few rows"):
                _walk(short.model_copy(update={"export": exports}), few, folder, Console(quiet=True))


def _build(recipe: EmbeddingRecipe, focus: Focus, data: EmbeddingData) -> EmbeddingModel:
    start = StartData(data.vectors, data.texts or [], data.teacher, data.tokens)
    return recipe.student.build(start, focus, recipe.seed)


def _distiller(recipe: EmbeddingRecipe, focus: Focus, data: EmbeddingData, **changes: Any) -> EmbeddingDistiller:
    """Make the student on its device, and the distiller that trains it; `changes` replace the recipe's settings."""
    train, student_part = recipe.train, recipe.student
    student = _build(recipe, focus, data)
    try:
        student.to(train.device)
    except (RuntimeError, AssertionError) as error:  # torch's for an unknown device, or one that is not available
        wrong = f"an available device, such as cpu or cuda, got {train.device}: {one_line(error, 200)}"
        raise UserError(f"train.device: expected {wrong}") from None
    fitted_rate = student_part.fitted_learning_rate if data.tokens else None
    settings: dict[str, Any] = {
        "heats": train.temperature.values() if train.temperature else (1.0,),
        "learning_rate": train.learning_rate or fitted_rate or student_part.learning_rate,
        "seed": recipe.seed,
        **train.model_dump(include={"epochs", "batch_size", "reconstruction", "patience"}),
    }
    return EmbeddingDistiller(student, PairObjective(focus, student_part.prefixes), **settings | changes)


def _save(student: EmbeddingModel, target: Path, teacher: Any) -> None:
    """Save a student; a head over a sentence-transformers model also together with it, as a model that reads text."""
    with atomic_path(target) as partial:
        student.save(partial)
        if isinstance(student, VectorHead) and teacher is not None:
            embedder_with_head(teacher, student).save_pretrained(str(partial), create_model_card=False)
        write_checksums(partial)


def _summarize(
    recipe: EmbeddingRecipe, data: EmbeddingData, evaluator: SpaceEvaluator, students: dict[Focus, EmbeddingModel]
) -> dict[str, Any]:
    """Measure the students and the baselines on the held-out rows; the content of summary.json."""
    held_out, dimensions = data.held_out, recipe.student.dimensions
    sample = data.vectors.sample(PCA_ROWS)
    centred = fit_pca(sample, dimensions)
    embedded = {focus: embed(student, held_out, data.held_out_texts) for focus, student in students.items()}
    student = embedded[recipe.focus]
    spaces = {
        "teacher": held_out,
        "student": student,
        "PCA": centred.project(held_out),
        "PCA uncentred": fit_pca(sample, dimensions, centred=False).project(held_out),
        "PCA whitened": centred.project(held_out, whiten=True),
        "random projection": random_projection(held_out, dimensions, recipe.seed),
    }

    def measure(vectors: Tensor) -> dict[str, float | None]:
        return asdict(evaluator(vectors))

    return {
        "kind": "embedding",
        "name": recipe.name,
        "seed": recipe.seed,
        "focus": recipe.focus,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "rows": {name: {"dimensions": space.shape[1], **measure(space)} for name, space in spaces.items()},
        "front": {focus: measure(vectors) for focus, vectors in embedded.items()},
        "prefixes": {str(d): measure(student[:, :d]) for d in sorted(recipe.student.prefixes or {})},
        "parameters": sum(weight.numel() for weight in students[recipe.focus].parameters()),
        "train_rows": data.vectors.rows,
        "held_out_rows": len(held_out),
        "space": _picture(held_out, student),
        "neighbours": _neighbours(held_out, student, data.held_out_texts, recipe.evaluate.texts),
        "eval_in_train": data.eval_in_train,
        "domain_auc": domain_auc(data.vectors.sample(MOST_ROWS), held_out) if recipe.trains else None,
        "notes": list(data.notes),
        "versions": versions(),
    }


def _picture(teacher: Tensor, student: Tensor) -> dict[str, Any]:
    """The same rows in the plane of the two strongest components of both spaces, and a hue for each row."""
    every = max(1, len(teacher) // _PICTURE_ROWS)
    samples = [vectors[::every] for vectors in (teacher, student)]
    planes = [fit_pca(vectors, min(2, vectors.shape[1])).project(vectors) for vectors in samples]
    teacher_plane, student_plane = (pad(plane, (0, 2 - plane.shape[1])) for plane in planes)
    hues = torch.atan2(teacher_plane[:, 1], teacher_plane[:, 0]) / (2 * torch.pi) % 1
    # The signs and the order of components mean nothing: turn and mirror the student's plane onto the teacher's.
    u, _, v = torch.linalg.svd(student_plane.T @ teacher_plane)
    turned = {"teacher": teacher_plane, "student": student_plane @ (u @ v)}
    points = {name: [[round(x, 4) for x in row] for row in plane.tolist()] for name, plane in turned.items()}
    return {**points, "hues": hues.tolist()}


def _neighbours(teacher: Tensor, student: Tensor, texts: Sequence[str] | None, number: int) -> list[dict[str, Any]]:
    """Evenly spaced held-out rows, and the nearest rows to each for the teacher and for the student."""
    rows = min(len(teacher), _NEIGHBOUR_ROWS)
    number = min(number, rows)
    similarity = {"teacher": cosines(teacher[:rows]), "student": cosines(student[:rows])}
    names = [text[:300] for text in texts[:rows]] if texts else [f"row {row + 1}" for row in range(rows)]

    def nearest(row: int, similar: Tensor) -> list[dict[str, Any]]:
        order = [other for other in similar.argsort(descending=True).tolist() if other != row][:_NEIGHBOURS]
        return [{"row": i, "text": names[i], "similarity": round(float(similar[i]), 3)} for i in order]

    chosen = [int((i + 0.5) * rows / number) for i in range(number)]
    lists = [{model: nearest(row, similar[row]) for model, similar in similarity.items()} for row in chosen]
    return [{"text": names[row], **nearby} for row, nearby in zip(chosen, lists, strict=True)]


@alone_in_process()
def check(recipe: EmbeddingRecipe) -> list[tuple[str, str]]:
    """Read everything that a recipe names, encode some texts, try the run on few rows, and time two steps.

    Returns lines of a table of what the run will need, with times of this machine.

    Raises:
        UserError: the run could not start.
    """
    with suppress_warnings():
        data, rows, held_out, encoding = _sample(recipe)
        _rehearse(recipe, data)
        steps, seconds = _time_training(recipe, data, rows) if recipe.trains else (0, 0.0)
        parameters = sum(weight.numel() for weight in _build(recipe, recipe.focus, data).parameters())
    return [
        ("teacher", f"{data.vectors.dimensions:,} dimensions"),
        ("student", f"{recipe.student.dimensions:,} dimensions, {parameters:,} parameters"),
        ("train", f"{rows:,} vectors" if recipe.trains else f"none: made of the vectors of {rows:,} tokens"),
        ("eval", f"{held_out:,} vectors"),
        *([("steps", f"{steps:,}")] if steps else []),
        *([("encoding", f"about {duration(encoding)} of the teacher's work, once")] if encoding else []),
        *([("time", f"about {duration(seconds)} of training on this machine, at most")] if steps else []),
        *(("note", note) for note in data.notes),
    ]


def _time_training(recipe: EmbeddingRecipe, data: EmbeddingData, rows: int) -> tuple[int, float]:
    """Count the steps of a training on `rows` vectors, and estimate its seconds from two steps."""
    train = recipe.train
    sample = VectorSlice(data.vectors, 0, min(data.vectors.rows, 2 * train.batch_size))
    size = max(2, min(train.batch_size, sample.rows // 2))
    distiller = _distiller(recipe, recipe.focus, data, heats=(1.0,), epochs=1, batch_size=size)
    times: list[float] = []
    texts: dict[str, Any] = {}
    if recipe.student.reads_text:
        texts["texts"] = (data.texts or [])[: sample.rows]
        texts["held_out_texts"] = (data.held_out_texts or [])[:_SAMPLE_TEXTS]
    held_out_sample = data.held_out[:_SAMPLE_TEXTS]
    distiller.fit(sample, held_out_sample, **texts, on_step=lambda *progress: times.append(time.perf_counter()))
    stages = train.temperature.stages if train.temperature else 1
    steps = -(-rows // train.batch_size) * train.epochs * stages * (3 if recipe.evaluate.front else 1)
    return steps, steps * (times[-1] - times[0]) / max(len(times) - 1, 1) * train.batch_size / size


def _sample(recipe: EmbeddingRecipe) -> tuple[EmbeddingData, int, int, float]:
    """Read the vectors, or encode some; count the rows of both sets, and estimate the teacher's seconds for all."""
    encoder = recipe.teacher.load()
    if encoder is None:
        data = load_data(recipe)
        return data, data.vectors.rows, len(data.held_out), 0.0
    train, held = read_texts(recipe)
    size = max(_SAMPLE_TEXTS, 2 * recipe.student.dimensions)
    encoder.encode(["the first call is slower"] * 2)
    start = time.perf_counter()
    tokens = recipe.student.read_tokens(encoder.model, size)
    all_tokens = len(text_tokens(tokens.tokenizer)) if tokens else 0
    token_seconds = (time.perf_counter() - start) * all_tokens / len(tokens.ids) if tokens else 0.0
    if not recipe.trains:
        assert tokens is not None
        data = tokens_alone(recipe, encoder, tokens, held and Texts(held.texts[:_SAMPLE_TEXTS]))
        return data, all_tokens, len(held.texts) if held else len(data.held_out), token_seconds
    assert train is not None
    texts = train.texts[:size]
    start = time.perf_counter()
    vectors = torch.as_tensor(encoder.encode(texts), dtype=torch.float32)
    seconds = (time.perf_counter() - start) / len(texts)
    data = EmbeddingData(TensorVectors(vectors), vectors, texts, texts, teacher=encoder.model, tokens=tokens)
    total = len(train.texts) + (len(held.texts) if held else 0)
    held_out = len(held.texts) if held else held_out_rows(total)
    return data, total - held_out, held_out, seconds * total + token_seconds
