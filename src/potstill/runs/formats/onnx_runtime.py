"""Run an exported ONNX graph with its cache in onnxruntime, on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, GenerationConfig

from potstill.errors import RunError, UserError, one_line
from potstill.evaluate.exported import ExportedFile
from potstill.models.chat import end_token_ids
from potstill.models.loading import load_tokenizer
from potstill.models.locate import require_package
from potstill.models.shapes import position_limit
from potstill.runs.formats.loaded import LoadedFile
from potstill.runs.formats.measure import Bench, measure
from potstill.runs.formats.onnx_graph import KIND, MODEL

_UNLIMITED = 1 << 20  # positions of a model without a limit
_PROBED, _SPLIT = 24, 9  # tokens that a graph reads in two passes, and those of the first
_FARTHEST = 1e-3  # nats between the log-probabilities of a graph in float32 and of its model


def program_version() -> str:
    """What runs the graphs, for reports."""
    for package in ("onnx", "onnxscript"):
        require_package(package, "onnx", "export")
    return f"onnxruntime {require_package('onnxruntime', 'onnx', 'export').__version__}"


class OnnxRuntime(LoadedFile):
    """The folder of an exported graph, loaded by onnxruntime.

    Raises:
        RunError: onnxruntime does not load the graph.
        UserError: the graph is not of a causal model with a cache.
    """

    def __init__(self, folder: Path) -> None:
        runtime = require_package("onnxruntime", "onnx", "export")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        try:
            self._session = runtime.InferenceSession(folder / MODEL, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # of onnxruntime's own, which have no common base
            raise RunError(
                f"export: expected a graph that onnxruntime loads, got {folder / MODEL}: {one_line(error, 200)}"
            ) from None
        self._folder, self.program = folder, program_version()
        inputs = {tensor.name: tensor.shape for tensor in self._session.get_inputs()}
        self._past = {name: shape for name, shape in inputs.items() if name.startswith("past_key_values.")}
        self._reads_positions = "position_ids" in inputs
        outputs = self._session.get_outputs()
        if not {"input_ids", "attention_mask"} <= {*inputs} or not self._past or outputs[0].name != "logits":
            raise UserError(
                f"student: expected {folder / MODEL} with input_ids, attention_mask and past_key_values, and logits, "
                f"got {', '.join([*inputs][:3])}. Write it with potstill export --to onnx."
            )
        self.num_tokens = int(outputs[0].shape[-1])
        self.context_length = position_limit(AutoConfig.from_pretrained(folder)) or _UNLIMITED
        self.kind = str(self._session.get_modelmeta().custom_metadata_map.get(KIND, ""))
        self._cache: dict[str, Any] = {}

    def close(self) -> None:
        """Free the memory of the program."""
        del self._session
        self._cache = {}

    def ends(self) -> frozenset[int]:
        """The tokens that end a generated text."""
        generation = GenerationConfig.from_pretrained(self._folder)
        return end_token_ids(
            load_tokenizer(str(self._folder), "student"), SimpleNamespace(generation_config=generation)
        )

    def _clear(self) -> None:
        self._cache = {
            name: np.zeros((1, heads, 0, width), np.float32) for name, (_, heads, _, width) in self._past.items()
        }

    def _decode(self, ids: Sequence[int], start: int) -> np.ndarray:
        positions = {"position_ids": np.arange(start, start + len(ids))[None]} if self._reads_positions else {}
        logits, *present = self._session.run(
            None,
            {
                "input_ids": np.array([ids]),
                "attention_mask": np.ones((1, start + len(ids)), np.int64),
                **positions,
                **self._cache,
            },
        )
        self._cache = dict(zip(self._past, present, strict=True))
        return np.asarray(logits[0])


def measure_onnx(folder: Path, kind: str, bench: Bench) -> ExportedFile:
    """Load a graph in onnxruntime, compare it with its model, and measure it.

    Raises:
        RunError: onnxruntime does not load it, or computes something else than the model in float32.
    """
    with OnnxRuntime(folder) as loaded:
        if kind == "f32" and bench.student is not None:
            _check_parity(loaded, bench.student)
        return measure(loaded, folder, kind, bench)


@torch.no_grad()
def _check_parity(loaded: OnnxRuntime, model: Any) -> None:
    length = min(_PROBED, loaded.context_length)
    ids = torch.randint(loaded.num_tokens, (length,), generator=torch.Generator().manual_seed(0))
    loaded._clear()
    passes = [loaded._decode(part.tolist(), start) for start, part in ((0, ids[:_SPLIT]), (_SPLIT, ids[_SPLIT:]))]
    logits, expected = torch.from_numpy(np.concatenate(passes)), model(input_ids=ids[None]).logits[0]
    distance = float((logits.log_softmax(-1) - expected.log_softmax(-1)).abs().max())
    if not distance <= _FARTHEST:  # NaN too
        raise RunError(
            f"export: expected {model.config.model_type} as ONNX within {_FARTHEST} nats of the student, got "
            f"{distance:.3g}: torch does not export what this model computes. Use another format."
        )


def onnx_kind(folder: Path) -> str:
    """What the weights of an exported graph are quantized to."""
    with OnnxRuntime(folder) as loaded:
        return loaded.kind
