"""LoRA students as adapters for llama.cpp: what it computes over their base is what the merged student computes."""

from __future__ import annotations

import copy
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from conftest import make_llama, make_tokenizer, quiet_run
from potstill.cli import app
from potstill.data.sources import Source
from potstill.errors import ModelError, RecipeError, RunError, UserError
from potstill.evaluate.exported import Exports, read_exports
from potstill.models.adapted import merged, save_adapter
from potstill.models.adapters import Adapter, Ia3, Lora, Prompt, adapt
from potstill.models.loading import load_model, suppress_warnings
from potstill.runs.config.run import Recipe
from potstill.runs.export import evaluate_files, export
from potstill.runs.formats.gguf_adapter import separate_adapter, write_gguf_adapter
from potstill.runs.formats.gguf_file import write_gguf
from potstill.runs.formats.table import exported_files
from test_export_gguf import CASES, IDS, expected, log_probs, make

peft = pytest.importorskip("peft")
pytest.importorskip("gguf")
pytest.importorskip("xllamacpp", reason="llama.cpp is not installed: pip install 'potstill[export]'")


def trained(model: Any, config: Any) -> Any:
    """A model with an adapter, by its declaration or by a config of peft, whose weights are not those of a new one."""
    with suppress_warnings(), warnings.catch_warnings(action="ignore"):
        model = adapt(model, config) if isinstance(config, Adapter) else peft.get_peft_model(model, config)
    torch.manual_seed(1)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(std=0.05)
    return model.eval()


def kl(reference: torch.Tensor, other: torch.Tensor) -> float:
    return float((reference.exp() * (reference - other)).sum(-1).max())


def compare(model: Any, folder: Path) -> None:
    """Check that an adapter matters, and that llama.cpp computes with it what the merged student is."""
    separate, before = separate_adapter(model), {k: v.clone() for k, v in model.state_dict().items()}
    write_gguf_adapter(separate, make_tokenizer(), folder, "f32")
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())
    student = expected(merged(model), IDS)
    assert kl(student, log_probs(folder, IDS)) < 1e-5
    assert (student - log_probs(folder, IDS)).abs().max() < 1e-2
    assert kl(student, log_probs(folder / "base.gguf", IDS)) > 1e-2, "the base alone is another model"


@pytest.mark.parametrize("case", CASES)
def test_llama_cpp_computes_base_and_adapter_as_the_merged_student(case: str, tmp_path: Path) -> None:
    compare(trained(make(CASES[case][0], **CASES[case][1]), Lora(rank=4, alpha=16)), tmp_path / "files")


@pytest.mark.parametrize(
    "changes",
    [
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 6}, "alpha_pattern": {"down_proj": 3, "k_proj": 30}},
        {"target_modules": ["q_proj", "lm_head"]},
        {"lora_alpha": 0, "alpha_pattern": {"down_proj": 16}},
        {"init_lora_weights": "gaussian", "lora_dropout": 0.5},
    ],
)
def test_scales_ranks_and_heads_of_adapters_of_peft(changes: dict[str, Any], tmp_path: Path) -> None:
    options: dict[str, Any] = {"r": 4, "lora_alpha": 12, "target_modules": "all-linear", **changes}
    compare(trained(make("llama"), peft.LoraConfig(**options)), tmp_path / "files")


def test_the_adapter_of_a_quantized_base(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    base = make("llama", hidden_size=64)
    base.save_pretrained(tmp_path / "base")
    model = load_model(str(tmp_path / "base"), "student", "float32", bits=4)
    compare(trained(model, Lora(rank=4, alpha=32)), tmp_path / "files")


LORA: dict[str, Any] = {"r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "expected for gguf-adapter a student with an adapter, got a whole model. Use gguf"),
        (Ia3(), "a LoRA adapter, got IA3. Use gguf, which merges it"),
        (
            peft.AdaLoraConfig(target_modules=["q_proj"], total_step=5, task_type="CAUSAL_LM"),
            "a LoRA adapter, got ADALORA",
        ),
        (peft.LoraConfig(**LORA, use_dora=True), "pairs of matrices alone, got .*lora_magnitude_vector"),
        (peft.LoraConfig(**LORA, modules_to_save=["lm_head"]), "pairs of matrices alone, got .*lm_head"),
        (peft.LoraConfig(**LORA, bias="all"), "pairs of matrices alone, got .*bias"),
        (peft.LoraConfig(**LORA, lora_bias=True), "pairs of matrices alone, got .*lora_B.bias"),
        (peft.LoraConfig(r=2, target_modules=["embed_tokens"]), "pairs of matrices alone, got .*lora_embedding"),
        (peft.LoraConfig(**LORA, trainable_token_indices=[3]), "pairs of matrices alone, got .*token"),
        (peft.LoraConfig(**LORA, init_lora_weights="pissa"), "of an unchanged base, got init_lora_weights: pissa"),
        (
            peft.LoraConfig(**LORA, alora_invocation_tokens=[3, 4]),
            "merged into the weights of its base, got aLoRA",
        ),
        (Prompt(virtual_tokens=2), "merged into the weights of its base, got virtual tokens"),
    ],
)
@pytest.mark.filterwarnings("ignore:Adapter 'default'")  # peft warns of any bias
def test_what_is_no_adapter_of_llama_cpp_is_refused(config: Any, message: str) -> None:
    model = make("llama", attention_bias=True)
    with pytest.raises(ModelError, match=message):
        separate_adapter(model if config is None else trained(model, config))


def test_the_head_that_is_the_embeddings_too_is_refused() -> None:
    config = peft.LoraConfig(r=2, target_modules=["lm_head"])
    with pytest.raises(ModelError, match=r"expected for gguf-adapter .*, got"):
        separate_adapter(trained(make("llama", tie_word_embeddings=True), config))


@pytest.fixture
def student(toys: Path, tmp_path: Path) -> Path:
    """A saved adapter over a copy of the toys' student."""
    base = shutil.copytree(toys / "student", tmp_path / "base")
    model = trained(load_model(str(base), "student", "float32"), Lora(rank=2, alpha=32))
    save_adapter(model, tmp_path / "adapter")
    make_tokenizer().save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_files_are_measured_together_and_evaluated_alone(student: Path, toys: Path, tmp_path: Path) -> None:
    data = Source(str(toys / "eval.jsonl"))
    options: dict[str, Any] = {"data": data, "max_length": 32, "tokens": 100}
    export(student, quantize=("f32",), **options)
    exports = export(student, to="gguf-adapter", quantize=("f32", "q8_0"), **options)
    whole, file, quantized = exports.files
    assert [file.file, quantized.file] == ["student-gguf-adapter-f32", "student-gguf-adapter-q8_0"]
    folder = student / "export" / file.file
    assert sorted(path.name for path in folder.iterdir()) == ["adapter.gguf", "base.gguf"]
    assert file.bytes == sum(path.stat().st_size for path in folder.iterdir())
    assert re.fullmatch(r"adapter.gguf has .* kB, base.gguf has .* kB\.", file.notes[0])
    assert (file.kind, quantized.kind, file.kl is not None and file.kl < 1e-5) == ("f32", "q8_0", True)
    assert file.loss == pytest.approx(whole.loss, abs=1e-3)
    arguments = ["--data", str(toys / "eval.jsonl"), "--max-length", "32", "--tokens", "100"]
    arguments += ["--out", str(tmp_path / "out.json")]
    alone = shutil.copytree(folder, tmp_path / "elsewhere")
    for path, beside in ((folder / "adapter.gguf", True), (alone, False)):
        result = CliRunner().invoke(app, ["evaluate", str(path), *arguments])
        assert result.exit_code == 0, result.exception
        (again,) = Exports.model_validate_json((tmp_path / "out.json").read_text(encoding="utf-8")).files
        assert (again.loss, again.kl) == (file.loss, pytest.approx(file.kl, abs=1e-6) if beside else None)
    assert [path.name for path in exported_files(student / "export")] == sorted(file.file for file in exports.files)
    (alone / "base.gguf").rename(alone / "another.gguf")
    loose = shutil.copy(alone / "adapter.gguf", tmp_path / "mine.gguf")
    for path, message in (
        (alone / "adapter.gguf", "student: expected base.gguf, the model that the adapter is for, beside .*, got none"),
        (Path(loose), r"student: expected a model, got an adapter, .*mine.gguf. Name it adapter.gguf"),
    ):
        result = CliRunner().invoke(app, ["evaluate", str(path), *arguments, "--teacher", str(toys / "teacher")])
        assert isinstance(result.exception, UserError), result.exception
        with pytest.raises(UserError, match=message):
            raise result.exception


@pytest.mark.parametrize("bits", [4, 8])
def test_files_of_a_quantized_base_are_compared_with_the_merged_student(bits: int, toys: Path, tmp_path: Path) -> None:
    """Products in 8 bits round activations, which a merged file does not."""
    pytest.importorskip("bitsandbytes")
    make("llama", hidden_size=64).save_pretrained(tmp_path / "base")
    with suppress_warnings():
        base = load_model(str(tmp_path / "base"), "student", "float32", bits=bits)
        save_adapter(trained(base, Lora(rank=2)), tmp_path / "adapter")
    make_tokenizer().save_pretrained(tmp_path / "adapter")
    data, rows = Source(str(toys / "eval.jsonl")), {"max_length": 32, "tokens": 100}
    (file,) = export(tmp_path / "adapter", quantize=("f32",), data=data, **rows).files  # type: ignore[arg-type]
    again = evaluate_files([tmp_path / "adapter/export/student-f32.gguf"], data, **rows)  # type: ignore[arg-type]
    assert file.kl is not None and file.kl < 1e-4
    assert (again.files[0].loss, again.files[0].kl) == (file.loss, file.kl)


def test_an_adapter_of_another_base_is_not_measured(student: Path, toys: Path) -> None:
    export(student, to="gguf-adapter", quantize=("f32",))
    folder = student / "export" / "student-gguf-adapter-f32"
    write_gguf(make_llama(hidden_size=48), make_tokenizer(), folder / "base.gguf", "f32")
    with pytest.raises(
        RunError, match=r"expected a file that llama.cpp loads, got \S*: llama_adapter.*wrong base model"
    ):
        evaluate_files([folder], Source(str(toys / "eval.jsonl")), max_length=32, tokens=100)


def test_recipes_export_adapters(recipe_values: dict[str, Any], toys: Path, student: Path) -> None:
    values = copy.deepcopy(recipe_values)
    values |= {"export": [{"to": "gguf-adapter"}, {"quantize": "f16"}], "evaluate": {"continuations": 0}}
    values["train"] |= {"max_steps": 2}
    message = "export: expected student.adapter lora or qlora, not merged, for gguf-adapter, got another"
    for wrong in (
        {"model": str(toys / "student")},
        {"model": str(toys / "student"), "adapter": "ia3"},
        {"model": str(toys / "student"), "adapter": {"kind": "lora", "rank": 2, "merge": True}},
    ):
        with pytest.raises(RecipeError, match=message):
            Recipe.parse({**values, "student": wrong})
    Recipe.parse({**values, "student": {"model": str(student)}})
    base = Path(shutil.copytree(toys / "student", Path(values["output"]).parent / "its-base"))
    values["student"] = {"model": str(base), "adapter": {"kind": "lora", "rank": 2}}
    directory = quiet_run(values).directory
    records = read_exports(directory / "export")
    assert records is not None and records.student_loss is not None
    assert [file.file for file in records.files] == ["student-gguf-adapter-f16", "student-f16.gguf"]
    for file in records.files:
        assert file.kl is not None and file.kl < 1e-4 and file.teacher_kl is not None
    assert "student-gguf-adapter-f16" in (directory / "report.html").read_text(encoding="utf-8")
    make_llama(hidden_size=8, layers=1, seed=4).save_pretrained(base)
    with pytest.raises(UserError, match=r"export: expected .*its-base as it was when the run in .* began, got another"):
        export(directory)
