"""Pushing a run to the Hub: what is sent, to whom, and what is refused; the Hub's client is replaced at its edge."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import create_autospec

import pytest
from httpx2 import ConnectError
from huggingface_hub import HfApi
from typer.testing import CliRunner

from potstill.cli import app
from potstill.errors import RunError, UserError
from potstill.runs import push as runs_push
from potstill.runs.push import push

FILES = ["README.md", "export/export.json", "export/student-q8_0.gguf", "model.safetensors", "pooling/config.json"]
FILES += ["report.html"]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    names = ["student/README.md", "student/model.safetensors", "student/pooling/config.json", "report.html"]
    names += ["export/export.json", "export/student-q8_0.gguf", "export/student-q4_0.gguf.1.partial", "recipe.yaml"]
    for name in [*names, "checkpoints/student/checkpoint-2/optimizer.pt", "rows.json"]:
        (tmp_path / "run" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / name).write_bytes(b"x" * 1000)
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
