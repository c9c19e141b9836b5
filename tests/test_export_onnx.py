"""ONNX graphs: what onnxruntime computes from them is what transformers computes, or they are refused by name."""

from __future__ import annotations

import logging
import shutil
import sys
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer, MambaConfig, MambaForCausalLM
from typer.testing import CliRunner

from conftest import make_llama, make_tokenizer
from potstill import files
from potstill.cli import app
from potstill.data.sources import Source
from potstill.errors import ModelError, RunError, UserError
from potstill.evaluate.exported import Exports, export_table, read_exports
from potstill.runs.config.run import Recipe
from potstill.runs.export import evaluate_files, export
from potstill.runs.formats import loaded as loaded_file
from potstill.runs.formats.graphs import CausalGraph, OpenGraph, measure_graph
from potstill.runs.formats.measure import Bench
from potstill.runs.formats.onnx_graph import _silent, trace, write_onnx
from potstill.runs.formats.onnx_runtime import open_onnx
from potstill.runs.formats.openvino import open_openvino, write_openvino
from potstill.runs.formats.table import FORMATS, exported_files
from potstill.runs.run import run
from test_export_gguf import CASES, IDS, expected, make
from toy_encoders import make_encoder, save, write_rows

pytest.importorskip("onnxscript")
onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime", reason="install it with pip install 'potstill[onnx]'")

FILES = ["config.json", "generation_config.json", "model.onnx", "tokenizer.json", "tokenizer_config.json"]
FAMILIES = sorted({family for family, _ in CASES.values()})  # those of the table in docs/export.md


def exported_toy(toys: Path, folder: Path, to: Any) -> tuple[Path, Exports]:
    """A toy model with its graphs, measured beside its teacher."""
    model = Path(shutil.copytree(toys / "student", folder / "model"))
    options: dict[str, Any] = {"data": Source(str(toys / "eval.jsonl")), "teacher": str(toys / "teacher")}
    return model, export(model, to, ("f32", "int8"), **options, max_length=32, tokens=100)


@pytest.fixture(scope="module")
def exported(toys: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Exports]:
    """Traced once: that takes some ten seconds."""
    return exported_toy(toys, tmp_path_factory.mktemp("onnx"), "onnx")


def test_graphs_are_measured_beside_the_teacher(exported: tuple[Path, Exports]) -> None:
    model, exports = exported
    assert sorted(path.name for path in (model / "export").iterdir()) == [
        "export.json",
        "student-onnx-f32",
        "student-onnx-int8",
    ]
    plain, small = exports.files
    assert (plain.kind, small.kind, plain.file) == ("f32", "int8", "student-onnx-f32")
    assert plain.program == small.program == f"onnxruntime {onnxruntime.__version__}"
    assert exports.student_loss is not None and exports.student_teacher_kl is not None
    assert plain.kl is not None and plain.teacher_kl is not None and plain.loss is not None
    assert plain.kl < 1e-6 and plain.agreement == 1 and abs(plain.loss - exports.student_loss) < 1e-5
    assert abs(plain.teacher_kl - exports.student_teacher_kl) < 1e-5
    assert small.kl is not None and plain.kl < small.kl < 1e-3, "8 bits in blocks of 32 cost little"
    assert small.bytes < plain.bytes
    graph = onnx.load(model / "export" / small.file / "model.onnx").graph
    operators = {node.op_type for node in graph.node}
    assert "MatMulNBits" in operators and "DynamicQuantizeLinear" not in operators, "no scale for all activations"
    assert str(Path.cwd()).encode() not in (model / "export" / plain.file / "model.onnx").read_bytes()
    assert small.loss is not None and small.teacher_kl is not None
    for file in exports.files:
        folder = model / "export" / file.file
        assert sorted(path.name for path in folder.iterdir()) == FILES
        assert file.bytes == sum(path.stat().st_size for path in folder.iterdir())
        assert file.prompt_tokens_per_second > 0 and file.tokens_per_second > 0


@torch.no_grad()
def test_onnxruntime_computes_what_transformers_does(exported: tuple[Path, Exports]) -> None:
    """With and without a cache, and for a batch that is padded on the left, as text generation does."""
    folder = exported[0] / "export" / "student-onnx-f32"
    model = AutoModelForCausalLM.from_pretrained(exported[0])
    check_parity(folder, model)
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    mask = torch.tensor([[1] * 8, [0] * 3 + [1] * 5])
    ids, positions = torch.tensor([IDS[:8], [1] * 3 + IDS[8:13]]), (mask.cumsum(1) - 1).clamp_min(0)
    past = {
        tensor.name: np.zeros((2, tensor.shape[1], 0, tensor.shape[3]), np.float32)
        for tensor in session.get_inputs()
        if tensor.name.startswith("past")
    }
    fed = {"input_ids": ids.numpy(), "attention_mask": mask.numpy(), "position_ids": positions.numpy()}
    logits = torch.from_numpy(session.run(["logits"], fed | past)[0])
    reference = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    assert (logits - reference)[mask.bool()].abs().max() < 1e-4


def check_parity(folder: Path, model: Any, open_graph: OpenGraph = open_onnx) -> None:
    """Compare log-probabilities at every position, in one pass and in passes of some tokens that use the cache."""
    reference = expected(model, IDS)
    for chunk in (len(IDS), 7, 1):
        with pytest.MonkeyPatch.context() as patch, CausalGraph(open_graph, folder) as loaded:
            patch.setattr(loaded_file, "CHUNK", chunk)
            logits = torch.from_numpy(np.concatenate([*loaded.logits(IDS)]))
        assert (logits.log_softmax(-1) - reference).abs().max() < 1e-4, chunk


def test_generation_ends_where_it_does_in_transformers(exported: tuple[Path, Exports]) -> None:
    model, tokenizer = (auto.from_pretrained(exported[0]) for auto in (AutoModelForCausalLM, AutoTokenizer))
    with CausalGraph(open_onnx, exported[0] / "export" / "student-onnx-f32") as loaded:
        assert loaded.ends() == {tokenizer.eos_token_id}
        ids = tokenizer("def f(a")["input_ids"]
        own = model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)[0, len(ids) :].tolist()
        assert loaded.generate(ids, 12) == own
        assert loaded.generate(ids, 12, ends=frozenset({own[2]})) == own[: own.index(own[2]) + 1]


def test_graphs_are_evaluated_alone(exported: tuple[Path, Exports], toys: Path, tmp_path: Path) -> None:
    before = exported[1]
    arguments = ["--data", str(toys / "eval.jsonl"), "--out", str(tmp_path / "out.json"), "--max-length", "32"]
    arguments += ["--teacher", str(toys / "teacher"), "--tokens", "100"]
    result = CliRunner().invoke(app, ["evaluate", str(exported[0] / "export"), *arguments])
    assert result.exit_code == 0, result.exception
    results = Exports.model_validate_json((tmp_path / "out.json").read_text(encoding="utf-8"))
    measured = [[(file.kind, file.loss, file.kl, file.teacher_kl) for file in e.files] for e in (before, results)]
    assert measured[0] == measured[1]
    alone = shutil.copytree(exported[0] / "export" / "student-onnx-int8", tmp_path / "alone")
    result = CliRunner().invoke(app, ["evaluate", str(alone / "model.onnx"), *arguments[:6], "--tokens", "100"])
    assert result.exit_code == 0, result.exception
    (file,) = Exports.model_validate_json((tmp_path / "out.json").read_text(encoding="utf-8")).files
    assert (file.kind, file.loss, file.kl) == ("int8", before.files[1].loss, None)
    (alone / "model.onnx").write_bytes(b"half")
    with pytest.raises(RunError, match=r"expected a graph that onnxruntime loads, got .*model.onnx: "):
        CausalGraph(open_onnx, alone)


def test_a_graph_is_measured_on_tokens_of_its_own_tokenizer(
    exported: tuple[Path, Exports], toys: Path, tmp_path: Path
) -> None:
    graph = Path(shutil.copytree(exported[0] / "export/student-onnx-int8", tmp_path / "export/other"))
    make_tokenizer(290).save_pretrained(graph)
    shutil.copytree(toys / "student", tmp_path / "student")
    with pytest.raises(UserError, match=r"expected in .*other a tokenizer that reads .* as the tokens"):
        evaluate_files([graph], Source(str(toys / "eval.jsonl")), max_length=32, tokens=100)


def test_a_damaged_config_of_a_graph_is_one_line(exported: tuple[Path, Exports], toys: Path, tmp_path: Path) -> None:
    graph = Path(shutil.copytree(exported[0] / "export/student-onnx-int8", tmp_path / "graph"))
    for damaged in ("{", '{"model_type": "ll!ma"}'):
        (graph / "config.json").write_text(damaged)
        with pytest.raises(UserError, match=r"student: expected "):
            evaluate_files([graph], Source(str(toys / "eval.jsonl")), max_length=32, tokens=100)


def test_exported_files_are_found(tmp_path: Path) -> None:
    for name in ("a.gguf", "b/model.onnx", "c/model.safetensors", "c/model.onnx", "d.partial/model.onnx"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert exported_files(tmp_path) == [tmp_path / "a.gguf", tmp_path / "b", tmp_path / "c"]
    assert exported_files(tmp_path / "b") == exported_files(tmp_path / "b" / "model.onnx") == [tmp_path / "b"]
    assert exported_files(tmp_path / "c") == [], "a model for transformers"


def test_a_graph_of_another_model_is_refused(exported: tuple[Path, Exports]) -> None:
    folder = exported[0] / "export" / "student-onnx-f32"
    with pytest.raises(RunError, match=r"expected llama as a graph within 0.001 of the student, got \d"):
        measure_graph(open_onnx, folder, "f32", Bench(make_tokenizer(), None, make_llama(seed=5).eval()))


def test_what_onnx_does_not_hold_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    mamba = MambaForCausalLM(MambaConfig(vocab_size=300, hidden_size=16, state_size=4, num_hidden_layers=1))
    with pytest.raises(ModelError, match="torch exports, got mamba, whose cache is not one of keys"):
        trace(mamba.eval())

    def fail(*arguments: Any, **options: Any) -> None:
        raise RuntimeError("data-dependent\nbranch")

    monkeypatch.setattr(torch.onnx, "export", fail)
    with pytest.raises(ModelError, match="got llama, which it does not: data-dependent branch"):
        trace(make_llama().eval())


def test_a_missing_package_is_an_error_with_the_command(toys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    message = r"expected the package onnxruntime, got none. Install it with pip install 'potstill\[onnx\]'"
    with pytest.raises(UserError, match=message):
        export(toys / "student", "onnx", out=toys / "nothing")
    assert not (toys / "nothing").exists()


def test_nothing_is_left_half_written(
    exported: tuple[Path, Exports], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second export replaces the first as a whole, one that fails leaves it, and what a kill left is cleared."""
    model = Path(shutil.copytree(exported[0], tmp_path / "model"))
    folder = model / "export" / "student-onnx-f32"
    with monkeypatch.context() as patch:
        patch.setattr(files.os, "getpid", lambda: 2**22 + 1)  # no process has this number
        left = files.temporary_path(model / "export" / "student-onnx-int8")
    left.mkdir()
    (left / "model.onnx").touch()

    def write(prepared: Any, student: Any, tokenizer: Any, path: Path, kind: str) -> None:
        shutil.copytree(exported[0] / "export" / f"student-onnx-{kind}", path)
        (path / "new.txt").touch()

    def fail(*arguments: Any) -> None:
        write(*arguments)
        (arguments[3] / "model.onnx").write_bytes(b"half")

    for writer, names in ((fail, FILES), (write, sorted([*FILES, "new.txt"]))):
        patched = replace(FORMATS["onnx"], prepare=lambda model, task: None, write=writer)
        monkeypatch.setitem(FORMATS, "onnx", patched)  # type: ignore[arg-type]
        if writer is fail:
            with pytest.raises(RunError, match="a graph that onnxruntime loads"):
                export(model, "onnx")
        else:
            export(model, "onnx")
        assert sorted(path.name for path in folder.iterdir()) == names
        assert {path.suffix for path in (model / "export").iterdir()} == {"", ".json"}
    records = read_exports(model / "export")
    assert records is not None and [file.kind for file in records.files] == ["f32"]


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_families(family: str, tmp_path: Path) -> None:
    model, tokenizer = make(family, **CASES[family][1]), make_tokenizer()
    traced = trace(model)
    write_onnx(traced, model, tokenizer, tmp_path / "onnx", "f32")
    check_parity(tmp_path / "onnx", model)
    if find_spec("openvino") is not None:
        write_openvino(traced, model, tokenizer, tmp_path / "openvino", "f32")
        check_parity(tmp_path / "openvino", model, open_openvino)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "task", "columns"),
    [
        ("bert", "masked", {}),
        ("bert", "classification", {"label": "label", "pair": "text_pair"}),
        ("bert", "regression", {"label": "score"}),
        ("bert", "encoder", {}),
        ("distilbert", "classification", {"label": "label"}),
        ("roberta", "masked", {}),
        ("modernbert", "masked", {}),
    ],
)
def test_encoders(family: str, task: Any, columns: dict[str, str], tmp_path: Path) -> None:
    """The export itself compares the graph with the student, on a row and a padded one."""
    names = [save(make_encoder(family, task, seed=seed), tmp_path / str(seed)) for seed in (0, 1)]
    data = Source(str(write_rows(tmp_path / "eval.jsonl", 16, seed=7)), field="text", **columns)
    exports = export(names[0], "onnx", ("f32", "int8"), data=data, teacher=names[1], task=task, max_length=30)
    plain, small = exports.files
    assert exports.task == task and plain.tokens == exports.tokens >= 16 and plain.tokens_per_second is None
    assert plain.kl is not None and plain.kl < 1e-6 and small.kl is not None and small.kl < 0.05
    assert exports.student_teacher_kl is not None and plain.teacher_kl is not None
    assert abs(plain.teacher_kl - exports.student_teacher_kl) < 1e-4
    assert (plain.loss is None) is (task == "encoder") and (plain.agreement is None) is (
        task in ("encoder", "regression")
    )
    columns, rows = export_table(exports)
    assert all(len(row) == len(columns) for row in rows)
    assert {
        "regression": "squared distance to the student",
        "encoder": "difference of similarities to the student",
    }.get(task, "KL to the student") in columns
    assert ("held-out loss" in columns) is (plain.loss is not None) and "generation, tokens a second" not in columns


def test_a_student_that_onnx_does_not_hold_is_refused_before_it_is_trained(
    recipe_values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(model: Any, task: str) -> None:
        raise ModelError("export: expected for ONNX a model that torch exports, got llama")

    monkeypatch.setitem(FORMATS, "onnx", replace(FORMATS["onnx"], prepare=refuse))  # type: ignore[arg-type]
    recipe_values |= {"export": [{"to": "onnx"}], "evaluate": {"baseline": False, "continuations": 0}}
    with pytest.raises(ModelError, match="expected for ONNX a model that torch exports, got llama"):
        run(Recipe.parse(recipe_values), console=Console(quiet=True))
    assert not Path(recipe_values["output"], "student").exists()


def test_the_quantizer_does_not_change_the_logging_of_the_process() -> None:
    before = logging.root.handlers[:], logging.root.level
    with _silent():
        sys.modules.pop("onnxruntime.quantization.matmul_nbits_quantizer", None)
        logging.root.handlers.clear()
        import_module("onnxruntime.quantization.matmul_nbits_quantizer")
        assert logging.root.handlers, "its import adds one"
    assert (logging.root.handlers, logging.root.level) == before


def test_wrong_tasks(toys: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("kind: other\n", encoding="utf-8")
    with pytest.raises(UserError, match="expected a run that trains a student, got one of the kind other"):
        export(tmp_path, "onnx")
    for arguments, message in (
        (["--task", "masks"], "--task: expected one of causal, .*, got masks. Did you mean masked"),
        (
            ["--to", "gguf", "--task", "masked"],
            "export: expected the task causal for this format, got masked. Use onnx",
        ),
        (["--label", "score"], "--field, --pair, --label: expected --data with them, got none"),
    ):
        result = CliRunner().invoke(app, ["export", str(toys / "student"), "--to", "onnx", *arguments])
        assert isinstance(result.exception, UserError), result.exception
        with pytest.raises(UserError, match=message):
            raise result.exception
