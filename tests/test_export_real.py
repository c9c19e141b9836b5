"""Exports of real models: what llama.cpp and onnxruntime read, compute and write is what transformers does.

Slow, and run where there are such models: `POTSTILL_REAL_MODELS=models make test-slow`, where models/ has folders
smollm2 (SmolLM2-135M-Instruct) and gemma3 (Gemma 3 270M).
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from potstill.models.chat import end_token_ids
from potstill.runs.formats.gguf_file import write_gguf
from potstill.runs.formats.graphs import CausalGraph
from potstill.runs.formats.llama_cpp import LlamaCpp
from potstill.runs.formats.onnx_graph import trace, write_onnx
from potstill.runs.formats.onnx_runtime import open_onnx
from test_export_gguf import PIECES, texts

pytest.importorskip("gguf")
pytest.importorskip("xllamacpp", reason="llama.cpp is not installed: pip install 'potstill[export]'")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

MODELS = Path(os.environ.get("POTSTILL_REAL_MODELS", "models"))
TEXT = (
    "The history of music covers the historical developments and evolution of music from prehistoric times to present "
    "day. In 1943, McCulloch and Pitts showed that networks of neurons can compute: x = 3.14 * (a + b).\n\n"
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return fibonacci(n - 1) + fibonacci(n - 2)\n\n"
    "Die Straße führt nach Zürich. Le café était fermé. Москва 東京 — 你好，世界! 😀 \t 100% of $1,000,000.\n"
)


class Real(NamedTuple):
    name: str
    model: Any
    tokenizer: Any
    gguf: Path


@pytest.fixture(scope="module", params=["smollm2", "gemma3"])
def real(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Real]:
    folder = MODELS / request.param
    if not (folder / "model.safetensors").exists():
        pytest.skip(f"no model in {folder}: set POTSTILL_REAL_MODELS to a folder with it")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    path = tmp_path_factory.mktemp("real") / "model.gguf"
    write_gguf(model, tokenizer, path, "f32")
    yield Real(request.param, model, tokenizer, path)
    path.unlink()


def far(loaded: Any, real: Real) -> tuple[float, float]:
    """The largest KL of a position, nats, and the largest distance of the log-probability of a token that follows."""
    ids = real.tokenizer(TEXT)["input_ids"]
    with torch.no_grad():
        expected = real.model(torch.tensor([ids])).logits[0].log_softmax(-1)
    actual = torch.from_numpy(np.concatenate([*loaded.logits(ids)])).log_softmax(-1)
    kl, following = (expected.exp() * (expected - actual)).sum(-1).max(), torch.tensor([ids[1:]]).T
    return float(kl), float((expected - actual)[:-1].gather(1, following).abs().max())


class _Params(ctypes.Structure):
    """The first fields of llama_context_params, as far as the types of its cache."""

    _fields_ = [("sizes", ctypes.c_uint32 * 4), ("others", ctypes.c_int32 * 9), ("flash_attention", ctypes.c_int32)]
    _fields_ += [("more", ctypes.c_int32 * 12), ("type_k", ctypes.c_int32), ("type_v", ctypes.c_int32)]


class Float32LlamaCpp(LlamaCpp):
    """llama.cpp with a cache in float32: by default it is in half precision, and flash attention computes so."""

    def _open(self, positions: int) -> None:
        defaults = self._library.llama_context_default_params

        def params() -> Any:
            values = defaults()
            fields = _Params.from_buffer(values)
            assert (fields.flash_attention, fields.type_k, fields.type_v) == (-1, 1, 1)  # auto, f16, f16
            fields.flash_attention = fields.type_k = fields.type_v = 0
            return values

        self._library = SimpleNamespace(**vars(self._library) | {"llama_context_default_params": params})
        super()._open(positions)


@pytest.mark.parametrize(
    ("kind", "program", "limit"),
    [("f32", Float32LlamaCpp, 1e-3), ("f32", LlamaCpp, 1e-2), ("f16", Float32LlamaCpp, 1e-2), ("f16", LlamaCpp, 3e-2)],
)
def test_llama_cpp_computes_what_transformers_does(
    real: Real, kind: Any, program: type[LlamaCpp], limit: float, tmp_path: Path
) -> None:
    """Where weights are in half precision its activations are too, and its GELU is a table in half precision."""
    path = real.gguf
    if kind != "f32":
        path = tmp_path / "model.gguf"
        write_gguf(real.model, real.tokenizer, path, kind)
    with program(path, 512) as loaded:
        kl, distance = far(loaded, real)
    print(f"{real.name} {kind} {program.__name__}: KL {kl:.2g}, log-probability {distance:.2g}")
    assert kl < 1e-3 and distance < (limit if real.name == "smollm2" else max(limit, 1e-2))


def test_onnxruntime_computes_what_transformers_does(real: Real, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="install it with pip install 'potstill[onnx]'")
    write_onnx(trace(real.model), real.model, real.tokenizer, tmp_path / "onnx", "f32")
    with CausalGraph(open_onnx, tmp_path / "onnx") as loaded:
        kl, distance = far(loaded, real)
    print(f"{real.name} onnx: KL {kl:.2g}, log-probability {distance:.2g}")
    assert kl < 1e-6 and distance < 1e-3


def test_tokenizers_agree_on_a_thousand_texts(real: Real) -> None:
    special = [token.content for token in real.tokenizer.added_tokens_decoder.values()][:24]
    with LlamaCpp(real.gguf, 512) as loaded:
        different = [
            text
            for text in [*texts(special), *PIECES, TEXT]
            if loaded.tokenize(text) != real.tokenizer(text, verbose=False)["input_ids"]
        ]
    assert different == []


CHATS = (
    [{"role": "user", "content": "What is 2 + 2?"}],
    [{"role": "system", "content": "Answer in one word."}, {"role": "user", "content": "The capital of France?"}],
    [
        {"role": "user", "content": "  Hi! 😀\n"},
        {"role": "assistant", "content": "Hello, 世界."},
        {"role": "user", "content": "Say <b>bye</b> & \"stop\"."},
    ],
)  # fmt: skip
# llama.cpp's server in a process of its own, as it does not end in this one.
SERVE = """
import json, os, sys, xllamacpp
path, chats, new_tokens = json.load(sys.stdin)
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.warmup, params.verbosity = path, 1024, False, 10
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
server = xllamacpp.Server(params)
answers = []
for chat in chats:
    answer = server.handle_chat_completions({"messages": chat, "max_tokens": new_tokens, "temperature": 0})
    answer = answer if isinstance(answer, dict) else json.loads(answer)
    choice = answer["choices"][0]
    answers.append([answer["__verbose"]["prompt"], answer["usage"]["prompt_tokens"], choice["finish_reason"],
                    choice["message"]["content"]])
with open(sys.argv[1], "w") as file:
    json.dump(answers, file)
os._exit(0)
"""


def test_chats_are_rendered_and_end_alike(real: Real, tmp_path: Path) -> None:
    tokenizer = real.tokenizer
    if tokenizer.chat_template is None:
        pytest.skip(f"{real.name} has no chat template")
    new_tokens, out = 60, tmp_path / "answers.json"
    question = json.dumps([str(real.gguf), CHATS, new_tokens])
    command = [sys.executable, "-c", SERVE, str(out)]
    subprocess.run(command, input=question.encode(), check=True, capture_output=True, timeout=900)
    for chat, (prompt, prompt_tokens, reason, content) in zip(CHATS, json.loads(out.read_text()), strict=True):
        expected = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        bos = tokenizer.bos_token if real.name == "gemma3" else ""  # which llama.cpp puts before the tokens
        assert prompt.removeprefix(bos) == expected.removeprefix(bos)
        ids = tokenizer(expected, add_special_tokens=False, return_tensors="pt")
        assert prompt_tokens == ids["input_ids"].shape[1]
        with torch.no_grad():
            written = real.model.generate(**ids, max_new_tokens=new_tokens, do_sample=False)[0, prompt_tokens:].tolist()
        ended = written[-1] in end_token_ids(tokenizer, real.model)
        assert reason == ("stop" if ended else "length")
        assert content.strip() == tokenizer.decode(written, skip_special_tokens=True).strip()


def test_generation_ends_where_it_does_in_transformers(real: Real) -> None:
    """Greedy, from the start of a list: to the end token where the model ends, else for as many tokens."""
    ends = end_token_ids(real.tokenizer, real.model)
    prompt = "Question: What is the capital of France?\nAnswer:"
    if real.tokenizer.chat_template is not None:
        prompt = real.tokenizer.apply_chat_template(CHATS[1], tokenize=False, add_generation_prompt=True)
    ids = real.tokenizer(prompt, add_special_tokens=real.name == "gemma3")["input_ids"]
    with torch.no_grad():
        own = real.model.generate(torch.tensor([ids]), max_new_tokens=48, do_sample=False)[0, len(ids) :].tolist()
    with LlamaCpp(real.gguf, 512) as loaded:
        more = real.tokenizer.convert_ids_to_tokens(sorted(loaded.ends() - ends))  # llama.cpp knows their names
        assert loaded.ends() >= ends and {*more} <= {"<|endoftext|>", "<reponame>", "<end_of_turn>", "</s>"}
        assert loaded.generate(ids, 48) == own
