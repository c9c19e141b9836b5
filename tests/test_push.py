"""Pushing a run to the Hub: what is sent, to whom, and what is refused; the Hub's client is replaced at its edge."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import create_autospec

import pytest
from httpx2 import ConnectError
from huggingface_hub import HfApi, constants
from typer.testing import CliRunner

import processes
from local_http import QuietHandler, serving
from potstill.cli import app
from potstill.errors import ModelError, RunError, UserError
from potstill.models.checksums import write_checksums
from potstill.runs import push as runs_push
from potstill.runs.push import push

FILES = ["README.md", "export/export.json", "export/student-q8_0.gguf", "model.safetensors", "pooling/config.json"]
FILES += ["report.html"]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    names = ["student/README.md", "student/model.safetensors", "student/pooling/config.json", "report.html"]
    names += ["export/export.json", "export/student-q8_0.gguf", "export/student-q4_0.gguf.1.partial", "recipe.yaml"]
    names += ["export/student-f16.gguf"]  # of an earlier student: not in export.json
    for name in [*names, "checkpoints/student/checkpoint-2/optimizer.pt", "rows.json"]:
        (tmp_path / "run" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / name).write_bytes(b"x" * 1000)
    file = {"file": "student-q8_0.gguf", "kind": "q8_0", "program": "llama.cpp", "bytes": 1000}
    file |= {"prompt_tokens_per_second": 1.0, "sha256": hashlib.sha256(b"x" * 1000).hexdigest()}
    (tmp_path / "run/export/export.json").write_text(json.dumps({"files": [file]}).ljust(1000))
    return tmp_path / "run"


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The Hub's client, with the signatures of the real one."""
    api = create_autospec(HfApi, instance=True)
    api.repo_info.return_value = SimpleNamespace(private=True)
    api.create_commit.return_value = SimpleNamespace(repo_url="https://hub/me/small")
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setattr(runs_push, "HfApi", lambda token: api if token == "secret" else pytest.fail(token))
    return api


def test_a_run_is_pushed_in_one_commit_to_a_private_repository(run: Path, api: Any) -> None:
    assert push(run, "me/small") == "https://hub/me/small"
    api.create_repo.assert_called_once_with("me/small", private=True, exist_ok=True)
    (name, operations), _ = api.create_commit.call_args
    assert name == "me/small" and [operation.path_in_repo for operation in operations] == FILES
    push(run, "me/small", public=True)
    assert api.create_repo.call_args.kwargs["private"] is False


class Hub(QuietHandler):
    """What the Hub's client asks for in a push; `server` keeps the requests, and what is in the repository.

    It holds the request with the number `server.holds` until `server.released`, and never answers it: behind half of
    its body, or, where `server.accepts`, once it has done what is asked for.
    """

    def parse_request(self) -> bool:
        parsed = super().parse_request()
        self.held, self.server.received = self.server.received == self.server.holds, self.server.received + 1
        if not self.held or self.server.accepts:
            return parsed
        self.rfile.read(int(self.headers.get("Content-Length", 0)) // 2)
        self.hold()
        return False

    def hold(self) -> None:
        self.server.waiting.set()
        self.server.released.wait()
        self.close_connection = True

    def do_GET(self) -> None:  # noqa: N802
        self.requested("")
        self.answer({"id": "me/small", "private": self.server.private, "sha": "1" * 40, "siblings": [], "tags": []})

    def do_POST(self) -> None:  # noqa: N802
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.requested(body.decode())
        if self.server.refuses:
            self.answer({"error": "You may not write here"}, 403)
        elif self.path == "/api/repos/create":
            self.answer({"url": f"{self.server.url}/me/small"})
        elif "/preupload/" in self.path:
            files = [file["path"] for file in json.loads(body)["files"]]
            modes = {True: "lfs", False: "regular"}
            listed = [
                {"path": path, "uploadMode": modes[path.endswith(("safetensors", "gguf"))], "shouldIgnore": False}
                for path in files
            ]
            self.answer({"files": listed})
        elif self.path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**of, "actions": {"upload": {"href": f"{self.server.url}/lfs/{of['oid']}", "header": {}}}}
                if of["oid"] not in self.server.stored
                else of
                for of in json.loads(body)["objects"]
            ]
            self.answer({"transfer": "basic", "objects": objects})
        elif self.path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        else:
            assert self.path == "/api/models/me/small/commit/main"
            self.server.commits.append([json.loads(line) for line in body.decode().splitlines()])
            self.answer({"commitUrl": f"{self.server.url}/me/small/commit/2", "commitOid": "2" * 40, "success": True})

    def do_PUT(self) -> None:  # noqa: N802
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.server.loses:
            return self.answer({"error": "lost"}, 400)
        self.server.stored[self.path.removeprefix("/lfs/")] = body
        return self.answer({})

    def requested(self, body: str) -> None:
        self.server.requests.append((f"{self.command} {self.path}", self.headers["Authorization"], body))

    def answer(self, content: dict[str, Any], status: int = 200) -> None:
        if self.held:
            self.hold()
            return
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    content = {"requests": [], "commits": [], "stored": {}, "private": True, "refuses": False, "loses": False}
    faults = {"waiting": threading.Event(), "released": threading.Event(), "holds": None, "accepts": False}
    with serving(Hub, received=0, **content, **faults) as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        yield server


# huggingface_hub 1 calls httpx in an old way when it sends a large file.
old_call = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@old_call
def test_a_run_is_pushed_over_http(run: Path, hub: Any) -> None:
    command = ["push", str(run), "--to", "me/small"]
    assert CliRunner().invoke(app, [*command, "--dry-run"]).exit_code == 0 and hub.requests == []
    pushed = CliRunner().invoke(app, command, catch_exceptions=False)
    assert pushed.exit_code == 0
    created = json.loads(hub.requests[0][2])
    assert (created["organization"], created["name"], created["visibility"]) == ("me", "small", "private")
    assert all(token == "Bearer secret" for _, token, _ in hub.requests)
    ((header, *parts),) = hub.commits
    assert header["key"] == "header" and sorted(part["value"]["path"] for part in parts) == FILES
    of = {part["value"]["path"]: part for part in parts}
    assert of["model.safetensors"]["key"] == of["export/student-q8_0.gguf"]["key"] == "lfsFile"
    assert base64.b64decode(of["README.md"]["value"]["content"]) == b"x" * 1000
    assert hub.stored == {hashlib.sha256(b"x" * 1000).hexdigest(): b"x" * 1000}


@old_call
def test_a_file_that_does_not_arrive_is_one_line(run: Path, hub: Any) -> None:
    hub.loses = True
    with pytest.raises(RunError, match=r"to take me/small, got BadRequestError: Bad request: lost\. Check") as lost:
        push(run, "me/small")
    assert "\n" not in str(lost.value) and hub.commits == []


def test_a_hub_that_refuses_or_has_a_public_repository_gets_no_file(run: Path, hub: Any) -> None:
    hub.private = False
    with pytest.raises(UserError, match=r"expected a private repository, got me/small, which is public. Add --public"):
        push(run, "me/small")
    hub.private, hub.refuses = True, True
    with pytest.raises(RunError, match=r"to take me/small, got .*403.* may write there\.$") as refused:
        push(run, "me/small")
    assert "secret" not in str(refused.value) and (hub.commits, hub.stored) == ([], {})


def push_to(url: str, run: Path) -> None:
    """Push in a process of its own, to a stand-in for the Hub."""
    constants.ENDPOINT, constants.HF_HUB_OFFLINE, constants.HF_HUB_DISABLE_XET = url, False, True
    push(run, "me/small")


@pytest.mark.slow
@old_call
def test_a_push_that_is_killed_at_any_request_leaves_no_part_of_a_run(run: Path, hub: Any) -> None:
    push(run, "me/small")
    (whole,), stored, requests = hub.commits, dict(hub.stored), hub.received
    assert requests > 5 and hub.requests[-1][0].endswith("/commit/main")  # the last one is what others can see
    for number in range(requests):
        for accepts in (False, True):
            hub.commits.clear(), hub.stored.clear(), hub.waiting.clear(), hub.released.clear()
            hub.received, hub.holds, hub.accepts = 0, number, accepts
            process = processes.start(run.parent / "printed", push_to, hub.url, run, HF_TOKEN="secret")
            assert hub.waiting.wait(60), (run.parent / "printed").read_text()
            process.kill()
            process.join()
            hub.holds = None
            hub.released.set()
            accepted = accepts and number == requests - 1
            assert hub.commits == [whole] * accepted
            push(run, "me/small")
            assert hub.commits == [whole] * (1 + accepted) and hub.stored == stored


def test_a_dry_run_lists_the_files_and_sends_nothing(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs_push, "HfApi", None)
    result = CliRunner().invoke(app, ["push", str(run), "--to", "me/small", "--dry-run"])
    assert result.exit_code == 0, result.exception
    assert all(f"{name}  1.0 kB" in result.stdout for name in FILES)
    assert "6 files, 6.0 kB, to me/small, private: nothing was pushed." in result.stdout


def test_what_is_refused(run: Path, api: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    api.repo_info.return_value = SimpleNamespace(private=False)
    with pytest.raises(UserError, match=r"expected a private repository, got me/small, which is public"):
        push(run, "me/small")
    api.create_repo.side_effect = ConnectError("no route")
    with pytest.raises(
        RunError, match=r"to take me/small, got ConnectError: no route. Check that the token in HF_TOKEN"
    ):
        push(run, "me/small")
    api.create_commit.assert_not_called()
    for name in ("small", "me/small/er", "me/sm all"):
        with pytest.raises(UserError, match=f"--to: expected owner/name, got {name}"):
            push(run, name)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(UserError, match="expected a token in HF_TOKEN, got none"):
        push(run, "me/small")
    with pytest.raises(UserError, match=r"expected a finished run, got .* without student/"):
        push(run / "export", "me/small")
    (run / "report.html").unlink()  # killed before its last step
    with pytest.raises(UserError, match=r"expected a finished run, got .* without report.html. Finish it with"):
        push(run, "me/small")


def test_a_damaged_student_is_not_pushed(run: Path, api: Any) -> None:
    write_checksums(run / "student")
    (run / "student" / "README.md").write_bytes(b"edited")  # a card is text of its own
    push(run, "me/small")
    (run / "student" / "model.safetensors").write_bytes(b"x" * 999)
    with pytest.raises(ModelError, match=r"push: expected model.safetensors in .* as it was written"):
        push(run, "me/small")
    api.create_commit.assert_called_once()


def test_an_exported_file_is_pushed_as_it_was_measured_or_not_at_all(run: Path, api: Any) -> None:
    (run / "export" / "student-q8_0.gguf").write_bytes(b"x" * 999 + b"y")
    with pytest.raises(UserError, match=r"push: expected .*student-q8_0\.gguf as it was measured, got another or none"):
        push(run, "me/small")
    (run / "export" / "student-q8_0.gguf").unlink()
    with pytest.raises(UserError, match=r"got another or none\. Export it again"):
        push(run, "me/small")
    api.create_commit.assert_not_called()
