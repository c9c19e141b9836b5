"""llama.cpp's C functions, by the standard library alone: as a program it reads a file in a process of its own.

llama.cpp ends the whole process at what it takes for impossible, such as two tokens of one text.
"""

from __future__ import annotations

import ctypes
import os
import sys
from ctypes import POINTER, c_bool, c_char_p, c_float, c_int8, c_int32, c_int64, c_size_t, c_uint32, c_void_p
from typing import Any

Log = ctypes.CFUNCTYPE(None, ctypes.c_int, c_char_p, c_void_p)


class Batch(ctypes.Structure):
    _fields_ = [
        ("n_tokens", c_int32),
        ("token", POINTER(c_int32)),
        ("embd", c_void_p),
        ("pos", POINTER(c_int32)),
        ("n_seq_id", POINTER(c_int32)),
        ("seq_id", POINTER(POINTER(c_int32))),
        ("logits", POINTER(c_int8)),
    ]


class ModelParams(ctypes.Structure):
    """Larger than llama_model_params: it is passed by address, and only defaults are used."""

    _fields_ = [("opaque", c_void_p * 64)]


class ContextParams(ctypes.Structure):
    """The first fields of llama_context_params, and more room than the others need."""

    _fields_ = [("n_ctx", c_uint32), ("n_batch", c_uint32), ("n_ubatch", c_uint32), ("n_seq_max", c_uint32)]
    _fields_ += [("opaque", c_void_p * 64)]


FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "llama_log_set": (None, [Log, c_void_p]),
    "llama_backend_init": (None, []),
    "llama_model_default_params": (ModelParams, []),
    "llama_context_default_params": (ContextParams, []),
    "llama_model_load_from_file": (c_void_p, [c_char_p, ModelParams]),
    "llama_init_from_model": (c_void_p, [c_void_p, ContextParams]),
    "llama_model_free": (None, [c_void_p]),
    "llama_free": (None, [c_void_p]),
    "llama_model_get_vocab": (c_void_p, [c_void_p]),
    "llama_model_n_ctx_train": (c_int32, [c_void_p]),
    "llama_vocab_n_tokens": (c_int32, [c_void_p]),
    "llama_vocab_is_eog": (c_bool, [c_void_p, c_int32]),
    "llama_n_ctx": (c_uint32, [c_void_p]),
    "llama_n_batch": (c_uint32, [c_void_p]),
    "llama_set_n_threads": (None, [c_void_p, c_int32, c_int32]),
    "llama_get_memory": (c_void_p, [c_void_p]),
    "llama_memory_clear": (None, [c_void_p, c_bool]),
    "llama_batch_init": (Batch, [c_int32, c_int32, c_int32]),
    "llama_batch_free": (None, [Batch]),
    "llama_decode": (c_int32, [c_void_p, Batch]),
    "llama_adapter_lora_init": (c_void_p, [c_void_p, c_char_p]),
    "llama_set_adapters_lora": (c_int32, [c_void_p, POINTER(c_void_p), c_size_t, POINTER(c_float)]),
    "llama_get_logits": (POINTER(c_float), [c_void_p]),
    "ggml_quantize_chunk": (c_size_t, [c_int32, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p]),
    "llama_tokenize": (c_int32, [c_void_p, c_char_p, c_int32, POINTER(c_int32), c_int32, c_bool, c_bool]),
}


def open_library(path: str) -> Any:
    """Open the library that has the functions.

    Raises:
        AttributeError: it has not all of them.
    """
    os.environ.setdefault("GGML_NO_BACKTRACE", "1")  # else a debugger prints a page where llama.cpp ends the process
    library = ctypes.CDLL(path)
    for name, (result, arguments) in FUNCTIONS.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


def _try_file(library: Any, model_path: str, adapter_path: str | None) -> None:
    """Load a model, and an adapter for it, and read one token, where llama.cpp does so."""
    library.llama_backend_init()
    model = library.llama_model_load_from_file(os.fsencode(model_path), library.llama_model_default_params())
    if not model or (adapter_path and not library.llama_adapter_lora_init(model, os.fsencode(adapter_path))):
        return
    context = library.llama_init_from_model(model, library.llama_context_default_params())
    if context:
        batch = library.llama_batch_init(1, 0, 1)
        batch.token[0], batch.pos[0], batch.n_seq_id[0], batch.logits[0], batch.n_tokens = 0, 0, 1, 1, 1
        batch.seq_id[0][0] = 0
        library.llama_decode(context, batch)


if __name__ == "__main__":
    _try_file(open_library(sys.argv[1]), *sys.argv[2:4], *[None] * (4 - len(sys.argv)))
