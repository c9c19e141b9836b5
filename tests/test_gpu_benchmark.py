"""benchmarks/gpu.py goes on where it ended, and its rehearsal runs without a GPU and without optional packages."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    import gpu

    return gpu


def run(gpu: Any, out: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--dry", "--out", str(out), *options])
    gpu.main()


def test_parts_that_ended_are_not_measured_again_and_long_ones_wait(
    gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measured, works = [], False

    def part(name: str) -> Any:
        def measure(at: Any) -> Iterator[dict[str, Any]]:
            measured.append(name)
            yield {"case": "first", "seconds": 0.25}
            if name == "fails" and not works:
                raise RuntimeError("no such device")

        return measure

    parts = {name: gpu.Part(part(name), 200) for name in ("short", "fails")}
    parts |= {"long": gpu.Part(part("long"), 400), "rare": gpu.Part(part("rare"), 1, ("no_such_package",))}
    monkeypatch.setattr(gpu, "PARTS", parts)
    with pytest.raises(SystemExit, match="Failed: fails"):
        run(gpu, tmp_path, monkeypatch, "--parts", *parts, "--minutes", "6")
    page = capsys.readouterr().out
    assert "| fails | failed |  |  |  | RuntimeError: no such device |" in page
    assert "long: left for the next run: 400 s may be more than the" in page
    assert "needs no_such_package" in page and (tmp_path / "table.md").read_text() in page
    works = True
    run(gpu, tmp_path, monkeypatch, "--parts", *parts)
    assert measured == ["short", "fails", "fails", "long"]
    assert "failed" not in (tmp_path / "table.md").read_text()


def test_no_gpu_is_one_line(gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--out", str(tmp_path / "new")])
    with pytest.raises(SystemExit, match="expected a CUDA device, got none"):
        gpu.main()
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_the_rehearsal_runs_without_the_packages_of_recipes(tmp_path: Path) -> None:
    missing = ["pydantic", "pydantic_core", "datasets", "dill", "multiprocess", "bitsandbytes", "trl"]
    program = (
        f"import sys, runpy; sys.modules.update(dict.fromkeys({missing})); sys.path.insert(0, {str(BENCHMARKS)!r})"
    )
    program += f"; sys.argv = ['gpu.py', '--dry', '--out', {str(tmp_path)!r}]; runpy.run_path({str(BENCHMARKS / 'gpu.py')!r}, run_name='__main__')"  # fmt: skip  # noqa: E501
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, env=os.environ)
    assert done.returncode == 0, done.stderr[-3000:]
    ended = {
        line["part"] for line in map(json.loads, (tmp_path / "rows.jsonl").read_text().splitlines()) if "done" in line
    }
    assert ended == {"kernels", "loss, V of Llama", "loss, V of Qwen", "memory", "step", "packing", "device_map"}


@pytest.mark.slow
def test_the_rehearsal_runs(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--dry", "--minutes", "60", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "| smollm2 | student |" in (tmp_path / "table.md").read_text()
