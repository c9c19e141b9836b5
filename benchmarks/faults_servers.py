"""A network and a server that fail: what `generate` and a served teacher get through them is what they get without.

A proxy stands in front of the toy server of the tests, on loopback addresses alone; its waits are a fiftieth of real
ones. A real server, llama.cpp's, is killed and started again, with real waits.
"""

from __future__ import annotations

import http.client
import json
import random
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch

from drill import Drill
from potstill.engines import client
from potstill.engines.server import ModelServer
from potstill.errors import ServerError
from potstill.losses.alignment import causal_alignment
from potstill.runs.config.generate import GenerateRecipe
from potstill.runs.formats.gguf_file import write_gguf
from potstill.runs.generate import generate
from potstill.teachers.served import ServedTeacher

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from conftest import TEXT, make_llama, make_tokenizer
from toy_server import ToyServer

PROMPTS, BATCH = 300, 30
START_S = 120  # of a real server, on a busy machine
FIRST_WAIT_S = client.FIRST_WAIT_S / 50
KINDS = ("drop", "delay", "429", "5xx", "restart", "outage", "all")


class _Quiet(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of a client that has gone."""


class Proxy:
    """Passes requests on to a server, and disturbs those of `/v1/completions`.

    drop: 1% of the connections are closed without an answer, or behind half of one. delay: a tenth of the answers come
    late, behind those to later requests. 429 and 5xx: all requests for a while. restart: the server is gone for a
    while. outage: it is gone for longer than the client waits.
    """

    def __init__(self, url: str, kind: str, rng: random.Random) -> None:
        self.address, self.kind, self.rng = url.removeprefix("http://"), kind, rng
        self.faults: Counter[str] = Counter()
        self.requests = 0
        # The request at which the trouble begins, and how many seconds it lasts.
        self.begins, self.lasts_s = rng.randrange(20, 60), 1e9 if kind == "outage" else rng.uniform(0.03, 0.15)
        self.began: float | None = None
        self._lock = threading.Lock()
        self._http = _Quiet(("127.0.0.1", 0), self._handler())
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._http.server_port}"

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    def end_trouble(self) -> None:
        self.lasts_s = 0.0

    def fault(self) -> str:
        """What happens to the next request, counted."""
        with self._lock:
            self.requests += 1
            chance, now = self.rng.random(), time.monotonic()
            if self.requests == self.begins:
                self.began = now
            troubled = self.began is not None and now < self.began + self.lasts_s
            kind = self.kind
            if kind == "all":
                kind = "restart" if troubled else self.rng.choice(("drop", "delay", "429", "5xx"))
                troubled = troubled or chance < 0.03
            if kind == "drop":
                fault = "cut" if chance < 0.005 else "closed" if chance < 0.01 else ""
            elif kind == "delay":
                fault = "late" if chance < 0.1 else ""
            elif kind == "none":
                fault = ""
            else:
                fault = {"429": "429", "5xx": self.rng.choice(("500", "502", "503"))}.get(kind, "gone") * troubled
            if fault:
                self.faults[fault] += 1
            return fault

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                fault = proxy.fault() if self.path == "/v1/completions" else ""
                if fault in ("closed", "gone"):
                    self.close_connection = True
                    return
                if fault.isdigit():
                    self.answer(int(fault), b"busy", {"Retry-After": "0.01"} if fault == "429" else {})
                    return
                connection = http.client.HTTPConnection(proxy.address, timeout=10)
                try:
                    connection.request(self.command, self.path, body, {"Content-Type": "application/json"})
                    response = connection.getresponse()
                    content = response.read()
                finally:
                    connection.close()
                if fault == "late":
                    time.sleep(proxy.rng.uniform(0.005, 0.05))
                self.answer(response.status, content, {}, cut=fault == "cut")

            do_POST = do_GET  # noqa: N815

            def answer(self, status: int, content: bytes, headers: dict[str, str], cut: bool = False) -> None:
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content[: len(content) // 2] if cut else content)
                self.close_connection = cut

            def log_message(self, format: str, *args: Any) -> None:
                pass

        return Handler


# llama.cpp's server: a model and a port.
SERVE = """
import sys, threading, xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.model_alias, params.port = sys.argv[1], {"toy"}, int(sys.argv[2])
params.n_ctx, params.n_parallel, params.warmup, params.verbosity = 2048, 2, False, 0
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
params.cache_prompt = False  # a prompt is computed in the same parts, whichever came before
server = xllamacpp.Server(params)
threading.Event().wait()
"""


class LlamaCpp:
    """A server of llama.cpp, in a process of its own that is killed and started again at the same port."""

    def __init__(self, model: Path) -> None:
        self.model, self.starts = model, 0
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start it, and return when it answers."""
        self.starts += 1
        self._process = subprocess.Popen([sys.executable, "-c", SERVE, str(self.model), str(self.port)])
        deadline = time.monotonic() + START_S
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError("llama.cpp did not start")
            time.sleep(0.05)

    def _answers(self) -> bool:
        with suppress(OSError), urllib.request.urlopen(f"{self.url}/health", timeout=2) as response:
            return bool(response.status == 200)
        return False

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


def _rows(url: str, folder: Path, repair: Callable[[], None] | None = None, concurrency: int = 8) -> tuple[bytes, int]:
    """The rows that `generate` writes, and how often it had to be resumed, after `repair` of the server."""
    prompts = folder / "prompts.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    prompts.write_text(
        "".join(json.dumps({"prompt": f"{i} {TEXT[i % len(TEXT)][:20]}"}) + "\n" for i in range(PROMPTS))
    )
    recipe = GenerateRecipe.parse(
        {
            "kind": "generate",
            "name": "faults",
            "teacher": {"server": {"url": url, "model": "toy", "timeout_s": 5.0, "concurrency": concurrency}},
            "task": {"task": "responses", "prompts": {"path": str(prompts), "field": "prompt"}},
            "sampling": {"samples": 2, "max_new_tokens": 8},
            "filter": {"cut": False, "repetition": None},
            "batch_size": BATCH,
            "output": str(folder / "out"),
        }
    )
    resumed = 0
    while True:
        try:
            result = generate(recipe, resume=resumed > 0)
            return result.rows.read_bytes() + (result.directory / "dropped.jsonl").read_bytes(), resumed
        except ServerError:
            resumed += 1
            if repair is None or resumed > 3:
                raise
            repair()


def generated(drill: Drill) -> None:
    """Rows through a proxy that drops, delays, refuses and restarts are those of an undisturbed run."""
    client.FIRST_WAIT_S = FIRST_WAIT_S
    toy = ToyServer(make_llama(), make_tokenizer())
    try:
        shutil.rmtree(drill.folder, ignore_errors=True)
        _rows(toy.url, drill.folder / "first")  # the first is slower than all others
        expected, _ = _rows(toy.url, drill.folder / "direct")
        for case in drill.cases(21):
            kind, seconds = KINDS[case.number % len(KINDS)], []
            for trouble in ("none", kind):  # one after the other, as other programs may run beside
                proxy = Proxy(toy.url, trouble, case.rng)
                start = time.perf_counter()
                try:
                    rows, resumed = _rows(proxy.url, case.folder / trouble, proxy.end_trouble)
                finally:
                    proxy.close()
                seconds.append(time.perf_counter() - start)
            slower = seconds[1] / seconds[0]
            facts = {"kind": kind, "faults": dict(proxy.faults), "resumed": resumed, "times_slower": round(slower, 2)}
            drill.note(case.number, rows == expected and (resumed > 0) == (kind == "outage"), **facts)
    finally:
        toy.close()


def signals(drill: Drill) -> None:
    """Log-probabilities of a served teacher through such a proxy are those of an undisturbed server, bit for bit."""
    client.FIRST_WAIT_S = FIRST_WAIT_S
    toy = ToyServer(make_llama(), tokenizer := make_tokenizer())
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randint(2, 300, (8, 16), generator=generator) for _ in range(12)]

    def targets(url: str) -> tuple[list[Any], float]:
        teacher = ServedTeacher(ModelServer(url, "toy", timeout_s=5.0, concurrency=8), tokenizer, top_k=5)
        start = time.perf_counter()
        outputs = [
            teacher({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, causal_alignment(ids))
            for ids in batches
        ]
        return outputs, time.perf_counter() - start

    try:
        targets(toy.url)  # the first is slower than all others
        expected, _ = targets(toy.url)
        quiet = Proxy(toy.url, "none", random.Random(0))
        _, undisturbed_s = targets(quiet.url)
        quiet.close()
        for case in drill.cases(30):
            kind = [kind for kind in KINDS if kind != "outage"][case.number % (len(KINDS) - 1)]
            proxy = Proxy(toy.url, kind, case.rng)
            try:
                outputs, seconds = targets(proxy.url)
            finally:
                proxy.close()
            same = all(
                torch.equal(a.targets.ids, b.targets.ids)
                and torch.equal(a.targets.log_probs, b.targets.log_probs)
                and torch.equal(a.label_log_probs, b.label_log_probs)
                for a, b in zip(outputs, expected, strict=True)
            )
            slower = round(seconds / undisturbed_s, 2)
            drill.note(case.number, same, kind=kind, faults=dict(proxy.faults), times_slower=slower)
    finally:
        toy.close()


def killed(drill: Drill) -> None:
    """Rows from a server that is killed and started again are those of an undisturbed one.

    Of four cases one is a server that comes back only when the command has ended. It gets one request at a time: what
    it computes together with other rows is rounded in other ways.
    """
    drill.folder.mkdir(parents=True, exist_ok=True)
    write_gguf(make_llama(), make_tokenizer(), drill.folder / "toy.gguf")
    server = LlamaCpp(drill.folder / "toy.gguf")
    server.start()
    try:
        expected = None
        for case in drill.cases(20):
            if expected is None:
                expected, _ = _rows(server.url, case.folder / "alone", concurrency=1)
            gone, server.starts, done = case.number % 4 == 3, 0, list[int]()
            journal = case.folder / "disturbed" / "out" / "texts.jsonl"
            trouble = threading.Thread(target=_kill, args=(server, journal, gone, case.rng, done))
            trouble.start()
            rows, resumed = _rows(server.url, case.folder / "disturbed", server.start, concurrency=1)
            trouble.join()
            held = rows == expected and (resumed > 0) == gone and server.starts == 1
            drill.note(case.number, held, gone=gone, resumed=resumed, prompts_before=done[0])
    finally:
        server.kill()


def _kill(server: LlamaCpp, journal: Path, gone: bool, rng: random.Random, done: list[int]) -> None:
    """Kill a server when some batches of a run are done, and start it again unless it is to be gone."""
    batches, deadline = rng.randrange(PROMPTS // BATCH), time.monotonic() + 120
    while time.monotonic() < deadline:
        if journal.exists() and journal.read_bytes().count(b"\n") > batches * BATCH:
            break
        time.sleep(0.002)
    time.sleep(rng.uniform(0, 0.1))
    server.kill()
    done.append(journal.read_bytes().count(b"\n") - 1)  # the first line is about the run
    if not gone:
        server.start()


PARTS = {"server-rows": generated, "server-signals": signals, "server-killed": killed}
