"""Open exported ONNX graphs in onnxruntime, on the CPU."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from potstill.errors import RunError, one_line
from potstill.models.locate import require_package
from potstill.runs.formats.graphs import Graph
from potstill.runs.formats.onnx_graph import KIND, MODEL


def program_version() -> str:
    """What runs the graphs, for reports."""
    for package in ("onnx", "onnxscript"):
        require_package(package, "onnx", "export")
    return f"onnxruntime {require_package('onnxruntime', 'onnx', 'export').__version__}"


def open_onnx(folder: Path) -> Graph:
    """Load a graph.

    Raises:
        RunError: onnxruntime does not load it.
    """
    runtime = require_package("onnxruntime", "onnx", "export")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        session: Any = runtime.InferenceSession(folder / MODEL, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # of onnxruntime's own, which have no common base
        raise RunError(
            f"export: expected a graph that onnxruntime loads, got {folder / MODEL}: {one_line(error, 200)}"
        ) from None
    inputs, outputs = (
        {tensor.name: tensor.shape for tensor in tensors} for tensors in (session.get_inputs(), session.get_outputs())
    )

    def run(values: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        return dict(zip(outputs, session.run([*outputs], dict(values)), strict=True))

    kind = str(session.get_modelmeta().custom_metadata_map.get(KIND, ""))
    return Graph(inputs, outputs, run, kind, program_version())
