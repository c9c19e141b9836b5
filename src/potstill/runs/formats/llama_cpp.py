"""Run a GGUF file in llama.cpp itself, by the C functions of llama.h, which xllamacpp's extension module exports."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from ctypes import c_float, c_int32, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from potstill.errors import RunError, UserError, one_line
from potstill.models.locate import require_package
from potstill.runs.formats import llama_functions
from potstill.runs.formats.llama_functions import Log, open_library
from potstill.runs.formats.loaded import CHUNK, LoadedFile

BASE, ADAPTER = "base.gguf", "adapter.gguf"  # of a folder with an adapter and the model that it is for
_LOG_ERROR = 4  # level of ggml


@cache
def _library() -> Any:
    module = require_package("xllamacpp", "export", "export")
    try:
        library = open_library(module.xllamacpp.__file__)
    except AttributeError as error:
        raise UserError(
            f"export: expected an xllamacpp with the functions of llama.h, got {module.__version__}: {one_line(error)}."
            " Install xllamacpp 2026.5 or later on Linux or macOS."
        ) from None
    library.llama_log_set(_collect, None)
    library.llama_backend_init()
    return library


def quantize_rows(weight: np.ndarray, ggml_type: int, shape: tuple[int, ...]) -> np.ndarray:
    """Quantize a float32 matrix, as llama.cpp does without an importance matrix, to bytes of that shape."""
    raw = np.empty(shape, np.uint8)
    rows, columns = weight.shape
    _library().ggml_quantize_chunk(int(ggml_type), weight.ctypes.data, raw.ctypes.data, 0, rows, columns, None)
    return raw


def program_version() -> str:
    """What runs the files, for reports; a package that writes them is missing first."""
    require_package("gguf", "export", "export")
    return f"llama.cpp of xllamacpp {require_package('xllamacpp', 'export', 'export').__version__}"


def model_file(path: Path) -> Path:
    """The file of a model: itself, or that of the base in a folder with an adapter."""
    if not path.is_dir():
        return path
    if not (path / BASE).is_file():
        raise UserError(
            f"student: expected {BASE}, the model that the adapter is for, beside {path / ADAPTER}, got none. Put it "
            "there."
        )
    return path / BASE


_errors: list[str] = []


@Log
def _collect(level: int, text: bytes, _: Any) -> None:
    """Keep llama.cpp's messages about a failure, and print nothing; dots of its progress have a higher level."""
    if level == _LOG_ERROR:
        _errors.append(text.decode(errors="replace"))


def check_survives(path: Path) -> None:
    """Load a file in another process first: llama.cpp ends the whole process at some files.

    Raises:
        RunError: it does so at this one.
    """
    module = require_package("xllamacpp", "export", "export")
    files = [str(model_file(path)), *([str(path / ADAPTER)] if path.is_dir() else [])]
    command = [sys.executable, "-I", llama_functions.__file__, module.xllamacpp.__file__, *files]
    tried = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, check=False)
    if tried.returncode < 0:
        messages = tried.stderr.decode(errors="replace").splitlines()
        reason = next((line for line in messages if "failed" in line), signal.Signals(-tried.returncode).name)
        raise RunError(
            f"export: expected a file that llama.cpp loads, got {path}, at which it ends: {one_line(reason)}"
        )


class LlamaCpp(LoadedFile):
    """A GGUF file, or a folder with an adapter and its base, loaded by llama.cpp.

    Raises:
        RunError: llama.cpp does not load it.
    """

    def __init__(self, path: Path, positions: int | None = None) -> None:
        self._library, self._context, self._model, self._adapter = _library(), None, None, None
        self.program = program_version()
        _errors.clear()
        params = self._library.llama_model_default_params()
        self._model = self._library.llama_model_load_from_file(os.fsencode(model_file(path)), params)
        if self._model and path.is_dir():  # before the context, which has room for what is loaded
            self._adapter = self._library.llama_adapter_lora_init(self._model, os.fsencode(path / ADAPTER))
        if not self._model or (path.is_dir() and not self._adapter):
            raise RunError(f"export: expected a file that llama.cpp loads, got {path}: {one_line(' '.join(_errors))}")
        self._vocabulary = self._library.llama_model_get_vocab(self._model)
        self.num_tokens = int(self._library.llama_vocab_n_tokens(self._vocabulary))
        self.context_length = int(self._library.llama_model_n_ctx_train(self._model))
        self._open(min(positions or self.context_length, self.context_length))

    def _open(self, positions: int) -> None:
        params = self._library.llama_context_default_params()
        # llama.cpp rounds contexts up to whole blocks of its cache.
        params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max = max(positions, 256), CHUNK, CHUNK, 1
        self._context = self._library.llama_init_from_model(self._model, params)
        if not self._context:
            raise RunError(f"export: expected a context of {positions} tokens, got none: {one_line(' '.join(_errors))}")
        sizes = self._library.llama_n_ctx(self._context), self._library.llama_n_batch(self._context)
        if sizes[0] < params.n_ctx or sizes[1] != CHUNK:  # the fields of another version lie elsewhere
            raise UserError(f"export: expected an xllamacpp whose contexts are as asked for, got {sizes}. Update it.")
        if self._adapter:
            self._library.llama_set_adapters_lora(self._context, c_void_p(self._adapter), 1, c_float(1.0))
        threads = torch.get_num_threads()
        self._library.llama_set_n_threads(self._context, threads, threads)

    def close(self) -> None:
        """Free the model, with its adapter, and its context."""
        if self._context:
            self._library.llama_free(self._context)
        if self._model:
            self._library.llama_model_free(self._model)
        self._context = self._model = None

    def ends(self) -> frozenset[int]:
        """The tokens that end a generated text."""
        return frozenset(i for i in range(self.num_tokens) if self._library.llama_vocab_is_eog(self._vocabulary, i))

    def tokenize(self, text: str, *, special: bool = True) -> list[int]:
        """Split a text, with BOS if the file says so; with `special`, the names of special tokens in it are tokens."""
        raw = text.encode("utf-8", errors="replace")
        room = (c_int32 * (len(raw) + 16))()
        number = self._library.llama_tokenize(self._vocabulary, raw, len(raw), room, len(room), True, special)
        return list(room[:number])

    def _clear(self) -> None:
        self._library.llama_memory_clear(self._library.llama_get_memory(self._context), True)

    def _decode(self, ids: Sequence[int], start: int) -> np.ndarray:
        batch = self._library.llama_batch_init(len(ids), 0, 1)
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, start + i, 1, 1
            batch.seq_id[i][0] = 0
        batch.n_tokens = len(ids)
        status = self._library.llama_decode(self._context, batch)
        self._library.llama_batch_free(batch)
        if status:
            raise RunError(f"export: expected llama.cpp to read {len(ids)} tokens, got status {status}.")
        logits = self._library.llama_get_logits(self._context)  # the next call overwrites them
        return np.ctypeslib.as_array(logits, (len(ids), self.num_tokens)).copy()
