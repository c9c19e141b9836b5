"""Graphs for OpenVINO: what it computes from them is what transformers computes, or they are refused by name."""

from __future__ import annotations

import json
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from potstill.cli import app
from potstill.data.sources import Source
from potstill.errors import RunError, UserError
from potstill.evaluate.exported import Exports
from potstill.runs.export import export
from potstill.runs.formats.openvino import open_openvino
from potstill.runs.formats.table import FORMATS, exported_files, format_of
from test_export_embedding import WORDS, train
from test_export_onnx import FILES, check_parity, exported_toy
from toy_encoders import make_encoder, save, write_rows

if find_spec("openvino") is None:  # its import reports itself over the network, unless Potstill does it
    pytest.skip("OpenVINO is not installed: pip install 'potstill[openvino]'", allow_module_level=True)
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def exported(toys: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Exports]:
    return exported_toy(toys, tmp_path_factory.mktemp("openvino"), "openvino")


def test_graphs_are_measured_in_openvino(exported: tuple[Path, Exports]) -> None:
    model, exports = exported
    plain, small = exports.files
    folders = [model / "export" / file.file for file in exports.files]
    assert [folder.name for folder in folders] == ["student-openvino-f32", "student-openvino-int8"]
    assert exported_files(model / "export") == folders
    assert plain.program == small.program and plain.program.startswith("OpenVINO 20")
    assert sys.modules["openvino_telemetry"] is None, "nothing is reported over the network"
    assert exports.student_loss is not None and plain.kl is not None and plain.loss is not None
    assert plain.kl < 1e-6 and plain.agreement == 1 and abs(plain.loss - exports.student_loss) < 1e-5
    assert small.kl is not None and plain.kl < small.kl < 1e-2 and small.teacher_kl is not None
    for folder, kind in zip(folders, ("f32", "int8"), strict=True):
        names = {*FILES} - {"model.onnx"} | {"openvino_model.xml", "openvino_model.bin"}
        assert {path.name for path in folder.iterdir()} == names
        assert format_of(folder) is FORMATS["openvino"] and FORMATS["openvino"].kind(folder) == kind
    check_parity(folders[0], AutoModelForCausalLM.from_pretrained(model), open_openvino)


def test_graphs_are_evaluated_alone(exported: tuple[Path, Exports], toys: Path, tmp_path: Path) -> None:
    folder = exported[0] / "export" / "student-openvino-int8"
    arguments = ["--data", str(toys / "eval.jsonl"), "--out", str(tmp_path / "out.json"), "--max-length", "32"]
    result = CliRunner().invoke(app, ["evaluate", str(folder / "openvino_model.xml"), *arguments, "--tokens", "100"])
    assert result.exit_code == 0, result.exception
    (file,) = Exports.model_validate_json((tmp_path / "out.json").read_text(encoding="utf-8")).files
    assert (file.kind, file.loss, file.kl) == ("int8", exported[1].files[1].loss, exported[1].files[1].kl)
    broken = Path(shutil.copytree(folder, tmp_path / "broken"))
    (broken / "openvino_model.xml").write_text("half")
    with pytest.raises(RunError, match=r"expected a graph that OpenVINO loads, got .*openvino_model.xml: "):
        open_openvino(broken)


def test_a_missing_package_is_an_error_with_the_command(toys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    message = r"expected the package openvino, got none. Install it with pip install 'potstill\[openvino\]'"
    with pytest.raises(UserError, match=message):
        export(toys / "student", "openvino", out=toys / "nothing")
    assert not (toys / "nothing").exists()


def test_a_recipe_exports_the_student_of_an_embedding_run(embedder: Path, tmp_path: Path) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    run = train(tmp_path, embedder, {"static": None}, export=[{"to": "openvino"}])
    (file,) = json.loads((run / "export/export.json").read_text())["files"]
    assert file["kl"] < 1e-8 and file["tokens"] >= 3
    for page in ("report.html", "student/README.md"):
        assert "student-openvino-f32" in (run / page).read_text(encoding="utf-8")
    folder = run / "export/student-openvino-f32"
    rows = AutoTokenizer.from_pretrained(folder)(WORDS[:4], padding=True, return_tensors="np")
    vectors = open_openvino(folder).run({name: rows[name] for name in ("input_ids", "attention_mask")})
    expected = sentence_transformers.SentenceTransformer(str(run / "student"), device="cpu").encode(WORDS[:4])
    np.testing.assert_allclose(vectors["sentence_embedding"], expected, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("task", ["masked", "classification", "encoder"])
def test_encoders(task: Any, tmp_path: Path) -> None:
    name = save(make_encoder("bert", task), tmp_path / "model")
    columns = {"label": "label"} if task == "classification" else {}
    data = Source(str(write_rows(tmp_path / "eval.jsonl", 16, seed=7)), field="text", **columns)
    plain, small = export(name, "openvino", ("f32", "int8"), data=data, task=task, max_length=30).files
    assert plain.kl is not None and plain.kl < 1e-6 and small.kl is not None and small.kl < 0.05
