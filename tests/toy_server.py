"""A toy model behind a real HTTP server with vLLM's API and faults on demand, and what it is compared with."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from potstill.losses.alignment import Alignment
from potstill.losses.targets import SparseTargets
from potstill.runs.build import BuiltRun, build_run
from potstill.runs.config.run import Recipe
from potstill.teachers.model import ModelTeacher
from potstill.teachers.teacher import Teacher, TeacherOutput


class LiveTopK(Teacher):
    """The top_k of a model that sits here."""

    def __init__(self, model: Any, top_k: int) -> None:
        self.model, self.top_k = ModelTeacher(model), top_k

    def __call__(self, batch: Mapping[str, Tensor], alignment: Alignment) -> TeacherOutput:
        kept = self.model(batch, alignment).targets.dense().log_softmax(-1).topk(self.top_k)
        return TeacherOutput(SparseTargets(kept.indices, kept.values))


def prepared_with_top_k(recipe: Recipe) -> BuiltRun:
    """`prepare`, but a model that sits here gives its 20 likeliest tokens alone."""
    built = build_run(recipe)
    return built if built.loaded.model is None else replace(built, teacher=LiveTopK(built.loaded.model, 20))


def logged(directory: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    kept = ("step", "loss", "logits", "labels", "eval_loss", "eval_cross_entropy")
    return [{key: line[key] for key in kept if key in line} for line in lines]


FAULTS = ("500", "503", "429", "date", "cut", "malformed", "hang", "closed")


class ToyServer:
    """Serves a model, under the name "toy" unless changed, until `close`.

    Args:
        model: a causal language model.
        tokenizer: how the server reads token ids.
        scores_prompts: whether it has prompt_logprobs and /detokenize, as vLLM does and OpenAI does not.
    """

    def __init__(self, model: Any, tokenizer: Any, *, scores_prompts: bool = True) -> None:
        self.model, self.tokenizer, self.scores_prompts = model.eval(), tokenizer, scores_prompts
        self.name = "toy"
        self.detokenizes = scores_prompts
        self.faults: list[str] = []  # the faults of the next requests to /v1/completions
        self.change: Any = None  # what is done to an answer of /v1/completions
        self.key: str | None = None  # the only key that is let in
        self.refused: set[str] = set()  # keys of /v1/completions that it does not know
        self.requests: list[dict[str, Any]] = []  # bodies of /v1/completions
        self.at_once = self.most_at_once = 0
        self.lock = threading.Lock()
        self._gone = threading.Event()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._http.server_port}"

    def close(self) -> None:
        self._gone.set()
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    def answer(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        limit = self.model.config.max_position_embeddings
        if path == "/v1/models":
            return 200, {"data": [{"id": self.name, "max_model_len": limit}, {"id": "other"}]}
        if path == "/detokenize" and self.detokenizes:
            return 200, {"prompt": self.tokenizer.decode(body["tokens"])}
        if path != "/v1/completions":
            return 404, {"detail": "Not Found"}
        if body["model"] != self.name:
            return 404, {"error": {"message": f"The model `{body['model']}` does not exist."}}
        if unknown := self.refused & {*body}:
            return 400, {"error": {"message": f"Unrecognized request argument supplied: {unknown.pop()}"}}
        prompt = body["prompt"] if isinstance(body["prompt"], list) else self.tokenizer(body["prompt"])["input_ids"]
        if len(prompt) + body["max_tokens"] > limit:
            return 400, {"error": {"message": f"the prompt is longer than the maximum model length of {limit}"}}
        if body.get("prompt_logprobs", 0) > 20:
            return 400, {"error": {"message": "Requested prompt logprobs greater than max allowed: 20"}}
        choices = [
            {"index": i, "text": f"{self.tokenizer.decode(prompt)}!{i}", "finish_reason": ("stop", "length")[i % 2]}
            for i in range(body.get("n", 1))
        ]
        if "prompt_logprobs" in body and self.scores_prompts:
            choices[0]["prompt_logprobs"] = self.prompt_logprobs(prompt, body["prompt_logprobs"])
        return 200, {"choices": choices[::-1]}

    @torch.no_grad()
    def prompt_logprobs(self, prompt: list[int], k: int) -> list[Any]:
        with self.lock:
            log_probs = self.model(input_ids=torch.tensor([prompt])).logits[0].log_softmax(-1)
        entries: list[Any] = [None]
        for token, at in zip(prompt[1:], log_probs, strict=False):
            likeliest = at.topk(k).indices.tolist()
            entries.append(
                {
                    str(one): {"logprob": max(float(at[one]), -9999.0), "decoded_token": self.tokenizer.decode([one])}
                    for one in dict.fromkeys([token, *likeliest])
                }
            )
        return entries

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self.reply()

            do_POST = do_GET  # noqa: N815

            def reply(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or b"{}")
                if server.key and self.headers.get("Authorization") != f"Bearer {server.key}":
                    self.send(401, {"error": {"message": f"Incorrect key: {self.headers.get('Authorization')}"}})
                    return
                fault = ""
                if self.path == "/v1/completions":
                    with server.lock:
                        server.requests.append(body)
                        fault = server.faults.pop(0) if server.faults else ""
                        server.at_once += 1
                        server.most_at_once = max(server.most_at_once, server.at_once)
                try:
                    status, answer = server.answer(self.path, body)
                    if server.change is not None and self.path == "/v1/completions" and status == 200:
                        answer = server.change(answer)
                    self.fail(fault) if fault else self.send(status, answer)
                finally:
                    if self.path == "/v1/completions":
                        with server.lock:
                            server.at_once -= 1

            def send(self, status: int, answer: Any, lost: int = 0, **headers: str) -> None:
                data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name.replace("_", "-"), value)
                self.send_header("Content-Length", str(len(data) + lost))
                self.end_headers()
                self.wfile.write(data)
                self.close_connection = lost > 0

            def fail(self, fault: str) -> None:
                if fault in ("500", "503"):
                    self.send(int(fault), b"a stack trace")
                elif fault == "429":
                    self.send(429, {"error": {"message": "slow down"}}, Retry_After="0.01")
                elif fault == "date":
                    self.send(429, b"", Retry_After="Wed, 21 Oct 2015 07:28:00 GMT")
                elif fault == "cut":
                    self.send(200, b'{"choices": [{"ind', lost=100)
                elif fault == "malformed":
                    self.send(200, b'{"choices": [{"ind')
                elif fault == "hang":
                    server._gone.wait(30)
                    self.close_connection = True
                elif fault == "closed":
                    self.close_connection = True
                else:  # a number of seconds
                    time.sleep(float(fault))
                    self.send(500, b"")

            def log_message(self, format: str, *args: Any) -> None:
                pass

        return Handler
