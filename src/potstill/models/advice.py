"""Say why a model cannot be loaded and what to do: by the files of its folder, else by the error."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from potstill.errors import ModelError, one_line
from potstill.models.locate import ModelLocation

LFS = b"version https://git-lfs"  # what stands in place of a file that Git LFS did not fetch
INDEX = "model.safetensors.index.json"

# Folders of other formats, by a file of theirs: what they are, and what to do.
FORMATS = {
    "*.onnx": ("an ONNX export", "Name the model that it was made from."),
    "*.tflite": ("a TFLite export", "Name the model that it was made from."),
    "*.mlpackage": ("a Core ML export", "Name the model that it was made from."),
    "openvino_model.xml": ("an OpenVINO export", "Name the model that it was made from."),
    "weights.npz": ("a model of MLX", "Name the model that it was made from."),
    "params.json": ("a model in its maker's own format", "Name the version in the format of transformers."),
    "*.nemo": ("a model of NeMo", "Export it to the format of transformers."),
    "tf_model.h5": ("weights of TensorFlow", "Convert them with transformers 4: from_pretrained(..., from_tf=True)."),
    "flax_model.msgpack": (
        "weights of Flax",
        "Convert them with transformers 4: from_pretrained(..., from_flax=True).",
    ),
}
PICKLES = ("pytorch_model*.bin", "adapter_model.bin", "*.pth", "*.pt", "*.ckpt")
TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.*", "spiece.model", "*.tiktoken")

QUANTIZERS = {"gptq": "gptqmodel", "hqq": "hqq", "torchao": "torchao"}  # packages that transformers does not name
AGAIN = "Download or copy it again: hf download NAME resumes."


class Cause(NamedTuple):
    """What was found in place of a model, and what to do."""

    got: str
    hint: str


def unreadable(key: str, expected: str, name: str, location: ModelLocation, error: Exception) -> ModelError:
    """Explain in one line why a model cannot be loaded."""
    if "gguf_file" in location.options:
        cause = Cause(
            f"a GGUF file that transformers {version('transformers')} does not read ({_short(error)}).",
            "Name the model that it was converted from, in safetensors.",
        )
    else:
        folder = location.folder
        cause = (folder and next(_causes(folder, expected), None)) or _of_error(error, expected, folder)
    return ModelError(f"{key}: expected {expected} in {name}, got {cause.got} {cause.hint}".strip())


def _causes(folder: Path, expected: str) -> Iterator[Cause]:
    """Look for what is wrong with a folder, from its first cause to what follows from it."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    if not [*folder.iterdir()]:
        yield Cause("an empty folder.", "Download or copy the model again.")
    for file in files:
        if file.stat().st_size < 1024 and file.read_bytes().startswith(LFS):
            yield Cause(f"a pointer of Git LFS in place of {file.name}.", "Run `git lfs pull` there.")
    if "tokenizer" in expected:
        if not any([*folder.glob(pattern)] for pattern in TOKENIZERS):
            yield Cause(
                "no tokenizer.",
                "Save the original model's there: AutoTokenizer.from_pretrained(ORIGINAL).save_pretrained(FOLDER).",
            )
        return
    yield from _without_config(folder)
    config = _json(folder / "config.json")
    if config is None:
        yield Cause("a config.json that is not JSON.", "Download or copy it again.")
    elif (folder / "config.json").exists():
        yield from _of_config(config)
    if "config.json" not in expected:
        yield from _of_weights(folder, config or {})


def _without_config(folder: Path) -> Iterator[Cause]:
    if (folder / "config.json").exists() or (folder / "adapter_config.json").exists():
        return
    yield from _of_formats(folder)
    within = [*folder.glob("*/config.json")] or [*folder.glob("*/*/config.json")]
    if within:
        newest = max(within, key=lambda path: path.stat().st_mtime)
        yield Cause("no config.json.", f"Did you mean {newest.parent}?")
    yield Cause("no config.json.", "Check the path, or copy the file from the original model.")


def _of_formats(folder: Path) -> Iterator[Cause]:
    for pattern, (what, hint) in FORMATS.items():
        if [*folder.glob(pattern)]:
            yield Cause(f"{what}.", hint)


def _of_config(config: dict[str, Any]) -> Iterator[Cause]:
    kind = config.get("model_type")
    if kind in CONFIG_MAPPING:
        return
    if "auto_map" in config:
        yield Cause(
            f"a {kind or 'model'} that needs code of its own, which is not run.",
            "Name a version of it in the format of transformers.",
        )
    yield Cause(
        f"the model_type {kind}, which transformers {version('transformers')} does not know.",
        "Upgrade it with pip install -U transformers, or name another model.",
    )


def _of_weights(folder: Path, config: dict[str, Any]) -> Iterator[Cause]:
    index = _json(folder / INDEX) or {}
    shards = sorted({*index.get("weight_map", {}).values()})
    absent = [shard for shard in shards if not (folder / shard).exists()]
    if absent:
        yield Cause(f"{len(shards) - len(absent)} of {len(shards)} files of weights, without {absent[0]}.", AGAIN)
    weights = sorted(folder.glob("*.safetensors"))
    for file in weights:
        try:
            with safe_open(file, "pt"):
                pass
        except (SafetensorError, OSError):
            yield Cause(f"{file.name}, which is cut off or damaged ({file.stat().st_size:,} bytes).", AGAIN)
    if "quantization" in config and "quant_method" not in config.get("quantization_config", {}):
        yield Cause("weights quantized by MLX.", "Name the model that it was made from.")
    if weights:
        return
    yield from _of_formats(folder)
    pickles = [path.name for pattern in PICKLES for path in sorted(folder.glob(pattern))]
    if pickles and "adapter" in pickles[0]:
        yield Cause(f"a pickle, {pickles[0]}.", "Save it again with peft, which writes safetensors.")
    elif pickles:
        load = "from transformers import AutoModelForCausalLM as M"
        save = f"M.from_pretrained('{folder}', use_safetensors=False).save_pretrained('{folder}')"
        yield Cause(
            f"weights in {pickles[0]}, a pickle, which can run code when it is loaded.",
            f'If you trust it, convert it once: python -c "{load}; {save}"',
        )
    yield Cause("no file of weights.", AGAIN)


def _of_error(error: Exception, expected: str, folder: Path | None) -> Cause:
    """The error itself; for a package that is missing, how to install it."""
    reason, config = one_line(error), (folder and _json(folder / "config.json")) or {}
    if "tokenizer" in expected and re.search("sentencepiece|tiktoken|protobuf", reason):
        return Cause(
            "a tokenizer that needs another package.", "Install it with pip install sentencepiece tiktoken protobuf."
        )
    if isinstance(error, ImportError):
        method = str((config.get("quantization_config") or {}).get("quant_method", ""))
        command = re.search(r"pip install (?:-U )?([^\s`'\"]+)", reason)
        package = QUANTIZERS.get(method) or (command and command[1])
        what = f"weights quantized by {method}" if method else "a model"
        hint = f"Install it with pip install '{package}', or name another version of the model." if package else ""
        return Cause(f"{what} that need a package: {_short(error)}.", hint)
    if "Unrecognized configuration class" in reason:
        return Cause(f"a {config.get('model_type', 'model')}, of which there is none.", "Check the recipe's task.")
    return Cause(f"{type(error).__name__}: {_short(error)}.", "")


def _short(error: Exception) -> str:
    reason = one_line(error)
    return reason if len(reason) <= 300 else reason[:300] + "..."


def _json(path: Path) -> dict[str, Any] | None:
    """The content of a file: empty if there is none, None if it is no JSON object."""
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return None
    return content if isinstance(content, dict) else None
