"""Trace a model, a causal one with its cache of keys and values, as an ONNX graph, and write it as a folder."""

from __future__ import annotations

import inspect
import io
import logging
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PretrainedConfig, PreTrainedTokenizerBase

from potstill.errors import ModelError, one_line
from potstill.evaluate.exported import ExportTask
from potstill.models.locate import require_package
from potstill.models.split import reads_token_types
from potstill.runs.formats.onnx_quantized import quantize_graph

OnnxType = Literal["f32", "int8", "int4"]
MODEL = "model.onnx"
KIND = "quantize"  # name of the kind in the metadata of a graph
_LARGEST = 1_800_000_000  # bytes of weights in one file: protobuf ends at 2 GB
_ROWS, _PAST, _NEW = 2, 3, 5  # sizes of what is traced; none may be 1, which exporters take for a constant
_FREE = torch.export.Dim.DYNAMIC
_OUTPUTS: dict[ExportTask, str] = {"encoder": "last_hidden_state", "embedding": "sentence_embedding"}  # else logits


class _Signature(NamedTuple):
    """A function of tensors, and what it is traced on.

    Args:
        values: of its arguments, by their names, in order.
        axes: those of each argument that are free.
        inputs: names of all tensors among the arguments.
        outputs: names of all tensors that it gives.
    """

    function: nn.Module
    values: dict[str, Any]
    axes: dict[str, Any]
    inputs: list[str]
    outputs: list[str]


class _Rows(nn.Module):
    """A model without a cache as a function of tensors: it gives its output of that name."""

    def __init__(self, model: Any, output: str) -> None:
        super().__init__()
        self.model, self.output = model, output

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        types = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        output = self.model(input_ids=input_ids, attention_mask=attention_mask, **types)
        tensor: Tensor = getattr(output, self.output)
        return tensor


class _Causal(nn.Module):
    """A causal model as a function of tensors: its cache is a pair of keys and values for each layer."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        past: Sequence[tuple[Tensor, Tensor]],
        position_ids: Tensor | None = None,
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        positions = {} if position_ids is None else {"position_ids": position_ids}
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=DynamicCache(ddp_cache_data=past),
            use_cache=True,
            **positions,
        )
        return output.logits, [(layer.keys, layer.values) for layer in output.past_key_values.layers]


def trace(model: Any, task: ExportTask = "causal") -> Any:
    """Trace a model as a torch.onnx.ONNXProgram, with names of inputs and outputs as those of Optimum.

    Raises:
        ModelError: torch cannot trace this model.
    """
    require_package("onnxscript", "onnx", "export")
    model.eval()
    traced = _causal(model) if task == "causal" else _rows(model, _OUTPUTS.get(task, "logits"))
    named: dict[str, Any] = {"input_names": traced.inputs, "output_names": traced.outputs}
    with _silent():
        try:
            program: Any = torch.onnx.export(  # never None for dynamo
                traced.function.eval(),
                tuple(traced.values.values()),
                dynamo=True,
                verbose=False,
                dynamic_shapes=tuple(traced.axes.values()),
                **named,
            )
        except Exception as error:  # torch raises errors of many kinds, of which most derive from none of its own
            raise _refused(model, f"which it does not: {one_line(error.__cause__ or error, 200)}") from error
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()  # lines of code with the paths of this machine
    if getattr(model, "may_read_no_tokens", False):
        _pad_empty_rows(program.model.graph)
    return program


def _pad_empty_rows(graph: Any) -> None:
    """Let a graph read rows of no tokens: they get one position, which their mask leaves out.

    In the graph, as torch takes the number of positions for one of 2 or more.
    """
    ir = require_package("onnxscript", "onnx", "export").ir
    used = [(value, [*value.uses()]) for value in graph.inputs]
    zero, begins = (ir.node("Constant", [], {"value_ints": [0] * number}) for number in (1, 3))
    length = ir.node("Shape", [graph.inputs[0]], {"start": 1})
    is_empty = ir.node("Equal", [length.outputs[0], zero.outputs[0]])
    missing = ir.node("Cast", [is_empty.outputs[0]], {"to": int(ir.DataType.INT64)})
    pads = ir.node("Concat", [begins.outputs[0], missing.outputs[0]], {"axis": 0})  # before and behind each axis
    padded = [ir.node("Pad", [value, pads.outputs[0]]) for value, _ in used]
    graph.insert_before(graph[0], [zero, begins, length, is_empty, missing, pads, *padded])
    for (_, uses), node in zip(used, padded, strict=True):
        for user, place in uses:
            user.replace_input_with(place, node.outputs[0])


def _causal(model: Any) -> _Signature:
    layers = _cache_layers(model)
    values, axes = _row_values(model, _PAST + _NEW)
    axes["past"] = [({0: _FREE, 2: _FREE}, {0: _FREE, 2: _FREE}) for _ in layers]
    values["past"] = [tuple(torch.zeros(_ROWS, heads, _PAST, width) for heads, width in layer) for layer in layers]
    inputs = ["input_ids", "attention_mask", *_cache_names("past_key_values", len(layers))]
    if "position_ids" in inspect.signature(model.forward).parameters:
        values["position_ids"] = torch.arange(_PAST, _PAST + _NEW).expand(_ROWS, _NEW).contiguous()
        axes["position_ids"] = {0: _FREE, 1: _FREE}
        inputs.append("position_ids")
    return _Signature(_Causal(model), values, axes, inputs, ["logits", *_cache_names("present", len(layers))])


def _rows(model: Any, output: str) -> _Signature:
    values, axes = _row_values(model, _NEW)
    if reads_token_types(model):
        values["token_type_ids"], axes["token_type_ids"] = torch.zeros_like(values["input_ids"]), axes["input_ids"]
    return _Signature(_Rows(model, output), values, axes, [*values], [output])


def _row_values(model: Any, attended: int) -> tuple[dict[str, Any], dict[str, Any]]:
    tokens = model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(tokens, (_ROWS, _NEW), generator=torch.Generator().manual_seed(0))
    values = {"input_ids": ids, "attention_mask": torch.ones(_ROWS, attended, dtype=torch.long)}
    return values, {name: {0: _FREE, 1: _FREE} for name in values}


def write_onnx(
    program: Any, model: Any, tokenizer: PreTrainedTokenizerBase, folder: Path, quantize: OnnxType = "f32"
) -> None:
    """Write a traced model into a new folder, with the configuration and the tokenizer that it is used with.

    In int8 and int4, matrices have so many bits in blocks of 32 with a scale each; embeddings, and a head over tokens,
    have 8 in both.
    """
    folder.mkdir()
    tokenizer.save_pretrained(str(folder))
    if type(model.config) is not PretrainedConfig:  # as of a static model, which has none of its own
        model.config.save_pretrained(str(folder))
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(str(folder))
    program.model.metadata_props[KIND] = quantize
    large = sum(weight.nbytes for weight in model.parameters()) > _LARGEST
    if quantize == "f32":
        program.save(folder / MODEL, external_data=large)
        return
    with tempfile.TemporaryDirectory(dir=folder) as temporary, _silent():
        plain, prepared = Path(temporary) / "plain.onnx", Path(temporary) / "prepared.onnx"
        program.save(plain, external_data=large)
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        bits, weight = int(quantize.removeprefix("int")), None if head is None else head.weight
        quantize_graph(plain, prepared, folder / MODEL, large, bits, weight)


def _cache_layers(model: Any) -> list[list[tuple[int, int]]]:
    """The numbers of heads, and their widths, of the keys and the values of each layer."""
    with torch.no_grad():
        output = model(input_ids=torch.zeros(1, 2, dtype=torch.long), use_cache=True)
    layers = getattr(getattr(output, "past_key_values", None), "layers", None) or []
    pairs: list[list[Any]] = [[getattr(layer, name, None) for name in ("keys", "values")] for layer in layers]
    if not pairs or not all(isinstance(tensor, Tensor) and tensor.ndim == 4 for pair in pairs for tensor in pair):
        raise _refused(model, "whose cache is not one of keys and values in each layer")
    return [[(tensor.shape[1], tensor.shape[3]) for tensor in pair] for pair in pairs]


def _cache_names(prefix: str, layers: int) -> list[str]:
    return [f"{prefix}.{i}.{name}" for i in range(layers) for name in ("key", "value")]


def _refused(model: Any, reason: str) -> ModelError:
    return ModelError(f"export: expected for ONNX a model that torch exports, got {model.config.model_type}, {reason}.")


@contextmanager
def _silent() -> Iterator[None]:
    """Keep what the exporter and the quantizer print to themselves: their own steps, and pages of traced code.

    The quantizer's import configures the logging of the whole process, which is undone.
    """
    before, nowhere = logging.root.manager.disable, io.StringIO()
    handlers, level = logging.root.handlers[:], logging.root.level
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(nowhere), redirect_stderr(nowhere):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
        logging.root.handlers[:] = handlers
        logging.root.setLevel(level)
