"""Say why a model cannot be loaded and what to do: by the files of its folder, else by the error."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
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
# Checkpoints of trainers that shard, by a file or folder of theirs.
SHARDED = {
    "zero_to_fp32.py": (
        "a checkpoint of DeepSpeed",
        "Run its zero_to_fp32.py with --safe_serialization, and name that folder with config.json.",
    ),
    "pytorch_model_fsdp*": ("a checkpoint of FSDP", "Run accelerate merge-weights on it, and add config.json."),
}
PICKLES = ("pytorch_model*.bin", "adapter_model.bin", "*.pth", "*.pt", "*.ckpt")
VOCABULARIES = ("tokenizer.json", "*.model", "vocab.*", "*.tiktoken", "*.vocab", "*-vocab.json", "merges.txt")
TOKENIZERS = ("tokenizer_config.json", *VOCABULARIES)

QUANTIZERS = {"gptq": "gptqmodel", "hqq": "hqq", "torchao": "torchao"}  # packages that transformers does not name
OTHER_TASK = "Unrecognized configuration class"  # of transformers' error
AGAIN = "Download or copy it again: hf download NAME resumes."


class Cause(NamedTuple):
    """What was found in place of a model, and what to do."""

    got: str
    hint: str


def unreadable(key: str, expected: str, name: str, location: ModelLocation, error: BaseException) -> ModelError:
    """Explain in one line why a model cannot be loaded."""
    if "gguf_file" in location.options and OTHER_TASK not in str(error):
        cause = Cause(
            f"a GGUF file that transformers {version('transformers')} does not read ({_short(error)}).",
            "Name the model that it was converted from, in safetensors.",
        )
    else:
        folder = None if "gguf_file" in location.options else location.folder
        cause = (folder and _first_cause(folder, expected)) or _of_error(error, expected, folder)
    return ModelError(f"{key}: expected {expected} in {name}, got {cause.got} {cause.hint}".strip())


def _first_cause(folder: Path, expected: str) -> Cause | None:
    with suppress(TypeError, ValueError, AttributeError, LookupError, OSError):  # a file holds anything
        return next(_causes(folder, expected), None)
    return None


def _causes(folder: Path, expected: str) -> Iterator[Cause]:
    """Look for what is wrong with a folder, from its first cause to what follows from it."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    if not [*folder.iterdir()]:
        yield Cause("an empty folder.", "Download or copy the model again.")
    for file in files:
        if file.stat().st_size < 1024 and file.read_bytes().startswith(LFS):
            yield Cause(f"a pointer of Git LFS in place of {file.name}.", "Run `git lfs pull` there.")
    if "tokenizer" in expected:
        yield from _of_tokenizer(folder)
        return
    if "adapter" in expected and _json(folder / "adapter_config.json") is None:
        yield Cause("an adapter_config.json that is not JSON.", AGAIN)
    yield from _without_config(folder)
    config = _json(folder / "config.json")
    if config is None:
        yield Cause("a config.json that is not JSON.", "Download or copy it again.")
    elif (folder / "config.json").exists():
        yield from _of_config(config)
    if "config.json" not in expected:
        yield from _of_weights(folder, config or {})


def _of_tokenizer(folder: Path) -> Iterator[Cause]:
    hint = "Save the original model's there: AutoTokenizer.from_pretrained(ORIGINAL).save_pretrained(FOLDER)."
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if _json(folder / name) is None:
            yield Cause(f"a {name} that is not JSON.", hint)
    if not has_tokenizer(folder):
        yield from _within(folder, "no tokenizer.", ("config.json", *TOKENIZERS[:2]))
        yield Cause("no tokenizer.", hint)
    if not any([*folder.glob(pattern)] for pattern in VOCABULARIES):
        yield Cause("a tokenizer without its vocabulary, such as tokenizer.json.", hint)


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder has a file of a tokenizer."""
    return any([*folder.glob(pattern)] for pattern in TOKENIZERS)


def _without_config(folder: Path) -> Iterator[Cause]:
    if (folder / "config.json").exists() or (folder / "adapter_config.json").exists():
        return
    yield from _of_formats(folder)
    yield from _within(folder, "no config.json.", ("config.json", "adapter_config.json"))
    yield Cause("no config.json.", "Check the path, or copy the file from the original model.")


def _within(folder: Path, got: str, names: Iterable[str]) -> Iterator[Cause]:
    """The newest folder within one, such as a checkpoint of a run, that has one of some files."""
    for depth in ("*", "*/*"):
        if inner := [path for name in names for path in folder.glob(f"{depth}/{name}")]:
            yield Cause(got, f"Did you mean {max(inner, key=lambda path: path.stat().st_mtime).parent}?")
            return


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
    index = _json(folder / INDEX)
    if index is None:
        yield Cause(f"a {INDEX} that is not JSON.", AGAIN)
    shards = sorted({*(index or {}).get("weight_map", {}).values()})
    absent = [shard for shard in shards if not (folder / shard).exists()]
    if absent:
        yield Cause(f"{len(shards) - len(absent)} of {len(shards)} files of weights, without {absent[0]}.", AGAIN)
    weights = sorted(folder.glob("*.safetensors"))
    if not (folder / "model.safetensors").exists() and not shards and [*folder.glob("consolidated*")]:
        yield Cause("a model in its maker's own format.", "Name the version in the format of transformers.")
    for file in weights:
        try:
            with safe_open(file, "pt"):
                pass
        except (SafetensorError, OSError):
            yield Cause(f"{file.name}, which is cut off or damaged ({file.stat().st_size:,} bytes).", AGAIN)
    if "quantization" in config and "quant_method" not in config.get("quantization_config", {}):
        yield Cause("weights quantized by MLX.", "Name the model that it was made from.")
    named = (folder / INDEX, folder / "model.safetensors", folder / "adapter_model.safetensors")
    if weights and not any(path.exists() for path in named):
        number = f"{weights[0].name}" + (f" and {len(weights) - 1} more" if len(weights) > 1 else "")
        yield Cause(
            f"weights in {number}, but neither model.safetensors nor {INDEX}.",
            "Rename a single file, or copy the index from the original model.",
        )
    if weights:
        return
    for file in folder.glob("*.gguf"):
        yield Cause("no safetensors, but a GGUF file.", f"Name {file}.")
    yield from _of_formats(folder)
    yield from _of_pickles(folder, config)
    yield Cause("no file of weights.", AGAIN)


def _of_pickles(folder: Path, config: dict[str, Any]) -> Iterator[Cause]:
    for pattern, (what, hint) in SHARDED.items():
        if [*folder.glob(pattern)]:
            yield Cause(f"{what}.", hint)
    pickles = [path.name for pattern in PICKLES for path in sorted(folder.glob(pattern))]
    if not pickles:
        return
    if "adapter" in pickles[0]:
        yield Cause(f"a pickle, {pickles[0]}.", "Save it again with peft, which writes safetensors.")
    got = f"weights in {pickles[0]}, a pickle, which can run code when it is loaded."
    if not pickles[0].startswith("pytorch_model"):
        yield Cause(got, "Load it where it was made, and save the model with save_pretrained.")
    architecture = next(iter(config.get("architectures") or ()), "AutoModelForCausalLM")
    load = f"from transformers import {architecture} as M"
    save = f"M.from_pretrained('{folder}', use_safetensors=False).save_pretrained('{folder}')"
    yield Cause(got, f'If you trust it, convert it once: python -c "{load}; {save}"')


def _of_error(error: BaseException, expected: str, folder: Path | None) -> Cause:
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
    if isinstance(error, KeyError) and "adapter" in expected:
        kind = f"an adapter of the kind {error.args[0]}, which peft {version('peft')} does not know."
        return Cause(kind, "Upgrade it with pip install -U peft, or merge the adapter where it was made.")
    if OTHER_TASK in reason and config.get("is_encoder_decoder"):
        return Cause(f"a {config.get('model_type')}, an encoder and a decoder.", "Name a model that is one of them.")
    if OTHER_TASK in reason:
        return Cause(f"a {config.get('model_type', 'model')}, of which there is none.", "Check the recipe's task.")
    return Cause(f"{type(error).__name__}: {_short(error)}.", "")


def _short(error: BaseException) -> str:
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
