"""What `make dist` builds holds what Potstill needs and nothing else, and runs where it is installed alone."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path
from zipfile import ZipFile

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
ROOT = Path(__file__).parent.parent
OTHER_THAN_PYTHON = {".j2", ".c", ".yaml", ".json", ".safetensors", ".log", ".md", ".typed", ".pyi"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the source distribution, as `make dist` does."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    (source,) = folder.glob("*.tar.gz")
    assert source.stat().st_size < 15e6
    (built,) = folder.glob("*.whl")
    return built


def test_it_holds_the_package_and_nothing_else(wheel: Path) -> None:
    listed = subprocess.run(["git", "ls-files", "src/potstill"], cwd=ROOT, capture_output=True, text=True, check=True)
    ours = {name.removeprefix("src/") for name in listed.stdout.split()}
    assert {Path(name).suffix for name in ours} == OTHER_THAN_PYTHON | {".py"}
    there = {name for name in ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert there == ours
    assert wheel.stat().st_size < 12e6


def test_the_demo_runs_where_it_is_installed(wheel: Path, tmp_path: Path) -> None:
    """In an environment of its own, which borrows the packages that it needs from the tests' (else it would download
    gigabytes); what is installed there in editable form is not seen, because its .pth is not read.
    """
    environment = tmp_path / "environment"
    venv.create(environment, symlinks=True)
    python = environment / "bin/python"
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    (packages,) = environment.glob("lib/*/site-packages")
    (packages / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "TRITON", "OMP"))}
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()

    def stdout_of(*command: str) -> str:
        done = subprocess.run(command, cwd=elsewhere, env=clean, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert stdout_of(str(python), "-c", "import potstill; print(potstill.__file__)").startswith(str(environment))
    output = stdout_of(str(environment / "bin/potstill"), "demo", "--fast")
    assert "The student closes" in " ".join(output.split())
    run = elsewhere / "runs/demo-fast"
    assert "fewer steps and less text than the figures of the README" in (run / "report.html").read_text()
    assert (run / "student/model.safetensors").exists()
