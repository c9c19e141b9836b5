"""A real vLLM on the CPU, from the environment that `make test-server` makes for it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

PYTHON = Path(__file__).parents[1] / ".venv-server" / "bin" / "python"
START_S = 1500  # it compiles and warms up before it answers; minutes where other work runs beside
OPTIONS = ("--max-model-len", "64", "--dtype", "float32", "--enforce-eager")
SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_SERVER_DEV_MODE": "1",  # it takes weights
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",  # and adapters
}


class Served(NamedTuple):
    """Where a model is served as "toy", and the folder that it is in."""

    url: str
    folder: Path


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@contextmanager
def serve(folder: Path, *options: str, port: int | None = None) -> Iterator[Served]:
    """A vLLM that serves the model in folder/model, until the end of the block, when it is killed."""
    if not PYTHON.exists():
        pytest.skip("vLLM is set up by make test-server")
    port = port or free_port()
    command = [PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", folder / "model", *OPTIONS, *options]
    command += ["--served-model-name", "toy", "--host", "127.0.0.1", "--port", str(port)]
    url = f"http://127.0.0.1:{port}"
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            list(map(str, command)),
            stdout=log,
            stderr=log,
            env=os.environ | SETTINGS,
            cwd=folder,
            start_new_session=True,
        )
        try:
            deadline = time.monotonic() + START_S
            while not _answers(f"{url}/health"):
                if process.poll() is not None or time.monotonic() > deadline:
                    pytest.fail(f"vLLM did not start: {(folder / 'log').read_text()[-3000:]}")
                time.sleep(0.5)
            yield Served(url, folder / "model")
        finally:
            os.killpg(process.pid, signal.SIGKILL)  # its workers too
            process.wait()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as response:
            return bool(response.status == 200)
    except OSError:
        return False
