"""Records of exported files: export/export.json of a run directory, for the report and the model card."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ValidationError

from potstill.errors import UserError
from potstill.evaluate.formatting import count, nats, percent, size
from potstill.files import write_text
from potstill.losses.alignment import TOKEN_TASKS, Task

FOLDER, FILE = "export", "export.json"
NONE = "–"  # in a table, where nothing was measured
ExportTask = Literal[Task, "embedding"]  # of a sentence-transformers model: a vector for each text


class ExportedFile(BaseModel):
    """A file, and what the program that it is for computed from it; None where there were no held-out rows.

    Args:
        tokens: held-out target tokens that it was measured on, or rows where a row has one target.
        kl: KL(student || file), nats; for numbers the mean squared distance from the student's, and for encoders
            and embeddings the mean squared difference of the cosines of all pairs of rows.
        teacher_kl: the same from the teacher.
    """

    file: str  # or a folder
    kind: str  # of its weights
    program: str  # that ran it, with its version
    bytes: int
    tokens: int = 0
    loss: float | None = None
    agreement: float | None = None  # with the student
    kl: float | None = None
    teacher_kl: float | None = None
    prompt_tokens_per_second: float
    tokens_per_second: float | None = None  # of generation; None for models that do not generate
    peak_bytes: int | None = None  # of memory, to load it and run a prompt; None where the system does not count it
    sha256: str = ""  # of what was measured
    notes: list[str] = []


class Exports(BaseModel):
    """The exported files of a student, and the student itself on the same rows."""

    task: ExportTask = "causal"
    sha256: str = ""  # of the student with its tokenizer, and of the rows
    tokens: int = 0  # held-out tokens, or rows, that all were measured on
    student_bytes: int | None = None  # None for files of no known student
    student_loss: float | None = None
    student_teacher_kl: float | None = None
    teacher_loss: float | None = None
    files: list[ExportedFile] = []

    @property
    def unit(self) -> str:
        """What `tokens` counts."""
        return "tokens" if self.task in TOKEN_TASKS else "rows"


def write_exports(exports: Exports, folder: Path) -> None:
    write_text(folder / FILE, exports.model_dump_json(indent=2) + "\n")


def read_exports(folder: Path) -> Exports | None:
    """The records of the exports in a folder; None without any.

    Raises:
        UserError: they are damaged.
    """
    path = folder / FILE
    try:
        return Exports.model_validate_json(path.read_bytes()) if path.exists() else None
    except ValidationError:
        raise UserError(
            f"export: expected the figures of exported files in {path}, got something else. Delete it, and export anew."
        ) from None


_SIMILARITIES = "difference of similarities"
_DISTANCES: dict[ExportTask, str] = {
    "regression": "squared distance",
    "encoder": _SIMILARITIES,
    "embedding": _SIMILARITIES,
}


def export_table(exports: Exports) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """The names of a table's columns, those with figures alone, and its rows: the student, then each file."""
    columns = zip(_columns(exports), *_rows(exports), strict=True)
    names, *rows = zip(*(column for column in columns if any(cell != NONE for cell in column[1:])), strict=True)
    return names, rows


def _columns(exports: Exports) -> tuple[str, ...]:
    distance = _DISTANCES.get(exports.task, "KL")
    return (
        *("file", "program", "size", "held-out loss", "agreement with the student"),
        *(f"{distance} to the student", f"{distance} to the teacher"),
        *("prompt, tokens a second", "generation, tokens a second", "peak memory"),
    )


def _rows(exports: Exports) -> Iterator[tuple[str, ...]]:
    def write(value: float | None, form: Any) -> str:
        return NONE if value is None else str(form(value))

    student = (write(exports.student_loss, nats), NONE, NONE, write(exports.student_teacher_kl, nats))
    if exports.student_bytes is not None:
        yield ("student/", "PyTorch", size(exports.student_bytes), *student, NONE, NONE, NONE)
    for file in exports.files:
        agreement = NONE if file.agreement is None else percent(file.agreement, 1)
        quality = (write(file.loss, nats), agreement, write(file.kl, "{:z.5f}".format), write(file.teacher_kl, nats))
        yield (
            file.file,
            file.program,
            size(file.bytes),
            *quality,
            count(file.prompt_tokens_per_second),
            write(file.tokens_per_second, count),
            write(file.peak_bytes, size),
        )


def export_facts(run_directory: Path) -> dict[str, Any]:
    """The exports of a run directory that are there, as its report and its card show them."""
    exports = read_exports(run_directory / FOLDER) or Exports()
    files = [file for file in exports.files if (run_directory / FOLDER / file.file).exists()]
    exports = exports.model_copy(update={"files": files})
    columns, rows = export_table(exports) if files else ((), [])
    return {"exports": exports if files else None, "export_columns": columns, "export_rows": rows}
