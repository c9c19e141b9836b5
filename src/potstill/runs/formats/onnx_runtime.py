"""Run exported ONNX graphs in onnxruntime, on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, GenerationConfig, PretrainedConfig

from potstill.errors import RunError, UserError, one_line
from potstill.evaluate.exported import ExportedFile
from potstill.evaluate.speed import extra_bytes
from potstill.losses.embedding import similarity_error
from potstill.models.chat import end_token_ids
from potstill.models.loading import load_tokenizer
from potstill.models.locate import require_package
from potstill.models.shapes import position_limit
from potstill.runs.formats.loaded import LoadedFile
from potstill.runs.formats.measure import (
    PROMPT,
    Bench,
    FileModule,
    check_lengths,
    exported_file,
    measure_causal,
    seconds,
)
from potstill.runs.formats.onnx_graph import KIND, MODEL
from potstill.runs.formats.sentences import PROBES

_UNLIMITED = 1 << 20  # positions of a model without a limit
_PROBED, _SPLIT = 24, 9  # tokens that a graph reads in two passes, and those of the first
_FARTHEST = 1e-3  # distance of a graph in float32 from its model: of log-probabilities, or of other outputs


def program_version() -> str:
    """What runs the graphs, for reports."""
    for package in ("onnx", "onnxscript"):
        require_package(package, "onnx", "export")
    return f"onnxruntime {require_package('onnxruntime', 'onnx', 'export').__version__}"


def _open(folder: Path) -> Any:
    """Load a graph; a RunError if onnxruntime does not."""
    runtime = require_package("onnxruntime", "onnx", "export")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        return runtime.InferenceSession(folder / MODEL, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # of onnxruntime's own, which have no common base
        raise RunError(
            f"export: expected a graph that onnxruntime loads, got {folder / MODEL}: {one_line(error, 200)}"
        ) from None


class OnnxRuntime(LoadedFile):
    """The folder of an exported graph, loaded by onnxruntime.

    Raises:
        RunError: onnxruntime does not load the graph.
        UserError: the graph is not of a causal model with a cache.
    """

    def __init__(self, folder: Path) -> None:
        self._session = _open(folder)
        self._folder, self.program = folder, program_version()
        inputs = {tensor.name: tensor.shape for tensor in self._session.get_inputs()}
        self._past = {name: shape for name, shape in inputs.items() if name.startswith("past_key_values.")}
        self._reads_positions = "position_ids" in inputs
        outputs = self._session.get_outputs()
        if not {"input_ids", "attention_mask"} <= {*inputs} or not self._past or outputs[0].name != "logits":
            raise UserError(
                f"student: expected {folder / MODEL} of a causal model with past_key_values, got one that reads "
                f"{', '.join([*inputs][:3])}. Other models are measured by potstill export alone."
            )
        self.num_tokens = int(outputs[0].shape[-1])
        self.context_length = position_limit(AutoConfig.from_pretrained(folder)) or _UNLIMITED
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

    def logits_in_passes(self, ids: Sequence[int], first: int) -> np.ndarray:
        """Read some tokens, then the others with their cache, and give the logits of all."""
        self._clear()
        return np.concatenate([self._decode(ids[:first], 0), self._decode(ids[first:], first)])

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


class OnnxRows(FileModule):
    """The folder of an exported graph without a cache, as a model of transformers with the configuration of its model.

    Raises:
        RunError: onnxruntime does not load the graph.
    """

    def __init__(self, folder: Path, config: PretrainedConfig) -> None:
        session = _open(folder)
        (output,) = session.get_outputs()
        super().__init__(int(output.shape[-1]))
        self.session, self.output = session, str(output.name)
        self.inputs = [tensor.name for tensor in session.get_inputs()]
        self.config = config  # says whether it reads token types

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None, **_: Any
    ) -> SimpleNamespace:
        types = torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids
        values = {"input_ids": input_ids, "attention_mask": attention_mask, "token_type_ids": types}
        (result,) = self.session.run(None, {name: values[name].numpy() for name in self.inputs})
        return SimpleNamespace(**{self.output: torch.from_numpy(result)})


def measure_onnx(folder: Path, kind: str, bench: Bench) -> ExportedFile:
    """Load a graph in onnxruntime, compare it with its model, and measure it.

    Raises:
        RunError: onnxruntime does not load it, or computes something else than the model in float32.
    """
    compared = bench.student if kind == "f32" else None
    if bench.task == "causal":

        def check(loaded: OnnxRuntime) -> list[str]:
            if compared is not None:
                _check_causal(loaded, compared)
            return []

        return measure_causal(partial(OnnxRuntime, folder), folder, kind, bench, check)
    config, tokens = bench.student.config, bench.student.get_input_embeddings().weight.shape[0]
    rows, limit = OnnxRows(folder, config), position_limit(config) or _UNLIMITED
    check_lengths(bench, folder, limit)
    if bench.task == "embedding":
        figures = _compare_sentences(rows, folder, compared, bench)
    else:
        if compared is not None:
            _check_rows(rows, compared, tokens)
        figures = bench.figures(rows)
    ids, time = _random_ids(tokens, min(PROMPT, limit // 2)), 0.0
    del rows

    def serve() -> None:
        nonlocal time
        again = OnnxRows(folder, config)
        time = seconds(lambda: again(ids, torch.ones_like(ids)))

    peak = extra_bytes(serve, torch.device("cpu"))
    return exported_file(
        folder, kind, program_version(), figures, (ids.shape[1] / time, None), peak, getattr(bench.student, "notes", [])
    )


def onnx_kind(folder: Path) -> str:
    """What the weights of an exported graph are quantized to."""
    return str(_open(folder).get_modelmeta().custom_metadata_map.get(KIND, ""))


def _random_ids(tokens: int, length: int) -> Tensor:
    return torch.randint(tokens, (1, length), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def _check_causal(loaded: OnnxRuntime, model: Any) -> None:
    """Check log-probabilities that are computed in two passes, the second with the cache of the first."""
    ids = _random_ids(loaded.num_tokens, min(_PROBED, loaded.context_length))
    passes = loaded.logits_in_passes(ids[0].tolist(), _SPLIT)
    logits, expected = torch.from_numpy(passes), model(input_ids=ids).logits[0]
    _check_close(logits.log_softmax(-1), expected.log_softmax(-1), model)


@torch.no_grad()
def _check_rows(rows: OnnxRows, model: Any, tokens: int) -> None:
    """Check the output for a row and a shorter one, which is padded."""
    limit = position_limit(rows.config) or _UNLIMITED
    ids = _random_ids(tokens, 2 * min(_PROBED, limit // 2)).view(2, -1)
    mask = torch.ones_like(ids)
    mask[1, _SPLIT:] = 0
    output, expected = (getattr(module(input_ids=ids, attention_mask=mask), rows.output) for module in (rows, model))
    if output.ndim == 3:
        output, expected = output[mask.bool()], expected[mask.bool()]
    _check_close(output, expected, model)


def _compare_sentences(rows: OnnxRows, folder: Path, compared: Any, bench: Bench) -> dict[str, Any]:
    """Compare vectors of texts with those of sentence-transformers, and check those of the model `compared`."""
    texts = [] if bench.rows is None else [*bench.rows["text"]]
    tokenizer = load_tokenizer(str(folder), "student")
    vectors, expected = bench.student.compare(rows, tokenizer, [*PROBES, *texts])
    if compared is not None:
        _check_close(vectors, expected, compared)
    if len(texts) < 2:  # no pair
        return {"tokens": len(texts)}
    measured = (vectors[len(PROBES) :], expected[len(PROBES) :])
    return {"tokens": len(texts), "kl": float(similarity_error(*measured))}


def _check_close(output: Tensor, expected: Tensor, model: Any) -> None:
    distance = float((output - expected).abs().max())
    if not distance <= _FARTHEST:  # NaN too
        raise RunError(
            f"export: expected {model.config.model_type} as ONNX within {_FARTHEST} of the student, got "
            f"{distance:.3g}: torch does not export what this model computes. Use another format."
        )
