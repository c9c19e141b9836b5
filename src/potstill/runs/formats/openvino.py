"""Write graphs for OpenVINO, made of ONNX graphs, and open them there, on the CPU."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from potstill.errors import RunError, one_line
from potstill.models.locate import require_package
from potstill.runs.formats import onnx_graph, onnx_runtime
from potstill.runs.formats.graphs import Graph
from potstill.runs.formats.onnx_graph import OnnxType

MODEL = "openvino_model.xml"  # Optimum's name; the weights are in a .bin beside it
_KIND = ["potstill", onnx_graph.KIND]  # place of the kind in the information on a graph


def _openvino() -> Any:
    """Import OpenVINO without the package by which it reports every import over the network."""
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # as if it was not installed
    return require_package("openvino", "openvino", "export")


def program_version() -> str:
    """What runs the graphs, for reports."""
    onnx_runtime.program_version()  # int8 is the quantization of onnxruntime
    return f"OpenVINO {_openvino().__version__.partition('-')[0]}"


def write_openvino(
    program: Any, model: Any, tokenizer: PreTrainedTokenizerBase, folder: Path, quantize: OnnxType = "f32"
) -> None:
    """Write a traced model into a new folder, with the configuration and the tokenizer that it is used with."""
    openvino = _openvino()
    onnx_graph.write_onnx(program, model, tokenizer, folder, quantize)
    graph = openvino.Core().read_model(folder / onnx_graph.MODEL)  # as convert_model does, which reports its use
    graph.set_rt_info(quantize, _KIND)
    openvino.save_model(graph, folder / MODEL, compress_to_fp16=False)
    del graph
    for path in folder.glob(f"{onnx_graph.MODEL}*"):
        path.unlink()


def open_openvino(folder: Path) -> Graph:
    """Load a graph, which computes in float32.

    Raises:
        RunError: OpenVINO does not load it.
    """
    openvino = _openvino()
    # By default, weights and activations are in bfloat16 on CPUs that multiply in it.
    options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    try:
        core = openvino.Core()
        graph = core.read_model(folder / MODEL)
        kind = str(graph.get_rt_info(_KIND).value) if graph.has_rt_info(_KIND) else ""
        compiled: Any = core.compile_model(graph, "CPU", options)
    except RuntimeError as error:
        raise RunError(
            f"export: expected a graph that OpenVINO loads, got {folder / MODEL}: {one_line(error, 200)}"
        ) from None
    inputs, outputs = (
        {
            port.any_name: [size.get_length() if size.is_static else None for size in port.partial_shape]
            for port in ports
        }
        for ports in (compiled.inputs, compiled.outputs)
    )

    def run(values: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        results = compiled(dict(values))
        return {name: results[name] for name in outputs}

    return Graph(inputs, outputs, run, kind, program_version())
