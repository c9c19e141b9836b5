"""Graphs with quantized weights, in blocks with a scale each, and the grid that these weights are on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from potstill.models.locate import require_package
from potstill.models.weight_grid import BLOCK, GridKind, WeightGrid

_INT8_PRODUCTS = 4  # onnxruntime multiplies quantized weights with activations in 8 bits


def graph_grids(model: Any, quantize: GridKind) -> dict[str, WeightGrid]:
    """The grids that a quantized graph has for the weights of a causal model, by their names there."""
    weights, grids, head = dict(model.named_parameters()), dict[str, WeightGrid](), model.get_output_embeddings()
    for name, module in model.named_modules():
        if f"{name}.weight" in weights and isinstance(module, nn.Linear | Conv1D | nn.Embedding):
            kind: GridKind = "int8" if module is head or isinstance(module, nn.Embedding) else quantize
            grids[f"{name}.weight"] = WeightGrid(kind, transposed=isinstance(module, Conv1D))
    return grids


def quantize_graph(plain: Path, prepared: Path, path: Path, large: bool, bits: int, head: Tensor | None) -> None:
    """Write a graph with weights in so many bits, but embeddings and head in 8.

    Args:
        prepared: path of a temporary file.
        head: weight [V, H] of the language model's head, if there is one.
    """
    quantization = require_package("onnxruntime.quantization", "onnx", "export")
    onnx = require_package("onnx", "onnx", "export")
    # Folds what is computed from weights alone: only matrices that are weights are quantized.
    quantization.quant_pre_process(plain, prepared, skip_symbolic_shape=True, save_as_external_data=large)
    from onnxruntime.quantization import matmul_nbits_quantizer as blocks

    model = onnx.load(str(prepared))
    _separate_biases(model.graph)
    # Weights alone: one scale for all activations of a matrix costs a language model tenths of a nat.
    quantizer = partial(blocks.MatMulNBitsQuantizer, block_size=BLOCK, is_symmetric=True, accuracy_level=_INT8_PRODUCTS)
    in_8_bits = quantizer(model, bits=8, nodes_to_exclude=[] if bits == 8 else _all_but(head, model.graph))
    in_8_bits.process()
    quantized = in_8_bits.model
    if bits != 8:
        others = quantizer(quantized.model, bits=bits)
        others.process()
        quantized = others.model
    _quantize_embeddings(quantized.model.graph, in_8_bits.node_quantizer.qbits_block_quant)
    quantized.save_model_to_file(str(path), large)


def _all_but(head: Tensor | None, graph: Any) -> list[str]:
    """Name all products of a graph, and return the names of those with another weight than the head's [V, H]."""
    onnx = require_package("onnx", "onnx", "export")
    weights = {tensor.name: tensor for tensor in graph.initializer}
    heads = [] if head is None else [head.T.float().numpy(force=True)]
    names = list[str]()
    for number, node in enumerate(graph.node):
        if node.op_type == "MatMul":
            node.name = node.name or f"product_{number}"
            weight = onnx.numpy_helper.to_array(weights[node.input[1]]) if node.input[1] in weights else np.empty(0)
            if not any(np.array_equal(weight, of_head) for of_head in heads):
                names.append(node.name)
    return names


def _separate_biases(graph: Any) -> None:
    """Write a product, and a sum where there is a bias, in place of each Gemm, which the quantizer leaves as it is."""
    onnx = require_package("onnx", "onnx", "export")
    weights, nodes = {tensor.name: tensor for tensor in graph.initializer}, list[Any]()
    for node in graph.node:
        settings = {part.name: onnx.helper.get_attribute_value(part) for part in node.attribute}
        plain = settings.get("alpha", 1.0) == settings.get("beta", 1.0) == 1.0 and not settings.get("transA")
        if node.op_type != "Gemm" or not plain or node.input[1] not in weights:
            nodes.append(node)
            continue
        (rows, name, *bias), (output,) = node.input, node.output
        if settings.get("transB"):
            weight = np.ascontiguousarray(onnx.numpy_helper.to_array(weights[name]).T)
            graph.initializer.append(onnx.numpy_helper.from_array(weight, name := f"{output}_weight"))
        product = f"{output}_product" if bias else output
        nodes.append(onnx.helper.make_node("MatMul", [rows, name], [product]))
        nodes += [onnx.helper.make_node("Add", [product, *bias], [output])] if bias else []
    _replace_nodes(graph, nodes)


def _quantize_embeddings(graph: Any, quantize: Callable[[np.ndarray], Any]) -> None:
    """Replace tables of rows in float32 by blocks with a scale each, those of the head where it has the same table."""
    onnx = require_package("onnx", "onnx", "export")
    stored = {tensor.name: tensor for tensor in graph.initializer}
    products = [node.input[1:3] for node in graph.node if node.op_type == "MatMulNBits"]
    nodes, names = list[Any](), dict[str, tuple[str, str]]()
    for node in graph.node:
        table = stored.get(node.input[0]) if node.op_type == "Gather" else None
        by_row = not any(part.name == "axis" and part.i for part in node.attribute)
        if table is None or not by_row or table.data_type != onnx.TensorProto.FLOAT or len(table.dims) != 2:
            nodes.append(node)
            continue
        if table.name not in names:
            blocks, scales, _ = quantize(np.ascontiguousarray(onnx.numpy_helper.to_array(table).T))
            arrays = blocks[..., : table.dims[1]], scales  # a narrow row without what fills its block
            same = (
                pair
                for pair in products
                if all(map(np.array_equal, map(onnx.numpy_helper.to_array, map(stored.__getitem__, pair)), arrays))
            )
            names[table.name] = next(same, None) or (f"{table.name}_blocks", f"{table.name}_scales")
            new = (pair for pair in zip(names[table.name], arrays, strict=True) if pair[0] not in stored)
            graph.initializer.extend([onnx.numpy_helper.from_array(array, name) for name, array in new])
        nodes += _read_rows(onnx, names[table.name], node.input[1], node.output[0], table.dims[1])
    graph.initializer.extend(_constants(onnx))
    _replace_nodes(graph, nodes)


def _read_rows(onnx: Any, names: tuple[str, str], ids: str, output: str, width: int) -> Iterator[Any]:
    """Nodes that read rows of blocks by ids, and compute the float32 rows of that width."""

    def node(kind: str, *inputs: str, **settings: Any) -> Any:
        return onnx.helper.make_node(kind, [*inputs], [f"{output}_of_blocks_{next(numbers)}"], **settings)

    numbers = iter(range(99))
    yield (values := node("Gather", names[0], ids))
    yield (values := node("Cast", values.output[0], to=onnx.TensorProto.FLOAT))
    yield (values := node("Sub", values.output[0], "blocks_zero"))
    yield (scales := node("Gather", names[1], ids))
    yield (scales := node("Unsqueeze", scales.output[0], "blocks_axes"))
    yield (values := node("Mul", values.output[0], scales.output[0]))
    yield (shape := node("Shape", ids))
    yield (shape := node("Concat", shape.output[0], "blocks_last", axis=0))
    yield (values := node("Reshape", values.output[0], shape.output[0]))
    yield (end := node("Constant", value_ints=[width]))
    yield onnx.helper.make_node("Slice", [values.output[0], "blocks_start", end.output[0], "blocks_last"], [output])


def _constants(onnx: Any) -> list[Any]:
    values = {
        "blocks_zero": np.float32(128),
        "blocks_axes": np.array([-1]),
        "blocks_last": np.array([-1]),
        "blocks_start": np.array([0]),
    }
    return [onnx.numpy_helper.from_array(np.asarray(value), name) for name, value in values.items()]


def _replace_nodes(graph: Any, nodes: list[Any]) -> None:
    """Give a graph other nodes, and leave out weights that none of them reads."""
    graph.ClearField("node")
    graph.node.extend(nodes)
    read = {name for node in nodes for name in node.input} | {output.name for output in graph.output}
    kept = [tensor for tensor in graph.initializer if tensor.name in read]
    graph.ClearField("initializer")
    graph.initializer.extend(kept)
