"""Exports: runs and models to files that are measured in llama.cpp, or refused by name."""

from __future__ import annotations

import io
import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoTokenizer, GPTNeoXConfig, PreTrainedTokenizerFast
from typer.testing import CliRunner

from conftest import make_llama, make_tokenizer, quiet_run
from potstill import files
from potstill.cli import app
from potstill.cli.export import show_exports
from potstill.data.sources import Source
from potstill.errors import DataError, ModelError, RunError, UserError
from potstill.evaluate.exported import ExportedFile, Exports, read_exports
from potstill.evaluate.report.page import write_report, write_student_card
from potstill.models.adapted import save_adapter
from potstill.models.adapters import Lora, adapt
from potstill.models.loading import load_model
from potstill.runs import export as runs_export
from potstill.runs.config.run import Recipe
from potstill.runs.export import evaluate_files, export
from potstill.runs.formats import gguf_check, gguf_file, llama_cpp, measure
from potstill.runs.formats.gguf_families import gguf_family
from potstill.runs.formats.gguf_file import write_gguf
from potstill.runs.formats.llama_cpp import LlamaCpp, check_survives
from potstill.runs.formats.loaded import LoadedFile
from potstill.runs.formats.measure import Bench
from potstill.runs.formats.table import FORMATS
from test_quantize import weights_of
from test_report import run_directory, summary  # noqa: F401  # fixtures

pytest.importorskip("gguf")
pytest.importorskip("xllamacpp", reason="llama.cpp is not installed: pip install 'potstill[export]'")


@pytest.fixture
def model(toys: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(toys / "student", tmp_path / "model"))


def test_a_student_with_an_adapter_is_as_large_as_both(model: Path, toys: Path) -> None:
    adapter = model.parent / "adapter"
    save_adapter(adapt(load_model(str(model), "student"), Lora(rank=2)), adapter)
    make_tokenizer().save_pretrained(adapter)
    exports = export(adapter, quantize=("f32",), data=Source(str(toys / "eval.jsonl")), max_length=32, tokens=100)
    alone = (adapter / "adapter_model.safetensors").stat().st_size
    assert exports.student_bytes == alone + (model / "model.safetensors").stat().st_size
    again = evaluate_files([adapter / "export/student-f32.gguf"], Source(str(toys / "eval.jsonl")), tokens=100)
    assert again.student_bytes == exports.student_bytes


def test_a_model_is_measured_beside_its_teacher(model: Path, toys: Path) -> None:
    data = Source(str(toys / "eval.jsonl"))
    exports = export(
        model, quantize=("f16", "q8_0"), data=data, teacher=str(toys / "teacher"), max_length=32, tokens=100
    )
    assert [file.file for file in exports.files] == ["student-f16.gguf", "student-q8_0.gguf"]
    assert sorted(path.name for path in (model / "export").iterdir()) == [
        "export.json",
        "student-f16.gguf",
        "student-q8_0.gguf",
    ]
    assert exports.student_loss is not None and exports.teacher_loss is not None
    for file in exports.files:
        assert file.bytes == (model / "export" / file.file).stat().st_size
        assert file.kl is not None and file.teacher_kl is not None and file.loss is not None
        assert file.kl < 1e-3 and abs(file.loss - exports.student_loss) < 2e-2
        assert abs(file.teacher_kl - exports.student_teacher_kl) < 2e-2
        assert file.prompt_tokens_per_second > 0 and file.tokens_per_second > 0
        assert file.peak_bytes is None or file.peak_bytes > 0
    f16, q8_0 = exports.files
    assert f16.notes == []
    assert "most weights of its matrices are not q8_0: 100% f16." in q8_0.notes[0]  # rows of 16 weights


def test_paths_stand_for_data_and_teacher(model: Path, toys: Path) -> None:
    options: dict[str, Any] = {"quantize": "f16", "max_length": 32, "tokens": 100}
    exports = export(model, data=str(toys / "eval.jsonl"), teacher=toys / "teacher", **options)
    assert exports.student_teacher_kl is not None
    path, rows = model / "export/student-f16.gguf", toys / "eval.jsonl"
    (file,) = evaluate_files([path], rows, toys / "teacher", max_length=32, tokens=100).files
    assert file.teacher_kl == exports.files[0].teacher_kl
    with pytest.raises(DataError, match=r"data: expected a Source or a path, got a list\. Give one"):
        export(model, data=[str(toys / "eval.jsonl")], **options)  # type: ignore[arg-type]


def test_each_model_runs_once_on_each_row(model: Path, toys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    forward = measure.RecordedModel.forward

    def count(self: Any, **batch: Any) -> Any:
        before = len(self._places)
        output = forward(self, **batch)
        calls.append(type(self.model).__name__ if len(self._places) > before else "recorded")
        return output

    monkeypatch.setattr(measure.RecordedModel, "forward", count)
    data = Source(str(toys / "eval.jsonl"))
    options: dict[str, Any] = {"data": data, "teacher": str(toys / "teacher"), "max_length": 32, "tokens": 100}
    export(model, quantize=("f16", "q8_0"), **options)
    rows = calls.count("CausalFile") // 2
    assert rows > 1 and calls.count("LlamaForCausalLM") == 2 * rows, "the student and the teacher"


def test_files_are_evaluated_alone(model: Path, toys: Path, tmp_path: Path) -> None:
    data = Source(str(toys / "eval.jsonl"))
    export(model, quantize=("f16", "q4_0"), data=data, teacher=str(toys / "teacher"), max_length=32, tokens=100)
    before = read_exports(model / "export")
    arguments = ["--data", str(toys / "eval.jsonl"), "--out", str(tmp_path / "out.json"), "--max-length", "32"]
    arguments += ["--teacher", str(toys / "teacher"), "--tokens", "100"]
    result = CliRunner().invoke(app, ["evaluate", str(model / "export"), *arguments])
    assert result.exit_code == 0, result.exception
    results = Exports.model_validate_json((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert before is not None and results.student_loss == before.student_loss
    assert {(file.kind, file.loss, file.kl) for file in results.files} == {
        (file.kind, file.loss, file.kl) for file in before.files
    }
    alone = shutil.copy(model / "export" / "student-q4_0.gguf", tmp_path / "alone.gguf")
    exports = evaluate_files([alone], data, max_length=32, tokens=100)
    (file,) = exports.files
    assert (file.loss, file.kl, exports.student_bytes) == (before.files[1].loss, None, None)
    assert file.tokens == exports.tokens == before.tokens
    (file,) = evaluate_files([alone], data, str(toys / "teacher"), max_length=32, tokens=100).files
    assert (file.loss, file.teacher_kl) == (before.files[1].loss, before.files[1].teacher_kl)
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + bytes(99))
    for name, options, message in (
        (alone, ["--generations", "2"], "--generations, .*: expected none of them with exported files"),
        (alone, ["--label", "text"], "--label, .*: expected none of them with exported files"),
        (tmp_path / "broken.gguf", [], "student: expected .*broken.gguf"),
    ):
        result = CliRunner().invoke(app, ["evaluate", str(name), *arguments[:6], *options])
        assert isinstance(result.exception, UserError), result.exception
        with pytest.raises(UserError, match=message):
            raise result.exception


def test_a_second_export_keeps_the_first_and_clears_what_a_kill_left(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export(model, quantize="f16")
    with monkeypatch.context() as patch:
        patch.setattr(files.os, "getpid", lambda: 2**22 + 1)  # no process has this number
        files.temporary_path(model / "export" / "student-q8_0.gguf").write_bytes(b"half")
    export(model, quantize=("q4_0",))
    export(model, quantize=("q4_0", "q4_0"))
    records = read_exports(model / "export")
    assert records is not None and [file.kind for file in records.files] == ["f16", "q4_0"]
    assert {path.suffix for path in (model / "export").iterdir()} == {".gguf", ".json"}


def test_files_of_another_student_or_on_other_rows_are_no_longer_listed(model: Path, toys: Path) -> None:
    options: dict[str, Any] = {"data": Source(str(toys / "eval.jsonl")), "max_length": 32}
    export(model, quantize=("f16",), **options, tokens=100)
    make_llama(hidden_size=8, layers=1, seed=3).save_pretrained(model)
    for kind, tokens in (("q8_0", 100), ("q4_0", 300)):
        console = Console(record=True, width=200, file=io.StringIO())
        (file,) = export(model, quantize=(kind,), **options, tokens=tokens, console=console).files
        assert (file.kind, file.kl is not None and file.kl < 1e-2) == (kind, True)
        left = "student-f16.gguf" if kind == "q8_0" else "student-q8_0.gguf"
        assert f"{left}: of another student, measured on other rows, or changed, and no longer" in console.export_text()


def test_files_are_listed_for_the_student_that_they_are_of_without_rows_too(model: Path) -> None:
    export(model, quantize="f32")
    make_llama(hidden_size=8, layers=1, seed=5).save_pretrained(model)
    output = io.StringIO()
    assert [file.kind for file in export(model, quantize="q8_0", console=Console(file=output)).files] == ["q8_0"]
    assert "student-f32.gguf: of another student" in output.getvalue()
    with (model / "export" / "student-q8_0.gguf").open("ab") as file:
        file.write(bytes(32))
    assert [file.kind for file in export(model, quantize="f16").files] == ["f16"], "its figures are of another file"


def test_a_text_ends_at_no_plain_token(tmp_path: Path) -> None:
    student = make_llama()
    student.generation_config.eos_token_id = student.config.eos_token_id = None
    for name, special, ends in (("pad", {"pad_token": "<pad>"}, {1}), ("none", {"extra": ""}, {11})):
        tokenizer = make_tokenizer(pad_token="<pad>")
        tokenizer.pad_token = special.get("pad_token")
        write_gguf(student, tokenizer, tmp_path / f"{name}.gguf", "q8_0")
        file = gguf_check.measure_gguf(tmp_path / f"{name}.gguf", "q8_0", measure.Bench(tokenizer, None, student))
        with LlamaCpp(tmp_path / f"{name}.gguf", 64) as loaded:
            assert loaded.ends() == ends
        assert any("llama.cpp ends a text at '*'" in note for note in file.notes) == (name == "none")


def test_added_tokens_that_take_what_is_beside_them_have_a_note(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([AddedToken("<tool>", lstrip=True, special=False), AddedToken("<plain>", special=False)])
    student = make_llama(vocab_size=310)
    write_gguf(student, tokenizer, tmp_path / "model.gguf", "q8_0")
    notes = gguf_check.measure_gguf(tmp_path / "model.gguf", "q8_0", measure.Bench(tokenizer, None, student)).notes
    assert [note for note in notes if "other tokens" in note and "<tool>" in note and "<plain>" not in note]


def test_a_file_at_which_llama_cpp_ends_the_process_is_one_line(tmp_path: Path) -> None:
    """It takes two tokens of one text for impossible."""
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([AddedToken("[PAD301]", special=False)])
    write_gguf(make_llama(vocab_size=310), tokenizer, tmp_path / "model.gguf", "f16")
    whole = (tmp_path / "model.gguf").read_bytes()
    check_survives(tmp_path / "model.gguf")
    (tmp_path / "model.gguf").write_bytes(whole.replace(b"[PAD303]", b"[PAD304]"))
    with pytest.raises(
        RunError, match=r"expected a file that llama\.cpp loads, got .*, at which it ends: .*id_to_token"
    ):
        check_survives(tmp_path / "model.gguf")
    (tmp_path / "model.gguf").write_bytes(whole[:8] + bytes([255]) * 8 + whole[16:])
    with pytest.raises(UserError, match=r"expected a GGUF file, got .*\. It is damaged"):
        gguf_file.gguf_kind(tmp_path / "model.gguf")


def test_a_run_is_exported_with_the_rows_and_the_teacher_of_its_report(
    recipe_values: dict[str, Any], toys: Path
) -> None:
    rows = Path(recipe_values["output"]).parent / "eval.jsonl"
    shutil.copy(toys / "eval.jsonl", rows)
    recipe_values["data"]["eval"]["path"] = str(rows)
    recipe_values |= {"evaluate": {}, "train": {**recipe_values["train"], "max_steps": 1}}
    run = quiet_run(recipe_values).directory
    whole = rows.read_text(encoding="utf-8")
    rows.write_text(whole + '{"text": "another"}\n', encoding="utf-8")
    with pytest.raises(UserError, match=r"export: expected .*eval\.jsonl as it was when the run .* began"):
        export(run)
    rows.unlink()
    with pytest.raises(UserError, match=r"eval\.jsonl.*Without them, export .*student with --data\."):
        export(run)
    assert not (run / "export").exists()


def test_a_file_that_llama_cpp_does_not_load_is_not_left_behind(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_file, "write_gguf", lambda *arguments: Path(arguments[2]).write_bytes(b"GGUF" + bytes(99)))
    with pytest.raises(RunError, match=r"expected a file that llama.cpp loads, got .*: "):
        export(model)
    assert not (model / "export").exists()


@pytest.mark.parametrize("kind", ["f32", "f16"])
def test_a_file_that_computes_something_else_is_not_left_behind(
    kind: Any, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf_file, "gguf_weight", lambda name, weight, *_: weight.float())  # rows of queries and keys
    with pytest.raises(RunError, match=r"expected llama in llama.cpp within 0.001 nats of the student, got \d"):
        export(model, quantize=(kind,))
    assert not (model / "export").exists()


def test_plain_text_of_other_tokens_is_refused(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenize = LlamaCpp.tokenize
    monkeypatch.setattr(LlamaCpp, "tokenize", lambda self, text: tokenize(self, text + "s" * text.isascii()))
    with pytest.raises(RunError, match=r"expected the tokenizer's tokens .* for 'Hello world' from llama.cpp"):
        export(model)
    monkeypatch.setattr(LlamaCpp, "tokenize", lambda self, text: tokenize(self, text + "s" * (not text.isascii())))
    (file,) = export(model).files
    assert "llama.cpp gives other tokens than the tokenizer for" in file.notes[0]


def test_the_speed_of_generation_is_without_the_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    now, prompts = 0.0, iter([9.0, 5.0, 1.0, 5.0, 1.0])  # each time the prompt takes another time

    class Slow(LoadedFile):
        num_tokens, context_length = 300, 256

        def close(self) -> None: ...
        def ends(self) -> frozenset[int]:
            return frozenset()

        def _clear(self) -> None: ...
        def _decode(self, ids: Any, start: int) -> np.ndarray:
            nonlocal now
            now += 0.01 if len(ids) == 1 else next(prompts)
            return np.zeros((len(ids), self.num_tokens), np.float32)

    monkeypatch.setattr(measure.time, "process_time", lambda: now)
    assert measure._speeds(Slow()) == pytest.approx((128 / 5, 100))


def test_generation_ends_where_it_does_in_transformers(tmp_path: Path) -> None:
    student, tokenizer = make_llama(seed=3).eval(), make_tokenizer()
    write_gguf(student, tokenizer, tmp_path / "model.gguf", "f32")
    with LlamaCpp(tmp_path / "model.gguf") as loaded:
        assert loaded.ends() == {tokenizer.eos_token_id}
        ids = tokenizer("def f(a")["input_ids"]
        own = student.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)[0, len(ids) :].tolist()
        assert loaded.generate(ids, 12) == own
        assert loaded.generate(ids, 12, ends=frozenset({own[2]})) == own[: own.index(own[2]) + 1]


def test_special_tokens_and_the_chat_template_are_written(tmp_path: Path) -> None:
    from gguf import GGUFReader

    tokenizer = make_tokenizer(eos_token="<end>", pad_token="<pad>")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}<pad>{% endfor %}"
    student = make_llama(320)
    write_gguf(student, tokenizer, tmp_path / "model.gguf", "f16")
    fields = GGUFReader(tmp_path / "model.gguf").fields
    content = {name: fields[f"tokenizer.{name}"].contents() for name in ("chat_template", "ggml.eos_token_id")}
    assert content == {"chat_template": tokenizer.chat_template, "ggml.eos_token_id": 0}
    assert fields["tokenizer.ggml.tokens"].contents()[-1] == "[PAD319]"
    with LlamaCpp(tmp_path / "model.gguf") as loaded:
        assert loaded.ends() == {0, 1}, "the template ends a turn with <pad>"


def words() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def test_what_gguf_does_not_hold_is_refused_by_name(tmp_path: Path) -> None:
    from test_export_gguf import make

    with pytest.raises(ModelError, match=r"expected for GGUF one of llama, mistral, .*, got gpt_neox"):
        gguf_family(GPTNeoXConfig())
    cases: list[tuple[str, dict[str, Any], str]] = [
        ("llama", {"hidden_act": "relu"}, "llama with the activation silu, got relu"),
        ("gemma", {"hidden_act": "silu", "hidden_activation": "gelu_pytorch_tanh"}, "activation gelu_pytorch_tanh"),
        (
            "phi3",
            {"hidden_size": 32, "num_attention_heads": 3, "head_dim": 8},
            "as wide as its hidden states, 32, got 24",
        ),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "gpt2 without scale_attn_by_inverse_layer_idx"),
    ]
    for family, changes, message in cases:
        config = AutoConfig.for_model(family)
        for key, value in changes.items():
            setattr(config, key, value)
        with pytest.raises(ModelError, match=message):
            gguf_family(config)
    with pytest.raises(ModelError, match="a byte-level BPE or a SentencePiece BPE with bytes, got WordLevel"):
        write_gguf(make_llama(), words(), tmp_path / "model.gguf")
    with pytest.raises(ModelError, match=r"qwen3 without biases, got model\.layers\.0\.self_attn\.q_proj\.bias"):
        write_gguf(make("qwen3", attention_bias=True), make_tokenizer(), tmp_path / "model.gguf")
    with pytest.raises(ModelError, match="embeddings of all 300 tokens, got 200"):
        write_gguf(make_llama(200), make_tokenizer(), tmp_path / "model.gguf")
    large = make_llama()
    large.lm_head.weight.data[0, 0] = 1e5
    with pytest.raises(ModelError, match=r"weights below 65,504 for f16, got larger ones in output.weight. Use bf16"):
        write_gguf(large, make_tokenizer(), tmp_path / "model.gguf")
    assert [*tmp_path.iterdir()] == []


def test_layers_with_windows_that_gguf_does_not_hold(tmp_path: Path) -> None:
    from test_export_gguf import WINDOWS, make

    kinds = ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]
    with pytest.raises(ModelError, match="gemma3_text with full attention in each n-th layer, got layer_types"):
        write_gguf(make("gemma3_text", **{**WINDOWS, "layer_types": kinds}), make_tokenizer(), tmp_path / "model.gguf")


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("llama", {"beta_fast": 8.0}, "yarn with beta_fast 32, got 8.0"),
        ("llama", {"truncate": False}, "yarn with truncate True, got False"),
        ("qwen2", {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}, "in qwen2, got llama3"),
        ("llama", {"rope_type": "dynamic"}, "default, linear, yarn, longrope, llama3 in llama, got dynamic"),
        ("gemma3_text", {"attention_factor": 1.0}, "yarn with its own attention_factor beside sliding windows"),
    ],
)
def test_rotary_embeddings_that_gguf_does_not_hold(
    family: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    from test_export_gguf import WINDOWS, YARN, make

    rope = {**YARN["rope_parameters"], **changes}
    windows: dict[str, Any] = {}
    if family == "gemma3_text":
        windows = {**WINDOWS, "head_dim": 8}
        rope = {"full_attention": rope, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
    with pytest.raises(ModelError, match=message):
        write_gguf(make(family, **windows, rope_parameters=rope), make_tokenizer(), tmp_path / "model.gguf")


def test_the_table_has_all_files_in_a_terminal_of_80_columns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    names = [f"student-{program}-{kind}" for program in ("onnx", "openvino") for kind in ("f32", "int8")]
    speeds: dict[str, Any] = {"prompt_tokens_per_second": 9.0, "peak_bytes": 8}
    exported = [ExportedFile(file=name, kind="f32", program="a program", bytes=7, **speeds) for name in names]
    show_exports(Exports(task="embedding", student_bytes=7, files=exported))
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert next(line for line in lines if line.split()[:1] == ["size"]).count("7 bytes") == 5, "the student and 4 files"
    head = lines[: next(i for i, line in enumerate(lines) if "──" in line)]
    letters = sorted("".join("".join(line.split()) for line in head))
    assert letters == sorted("".join(["student/", *names])), "no name is cut"
    assert not any("loss" in line or "generation" in line for line in lines), "nothing was measured"


def test_what_is_in_the_way_is_refused_before_anything_is_measured(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise AssertionError("measured")

    monkeypatch.setattr(Bench, "start", fail)
    out = model / "export"
    (out / "student-f16.gguf").mkdir(parents=True)
    with pytest.raises(UserError, match=r"expected a file to write, or nothing, at .*student-f16.gguf, got a folder"):
        export(model)
    (out / "student-f16.gguf").rmdir()
    (out / "student-onnx-f32").touch()
    with pytest.raises(UserError, match=r"expected a folder to write, or nothing, at .*student-onnx-f32, got a file"):
        export(model, "onnx")
    for text in ("{half", "[]"):
        (out / "export.json").write_text(text)
        with pytest.raises(UserError, match=r"figures of exported files in .*export.json, got something else. Delete"):
            export(model)


def test_a_full_disk_is_one_line_without_advice_for_other_commands(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setitem(FORMATS, "gguf", replace(FORMATS["gguf"], write=fail))  # type: ignore[arg-type]
    monkeypatch.setattr(files.shutil, "disk_usage", lambda folder: SimpleNamespace(free=0))
    with pytest.raises(RunError, match=r"got 0.0 MB. .* run the command again, with --resume if it has that"):
        export(model)
    assert not (model / "export").exists()


def test_wrong_options(model: Path, toys: Path) -> None:
    for arguments, message in (
        (["--quantize", "int8"], "--quantize: expected some of f32, f16, .*, got int8"),
        (["--to", "onnx", "--quantize", "q8_0"], "--quantize: expected some of f32, int8, int4, got q8_0"),
        (["--quantize", "q4"], "--quantize: expected some of f32, f16, .*, got q4. Did you mean q4_"),
        (["--quantize", "Q4_K_M"], "got Q4_K_M. Did you mean q4_k_m?"),
        (["--to", "ggml"], "--to: expected one of gguf, gguf-adapter, onnx, openvino, got ggml"),
        (["--field", "text"], "--field, --pair, --label: expected --data with them, got none"),
    ):
        result = CliRunner().invoke(app, ["export", str(model), *arguments])
        assert isinstance(result.exception, UserError)
        with pytest.raises(UserError, match=message):
            raise result.exception
    with pytest.raises(ModelError, match="student: expected"):
        export(model / "nothing")
    other = shutil.copytree(toys / "teacher", model.parent / "other")
    make_tokenizer(280).save_pretrained(other)
    for data, message in (
        (Source(str(toys / "eval.jsonl")), "--teacher: expected a model with the tokens of .*, got .*other. Leave it"),
        (None, "--teacher: expected --data to compare a model on, got .*other without"),
    ):
        with pytest.raises(UserError, match=message):
            export(model, data=data, teacher=str(other))
    assert not (model / "export").exists()


@pytest.mark.parametrize("package", ["gguf", "xllamacpp"])
def test_a_missing_package_is_an_error_with_the_command(
    package: str, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(measure.Bench, "start", lambda *_: pytest.fail("the student is measured"))
    llama_cpp._library.cache_clear()
    try:
        with pytest.raises(
            UserError, match=rf"expected the package {package}, got none. .*pip install 'potstill\[export\]'"
        ):
            export(model)
    finally:
        llama_cpp._library.cache_clear()


def test_exports_stand_in_the_report_and_on_the_card(model: Path, run_directory: Any, summary: dict[str, Any]) -> None:  # noqa: F811
    run = run_directory(summary)
    shutil.copytree(model, run / "student", dirs_exist_ok=True)
    tokenizer, student = AutoTokenizer.from_pretrained(model), make_llama(hidden_size=8, layers=1)
    bench = Bench(tokenizer, student=student)
    runs_export.export_model(
        bench, {"gguf": ["q8_0"]}, run / "export", saved=run / "student", console=Console(quiet=True)
    )
    for page in (write_report(run), write_student_card(run)):
        text = page.read_text(encoding="utf-8")
        assert "student-q8_0.gguf" in text and "llama.cpp of xllamacpp" in text
    runs_export.export_model(
        bench, {"gguf": ["f16"]}, run / "export", saved=run / "student", console=Console(quiet=True)
    )
    for deleted, listed in (("student-q8_0.gguf", True), ("student-f16.gguf", False)):
        (run / "export" / deleted).unlink()
        for page in (write_report(run), write_student_card(run)):
            text = page.read_text(encoding="utf-8")
            assert deleted not in text
            assert ("student-f16.gguf" in text) is ("llama.cpp of xllamacpp" in text) is listed


def test_recipes_name_their_exports(recipe_values: dict[str, Any]) -> None:
    recipe_values["export"] = [{"quantize": "q8_0"}, {"to": "gguf", "quantize": "q4_0"}]
    recipe_values["export"] += [{}, {"to": "onnx"}, {"to": "onnx", "quantize": "int8"}, {"quantize": "f32"}]
    files = [(part.to, part.kind) for part in Recipe.parse(recipe_values).export]
    assert files[:3] == [("gguf", "q8_0"), ("gguf", "q4_0"), ("gguf", "f16")]
    assert files[3:] == [("onnx", "f32"), ("onnx", "int8"), ("gguf", "f32")]
    for wrong, message in (
        ({"quantize": "q8_0"}, "export: expected each file once, got gguf q8_0 twice"),
        ({"to": "onnx", "quantize": "q4_1"}, r"export.6.quantize: expected some of f32, int8, int4, got q4_1"),
        ({"quantize": "int8"}, r"export.6.quantize: expected some of f32, f16, .*, got int8"),
    ):
        with pytest.raises(UserError, match=message):
            Recipe.parse({**recipe_values, "export": [*recipe_values["export"], wrong]})
    recipe_values |= {"export": [{}], "task": "masked"}
    with pytest.raises(UserError, match=r"export: expected the task causal for this format, got masked. Use onnx"):
        Recipe.parse(recipe_values)


def test_a_run_exports_its_student(recipe_values: dict[str, Any], tmp_path: Path) -> None:
    from potstill.runs.run import run

    recipe_values["student"] |= {"quantize": "q8_0", "design": {"hidden_size": 32, "num_hidden_layers": 1}}
    recipe_values |= {"export": [{"quantize": "q8_0"}], "evaluate": {"baseline": False, "continuations": 0}}
    recipe_values["train"] |= {"max_steps": 1}
    directory = run(Recipe.parse(recipe_values), console=Console(quiet=True)).directory
    records = read_exports(directory / "export")
    assert records is not None and records.files[0].teacher_kl is not None
    trained = load_file(directory / "student" / "model.safetensors")
    exported = weights_of(directory / "export" / "student-q8_0.gguf")
    for name, own in (("model.embed_tokens", "token_embd"), ("model.layers.0.mlp.up_proj", "blk.0.ffn_up")):
        assert np.array_equal(trained[f"{name}.weight"].numpy(), exported[f"{own}.weight"])
    assert "student-q8_0.gguf" in (directory / "report.html").read_text(encoding="utf-8")
    text = (directory / "recipe.yaml").read_text(encoding="utf-8")  # of an older transformers
    (directory / "recipe.yaml").write_text(text.replace("\ntrain:\n", "\ntrain:\n  no_longer: 1\n"), encoding="utf-8")
    again = CliRunner().invoke(app, ["export", str(directory), "--quantize", "f16"])
    assert again.exit_code == 0, again.exception
    assert "student-f16.gguf" in (directory / "student" / "README.md").read_text(encoding="utf-8")
    assert {file["kind"] for file in json.loads((directory / "export" / "export.json").read_text())["files"]} == {
        "q8_0",
        "f16",
    }


def test_a_second_export_of_fewer_tokens_is_beside_the_cut_teacher(recipe_values: dict[str, Any]) -> None:
    recipe_values["student"] |= {"vocabulary": {"keep": 280}}
    recipe_values |= {"export": [{"to": "gguf", "quantize": "f32"}], "evaluate": {"continuations": 0}}
    directory = quiet_run(recipe_values).directory
    first = read_exports(directory / "export")
    assert first is not None
    assert first.files[0].teacher_kl is not None
    again = export(directory, quantize=["f32"])
    assert again.files[0].teacher_kl == pytest.approx(first.files[0].teacher_kl, rel=1e-3)
    assert again.teacher_loss == pytest.approx(first.teacher_loss, rel=1e-3)
