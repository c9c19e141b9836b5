"""Embedding students as ONNX graphs: onnxruntime and the tokenizer alone give what sentence-transformers gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoTokenizer
from typer.testing import CliRunner

from conftest import TEXT
from potstill.cli import app
from potstill.data.sources import Source
from potstill.embedding.static import static_student
from potstill.errors import ModelError, RunError, UserError
from potstill.evaluate.exported import read_exports
from potstill.runs import export as runs_export
from potstill.runs.config.embedding import EmbeddingRecipe
from potstill.runs.embedding import run_embedding
from potstill.runs.export import export
from potstill.runs.export_inputs import text_rows
from potstill.runs.formats.graphs import measure_graph
from potstill.runs.formats.measure import Bench
from potstill.runs.formats.onnx_runtime import open_onnx
from potstill.runs.formats.sentences import SentenceModel, static_tokenizer

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
    """Together, which pads them, and one by one; sentence-transformers does not read a row of no tokens alone."""
    model = sentence_transformers.SentenceTransformer(str(student), device="cpu")
    expected = model.encode(PROBES, batch_size=len(PROBES), show_progress_bar=False)
    np.testing.assert_allclose(vectors_of(folder, PROBES), expected, atol=2e-5)
    for text, vector in zip(PROBES, expected, strict=True):
        np.testing.assert_allclose(vectors_of(folder, [text])[0], vector, atol=2e-5)


@pytest.mark.parametrize(
    "student",
    [
        pytest.param({"static": None}, id="static"),
        pytest.param({"encoder": {"layers": 1, "vocabulary": "data"}}, id="encoder", marks=pytest.mark.slow),
        pytest.param({"head": "mlp", "hidden": 4}, id="head", marks=pytest.mark.slow),
    ],
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
    other = SentenceModel(static_student(AutoTokenizer.from_pretrained(embedder), torch.randn(300, 4)).model)
    with pytest.raises(RunError, match=r"expected a static model as a graph within 0.001 of the student, got \d"):
        measure_graph(
            open_onnx, run / "export/student-onnx-f32", "f32", Bench(other.tokenizer, None, other, None, "embedding")
        )
    with pytest.raises(UserError, match=r"expected the task causal for this format, got embedding. Use onnx"):
        export(run, "gguf")


def test_recipes_name_the_exports_of_embedding_runs(embedder: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "vectors.npy", torch.randn(len(WORDS), 9).numpy())
    files: list[Any] = [{"to": "onnx"}, {"to": "onnx", "quantize": "int8"}]
    run = train(tmp_path, embedder, {"static": None}, export=files)
    exports = read_exports(run / "export")
    assert exports is not None and [file.kind for file in exports.files] == ["f32", "int8"]
    assert all(file.kl is not None for file in exports.files) and exports.tokens >= 3
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "student-onnx-f32" in page and "student-onnx-int8" in page
    vectors = {"teacher": {"vectors": str(tmp_path / "vectors.npy")}, "data": {}}
    for student, parts, message in (
        ({"static": None}, {"export": [{}]}, "expected the task causal for this format, got embedding. Use onnx"),
        ({"static": None}, {"export": [*files, files[0]]}, "export: expected each file once, got onnx f32 twice"),
        ({"head": "linear"}, {"export": files, **vectors}, "expected a student that reads text, got a head over vect"),
    ):
        with pytest.raises(UserError, match=message):
            train(tmp_path, embedder, student, **parts, output=str(tmp_path / "other"))
    assert not (tmp_path / "other").exists()


def test_a_head_over_vectors_alone_is_refused(embedder: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "vectors.npy", torch.randn(len(WORDS), 9).numpy())
    run = train(tmp_path, embedder, {"head": "linear"}, teacher={"vectors": str(tmp_path / "vectors.npy")}, data={})
    with pytest.raises(UserError, match="expected a student that reads text, got a head over vectors of a server"):
        export(run, "onnx")
    assert not (run / "export").exists()


def test_a_folder_of_sentence_transformers_is_read_as_one(
    embedder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs_export, "export_model", lambda bench, *arguments, **options: bench)
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in WORDS))
    bench: Any = export(embedder, "onnx", data=Source(str(tmp_path / "texts.jsonl")), out=tmp_path / "out")
    assert bench.task == "embedding" and bench.rows["text"][:3] == WORDS[:3]
    assert max(map(len, bench.rows["input_ids"])) <= 32, "the tokens that the model reads"
    bench = export(embedder, "onnx")
    assert bench.rows is None
    with pytest.raises(UserError, match="--teacher: expected none for a sentence-transformers model, got other"):
        export(embedder, "onnx", teacher="other")
    (tmp_path / "chats.jsonl").write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n")
    with pytest.raises(UserError, match=r"--data: expected a column of texts in .*, got none. Name it with --field"):
        export(embedder, "onnx", data=Source(str(tmp_path / "chats.jsonl")))


@pytest.mark.parametrize(("pooling", "reads_no_tokens"), [("cls", False), ("max", False), ("mean", True)])
def test_a_text_without_a_token_has_a_vector_where_padding_does_not_change_it(
    pooling: str, reads_no_tokens: bool, embedder: Path
) -> None:
    from sentence_transformers.sentence_transformer.modules import Pooling

    model = sentence_transformers.SentenceTransformer(str(embedder), device="cpu")
    student = SentenceModel(sentence_transformers.SentenceTransformer(modules=[model[0], Pooling(16, pooling)]))
    assert student.may_read_no_tokens and student.reads_no_tokens is reads_no_tokens
    assert ("" in student.probes(), student.notes == []) == (reads_no_tokens, reads_no_tokens)
    assert text_rows(["", WORDS[0]], student.tokenizer)["text"][:] == [WORDS[0]]


@pytest.mark.slow
@pytest.mark.parametrize("pooling", ["cls", "max"])
def test_poolings_without_a_vector_for_no_tokens(pooling: str, embedder: Path, tmp_path: Path) -> None:
    from sentence_transformers.sentence_transformer.modules import Pooling

    model = sentence_transformers.SentenceTransformer(str(embedder), device="cpu")
    model = sentence_transformers.SentenceTransformer(modules=[model[0], Pooling(16, pooling)], device="cpu")
    model.save_pretrained(str(tmp_path / "model"), create_model_card=False)
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in WORDS))
    (file,) = export(tmp_path / "model", "onnx", data=tmp_path / "texts.jsonl").files
    assert file.kl is not None and file.kl < 1e-8 and "leave out texts without a token" in file.notes[0]
    vectors = vectors_of(tmp_path / "model/export/student-onnx-f32", PROBES[1:])
    np.testing.assert_allclose(vectors, model.encode(PROBES[1:], show_progress_bar=False), atol=2e-5)


def test_what_a_graph_of_tokens_does_not_hold(embedder: Path) -> None:
    from sentence_transformers.sentence_transformer.modules import Normalize

    model = sentence_transformers.SentenceTransformer(str(embedder), device="cpu", prompts={"query": "say: "})
    assert SentenceModel(model).notes == []
    model.default_prompt_name = "query"
    assert SentenceModel(model).notes == ["put 'say: ' before texts, as sentence-transformers does"]
    model[1].include_prompt = False
    with pytest.raises(ModelError, match="got one whose pooling leaves out the tokens of a prompt"):
        SentenceModel(model)
    with pytest.raises(ModelError, match="of a transformer or of token vectors, got one that begins with Normalize"):
        SentenceModel(sentence_transformers.SentenceTransformer(modules=[Normalize()], device="cpu"))
    with pytest.raises(ModelError, match="got one whose tokenizer has no special token to pad with"):
        static_tokenizer(Tokenizer(WordLevel({"a": 0, "b": 1}, unk_token="a")))
