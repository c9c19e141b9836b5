"""Find a model's files: in a folder, in a GGUF file, or on the Hub, which is given little time to answer."""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from threading import Thread
from typing import Any

from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, HFValidationError, RepositoryNotFoundError
from transformers.utils import quantization_config

from potstill.errors import ModelError, UserError, one_line
from potstill.models.checksums import check_folder

HUB_SECONDS = 2.0  # to wait for an answer of the Hub, unless HF_HUB_ETAG_TIMEOUT is set

# Single files that are no model which can be trained or taught from, by their suffix: what they are, and what to do.
FILES = {
    ".safetensors": "a file of weights alone. Name its folder, which also has config.json and the tokenizer",
    ".json": "a file of a model. Name its folder",
    **dict.fromkeys(
        (".bin", ".pt", ".pth", ".ckpt"),
        "a pickle, which can run code when it is loaded. Save the model with save_pretrained, and name that folder",
    ),
    **dict.fromkeys(
        (".onnx", ".tflite", ".mlmodel", ".engine"),
        "an export for inference. Name the model that it was made from",
    ),
}


@dataclass(frozen=True)
class ModelLocation:
    """What from_pretrained is given to load a model: a folder or a name on the Hub, and options."""

    path: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def folder(self) -> Path | None:
        """The folder on this disk that has the files; None for a model that is not downloaded."""
        if Path(self.path).is_dir():
            return Path(self.path)
        try:
            config = try_to_load_from_cache(self.path, "config.json")
        except HFValidationError:  # a path that does not exist
            return None
        return Path(config).parent if isinstance(config, str) else None


def require_package(package: str, extra: str, key: str) -> Any:
    """Import an optional package; a UserError says how to install it."""
    try:
        return import_module(package)
    except ImportError:
        hint = f"Install it with pip install 'potstill[{extra}]'."
        raise UserError(f"{key}: expected the package {package}, got none. {hint}") from None


def locate(name: str, key: str) -> ModelLocation:
    """Find a model by its path or its name on the Hub.

    Raises:
        ModelError: there is none, a file of it has changed since Potstill saved it, or the Hub cannot be reached; in
            seconds, and with what to do.
    """
    path = Path(name).expanduser()
    if not name.strip():
        raise ModelError(f"{key}: expected a folder or a model's name, got {name!r}. Name one.")
    if path.is_dir():
        check_folder(path, key)
        return _in_folder(path, key)
    if path.is_file():
        if path.suffix == ".gguf":
            return _in_gguf(path, key)
        what = FILES.get(path.suffix.lower(), "a file. Name the folder of a model")
        raise ModelError(f"{key}: expected a folder with a model, got {name}, {what}.")
    if hint := _other_notation(name):
        raise ModelError(f"{key}: expected a folder or a model's name, got {one_line(name)}. {hint}")
    matches = sorted(str(match) for match in path.parent.glob(path.name)) if set("*?[") & set(path.name) else []
    if matches:
        raise ModelError(
            f"{key}: expected one folder with a model, got the pattern {name}, which matches {len(matches)}. Name one, "
            f"such as {matches[0]}."
        )
    near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*") if p.is_dir()], n=1, cutoff=0.8)
    local = name.count("/") > 1 or name.startswith((".", "/", "~")) or ("/" in name and path.parent.is_dir())
    if local or near or set("*?[") & set(name):
        hint = f"Did you mean {path.parent / near[0]}?" if near else "Check the path."
        raise ModelError(f"{key}: expected a folder with a model, got {name}, which is not one. {hint}")
    return _on_hub(name, key)


def _other_notation(name: str) -> str | None:
    """What to write in place of a URL, or of a name with a revision; None for other names."""
    if url := re.match(r"(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/([^/]+/[^/?#]+)|hf://([^/]+/[^/@]+)", name):
        return f"Write {url[1] or url[2]}."
    if name.startswith("file://"):
        return f"Write {name.removeprefix('file://')}."
    if "://" in name:
        return "Download it, and name the folder."
    if revision := re.fullmatch(r"([\w.-]+(?:/[\w.-]+)?)@([\w./-]+)", name):
        download = f"hf download {revision[1]} --revision {revision[2]} --local-dir FOLDER"
        return f"For a revision run `{download}`, and name that folder."
    if re.fullmatch(r"[\w.-]+:[\w.-]+", name):
        return "A name of Ollama is none of the Hub: name the model that it was converted from."
    return None


def weight_files(name: str | Path) -> list[Path]:
    """The files of a model's or an adapter's weights that are on this disk, without other variants of them."""
    path = Path(name).expanduser()
    if path.is_file():
        return [path]
    if (folder := ModelLocation(str(path)).folder) is None:
        return []
    for pattern in ("adapter_model.safetensors", "model.safetensors", "model-*-of-*.safetensors", "*.safetensors"):
        if files := sorted(folder.glob(pattern)):
            return files
    return sorted(folder.glob("*.gguf"))


def _in_folder(folder: Path, key: str) -> ModelLocation:
    for index in folder.glob("*.index.json"):
        _check_index(index, key)
    if (folder / "config.json").exists():
        return ModelLocation(str(folder))
    files = sorted(file for file in folder.glob("*.gguf") if not file.name.startswith("mmproj"))  # a vision tower
    if len(files) > 1:
        raise ModelError(
            f"{key}: expected one GGUF file in {folder}, got {len(files)}. Name one of them, such as {files[0]}; merge "
            "parts of one model with llama-gguf-split --merge."
        )
    return _in_gguf(files[0], key) if files else ModelLocation(str(folder))


def _check_index(path: Path, key: str) -> None:
    """Check that an index of weights names files of its own folder alone."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        names = {*content["weight_map"].values()}
        outside = [name for name in names if Path(name).name != name]
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return  # not an index of weights, or damaged, which is an error where it is read
    if outside:
        raise ModelError(
            f"{key}: expected the files of weights in {path.parent}, got {outside[0]} in {path.name}. "
            "Copy it there, and name it without a folder."
        )


def _in_gguf(path: Path, key: str) -> ModelLocation:
    """Read a GGUF file as a plain model: its weights are dequantized."""
    if re.search(r"-\d{5}-of-\d{5}\.gguf$", path.name):
        raise ModelError(
            f"{key}: expected a whole GGUF file, got {path}, a part of one. Merge the parts with llama-gguf-split "
            "--merge, and name the result."
        )
    require_package("gguf", "gguf", key)
    options: dict[str, Any] = {"gguf_file": path.name}
    if hasattr(quantization_config, "GgufConfig"):  # of later versions, which would else keep the quantized blocks
        options["quantization_config"] = quantization_config.GgufConfig(dequantize=True)
    return ModelLocation(str(path.parent), options)


def _on_hub(name: str, key: str) -> ModelLocation:
    """Check a name on the Hub; where the Hub cannot be reached, take what was downloaded before."""
    error = None
    try:
        downloaded = try_to_load_from_cache(name, "config.json")
    except HFValidationError:
        raise ModelError(f"{key}: expected a folder or a model's name, got {one_line(name)}. Check the path.") from None
    if not constants.is_offline_mode():
        error = _hub_error(name)
        if error is None:
            return ModelLocation(name)
    site = constants.ENDPOINT.removeprefix("https://")
    if isinstance(error, GatedRepoError):
        raise ModelError(
            f"{key}: expected a model that you may read, got {name}, which is gated. Accept its terms at "
            f"{constants.ENDPOINT}/{name}, and log in with `hf auth login`."
        )
    if isinstance(error, RepositoryNotFoundError):
        raise ModelError(
            f"{key}: expected a folder or a model on {site}, got {name}, which is neither, or private. Check the "
            "spelling; for a private model log in with `hf auth login`."
        )
    if isinstance(error, EntryNotFoundError):
        raise ModelError(
            f"{key}: expected a model with config.json, got {name} on {site}, which has none. An adapter or a GGUF "
            f"file is read from a folder: hf download {name} --local-dir FOLDER, and name that."
        )
    if isinstance(downloaded, str):
        return ModelLocation(str(Path(downloaded).parent))
    why = "HF_HUB_OFFLINE is set" if error is None else f"{site} cannot be reached"
    raise ModelError(
        f"{key}: expected a folder or a downloaded model, got {name}, which is neither, and {why}. Name a folder, or "
        f"run `hf download {name}` where there is a connection and copy {constants.HF_HUB_CACHE} here."
    )


def _hub_error(name: str) -> Exception | None:
    """Ask the Hub for a model's config; the error, or None where it is there."""
    seconds = float(os.environ.get("HF_HUB_ETAG_TIMEOUT", HUB_SECONDS))
    try:
        _within(seconds, lambda: get_hf_file_metadata(hf_hub_url(name, "config.json"), timeout=seconds))
    except Exception as error:  # of the Hub, of httpx, of the resolver, or of a name that cannot be one
        return error
    return None


def _within(seconds: float, call: Callable[[], Any]) -> Any:
    """Call with a limit of time, which the resolver of host names does not have."""
    result: Future[Any] = Future()

    def work() -> None:
        try:
            result.set_result(call())
        except Exception as error:
            result.set_exception(error)

    Thread(target=work, daemon=True).start()
    return result.result(timeout=seconds)
