"""Recipes of kind embedding, from the file to the run directory; students that read text; the server."""

from __future__ import annotations

import io
import json
import re
import runpy
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from conftest import TEXT, make_tokenizer
from potstill.cli import app
from potstill.embedding.encoders import embedder_with_head
from potstill.embedding.heads import VectorHead
from potstill.embedding.static import text_tokens
from potstill.embedding.teachers import TextEncoder, encode_texts, server_encoder
from potstill.embedding.training import EmbeddingDistiller
from potstill.errors import DataError, ModelError, RecipeError, RefusedError, ServerError, UserError
from potstill.runs.config.embedding import EmbeddingRecipe
from potstill.runs.embedding import check, run_embedding
from test_embedding_training import HELD, TRAIN

ROOT = Path(__file__).parent.parent
WORDS = [f"{text.split('(')[0]} number {i} of {i % 7} and {i % 5}" for i, text in enumerate(TEXT * 2)]


@pytest.fixture
def values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A small whole recipe; tests change it."""
    monkeypatch.chdir(tmp_path)
    np.save("embeddings.npy", TRAIN.numpy())
    return {
        "kind": "embedding",
        "name": "toy",
        "teacher": {"vectors": "embeddings.npy"},
        "student": {"head": "linear", "dimensions": 3},
        "train": {"epochs": 1, "batch_size": 64},
        "output": "run",
    }


def run(values: dict[str, Any], **options: Any) -> Any:
    return run_embedding(EmbeddingRecipe.parse(values), console=Console(file=io.StringIO()), **options)


@pytest.mark.parametrize("name", ["openai", "curriculum", "fast"])
def test_the_presets_run(name: str, values: dict[str, Any]) -> None:
    np.save("embeddings.npy", torch.cat([TRAIN, torch.randn(400, 24)], 1).numpy())
    small = ["train.epochs=1", "student.dimensions=6", "train.batch_size=64"]
    small += ["student.prefixes={2: 0.7, 6: 0.3}"] if name == "curriculum" else []
    command = ["run", f"preset:{name}", *(word for change in small for word in ("--set", change))]
    done = CliRunner().invoke(app, command, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert "all pairs" in done.output and "PCA" in done.output
    directory = Path("runs") / name
    assert VectorHead.load(directory / "student").transform(HELD.repeat(1, 2)).shape == (120, 6)
    summary = json.loads((directory / "summary.json").read_text())
    assert set(summary["front"]) == ({"balanced"} if name == "fast" else {"local", "balanced", "global"})
    stages = sorted(path.name for path in (directory / "checkpoints" / "student").glob("*.pt"))
    assert stages == [f"stage-{i + 1}.pt" for i in range(5 if name == "curriculum" else 1)]
    (directory / "report.html").unlink()
    assert CliRunner().invoke(app, ["report", str(directory)]).exit_code == 0
    page = (directory / "report.html").read_text()
    assert page.count("<svg") >= 4 and "http://" not in page.replace("http://www.w3.org", "")


def test_the_stages_of_the_curriculum() -> None:
    recipe = EmbeddingRecipe.load("preset:curriculum")
    assert recipe.train.temperature is not None
    assert recipe.train.temperature.values() == [4.0, 3.125, 2.25, 1.375, 0.5]
    falling = recipe.train.temperature.model_copy(update={"schedule": "exponential"}).values()
    assert falling[2] == pytest.approx((4.0 * 0.5) ** 0.5)
    assert recipe.train.temperature.model_copy(update={"schedule": "cosine"}).values()[2] == pytest.approx(2.25)


def test_a_preset_that_is_not_there() -> None:
    with pytest.raises(RecipeError, match=r"curriculum, fast, openai, got openia\. Did you mean openai\?"):
        EmbeddingRecipe.load("preset:openia")


def test_a_run_is_not_overwritten_and_goes_on(values: dict[str, Any]) -> None:
    first = run(values)
    with pytest.raises(RecipeError, match="which holds a run"):
        run(values)
    again = run(values, resume=True)
    assert again.summary["rows"] == first.summary["rows"]
    with pytest.raises(RecipeError, match="began with, got another"):
        run(values | {"seed": 3}, resume=True)


def test_a_text_student_is_a_plain_sentence_transformers_model(values: dict[str, Any], embedder: Path) -> None:
    from sentence_transformers import SentenceTransformer

    rows = [{"a": text, "b": text[::-1], "score": str(i % 6)} for i, text in enumerate(WORDS)]
    for name, part in (("train", rows[:90]), ("eval", rows[90:])):
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    values |= {
        "teacher": {"embedder": str(embedder)},
        "data": {
            "train": {"path": "train.jsonl", "fields": ["a", "b"]},
            "eval": {"path": "eval.jsonl", "fields": ["a", "b"], "score": "score"},
        },
    }
    for student in ({"static": None}, {"encoder": {"layers": 2}}, {"head": "mlp", "hidden": 4}):
        values |= {"student": student | {"dimensions": 4}, "output": f"run-{next(iter(student))}"}
        result = run(values)
        row = result.summary["rows"]["student"]
        assert row["scores"] is not None and row["dimensions"] == 4
        assert {near["text"] for near in result.summary["neighbours"]} <= {
            one[key] for one in rows[90:] for key in "ab"
        }
        assert (result.directory / "student/modules.json").exists()
        assert not list((result.directory / "student").rglob("*.bin"))
        assert "SentenceTransformer(" in (result.directory / "student/README.md").read_text()
        loaded = SentenceTransformer(str(result.directory / "student"), device="cpu")
        vectors = loaded.encode(WORDS[:5], show_progress_bar=False)
        assert vectors.shape == (5, 4) and np.isfinite(vectors).all()
    layers = SentenceTransformer("run-encoder/student", device="cpu")[0].auto_model.encoder.layer
    assert len(layers) == 2
    with pytest.raises(ModelError, match="expected 1 to 3 layers of a transformer, got 9"):
        run(values | {"student": {"encoder": {"layers": 9}, "dimensions": 4}, "output": "run-9"})


def test_an_encoder_with_the_tokens_of_its_texts_is_the_same_on_them(embedder: Path, tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    from potstill.embedding.encoders import encoder_student, load_embedder

    model, texts = load_embedder(str(embedder), "teacher"), [text[:60] for text in TEXT[:12]]
    start = torch.from_numpy(model.encode(texts))[:, :4]
    whole, cut = (encoder_student(model, 2, texts, start, keep=keep) for keep in (None, "data"))
    assert len(cut.model.tokenizer.get_vocab()) < len(whole.model.tokenizer.get_vocab()) == 300
    cut.save(tmp_path / "cut")
    saved = SentenceTransformer(str(tmp_path / "cut"), device="cpu")
    for student in (cut.model, saved):
        torch.testing.assert_close(
            torch.from_numpy(student.encode(texts)), torch.from_numpy(whole.model.encode(texts)), atol=1e-5, rtol=1e-4
        )
    assert saved[0].auto_model.config.vocab_size == len(saved.tokenizer.get_vocab())
    assert len(encoder_student(model, 1, texts, start, keep=265).model.tokenizer.get_vocab()) == 265


@pytest.mark.parametrize("hidden", [0, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_head_reads_texts_with_its_teacher(
    hidden: int, dtype: torch.dtype, embedder: Path, tmp_path: Path
) -> None:
    from sentence_transformers import SentenceTransformer

    teacher = SentenceTransformer(str(embedder), device="cpu", prompts={"query": "say: "}, default_prompt_name="query")
    teacher.to(dtype)
    torch.manual_seed(3)
    head = VectorHead(16, 4, hidden)
    embedder_with_head(teacher, head).save_pretrained(str(tmp_path / "whole"), create_model_card=False)
    whole = SentenceTransformer(str(tmp_path / "whole"), device="cpu")
    vectors = teacher.float().encode(WORDS[:20], show_progress_bar=False, convert_to_tensor=True).double().cpu()
    weights = {name: value.double() for name, value in head.state_dict().items()}
    x = vectors / vectors.norm(dim=1, keepdim=True)
    y = x @ weights["map.weight"].T + weights["map.bias"]
    if hidden:
        z = x @ weights["beside.0.weight"].T + weights["beside.0.bias"]
        gelu = z * (1 + torch.erf(z / 2**0.5)) / 2
        y = y + gelu @ weights["beside.2.weight"].T + weights["beside.2.bias"]
    y = (y / y.norm(dim=1, keepdim=True)).float().numpy()
    np.testing.assert_allclose(whole.encode(WORDS[:20], show_progress_bar=False), y, atol=2e-6)
    np.testing.assert_allclose(head.transform(vectors.float()), y, atol=2e-6)


def test_a_matrix_teaches_a_student_that_reads_text(values: dict[str, Any], embedder: Path) -> None:
    Path("train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in WORDS))
    save_file({"embeddings": torch.randn(len(WORDS), 9)}, "x.safetensors")
    values |= {
        "teacher": {"vectors": "x.safetensors"},
        "student": {"static": {"tokenizer": str(embedder)}, "dimensions": 2},
        "data": {"train": {"path": "train.jsonl"}},
    }
    assert run(values).summary["train_rows"] == 108
    Path("train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in WORDS[:-1]))
    with pytest.raises(
        DataError, match=r"expected a text for each of the 120 rows of x.safetensors\[embeddings\], got 119"
    ):
        run(values | {"output": "other"})
    with pytest.raises(UserError, match=r"student\.static\.tokenizer: expected a folder"):
        Path("train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in WORDS))
        run(values | {"student": {"static": None, "dimensions": 2}, "output": "other"})


def test_texts_learn_with_their_own_vectors(embedder: Path) -> None:
    from potstill.embedding.static import static_student

    teacher = torch.randn(len(WORDS), 9)
    with pytest.raises(DataError, match="expected texts with a TextStudent"):
        EmbeddingDistiller(static_student(make_tokenizer(), torch.zeros(300, 3))).fit(teacher, teacher)
    with pytest.raises(DataError, match="got 2 texts and 120 vectors"):
        EmbeddingDistiller(static_student(make_tokenizer(), torch.zeros(300, 3))).fit(
            teacher, teacher, texts=WORDS[:2], held_out_texts=WORDS
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"focus": "lokal"}, "focus: input should be 'local', 'balanced' or 'global'"),
        ({"teacher": {}}, "teacher: expected one of vectors, embedder and server, got none"),
        ({"teacher": {"vectors": "a", "embedder": "b"}}, "got vectors and embedder"),
        ({"teacher": {"embedder": "b", "key": "x"}}, "teacher.key: unknown key."),
        ({"teacher": {"embedder": "b"}}, "expected data.train with texts, got none"),
        ({"student": {"dimensions": 3}}, "student: expected one of head, encoder and static, got none"),
        ({"student": {"head": "linear", "dimension": 3}}, "student.dimension: unknown key. Did you mean dimensions?"),
        ({"student": {"head": "linear", "dimensions": 3, "prefixes": {4: 1.0}}}, "expected prefixes of 1 to 3"),
        ({"data": {"train": {"path": "x", "fields": ["a"], "score": "s"}}}, "expected two fields with a score"),
        ({"train": {"temperature": {"schedule": "linear", "stages": 1}}}, "train.temperature.stages"),
    ],
)
def test_mistakes_of_a_recipe_name_their_key(values: dict[str, Any], change: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        EmbeddingRecipe.parse(values | change)
    assert message in str(caught.value)


def test_a_missing_device_is_an_error(values: dict[str, Any]) -> None:
    assert run(values | {"train": {**values["train"], "device": "cpu"}}).summary["rows"]
    for device in ("nowhere", "meta:-2"):
        with pytest.raises(UserError, match=f"train.device: expected an available device, .* got {device}") as caught:
            run(values | {"train": {**values["train"], "device": device}, "output": device})
        assert "\n" not in str(caught.value)


def test_bad_input_is_one_line_of_the_command(values: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    np.save("few.npy", TRAIN[:8].numpy())
    np.save("narrow.npy", HELD[:, :7].numpy())
    Path("train.jsonl").write_text('{"text": "a"}\n{"text": 3}\n')
    for change, message in (
        ({"teacher": {"vectors": "embedings.npy"}}, "Did you mean embeddings.npy?"),
        ({"teacher": {"vectors": "few.npy"}}, "expected at least 30 rows, of which a tenth is held out, got 8"),
        ({"teacher": {"vectors": "embeddings.npy", "eval_vectors": "narrow.npy"}}, "expected vectors of 24 dimensions"),
        (
            {"data": {"train": {"path": "train.jsonl"}}},
            "expected text in column 'text' of train.jsonl, got the number 3 in",
        ),
        ({"data": {"train": {"path": "train.jsonl", "fields": ["txt"]}}}, "Did you mean"),
        (
            {"teacher": {"embedder": "./nowhere"}, "data": {"train": {"path": "embeddings.npy"}}},
            "ends in one of .jsonl",
        ),
    ):
        with pytest.raises(UserError) as caught:
            run(values | change)
        assert message in str(caught.value) and "\n" not in str(caught.value)
    Path("r.yaml").write_text(yaml.safe_dump(values | {"kind": "embeding"}))
    with pytest.raises(RecipeError, match="expected kind to be one of distillation, embedding, got embeding"):
        CliRunner().invoke(app, ["run", "r.yaml"], catch_exceptions=False)


def test_the_error_for_a_missing_package_has_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from potstill.embedding.encoders import load_embedder

    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(UserError, match=r"pip install 'potstill\[embeddings\]'"):
        load_embedder("x", "teacher.embedder")


class Server(BaseHTTPRequestHandler):
    """/v1/embeddings: a text's vector is its length and 1, the rows in another order; `statuses` are given first."""

    statuses: ClassVar[list[int]] = []
    keys: ClassVar[list[str | None]] = []
    width = 2

    def do_POST(self) -> None:
        self.keys.append(self.headers.get("Authorization"))
        texts = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["input"]
        status = self.statuses.pop(0) if self.statuses else 200
        rows = [
            {"index": i, "embedding": [float(len(text))] + [1.0] * (self.width - 1)} for i, text in enumerate(texts)
        ]
        body = json.dumps({"data": rows[::-1]} if status == 200 else {"error": "no"}).encode()
        self.send_response(status if self.path == "/v1/embeddings" else 404)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None: ...


@pytest.fixture
def address(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr("potstill.engines.client.FIRST_WAIT_S", 0.0)
    monkeypatch.delenv("POTSTILL_API_KEY", raising=False)
    Server.statuses, Server.keys = [], []
    server = HTTPServer(("127.0.0.1", 0), Server)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_server_gives_vectors_once(address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    Server.statuses = [429, 503]
    texts = [f"{'x' * i}" for i in range(1, 300)]
    for url in (address, address + "/v1/"):
        vectors = encode_texts(texts, TextEncoder(server_encoder(url, "m"), "server"), tmp_path)
        assert vectors.read(0, 299)[:, 0].tolist() == [float(i) for i in range(1, 300)]
    assert Server.keys == ["Bearer sk-secret"] * 7  # two busy, five parts, and nothing for what is kept
    assert not [path for path in tmp_path.iterdir() if b"secret" in path.read_bytes()]


def test_the_error_of_a_failing_server_has_no_key(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    for statuses, error, message in (
        ([401], RefusedError, "got status 401"),
        ([500] * 4, ServerError, "got status 500"),
    ):
        Server.statuses = statuses
        with pytest.raises(error, match=message) as caught:
            server_encoder(address, "m")(["a"])
        assert "secret" not in str(caught.value)
    with pytest.raises(UserError, match="expected a url such as"):
        server_encoder("file:///etc/passwd", "m")
    with pytest.raises(DataError, match="expected vectors of 2 dimensions, got 3 in a later batch"):
        widths = iter([2, 3])
        encode_texts(["a"] * 300, TextEncoder(lambda texts: np.ones((len(texts), next(widths))), "odd"), tmp_path)
    assert not list(tmp_path.iterdir())


PAGE = (ROOT / "docs/embeddings.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("number", [0, 1])
def test_the_python_of_the_page_runs(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("example.py").write_text(re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)[number])
    runpy.run_path("example.py")


def test_the_recipes_of_the_page_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, embedder: Path) -> None:
    monkeypatch.chdir(tmp_path)
    Path("teacher").symlink_to(embedder)
    Path("train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in WORDS))
    recipe, static = re.findall(r"```yaml\n(.*?)```", PAGE, flags=re.DOTALL)
    assert run(yaml.safe_load(recipe)).summary["rows"]["student"]["dimensions"] == 8
    assert run(yaml.safe_load(static.replace("256", "4"))).summary["rows"]["student"]["dimensions"] == 4


def test_a_student_of_a_half_precision_embedder_is_trained_in_full_and_saved_in_half(
    values: dict[str, Any], embedder: Path, tmp_path: Path
) -> None:
    from sentence_transformers import SentenceTransformer

    half = SentenceTransformer(str(embedder), device="cpu")
    half.to(torch.bfloat16).save_pretrained("half", create_model_card=False)
    Path("train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in WORDS))
    values |= {"teacher": {"embedder": "half"}, "data": {"train": {"path": "train.jsonl"}}}
    values["student"] = {"encoder": {"layers": 1}, "dimensions": 4}
    result = run(values)
    trained = torch.load("run/checkpoints/student/stage-1.pt", weights_only=True)["student"]
    assert {weight.dtype for weight in trained.values() if weight.is_floating_point()} == {torch.float32}
    saved = SentenceTransformer("run/student", device="cpu")
    assert {weight.dtype for weight in saved.parameters()} == {torch.bfloat16}
    result = run(values | {"student": values["student"] | {"save_dtype": "float32"}, "output": "run-32"})
    saved = SentenceTransformer(str(result.directory / "student"), device="cpu")
    assert {weight.dtype for weight in saved.parameters()} == {torch.float32}
    with pytest.raises(RecipeError, match="expected save_dtype float32 for a head over vectors"):
        run(values | {"student": {"head": "linear", "dimensions": 3, "save_dtype": "bfloat16"}, "output": "run-head"})


def test_held_out_texts_that_are_training_texts_are_reported(values: dict[str, Any], embedder: Path) -> None:
    for name, texts in (("train", WORDS[:90]), ("eval", WORDS[60:])):
        Path(f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    values |= {
        "teacher": {"embedder": str(embedder)},
        "data": {"train": {"path": "train.jsonl"}, "eval": {"path": "eval.jsonl"}},
        "student": {"static": None, "dimensions": 4},
    }
    summary = run(values).summary
    assert summary["eval_in_train"] == pytest.approx(len({*WORDS[:90]} & {*WORDS[60:]}) / len(WORDS[60:]), abs=0.3)
    assert "held-out rows are training rows too, such as held-out row 1 and training row 61" in summary["notes"][0]
    assert "No conclusion" in Path("run/report.html").read_text()


def test_held_out_vectors_that_are_training_vectors_are_reported(values: dict[str, Any]) -> None:
    np.save("held.npy", torch.cat([HELD, TRAIN[5:7]]).numpy())
    summary = run(values | {"teacher": {"vectors": "embeddings.npy", "eval_vectors": "held.npy"}}).summary
    assert summary["eval_in_train"] == pytest.approx(2 / (len(HELD) + 2))
    assert f"held-out row {len(HELD) + 1} and training row 6." in summary["notes"][0]


def test_a_static_student_is_made_of_the_vocabulary_alone(values: dict[str, Any], embedder: Path) -> None:
    from sentence_transformers import SentenceTransformer

    values |= {"teacher": {"embedder": str(embedder)}, "student": {"static": None, "dimensions": 4}}
    with pytest.raises(RecipeError, match=r"expected data\.train with texts beside train, got none\. Add texts, or"):
        run(values)
    del values["train"]
    lines = dict(check(EmbeddingRecipe.parse(values)))
    assert lines["train"].startswith("none: made of the vectors of 2") and "steps" not in lines
    result = run(values)
    assert "data.eval: none, so the metrics are of single words" in result.summary["notes"][-1]
    student = SentenceTransformer("run/student", device="cpu")
    vectors = student.encode(WORDS, show_progress_bar=False)
    assert vectors.shape == (120, 4) and np.abs(vectors).max(1).min() > 0
    assert run(values, resume=True).summary["rows"] == result.summary["rows"]
    Path("eval.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in WORDS))
    summary = run(values | {"data": {"eval": {"path": "eval.jsonl"}}, "output": "measured"}).summary
    assert summary["held_out_rows"] == 120
    assert not any(note.startswith("data.eval") for note in summary["notes"])
    assert "PCA" in Path("measured/report.html").read_text()


def test_tokens_that_no_text_has_are_not_at_zero(values: dict[str, Any], embedder: Path) -> None:
    Path("train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in WORDS))
    values |= {"teacher": {"embedder": str(embedder)}, "student": {"static": None, "dimensions": 4}}
    run(values | {"data": {"train": {"path": "train.jsonl"}}})
    table = load_file("run/student/model.safetensors")["embedding.weight"]
    kept = text_tokens(make_tokenizer())
    assert (table[kept].abs().amax(1) > 0).all() and len(kept) > 250
    values["student"]["start"] = "centred"
    with pytest.raises(RecipeError, match=r"expected no student\.start, as the student starts from the"):
        run(values | {"data": {"train": {"path": "train.jsonl"}}})


def test_the_verdict_names_another_domain(values: dict[str, Any]) -> None:
    other = torch.cat([HELD, HELD + 0.01]) + 3 * torch.randn(HELD.shape[1], generator=torch.Generator().manual_seed(5))
    np.save("held.npy", other.numpy())
    summary = run(values | {"teacher": {"vectors": "embeddings.npy", "eval_vectors": "held.npy"}}).summary
    assert summary["domain_auc"] > 0.95
    assert "out of domain, the student is" in Path("run/report.html").read_text()
    np.save("same.npy", HELD.numpy())
    same = {"vectors": "embeddings.npy", "eval_vectors": "same.npy"}
    summary = run(values | {"teacher": same, "output": "same"}).summary
    assert 0.3 < summary["domain_auc"] < 0.8
    assert "held out, the student is" in Path("same/report.html").read_text()
