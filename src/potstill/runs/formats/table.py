"""The formats that a student can be exported to."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from potstill.errors import nearest
from potstill.evaluate.exported import ExportedFile
from potstill.runs.formats import gguf_check, gguf_file, llama_cpp, onnx_graph, onnx_runtime
from potstill.runs.formats.gguf_file import GgufType
from potstill.runs.formats.measure import Bench
from potstill.runs.formats.onnx_graph import OnnxType

Format = Literal["gguf", "onnx"]
FileType = Literal[GgufType, OnnxType]


@dataclass(frozen=True)
class FileFormat:
    """How files of a format are written, and measured in the program that they are for.

    Args:
        file: name of a file, or a folder, with a place for its kind.
        program: names that program and its version, or raises a UserError where a package is missing.
        prepare: makes of a model what all its files are written from.
        write: a file from what is prepared, the model, its tokenizer, a path and a kind.
        kind: reads the kind of any file of the format.
    """

    kinds: tuple[str, ...]
    default: str
    file: str
    program: Callable[[], str]
    prepare: Callable[[Any], Any]
    write: Callable[..., None]
    measure: Callable[[Path, str, Bench], ExportedFile]
    kind: Callable[[Path], str]

    def mistakes(self, key: str, kind: str) -> Iterator[str]:
        """Give the error of a kind that the format does not have."""
        if kind not in self.kinds:
            yield f"{key}: expected some of {', '.join(self.kinds)}, got {kind}.{nearest(kind, self.kinds)}"


FORMATS: Mapping[str, FileFormat] = {
    "gguf": FileFormat(
        kinds=get_args(GgufType),
        default="f16",
        file="student-{}.gguf",
        program=llama_cpp.program_version,
        prepare=lambda model: model,
        write=lambda prepared, *written: gguf_file.write_gguf(*written),
        measure=gguf_check.measure_gguf,
        kind=gguf_file.gguf_kind,
    ),
    "onnx": FileFormat(
        kinds=get_args(OnnxType),
        default="f32",
        file="student-onnx-{}",
        program=onnx_runtime.program_version,
        prepare=onnx_graph.trace,
        write=onnx_graph.write_onnx,
        measure=onnx_runtime.measure_onnx,
        kind=onnx_runtime.onnx_kind,
    ),
}


def format_of(file: Path) -> FileFormat:
    """The format of a file that stands alone."""
    return FORMATS["onnx" if file.is_dir() else "gguf"]


def exported_files(path: Path) -> list[Path]:
    """The exported files that a path names: itself, or those in a folder that is no model of transformers."""
    if (path / onnx_graph.MODEL).is_file() and not [*path.glob("*.safetensors")]:
        return [path]
    if path.name == onnx_graph.MODEL and path.is_file():
        return [path.parent]
    if path.is_dir() and not (path / "config.json").exists():
        return sorted([*path.glob("*.gguf"), *(model.parent for model in path.glob(f"*/{onnx_graph.MODEL}"))])
    return [path] if path.is_file() and path.suffix == ".gguf" else []
