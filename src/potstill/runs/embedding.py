"""run_embedding(recipe): from a recipe of kind embedding to a run directory. Read it from top to bottom."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from potstill.data.files import write_text
from potstill.embedding.encoders import TextStudent, encoder_student, load_embedder, static_student
from potstill.embedding.heads import SAMPLE, VectorHead, principal, random_projection
from potstill.embedding.objective import FOCUSES, START, Focus, PairObjective
from potstill.evaluate.report.embedding import write_embedding_report
from potstill.runs.embedding_sources import Material, gather
from potstill.embedding.training import EmbeddingDistiller, Epoch, Student, vectors_of
from potstill.errors import RecipeError, UserError
from potstill.evaluate.space import SpaceEvaluator, cosines
from potstill.models.loading import load_tokenizer, suppress_warnings
from potstill.runs.config.embedding import EmbeddingRecipe

_PICTURED = 1000  # held-out rows in the picture of the space
_SHOWN = 5  # neighbours


@dataclass(frozen=True)
class EmbeddingResult:
    """What a run leaves.

    Args:
        directory: the run directory; `student/` and `report.html` are in it.
        summary: the content of summary.json.
    """

    directory: Path
    summary: dict[str, Any]


def run_embedding(recipe: EmbeddingRecipe, *, resume: bool = False, console: Console | None = None) -> EmbeddingResult:
    """Distil an embedding student as a recipe says, and report.

    Args:
        recipe: all that there is to say.
        resume: go on with the run in `recipe.output`, if there is one.
        console: where progress is shown; default: standard error.

    Raises:
        UserError: something in the recipe, the data or the models is to be corrected.
        RunError: the loss is not finite any more, or a server does not answer.
    """
    console = console or Console(stderr=True)
    directory = Path(recipe.output)
    _must_be_free(directory, recipe, resume)
    with suppress_warnings():
        with _progress(console, "teacher") as advance:
            material = gather(recipe, lambda done, total: advance(done, total, None))
        directory.mkdir(parents=True, exist_ok=True)
        write_text(directory / "recipe.yaml", recipe.dump())
        for note in material.notes:
            console.print(note, style="dim", highlight=False, markup=False)
        judge = SpaceEvaluator(material.held_out, material.pairs)
        others = [focus for focus in FOCUSES if focus != recipe.focus] if recipe.evaluate.front else []
        students, lines = {}, []
        for focus in (recipe.focus, *others):
            name = "student" if focus == recipe.focus else focus
            students[focus], history = _train(recipe, focus, name, material, judge, directory, console)
            lines += [{"run": name, **epoch.line()} for epoch in history]
            write_text(directory / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
        _save(students[recipe.focus], directory / "student")
        summary = _summarize(recipe, material, judge, students)
        write_text(directory / "summary.json", json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
        write_embedding_report(directory)
    return EmbeddingResult(directory, summary)


def _must_be_free(directory: Path, recipe: EmbeddingRecipe, resume: bool) -> None:
    record = directory / "recipe.yaml"
    if not record.exists():
        return
    if not resume:
        raise RecipeError(
            f"output: expected an empty or new directory, got {directory}, which holds a run. "
            "Go on with it with --resume, or choose another with --set output=DIR."
        )
    if EmbeddingRecipe.load(record) != recipe:
        raise RecipeError(
            f"output: expected the recipe that the run in {directory} began with, got another. Take {record}, "
            "or choose another directory with --set output=DIR."
        )


@contextmanager
def _progress(console: Console, title: str) -> Iterator[Any]:
    bar = Progress(
        TextColumn("[bold]{task.description:<9}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[loss]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
    )
    task = bar.add_task(title, total=None, loss="")

    def advance(done: int, total: int, loss: float | None) -> None:
        bar.update(task, completed=done, total=total, loss="" if loss is None else f"loss {loss:.3f}")

    with bar:
        yield advance


def _train(
    recipe: EmbeddingRecipe,
    focus: Focus,
    name: str,
    material: Material,
    judge: SpaceEvaluator,
    directory: Path,
    console: Console,
) -> tuple[Student, list[Epoch]]:
    student = new_student(recipe, focus, material)
    train = recipe.train
    reads = isinstance(student, TextStudent)
    distiller = EmbeddingDistiller(
        student,
        PairObjective(focus, recipe.student.prefixes),
        heats=train.temperature.values() if train.temperature else (1.0,),
        epochs=train.epochs,
        batch_size=train.batch_size,
        learning_rate=train.learning_rate or default_learning_rate(recipe),
        reconstruction=train.reconstruction,
        patience=train.patience,
        seed=recipe.seed,
    )
    with _progress(console, name) as advance:
        history = distiller.fit(
            material.vectors,
            material.held_out,
            texts=material.texts if reads else None,
            held_out_texts=material.held_out_texts if reads else None,
            judge=judge,
            checkpoints=directory / "checkpoints" / name,
            on_step=advance,
        )
    return student, history


def default_learning_rate(recipe: EmbeddingRecipe) -> float:
    """Chosen on STS-B's dev split."""
    return 3e-4 if recipe.student.encoder else 1e-2 if recipe.student.static else 3e-3


def new_student(recipe: EmbeddingRecipe, focus: Focus, material: Material) -> Student:
    """The student with its first weights, near a PCA of the teacher's vectors: the same at every call.

    Raises:
        UserError: it lacks a tokenizer or a model, or the device is not there.
    """
    student = _new_student(recipe, focus, material)
    try:
        return student.to(recipe.train.device)
    except (RuntimeError, AssertionError) as error:  # as torch says of a device that it does not know, or have
        said = " ".join(str(error).split())[:200]
        raise UserError(
            f"train.device: expected one that is here, such as cpu or cuda, got {recipe.train.device}: {said}"
        ) from None


def _new_student(recipe: EmbeddingRecipe, focus: Focus, material: Material) -> Student:
    part = recipe.student
    torch.manual_seed(recipe.seed)
    sample = material.vectors.sample(SAMPLE)
    start = part.start or START[focus]
    hidden = part.hidden if part.head == "mlp" else 0
    head = VectorHead.from_pca(sample, part.dimensions, hidden=hidden, start=start, seed=recipe.seed)
    if part.head:
        return head
    texts = material.texts or []
    said = torch.from_numpy(head.transform(material.vectors))
    if part.static:
        if part.static.tokenizer is None and material.embedder is None:
            raise UserError("student.static.tokenizer: expected a folder with a tokenizer, got none. Name one.")
        tokenizer: Any = (
            load_tokenizer(part.static.tokenizer, "student.static.tokenizer")
            if part.static.tokenizer
            else material.embedder.tokenizer
        )
        return static_student(tokenizer, texts, said)
    assert part.encoder is not None
    if part.encoder.model is None and material.embedder is None:
        raise UserError("student.encoder.model: expected a sentence-transformers model, got none. Name one.")
    model = load_embedder(part.encoder.model, "student.encoder.model") if part.encoder.model else material.embedder
    return encoder_student(model, part.encoder.layers, texts, said)


def _save(student: Student, target: Path) -> None:
    partial = target.with_name(f"{target.name}.partial")
    for folder in (partial, target):
        shutil.rmtree(folder, ignore_errors=True)
    student.save(partial)
    partial.rename(target)


def _summarize(
    recipe: EmbeddingRecipe, material: Material, judge: SpaceEvaluator, students: dict[Focus, Student]
) -> dict[str, Any]:
    held, dimensions = material.held_out, recipe.student.dimensions
    sample = material.vectors.sample(SAMPLE)
    centred, uncentred = principal(sample, dimensions), principal(sample, dimensions, centred=False)
    mine = vectors_of(
        students[recipe.focus],
        held,
        material.held_out_texts if isinstance(students[recipe.focus], TextStudent) else None,
    )
    spaces = {
        "teacher": held,
        "student": mine,
        "PCA": centred.project(held),
        "PCA uncentred": uncentred.project(held),
        "PCA whitened": centred.project(held, whiten=True),
        "random projection": random_projection(held, dimensions, recipe.seed),
    }
    rows = {name: {"dimensions": space.shape[1], **judge(space).as_dict()} for name, space in spaces.items()}
    front = {
        focus: judge(
            vectors_of(student, held, material.held_out_texts if isinstance(student, TextStudent) else None)
        ).as_dict()
        for focus, student in students.items()
    }
    prefixes = {str(d): judge(mine[:, :d]).as_dict() for d in sorted(recipe.student.prefixes or {})}
    return {
        "kind": "embedding",
        "name": recipe.name,
        "seed": recipe.seed,
        "focus": recipe.focus,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "rows": rows,
        "front": front,
        "prefixes": prefixes,
        "parameters": sum(p.numel() for p in students[recipe.focus].parameters()),
        "train_rows": material.vectors.rows,
        "held_out_rows": len(held),
        "space": _space(held, mine),
        "neighbours": _neighbours(held, mine, material.held_out_texts, recipe.evaluate.texts),
        "notes": material.notes,
        "versions": {
            **{name: importlib.metadata.version(name) for name in ("potstill", "torch")},
            "python": platform.python_version(),
            "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        },
    }


def _space(teacher: Tensor, student: Tensor) -> dict[str, Any]:
    """The same rows in the plane of both, with a hue each: the angle in the teacher's plane."""
    every = max(1, len(teacher) // _PICTURED)
    planes = {}
    for name, vectors in (("teacher", teacher[::every]), ("student", student[::every])):
        planes[name] = principal(vectors, min(2, vectors.shape[1])).project(vectors)
        if planes[name].shape[1] == 1:
            planes[name] = torch.cat([planes[name], torch.zeros_like(planes[name])], 1)
    hues = torch.atan2(planes["teacher"][:, 1], planes["teacher"][:, 0]) / (2 * torch.pi) % 1
    turned = {"teacher": planes["teacher"], "student": _turned(planes["student"], planes["teacher"])}
    return {**{n: [[round(v, 4) for v in row] for row in p.tolist()] for n, p in turned.items()}, "hues": hues.tolist()}


def _turned(plane: Tensor, like: Tensor) -> Tensor:
    """The plane turned and mirrored onto another: signs and order of components mean nothing."""
    u, _, v = torch.linalg.svd(plane.T @ like)
    return plane @ (u @ v)


def _neighbours(teacher: Tensor, student: Tensor, texts: list[str] | None, wanted: int) -> list[dict[str, Any]]:
    """Held-out rows, evenly spread, and who is nearest to each for the teacher and for the student."""
    first = min(len(teacher), 4000)
    found = []
    similar = {"teacher": cosines(teacher[:first]), "student": cosines(student[:first])}

    def name(row: int) -> str:
        return texts[row] if texts else f"row {row + 1}"

    for i in range(min(wanted, first)):
        row = int((i + 0.5) * first / min(wanted, first))
        near = {}
        for who, matrix in similar.items():
            order = [j for j in matrix[row].argsort(descending=True).tolist() if j != row][:_SHOWN]
            near[who] = [
                {"row": j, "text": name(j)[:300], "similarity": round(float(matrix[row, j]), 3)} for j in order
            ]
        found.append({"text": name(row)[:300], **near})
    return found
