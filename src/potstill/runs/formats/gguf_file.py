"""Write a model and its tokenizer as one GGUF file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from potstill.errors import ModelError, UserError, one_line
from potstill.files import atomic_path
from potstill.models.locate import require_package
from potstill.models.weight_grid import BLOCK, GridKind, WeightGrid
from potstill.runs.formats.gguf_families import (
    gguf_family,
    gguf_weight,
    is_transposed,
    rope_tensors,
    weight_scale,
    write_parameters,
)
from potstill.runs.formats.gguf_tokenizer import write_tokenizer
from potstill.runs.formats.llama_cpp import ADAPTER, BASE, model_file, quantize_rows

GgufType = Literal["f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "q6_k", "q5_k_m", "q4_k_m"]
_FILE_TYPES = {"f32": 0, "f16": 1, "bf16": 32, "q8_0": 7, "q5_1": 9, "q5_0": 8, "q4_1": 3, "q4_0": 2}
_FILE_TYPES |= {"q6_k": 18, "q5_k_m": 17, "q4_k_m": 15}
# Of a matrix in k-quants: what rows get that no block of 256 divides.
_SMALL_BLOCKS = {"q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0"}
_K_QUANTS = ("q6_k", "q5_k_m", "q4_k_m")
SUPER_BLOCK = 256
LEAST_OF_KIND = 0.5  # of the weights of a file's matrices, of the kind that it is named by
EMBEDDING, HEAD = "token_embd.weight", "output.weight"


def write_gguf(model: Any, tokenizer: PreTrainedTokenizerBase, path: Path, quantize: GgufType = "f16") -> None:
    """Write a causal model; matrices are quantized, vectors are in float32.

    The head, or the embeddings where they are the head too, have at least 8 bits, as llama.cpp's own files; rows that
    no block of 32 divides have 16. The k-quants have the mixture of llama.cpp's own quantizer, without an importance
    matrix.

    Raises:
        ModelError: llama.cpp does not compute this model or its tokenizer.
    """
    gguf = require_package("gguf", "export", "export")
    config = model.config
    family = gguf_family(config)
    writer = gguf.GGUFWriter(None, family.arch)
    write_parameters(writer, config, family)
    write_tokenizer(writer, tokenizer, model.get_input_embeddings().weight.shape[0], model)
    writer.add_file_type(_FILE_TYPES[quantize])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for name, own, weight, kind in _tensors(model, quantize):
        _add(gguf, writer, own, gguf_weight(name, weight, config, family).numpy(), kind)
    for own, factors in rope_tensors(config, family).items():
        writer.add_tensor(own, factors.float().numpy())
    with atomic_path(path) as partial:
        writer.write_header_to_file(partial)
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def gguf_grids(model: Any, quantize: GridKind) -> dict[str, WeightGrid]:
    """The grids that an exported file has for the weights of a model, by their names there.

    Raises:
        ModelError: llama.cpp does not compute this model.
    """
    require_package("gguf", "export", "student.quantize")
    try:
        tensors = [*_tensors(model, cast(GgufType, quantize))]
    except ModelError as error:
        raise ModelError(f"student.quantize: {str(error).removeprefix('export: ')}") from None
    config, family = model.config, gguf_family(model.config)
    return {
        name: WeightGrid(kind, weight_scale(name, config, family), is_transposed(name, family))
        for name, _, _, kind in tensors
        if kind != "f32"
    }


def _tensors(model: Any, quantize: GgufType) -> Iterator[tuple[str, str, Tensor, Any]]:
    """Each weight of a model: its name, its name in GGUF, itself, and how it is quantized."""
    config, name_in_gguf = model.config, tensor_names(model.config)
    tied, family = config.tie_word_embeddings, gguf_family(config)
    for name, weight in model.state_dict().items():
        if tied and name == "lm_head.weight":
            continue
        if name.endswith(".bias") and not family.biases:
            raise ModelError(
                f"export: expected for GGUF {config.model_type} without biases, got {name}. Export another student, or "
                "use onnx."
            )
        own = name_in_gguf(name)
        columns = weight.shape[0 if is_transposed(name, family) else -1]
        if weight.ndim == 1 or own == "position_embd.weight":
            yield name, own, weight, "f32"
        else:
            is_head = own == (EMBEDDING if tied else HEAD)
            yield name, own, weight, _matrix_type(own, columns, quantize, is_head, config.num_hidden_layers)


def tensor_names(config: Any) -> Callable[[str], str]:
    """A function that gives the name in GGUF of a weight of a model with some config."""
    gguf = require_package("gguf", "export", "export")
    arch = gguf_family(config).arch
    known = next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    names = gguf.get_tensor_name_map(known, config.num_hidden_layers)

    def name_in_gguf(name: str) -> str:
        own: str | None = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if own is None:
            raise ModelError(f"export: expected for GGUF weights that {arch} has, got {name}.")
        return own

    return name_in_gguf


def gguf_kind(path: Path) -> str:
    """What most weights of any model are quantized to, by the header of its file: q4_k_m, for example."""
    gguf = require_package("gguf", "export", "export")
    try:
        reader = gguf.GGUFReader(model_file(path))
        field, of = (reader.get_field(f"general.{name}") for name in ("file_type", "type"))
        if of is not None and of.contents() == gguf.GGUFType.ADAPTER:
            raise UserError(
                f"student: expected a model, got an adapter, {path}. Name it {ADAPTER}, and its model as GGUF {BASE}, "
                "in a folder of both, and evaluate that."
            )
        name = "" if field is None else gguf.LlamaFileType(field.contents()).name
    except UserError:
        raise
    except Exception as error:  # the package reads a damaged header as it is
        raise UserError(
            f"student: expected a GGUF file, got {path}: {one_line(error, 200)}. It is damaged, or of another format."
        ) from None
    return name.lower().removeprefix("mostly_").removeprefix("all_")


def kind_notes(source: Any, kind: str) -> Iterator[str]:
    """Say so where most weights of the matrices of a file, or of a model's file, are of other kinds than its name."""
    weights = Counter[str]()
    if isinstance(source, Path):
        for tensor in require_package("gguf", "export", "export").GGUFReader(source).tensors:
            if len(tensor.shape) > 1:
                weights[tensor.tensor_type.name.lower()] += int(tensor.n_elements)
    else:
        for _, _, weight, its_kind in _tensors(source, cast(GgufType, kind)):
            if weight.ndim > 1:
                weights[its_kind] += weight.numel()
    own = sum(count for name, count in weights.items() if kind.startswith(name))
    if kind.startswith("q") and own < LEAST_OF_KIND * weights.total():
        shares = ", ".join(f"{count / weights.total():.0%} {name}" for name, count in weights.most_common())
        yield (
            f"most weights of its matrices are not {kind}: {shares}. The head has more bits, and so have matrices with "
            f"rows that no block divides, of {SUPER_BLOCK if '_k' in kind else BLOCK} weights. Choose widths by it."
        )


def _add(gguf: Any, writer: Any, name: str, weight: np.ndarray, kind: str) -> None:
    if kind == "f16" and np.abs(weight).max() > np.finfo(np.float16).max:
        raise ModelError(f"export: expected weights below 65,504 for f16, got larger ones in {name}. Use bf16.")
    ggml_type, weight = gguf.GGMLQuantizationType[kind.upper()], np.ascontiguousarray(weight)
    if kind.endswith("_k"):  # which the package reads, but does not write
        raw = quantize_rows(weight, ggml_type, gguf.quant_shape_to_byte_shape(weight.shape, ggml_type))
    else:
        raw = gguf.quants.quantize(weight, ggml_type)
    writer.add_tensor(name, raw, raw_dtype=ggml_type)


def _matrix_type(name: str, columns: int, quantize: GgufType, is_head: bool, layers: int) -> str:
    if not quantize.startswith("q"):
        return quantize
    if columns % BLOCK:
        return "f16"
    if not quantize.startswith(_K_QUANTS):
        return "q8_0" if is_head else quantize
    kind = "q6_k" if is_head else _mixture(name, quantize, layers)
    return kind if columns % SUPER_BLOCK == 0 else _SMALL_BLOCKS[kind]


def _mixture(name: str, quantize: str, layers: int) -> str:
    """The k-quant of a matrix, as llama.cpp's quantizer chooses it."""
    part = name.partition(".weight")[0].split(".")
    if part[-1] in ("attn_v", "attn_qkv", "ffn_down"):
        layer, eighth = int(part[1]), layers // 8
        if layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2:
            return "q6_k"
    return quantize.removesuffix("_m")
