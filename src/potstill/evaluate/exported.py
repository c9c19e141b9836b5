"""Records of exported files: export/export.json of a run directory, for the report and the model card."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from potstill.data.files import write_text
from potstill.evaluate.formatting import count, nats, percent, size

FOLDER, FILE = "export", "export.json"


class ExportedFile(BaseModel):
    """A file, and what the program that it is for computed from it; None where there were no held-out rows.

    Args:
        kl: KL(student || file), nats per token.
        teacher_kl: KL(teacher || file), nats per token.
    """

    file: str  # or a folder
    kind: str  # of its weights
    program: str  # that ran it, with its version
    bytes: int
    tokens: int = 0  # held-out tokens that it was measured on
    loss: float | None = None
    agreement: float | None = None  # with the student
    kl: float | None = None
    teacher_kl: float | None = None
    prompt_tokens_per_second: float
    tokens_per_second: float  # of generation
    notes: list[str] = []


class Exports(BaseModel):
    """The exported files of a student, and the student itself on the same rows."""

    tokens: int = 0  # held-out tokens that all were measured on
    student_bytes: int | None = None  # None for files of no known student
    student_loss: float | None = None
    student_teacher_kl: float | None = None
    teacher_loss: float | None = None
    files: list[ExportedFile] = []


def write_exports(exports: Exports, folder: Path) -> None:
    write_text(folder / FILE, exports.model_dump_json(indent=2) + "\n")


def read_exports(folder: Path) -> Exports | None:
    """The records of the exports in a folder; None without any."""
    path = folder / FILE
    return Exports.model_validate_json(path.read_text(encoding="utf-8")) if path.exists() else None


COLUMNS = (
    *(
        "file",
        "program",
        "size",
        "held-out loss",
        "agreement with the student",
        "KL to the student",
        "KL to the teacher",
    ),
    *("prompt, tokens a second", "generation, tokens a second"),
)


def export_rows(exports: Exports) -> Iterator[tuple[str, ...]]:
    """Rows of a table with COLUMNS: the student in transformers, then each file."""

    def write(value: float | None, form: Any) -> str:
        return "–" if value is None else str(form(value))

    student = (write(exports.student_loss, nats), "–", "–", write(exports.student_teacher_kl, nats))
    if exports.student_bytes is not None:
        yield ("student/", "PyTorch", size(exports.student_bytes), *student, "–", "–")
    for file in exports.files:
        agreement = "–" if file.agreement is None else percent(file.agreement, 1)
        quality = (write(file.loss, nats), agreement, write(file.kl, "{:.5f}".format), write(file.teacher_kl, nats))
        yield (
            file.file,
            file.program,
            size(file.bytes),
            *quality,
            count(file.prompt_tokens_per_second),
            count(file.tokens_per_second),
        )
