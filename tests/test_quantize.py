"""Quantization-aware training: weights on the grid of an exported file, and latent ones that are trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from conftest import make_batch, make_llama, make_tokenizer, quiet_run
from potstill.errors import ModelError, RecipeError, UserError
from potstill.evaluate.exported import read_exports
from potstill.models.checksums import CHECKSUMS
from potstill.models.loading import load_model
from potstill.models.weight_grid import WeightGrid
from potstill.runs.check import check
from potstill.runs.config.run import Recipe
from potstill.runs.formats.gguf_file import write_gguf
from potstill.runs.formats.graphs import CausalGraph
from potstill.runs.formats.onnx_graph import trace, write_onnx
from potstill.runs.formats.onnx_runtime import open_onnx
from potstill.runs.formats.table import weight_grids
from potstill.train.arguments import DistillationConfig
from potstill.train.terms.logits import Labels
from potstill.train.trainer import DistillationTrainer
from test_export_gguf import CASES, make

gguf = pytest.importorskip("gguf")

WEIGHTS = {
    "normal": torch.randn(300, 128, generator=torch.Generator().manual_seed(0)),
    "small": torch.randn(300, 128, generator=torch.Generator().manual_seed(1)) * 1e-6,
    "ties": torch.randint(-3, 4, (300, 64), generator=torch.Generator().manual_seed(2)) / 7,
    "powers of two": 2.0 ** torch.randint(-9, 3, (300, 64), generator=torch.Generator().manual_seed(3)),
    "zeros": torch.zeros(2, 64),
}


@pytest.mark.parametrize("kind", ["q4_0", "q8_0", "f16"])
@pytest.mark.parametrize("weight", WEIGHTS.values(), ids=WEIGHTS)
def test_the_grid_is_that_of_the_gguf_package(weight: torch.Tensor, kind: Any) -> None:
    file_type = gguf.GGMLQuantizationType[kind.upper()]
    for scale in (1.0, 2**0.5):
        grid = WeightGrid(kind, scale)
        raw = gguf.quants.quantize((weight * scale).numpy(), file_type)
        expected = torch.tensor(gguf.quants.dequantize(raw, file_type).astype(np.float32))
        assert torch.equal(grid.round(weight), expected / scale)
        again = gguf.quants.quantize((grid.round(weight) * scale).numpy(), file_type)
        assert np.array_equal(gguf.quants.dequantize(again, file_type), gguf.quants.dequantize(raw, file_type))
        assert torch.equal(WeightGrid(kind, scale, transposed=True).round(weight.T), grid.round(weight).T)


@pytest.mark.parametrize("kind", ["q4_0", "q8_0", "int8", "int4"])
def test_weights_below_the_smallest_scale_are_zero_on_a_grid(kind: Any) -> None:
    weight = torch.tensor([1e-38, -3e-40, 0.0, 1e-45] * 8)[None]
    assert WeightGrid(kind).round(weight).abs().max() <= weight.max()


def weights_of(path: Path) -> dict[str, np.ndarray]:
    """The numbers that a file's blocks stand for: the sign of a zero scale is none of them."""
    tensors = gguf.GGUFReader(path).tensors
    return {tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type) for tensor in tensors}


@pytest.mark.parametrize("kind", ["q4_0", "q8_0"])
@pytest.mark.parametrize("case", ["llama", "llama, tied", "phi3", "gemma2, another scale", "gemma3_text", "gpt2"])
def test_an_export_holds_the_trained_weights(case: str, kind: Any, tmp_path: Path) -> None:
    family, changes = CASES[case]
    model = make(family, **changes, **({} if family == "gpt2" else {"intermediate_size": 72}))  # no whole blocks
    write_gguf(model, make_tokenizer(), tmp_path / "latent.gguf", kind)
    grids = weight_grids(model, kind)
    assert {grid.kind for grid in grids.values()} >= {kind}
    parameters = dict(model.named_parameters())
    assert {name for name, weight in parameters.items() if weight.ndim > 1} - {"transformer.wpe.weight"} == {*grids}
    for name, grid in grids.items():
        parameters[name].data = grid.round(parameters[name].data)
    write_gguf(model, make_tokenizer(), tmp_path / "rounded.gguf", kind)
    latent, rounded = (weights_of(tmp_path / f"{name}.gguf") for name in ("latent", "rounded"))
    assert all(np.array_equal(weight, rounded[name]) for name, weight in latent.items())


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("case", ["llama, tied", "phi3", "gpt2"])
def test_a_graph_holds_the_trained_weights(case: str, kind: Any, tmp_path: Path) -> None:
    """All matrices and tables are in blocks, and those of weights on the grid are those of the latent ones."""
    onnx = pytest.importorskip("onnx", reason="install it with pip install 'potstill[onnx]'")
    family, changes = CASES[case]
    model = make(family, **changes, **({} if family == "gpt2" else {"intermediate_size": 72}))  # no whole blocks
    write_onnx(trace(model), model, make_tokenizer(), tmp_path / "latent", kind)
    grids, parameters = weight_grids(model, kind), dict(model.named_parameters())
    assert {name for name, weight in parameters.items() if weight.ndim > 1} == {*grids}
    for name, grid in grids.items():
        parameters[name].data = grid.round(parameters[name].data)
        assert torch.equal(grid.round(parameters[name].data), parameters[name].data)
    write_onnx(trace(model), model, make_tokenizer(), tmp_path / "rounded", kind)
    latent, rounded = (onnx.load(tmp_path / name / "model.onnx").graph for name in ("latent", "rounded"))
    blocks = {x.name: onnx.numpy_helper.to_array(x) for x in rounded.initializer if len(x.dims) == 3}
    assert len(blocks) == len(grids)
    kinds = [grid.kind for grid in grids.values()]
    tables = sum(isinstance(module, nn.Embedding) for module in model.modules())
    assert kinds.count("int8") == (
        len(grids) if kind == "int8" else tables + (not model.config.tie_word_embeddings)  # with the head
    )
    bits = [8 * values.shape[-1] // 32 for values in blocks.values()]
    assert (bits.count(8), bits.count(4)) == (kinds.count("int8"), kinds.count("int4"))
    assert all(
        np.array_equal(onnx.numpy_helper.to_array(x), blocks[x.name]) for x in latent.initializer if x.name in blocks
    )
    ids = [*range(5, 40)]
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    with CausalGraph(open_onnx, tmp_path / "rounded") as loaded:
        actual = torch.from_numpy(np.concatenate([*loaded.logits(ids)])).log_softmax(-1)
    assert (expected.exp() * (expected - actual)).sum(-1).max() < 1e-3  # activations are in 8 bits


def trainer_of(student: Any, folder: Path, rows: list[dict[str, Any]], **options: Any) -> DistillationTrainer:
    args = DistillationConfig(str(folder), optim="sgd", learning_rate=0.5, lr_scheduler_type="constant", **options)
    grids = weight_grids(student, "q4_0")
    return DistillationTrainer(student, None, [Labels()], args, train_dataset=rows, grids=grids)


def test_the_gradient_at_the_rounded_weights_changes_the_latent_ones(tmp_path: Path) -> None:
    batch = make_batch(rows=4)
    rows = [{name: values[i] for name, values in batch.items()} for i in range(4)]
    options = {"max_steps": 1, "per_device_train_batch_size": 4, "max_grad_norm": 0.0, "save_strategy": "no"}
    student, reference = make_llama(hidden_size=32), make_llama(hidden_size=32)
    grids = weight_grids(reference, "q4_0")
    latent = {name: weight.detach().clone() for name, weight in reference.named_parameters()}
    for name, weight in reference.named_parameters():
        weight.data = grids[name].round(weight.data) if name in grids else weight.data
    loss = reference(**batch).loss
    loss.backward()
    trainer_of(student, tmp_path, rows, **options).train()
    assert len(grids) == 2 * 7 + 2  # the matrices of two layers, embeddings and head
    for name, weight in student.named_parameters():
        gradient = dict(reference.named_parameters())[name].grad
        assert gradient is not None
        stepped = latent[name] - 0.5 * gradient
        expected = grids[name].round(stepped) if name in grids else stepped
        near = torch.isclose(weight, expected, atol=1e-6)  # a weight between two of the grid may go to either
        assert near.float().mean() > 0.995, name


def test_a_resumed_training_ends_in_the_same_weights(tmp_path: Path) -> None:
    batch = make_batch(rows=4)
    rows = [{name: values[i] for name, values in batch.items()} for i in range(4)]
    options = {"max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 2}
    student = make_llama(hidden_size=32)
    trainer_of(student, tmp_path, rows, **options).train()
    assert (tmp_path / "checkpoint-2" / "latent.safetensors").exists()
    again = make_llama(hidden_size=32, seed=1)
    trainer_of(again, tmp_path, rows, **options).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert all(map(torch.equal, student.parameters(), again.parameters()))
    (tmp_path / "checkpoint-2" / "latent.safetensors").unlink()
    (tmp_path / "checkpoint-2" / CHECKSUMS).unlink()
    with pytest.raises(UserError, match=r"expected latent.safetensors in .*: it is of a training without grids"):
        trainer_of(again, tmp_path, rows, **options).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_widths_that_no_block_divides_are_noted_before_the_training(recipe_values: dict[str, Any]) -> None:
    """Of the design, 8 wide, and of what is exported beside."""
    values = recipe_values | {"student": recipe_values["student"] | {"quantize": "q4_0"}}
    (note,) = [note for note in check(Recipe.parse(values)).built.notes if "of its matrices" in note]
    assert note.startswith("student.quantize: most weights of its matrices are not q4_0: ") and "% f16" in note
    values |= {"export": [{"to": "gguf", "quantize": "q8_0"}, {"to": "gguf", "quantize": "f16"}]}
    notes = [note for note in check(Recipe.parse(values)).built.notes if "of its matrices" in note]
    assert [note.partition(":")[0] for note in notes] == ["export", "student.quantize"]
    assert (
        "student.quantize: the student is trained for q4_0, and export writes q8_0, f16 alone. Add a file of that kind."
        in check(Recipe.parse(values)).built.notes
    )


def test_a_student_that_is_trained_for_a_graph(recipe_values: dict[str, Any]) -> None:
    pytest.importorskip("onnxruntime", reason="install it with pip install 'potstill[onnx]'")
    values = recipe_values | {"student": recipe_values["student"] | {"quantize": "int4"}}
    values |= {"export": [{"to": "onnx", "quantize": "int4"}], "evaluate": {"baseline": False, "continuations": 0}}
    directory = quiet_run(values).directory
    exports = read_exports(directory / "export")
    assert exports is not None
    (file,) = exports.files
    assert (file.file, file.kind) == ("student-onnx-int4", "int4") and file.kl is not None and file.kl < 1e-3
    student = load_model(str(directory / "student"), "student")
    weights = dict(student.named_parameters())
    assert all(
        torch.equal(grid.round(weights[name]), weights[name]) for name, grid in weight_grids(student, "int4").items()
    )


def test_what_cannot_be_trained_so_is_refused(recipe_values: dict[str, Any], tmp_path: Path) -> None:
    student = recipe_values["student"] | {"quantize": "q4_0"}
    for changes, message in (
        ({"student": student | {"save_dtype": "bfloat16"}}, "student: expected save_dtype float32 with quantize"),
        ({"student": {"model": "x", "quantize": "q4_0", "adapter": "lora"}}, "student: expected no adapter with quant"),
        ({"student": student, "task": "masked"}, "student.quantize: expected the task causal, got masked"),
    ):
        with pytest.raises(RecipeError, match=message):
            Recipe.parse(recipe_values | changes)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    with pytest.raises(ModelError, match=r"student.quantize: expected for GGUF one of llama, .*, got gpt_neox"):
        weight_grids(GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=300, **sizes)), "q4_0")
    with pytest.raises(UserError, match=r"grids: expected a student in float32, got torch.bfloat16"):
        trainer_of(make_llama(hidden_size=32).bfloat16(), tmp_path, [{"input_ids": [1, 2, 3]}])
