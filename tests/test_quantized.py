"""A teacher in 8 or 4 bits: its layers are rounded, its head is not, and it teaches like any other."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, LlamaForCausalLM

from conftest import make_batch, make_llama, make_tokenizer
from potstill.errors import ModelError, RecipeError, UserError
from potstill.losses.alignment import causal_alignment
from potstill.losses.divergences import ForwardKL
from potstill.losses.targets import DenseTargets, HeadTargets
from potstill.losses.token_losses import token_divergence
from potstill.models.loading import load_model, loading_notes, suppress_warnings
from potstill.models.precision import keep_gradients
from potstill.models.split import run, split_model
from potstill.runs.build import build_run
from potstill.runs.config.run import Recipe
from potstill.runs.run import run as distil
from potstill.teachers.model import ModelSource, ModelTeacher

bitsandbytes = pytest.importorskip("bitsandbytes")
KINDS = {"int8": "Linear8bitLt", "int4": "Linear4bit"}


@pytest.fixture(scope="module", autouse=True)
def _quiet() -> Any:
    with suppress_warnings():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher wide enough that rounding saves something."""
    found = tmp_path_factory.mktemp("wide")
    make_llama(hidden_size=128, seed=1).save_pretrained(found)
    make_tokenizer().save_pretrained(found)
    return found


def test_its_layers_are_rounded_and_its_head_is_not(folder: Path) -> None:
    batch = make_batch()
    alignment = causal_alignment(batch["labels"])
    apart, size = {}, {}
    whole = ModelTeacher(load_model(str(folder), "teacher"))
    exact = whole(batch, alignment).targets
    for dtype, kind in KINDS.items():
        loaded = ModelSource(model=str(folder), dtype=dtype, device="cpu").load(None)
        assert loaded.model is not None
        kinds = {type(module).__name__ for module in loaded.model.model.layers.modules()}
        assert kind in kinds and "Linear" not in kinds
        targets = loaded.teacher(batch, alignment).targets
        assert isinstance(targets, HeadTargets)
        assert torch.equal(targets.head.weight, exact.head.weight)
        with torch.no_grad():
            logits = alignment.select(run(loaded.model, batch).logits)
        torch.testing.assert_close(targets.dense(), logits, atol=1e-4, rtol=1e-5)
        apart[dtype] = float(token_divergence(targets.dense(), exact, ForwardKL()).mean())
        size[dtype] = loaded.model.get_memory_footprint()
        (note,) = [note for note in loading_notes(loaded.model) if "by precision" in note]
        rounded = sum(x.nbytes for x in loaded.model.parameters() if x.dtype.itemsize == 1)
        assert f"{rounded / 1e9:.3g} GB in {'int8' if dtype == 'int8' else 'uint8'}" in note
    assert 0 < apart["int8"] < 0.05 < apart["int4"] < 2
    assert size["int4"] < size["int8"] < 0.5 * whole.model.get_memory_footprint()


def test_a_head_that_is_rounded_too_gives_whole_logits(folder: Path) -> None:
    rounded = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=["nothing"])
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=rounded)
    keep_gradients(model)  # 32 does not divide the vocabulary, which some CPUs would want
    assert type(model.lm_head) is not nn.Linear and split_model(model) is None
    batch = make_batch()
    alignment = causal_alignment(batch["labels"])
    targets = ModelTeacher(model)(batch, alignment).targets
    assert isinstance(targets, DenseTargets)
    with torch.no_grad():
        assert torch.equal(targets.logits, alignment.select(run(model, batch).logits))


@pytest.mark.parametrize("dtype", KINDS)
def test_a_run_learns_from_it(folder: Path, recipe_values: dict[str, Any], dtype: str) -> None:
    recipe_values["teacher"] = {"model": str(folder), "dtype": dtype, "device": "cpu", "prefetch": True}
    recipe_values["evaluate"] = {"baseline": False}
    rows = distil(Recipe.parse(recipe_values), console=Console(quiet=True)).summary["rows"]
    assert rows["teacher"]["parameters"] == make_llama(hidden_size=128).num_parameters()
    assert rows["student"]["kl"] > 0


def test_its_weights_cannot_be_taken_over(folder: Path, recipe_values: dict[str, Any]) -> None:
    recipe_values["teacher"] = {"model": str(folder), "dtype": "int4"}
    recipe_values["student"]["initialize"] = "truncate"
    with pytest.raises(RecipeError, match="expected a model in full precision for truncate, got a quantized one"):
        build_run(Recipe.parse(recipe_values))


def test_the_error_without_the_package_has_the_command(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match=r"pip install 'potstill\[quantized\]'"):
        load_model(str(folder), "teacher.model", bits=4)


def test_experts_in_one_tensor_are_refused_with_what_they_would_take(tmp_path: Path) -> None:
    sizes = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 16}
    sizes |= {"num_key_value_heads": 1, "num_experts": 4, "num_local_experts": 4, "intermediate_size": 64}
    sizes |= {"moe_intermediate_size": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = AutoConfig.for_model("qwen3_moe", **sizes)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path)
    experts = model.model.layers[0].mlp.experts
    share = sum(weight.numel() for weight in experts.parameters()) / model.num_parameters()
    message = rf"t.model: expected linear layers alone to quantize to 4 bits, got Qwen3Moe.*experts \({share:.0%} of"
    with pytest.raises(ModelError, match=message):
        load_model(str(tmp_path), "t.model", bits=4)
    load_model(str(tmp_path), "t.model")
