"""Files of a student for other programs, as a recipe names them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pydantic import Field

from potstill.evaluate.exported import ExportTask
from potstill.runs.config.document import Part
from potstill.runs.formats.table import FORMATS, FileType, Format


class ExportPart(Part):
    """A file of the student for another program, measured there."""

    to: Format = Field(
        "gguf", description="for llama.cpp, a LoRA adapter merged (gguf) or beside its base; onnxruntime; OpenVINO"
    )
    quantize: FileType | None = Field(
        None, description="of its matrices, or those of its base; by default f16 in GGUF, else f32"
    )

    @property
    def kind(self) -> FileType:
        """What its matrices are quantized to."""
        return self.quantize or FORMATS[self.to].default  # type: ignore[return-value]


def export_mistakes(files: Sequence[ExportPart], task: ExportTask) -> Iterator[str]:
    """Find kinds that a format does not have, tasks that it is not for, and files that are named twice."""
    for place, part in enumerate(files):
        yield from FORMATS[part.to].mistakes(f"export.{place}.quantize", part.kind, task)
    names = [f"{part.to} {part.kind}" for part in files]
    if repeated := [name for place, name in enumerate(names) if name in names[:place]]:
        yield f"export: expected each file once, got {repeated[0]} twice."


def export_kinds(files: Sequence[ExportPart]) -> dict[Format, list[FileType]]:
    """The kinds of files of each format."""
    kinds: dict[Format, list[FileType]] = {}
    for file in files:
        kinds.setdefault(file.to, []).append(file.kind)
    return kinds
