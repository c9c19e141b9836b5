"""Embedding students as ONNX graphs: onnxruntime and the tokenizer alone give what sentence-transformers gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from transformers import AutoTokenizer
from typer.testing import CliRunner

from conftest import TEXT
from potstill.cli import app
from potstill.data.sources import Source
from potstill.embedding.static import static_student
from potstill.errors import ModelError, RunError, UserError
from potstill.evaluate.exported import Exports, read_exports
from potstill.runs.config.embedding import EmbeddingRecipe
from potstill.runs.embedding import run_embedding
from potstill.runs.export import export
from potstill.runs.formats.sentences import SentenceModel

pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime", reason="install it with pip install 'potstill[onnx]'")
sentence_transformers = pytest.importorskip("sentence_transformers")

WORDS = [f"{text.split('(')[0]} number {i} of {i % 7} and {i % 5}" for i, text in enumerate(TEXT * 2)]
PROBES = ["", "x", WORDS[0], "\n \N{GRINNING FACE} " * 9, " ".join(WORDS[:9])]  # the last is longer than 32 tokens


def train(folder: Path, embedder: Path, student: dict[str, Any], **parts: Any) -> Path:
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in WORDS))
    values = {
        "kind": "embedding",
        "name": "toy",
        "teacher": {"embedder": str(embedder)},
        "student": student | {"dimensions": 4},
        "data": {"train": {"path": str(folder / "texts.jsonl")}},
        "train": {"epochs": 1, "batch_size": 64},
        "output": str(folder / "run"),
    }
    return run_embedding(EmbeddingRecipe.parse(values | parts), console=Console(quiet=True)).directory


def vectors_of(folder: Path, texts: list[str]) -> np.ndarray:
    """The vectors of texts by onnxruntime and the tokenizer alone."""
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    rows = AutoTokenizer.from_pretrained(folder)(texts, padding=True, truncation=True, return_tensors="np")
    rows = {"token_type_ids": np.zeros_like(rows["input_ids"])} | dict(rows)
    fed = {tensor.name: rows[tensor.name].astype(np.int64) for tensor in session.get_inputs()}
    assert set(fed) <= {"input_ids", "attention_mask", "token_type_ids"}
    return np.asarray(session.run(["sentence_embedding"], fed)[0])


def check_parity(folder: Path, student: Path) -> None:
    """Together, which pads them, and one by one."""
    model = sentence_transformers.SentenceTransformer(str(student), device="cpu")
    expected = model.encode(PROBES, batch_size=len(PROBES), show_progress_bar=False)
    np.testing.assert_allclose(vectors_of(folder, PROBES), expected, atol=2e-5)
    for text in PROBES:
        np.testing.assert_allclose(
            vectors_of(folder, [text]), model.encode([text], show_progress_bar=False), atol=2e-5
        )


@pytest.mark.parametrize(
    "student",
    [{"static": None}, {"encoder": {"layers": 1, "vocabulary": "data"}}, {"head": "mlp", "hidden": 4}],
    ids=["static", "encoder", "head"],
)
def test_students_of_embedding_runs(student: dict[str, Any], embedder: Path, tmp_path: Path) -> None:
    run = train(tmp_path, embedder, student)
    result = CliRunner().invoke(app, ["export", str(run), "--to", "onnx", "--quantize", "f32,int8", "--tokens", "200"])
    assert result.exit_code == 0, result.exception
    exports = read_exports(run / "export")
    assert exports is not None and exports.task == "embedding" and exports.student_bytes and exports.tokens >= 3
    plain, small = exports.files
    assert (plain.file, small.file, plain.tokens) == ("student-onnx-f32", "student-onnx-int8", exports.tokens)
    assert plain.kl is not None and plain.kl < 1e-8 and small.kl is not None and plain.kl < small.kl < 0.01
    assert plain.prompt_tokens_per_second > 0 and plain.tokens_per_second is plain.loss is plain.teacher_kl is None
    assert {"model.onnx", "tokenizer.json"} <= {path.name for path in (run / "export/student-onnx-f32").iterdir()}
    check_parity(run / "export/student-onnx-f32", run / "student")
    for file in ("report.html", "student/README.md"):
        page = (run / file).read_text(encoding="utf-8")
        assert "student-onnx-int8" in page and "difference of similarities to the student" in page, file
