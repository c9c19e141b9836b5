"""The precision in which a model's weights are saved."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import BitsAndBytesConfig

from potstill.errors import ModelError
from potstill.models.locate import require_package, weight_files

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def as_dtype(name: str | torch.dtype | None) -> torch.dtype | None:
    """The dtype of a name, as configs and recipes write it."""
    return getattr(torch, name) if isinstance(name, str) else name


def saved_dtype(name: str | Path) -> torch.dtype | None:
    """The precision of most of a saved model's weights that are not quantized; None for a model that is not here."""
    sizes: Counter[torch.dtype] = Counter()
    if any(file.suffix == ".gguf" for file in weight_files(name)):
        return torch.bfloat16  # what is quantized there loses nothing in half precision
    for _, _, dtype, shape in saved_weights(name):
        if dtype in DTYPES:
            sizes[DTYPES[dtype]] += math.prod(shape)
    return max(sizes, key=sizes.__getitem__, default=None)


def integer_weights(name: str | Path) -> list[str]:
    """Names of the weights that a saved model has as integers."""
    return [weight for _, weight, dtype, _ in saved_weights(name) if weight.endswith("weight") and dtype[0] in "IU"]


def check_quantizable(model: nn.Module, *, key: str, name: str, bits: int) -> None:
    """Refuse a model with the weights of all experts of a layer in one tensor, which bitsandbytes does not quantize."""
    modules = (module for module in model.modules() if not isinstance(module, nn.Conv1d))
    weights = (weight for module in modules for weight in module.parameters(recurse=False))
    experts = sum(weight.numel() for weight in weights if weight.ndim == 3)
    if not experts:
        return
    total = sum(weight.numel() for weight in model.parameters())
    expected, real = ((total - left) * bits / 8 + left * 2 for left in (0, experts))
    raise ModelError(
        f"{key}: expected linear layers alone to quantize to {bits} bits, got {type(model).__name__}, whose experts "
        f"({experts / total:.0%} of its weights) bitsandbytes leaves in 16 bits: {name} would take {real / 1e9:.3g} "
        f"GB, not {expected / 1e9:.3g} GB. Leave dtype out, spread it (device_map), or name a checkpoint that was "
        "saved quantized."
    )


def bitsandbytes_config(bits: int, dtype: str, key: str) -> BitsAndBytesConfig:
    """Quantize linear layers to 8 bits, or to 4 (nf4 with double quantization)."""
    require_package("bitsandbytes", "quantized", key)
    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    compute = torch.bfloat16 if dtype == "auto" else getattr(torch, dtype)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=compute
    )


def keep_gradients(model: nn.Module) -> None:
    """Keep bitsandbytes from packing 4-bit weights on a CPU with AVX512-BF16 instructions.

    It packs them in the first pass without gradients, such as an evaluation. No later pass has a gradient then, without
    an error; and a layer whose number of outputs 32 does not divide fails.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def saved_weights(name: str | Path) -> Iterator[tuple[Path, str, str, list[int]]]:
    """File, name, dtype and shape of each weight of a saved model in safetensors, by the headers of its files."""
    for file in weight_files(name):
        if file.suffix == ".safetensors":
            with safe_open(file, "np") as weights:
                for weight in weights.keys():  # noqa: SIM118  # it is no mapping
                    part = weights.get_slice(weight)
                    yield file, weight, part.get_dtype(), part.get_shape()


def weight_bytes(shape: list[int], kind: str, dtype: torch.dtype | None = None) -> int:
    """Count the bytes of a saved weight of some kind (F32, BF16, I8, ...), in another precision if that is given."""
    bits = int("".join(filter(str.isdigit, kind.split("_")[0])) or 8)
    return math.prod(shape) * (dtype.itemsize if dtype and kind in DTYPES else bits // 8)


def saved_bytes(name: str | Path, dtype: torch.dtype | None) -> int:
    """Count the bytes that a saved model's weights take in a precision, or in their own.

    0 for one that is not here, or whose files cannot be read: loading says why.
    """
    try:
        return sum(weight_bytes(shape, kind, dtype) for _, _, kind, shape in saved_weights(name))
    except (OSError, SafetensorError):
        return 0


def describe_precision(name: str | Path) -> str | None:
    """The precision of a model's weights on disk in words; None for a model that is not here."""
    files = weight_files(name)
    if not files:
        return None
    config = files[0].with_name("config.json")
    if files[0].suffix == ".gguf":
        return "GGUF"
    if config.exists() and (quantization := json.loads(config.read_text()).get("quantization_config")):
        return str(quantization.get("quant_method", "quantized"))
    return str(saved_dtype(name)).removeprefix("torch.")
