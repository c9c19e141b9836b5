"""The formats that a student can be exported to."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

from potstill.errors import nearest
from potstill.evaluate.exported import ExportedFile, ExportTask
from potstill.models.weight_grid import GridKind, WeightGrid
from potstill.runs.formats import gguf_adapter, gguf_check, gguf_file, llama_cpp, onnx_graph, onnx_runtime, openvino
from potstill.runs.formats.gguf_file import GgufType
from potstill.runs.formats.graphs import OpenGraph, measure_graph
from potstill.runs.formats.measure import Bench
from potstill.runs.formats.onnx_graph import OnnxType
from potstill.runs.formats.onnx_quantized import graph_grids

Format = Literal["gguf", "gguf-adapter", "onnx", "openvino"]
FileType = Literal[GgufType, OnnxType]


@dataclass(frozen=True)
class FileFormat:
    """How files of a format are written, and measured in the program that they are for.

    Args:
        file: name of a file, or a folder, with a place for its kind.
        main: name of the file by which such a folder is known; None for a file.
        disk: bytes for each weight while a file is written, at most.
        program: names that program and its version, or raises a UserError where a package is missing.
        prepare: makes of a model and its task what all its files are written from.
        adapter: whether that is a student's adapter beside its base, before both are merged.
        write: a file from what is prepared, the model, its tokenizer, a path and a kind.
        kind: reads the kind of any file of the format.
        grids: of a model's weights in files of a kind, by their names in the model, to train on.
    """

    kinds: tuple[str, ...]
    default: str
    tasks: frozenset[ExportTask]
    file: str
    main: str | None
    disk: int
    program: Callable[[], str]
    prepare: Callable[[Any, ExportTask], Any]
    write: Callable[..., None]
    measure: Callable[[Path, str, Bench], ExportedFile]
    kind: Callable[[Path], str]
    grids: Callable[[Any, GridKind], dict[str, WeightGrid]]
    adapter: bool = False

    def mistakes(self, key: str, kind: str, task: ExportTask) -> Iterator[str]:
        """Give the errors of a kind that the format does not have, and of a task that it is not for."""
        if kind not in self.kinds:
            yield f"{key}: expected some of {', '.join(self.kinds)}, got {kind}.{nearest(kind, self.kinds)}"
        if task not in self.tasks:
            yield f"export: expected the task {', '.join(sorted(self.tasks))} for this format, got {task}. Use onnx."


def _of_graphs(
    name: str,
    kinds: tuple[str, ...],
    main: str,
    disk: int,
    program: Callable[[], str],
    write: Any,
    opened: OpenGraph,
) -> FileFormat:
    """A format whose files are folders with a graph that torch traces."""
    return FileFormat(
        kinds=kinds,
        default="f32",
        tasks=frozenset(get_args(ExportTask)),
        file=f"student-{name}-{{}}",
        main=main,
        disk=disk,
        program=program,
        prepare=onnx_graph.trace,
        write=write,
        measure=partial(measure_graph, opened),
        kind=lambda folder: opened(folder).kind,
        grids=graph_grids,
    )


FORMATS: Mapping[str, FileFormat] = {
    "gguf": FileFormat(
        kinds=get_args(GgufType),
        default="f16",
        tasks=frozenset({"causal"}),
        file="student-{}.gguf",
        main=None,
        disk=4,
        program=llama_cpp.program_version,
        prepare=lambda model, task: model,
        write=lambda prepared, *written: gguf_file.write_gguf(*written),
        measure=gguf_check.measure_gguf,
        kind=gguf_file.gguf_kind,
        grids=gguf_file.gguf_grids,
    ),
    "gguf-adapter": FileFormat(
        kinds=get_args(GgufType),
        default="f16",
        tasks=frozenset({"causal"}),
        file="student-gguf-adapter-{}",
        main=llama_cpp.ADAPTER,
        disk=8,
        program=llama_cpp.program_version,
        prepare=lambda model, task: gguf_adapter.separate_adapter(model),
        write=lambda prepared, model, *written: gguf_adapter.write_gguf_adapter(prepared, *written),
        measure=gguf_adapter.measure_gguf_adapter,
        kind=gguf_file.gguf_kind,
        grids=gguf_file.gguf_grids,
        adapter=True,
    ),
    "onnx": _of_graphs(
        "onnx",
        get_args(OnnxType),
        onnx_graph.MODEL,
        12,
        onnx_runtime.program_version,
        onnx_graph.write_onnx,
        onnx_runtime.open_onnx,
    ),
    "openvino": _of_graphs(
        "openvino",
        ("f32", "int8"),
        openvino.MODEL,
        16,
        openvino.program_version,
        openvino.write_openvino,
        openvino.open_openvino,
    ),
}
FOLDERS = {form.main: form for form in FORMATS.values() if form.main}


def weight_grids(model: Any, kind: GridKind) -> dict[str, WeightGrid]:
    """The grids of a model's weights in files of a kind, by their names in the model."""
    return next(form for form in FORMATS.values() if kind in form.kinds).grids(model, kind)


def format_of(file: Path) -> FileFormat:
    """The format of a file that stands alone, or of a folder with a graph."""
    return next((form for main, form in FOLDERS.items() if (file / main).is_file()), FORMATS["gguf"])


def exported_files(path: Path) -> list[Path]:
    """The exported files that a path names: itself, or those in a folder that is no model of transformers."""
    if any((path / main).is_file() for main in FOLDERS) and not [*path.glob("*.safetensors")]:
        return [path]
    if path.name in FOLDERS and path.is_file():
        return [path.parent]
    if path.is_dir() and not (path / "config.json").exists():
        files = [*path.glob("*.gguf"), *(file.parent for main in FOLDERS for file in path.glob(f"*/{main}"))]
        return sorted(file for file in files if file.suffix != ".partial")  # of an export that was killed
    return [path] if path.is_file() and path.suffix == ".gguf" else []
