"""Write a student's LoRA adapter as a GGUF file of its own, in a folder with its base."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from potstill.errors import ModelError
from potstill.evaluate.exported import ExportedFile
from potstill.evaluate.formatting import size
from potstill.models.adapted import check_mergeable, is_adapted, over_plain_base
from potstill.models.loading import SAVED_EMBEDDINGS, suppress_warnings
from potstill.models.locate import require_package
from potstill.runs.formats.gguf_check import measure_gguf
from potstill.runs.formats.gguf_families import gguf_family, gguf_rows, weight_scale
from potstill.runs.formats.gguf_file import GgufType, tensor_names, write_gguf
from potstill.runs.formats.llama_cpp import ADAPTER, BASE
from potstill.runs.formats.measure import Bench

_PAIR = (".lora_A.weight", ".lora_B.weight")
_KEEPS_BASE = (True, False, "gaussian", "eva", "orthogonal", "mica")  # of peft's ways to begin


@dataclass(frozen=True)
class SeparateAdapter:
    """A base, and the matrices A [rank, in] and B [out, rank] beside its weights, by the names of these."""

    base: Any
    alpha: float  # llama.cpp adds alpha / rank * B A
    matrices: Mapping[str, tuple[Tensor, Tensor]]


def separate_adapter(model: Any) -> SeparateAdapter:
    """Copy the adapter and the base of a student; the scales of its layers go into B where they differ.

    Raises:
        ModelError: llama.cpp has no such adapters.
    """
    if not is_adapted(model):
        raise _refusal("a student with an adapter", "a whole model", "Use gguf")
    check_mergeable(model)
    config, adapter, kind = model.active_peft_config, model.active_adapter, model.active_peft_config.peft_type.value
    if kind != "LORA":
        raise _refusal("a LoRA adapter", kind)
    if getattr(model.get_base_model(), SAVED_EMBEDDINGS, False):
        raise _refusal("a LoRA adapter alone", "embeddings of its own")
    if config.init_lora_weights not in _KEEPS_BASE:
        raise _refusal("an adapter of an unchanged base", f"init_lora_weights: {config.init_lora_weights}")
    with suppress_warnings():
        peft = require_package("peft", "adapters", "export")
        names = [*peft.get_peft_model_state_dict(model, save_embedding_layers=False)]
        if others := [name for name in names if not name.endswith(_PAIR)]:
            raise _refusal("pairs of matrices alone", others[0])
        model = over_plain_base(copy.deepcopy(model))
        matrices, alpha = {}, config.lora_alpha or 1.0  # 0 is none for llama.cpp
        for name, layer in model.get_base_model().named_modules():
            if adapter in getattr(layer, "lora_A", ()):
                a, b = (pair[adapter].weight.detach().float() for pair in (layer.lora_A, layer.lora_B))
                matrices[f"{name}.weight"] = a, b * (layer.scaling[adapter] * len(a) / alpha)
        base = model.unload()
    if base.config.tie_word_embeddings and "lm_head.weight" in matrices:
        raise _refusal("an adapter of layers", "one of the head, which is the embeddings too")
    return SeparateAdapter(base, alpha, matrices)


def _refusal(expected: str, got: str, advice: str = "Use gguf, which merges it into its base") -> ModelError:
    return ModelError(f"export: expected for gguf-adapter {expected}, got {got}. {advice}.")


def write_gguf_adapter(
    separate: SeparateAdapter, tokenizer: PreTrainedTokenizerBase, folder: Path, quantize: GgufType
) -> None:
    """Write a folder: the base in a kind of GGUF, and the adapter in float32.

    Raises:
        ModelError: llama.cpp does not compute this model or its tokenizer.
    """
    folder.mkdir()
    write_gguf(separate.base, tokenizer, folder / BASE, quantize)
    gguf, config = require_package("gguf", "export", "export"), separate.base.config
    family, name_in_gguf = gguf_family(config), tensor_names(config)
    writer = gguf.GGUFWriter(folder / ADAPTER, family.arch)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, separate.alpha)
    for name, (a, b) in separate.matrices.items():
        own = name_in_gguf(name)
        b = gguf_rows(name, b, config, family) * weight_scale(name, config, family)
        writer.add_tensor(f"{own}.lora_a", a.contiguous().numpy())
        writer.add_tensor(f"{own}.lora_b", b.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def measure_gguf_adapter(folder: Path, kind: str, bench: Bench) -> ExportedFile:
    """Load the base with the adapter in llama.cpp, and measure both together; a note has the size of each."""
    file = measure_gguf(folder, kind, bench)
    sizes = (f"{name} has {size((folder / name).stat().st_size)}" for name in (ADAPTER, BASE))
    return file.model_copy(update={"notes": [f"{', '.join(sizes)}.", *file.notes]})
