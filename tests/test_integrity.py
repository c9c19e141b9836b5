"""A loaded model is the model that was saved, and a causal one."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertLMHeadModel,
    LlamaForCausalLM,
    PreTrainedModel,
)

import families
from potstill import Distiller, ForwardKL, Logits
from potstill.errors import ModelError
from potstill.models.integrity import check_causal
from potstill.models.loading import load_model, loading_notes

NOT_CAUSAL = {  # encoders without is_decoder, and models that read the whole text by design
    *("bert", "bert-generation", "big_bird", "camembert", "cpmant", "data2vec-text", "electra", "ernie"),
    *("megatron-bert", "rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm"),
    *("xlm-roberta", "xlm-roberta-xl", "xlnet", "xmod"),
}
OF_LENGTH = {"prophetnet"}  # it reads the relative positions of heads and tokens in another order than they are in


def test_a_model_of_linear_attention_alone_is_refused(tmp_path: Path) -> None:
    """transformers generates no text with it: its cache asks a layer of full attention for the length."""
    config = families.small("qwen3_next")
    for types in (["linear_attention", "full_attention"], ["linear_attention"] * 2):
        config.layer_types = types
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
        if "full_attention" in types:
            load_model(str(tmp_path), "student")
    with pytest.raises(ModelError, match=r"^student: .* can generate text with, got .* linear attention alone"):
        load_model(str(tmp_path), "student")


def saved(folder: Path, rename: Any = lambda name: name, **fields: Any) -> str:
    """Save a small Llama whose weights have other names, or None for those that are left out."""
    config = families.small("llama")
    for name, value in fields.items():
        setattr(config, name, value)
    LlamaForCausalLM(config).save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    renamed = {rename(name): weight for name, weight in weights.items() if rename(name)}
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


def without_head(name: str) -> str | None:
    return None if name.startswith("lm_head") else name


@pytest.mark.parametrize(
    ("rename", "message"),
    [
        (without_head, "saved without its head: save it as LlamaForCausalLM"),
        (lambda name: f"_orig_mod.{name}", "saved compiled"),
        (lambda name: f"module.{name}", "saved within DataParallel"),
        (lambda name: f"base_model.model.{name}", "saved within PEFT"),
        (lambda name: f"backbone.{name}", "got names like backbone.lm_head.weight. Save the model within it"),
        (lambda name: name.replace("mlp.", "_checkpoint_wrapped_module.mlp."), "saved with wrapped layers"),
        (lambda name: None if "layers.1.mlp" in name else name, "layers.1.mlp.down_proj.weight"),
        (lambda name: name.replace("q_proj", "q_proj.base_layer"), "saved within PEFT: save model.merge_and_unload"),
        (lambda name: f"pretrained_model.{name}", "saved with a value head of TRL"),
        (lambda name: f"_forward_module.{name}", "saved within Lightning Fabric"),
    ],
)
def test_missing_weights_are_refused(tmp_path: Path, rename: Any, message: str) -> None:
    name = saved(tmp_path, rename)
    with pytest.raises(ModelError, match=message) as error:
        load_model(name, "teacher.model")
    assert "\n" not in str(error.value)


def test_a_student_may_miss_weights_with_a_note(tmp_path: Path) -> None:
    model = load_model(saved(tmp_path, without_head), "student.model", may_miss=True)
    (note,) = loading_notes(model)
    assert "no weights for lm_head.weight: they start at random" in note
    with pytest.raises(ModelError, match="compiled"):  # names of a wrapper are a mistake there too
        load_model(saved(tmp_path / "b", lambda name: f"_orig_mod.{name}"), "student.model", may_miss=True)


def test_weights_that_are_not_read_are_noted(tmp_path: Path) -> None:
    name = saved(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    save_file({**weights, "v_head.weight": torch.ones(2)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (note,) = loading_notes(load_model(name, "teacher.model"))
    assert "does not read: v_head.weight" in note


@pytest.mark.parametrize(
    ("added", "message"),
    [
        ("model.layers.2.mlp.up_proj.weight", "Take config.json and weights from one model"),  # one more layer
        ("model.layers.0.self_attn.q_proj.bias", "Take config.json and weights from one model"),
        ("model.layers.0.self_attn.q_norm.weight", "Take config.json and weights from one model"),
        ("model.layers.0.self_attn.q_proj.lora_A.weight", "an adapter's: save model.merge_and_unload"),
        ("model.layers.0.self_attn.q_proj.weight_scale", "keep quantization_config in the config"),
        ("model.layers.0.self_attn.rotary_emb.inv_freq", None),  # of older versions
        ("model.layers.0.self_attn.masked_bias", None),
        ("model.vision_tower.layers.0.weight", None),
        ("mtp.layers.0.weight", None),
    ],
)
def test_weights_that_change_what_a_layer_computes_are_read(tmp_path: Path, added: str, message: str | None) -> None:
    name = saved(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    save_file({**weights, added: torch.ones(2)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    load_model(name, "student.model", may_miss=True)
    if message is None:
        load_model(name, "teacher.model")
        return
    with pytest.raises(ModelError, match=f"teacher.model: .* does not read.*{re.escape(added)}.*{message}"):
        load_model(name, "teacher.model")


def change_weight(folder: Path, name: str, change: Any) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file(weights | {name: change(weights[name])}, folder / "model.safetensors", metadata={"format": "pt"})


def spoiled(value: float) -> Any:
    return lambda weight: weight.index_fill(0, torch.tensor([7]), value)


@pytest.mark.parametrize("may_miss", [False, True])
@pytest.mark.parametrize(
    ("weight", "change", "message"),
    [
        (
            "model.embed_tokens.weight",
            spoiled(float("nan")),
            "expected finite weights .* NaN or infinity in model.embed",
        ),
        ("model.layers.1.mlp.up_proj.weight", spoiled(float("inf")), "NaN or infinity in model.layers.1.mlp.up_proj"),
        ("model.layers.0.mlp.up_proj.weight", lambda x: (x * 99).to(torch.int8), "got integers in .*up_proj.weight"),
    ],
)
def test_weights_that_cannot_be_right_are_refused(
    tmp_path: Path, weight: str, change: Any, message: str, may_miss: bool
) -> None:
    name = saved(tmp_path)
    change_weight(tmp_path, weight, change)
    with pytest.raises(ModelError, match=message):
        load_model(name, "student.model", may_miss=may_miss)


def test_a_matrix_of_equal_values_is_noted(tmp_path: Path) -> None:
    name = saved(tmp_path)
    change_weight(tmp_path, "model.layers.1.mlp.up_proj.weight", torch.zeros_like)
    (note,) = loading_notes(load_model(name, "teacher.model"))
    assert note.endswith("has weights whose values are all the same: model.layers.1.mlp.up_proj.weight.")


def test_a_student_of_another_family_is_not_random(tmp_path: Path) -> None:
    name = saved(tmp_path, lambda name: name.replace("model.layers", "transformer.h"))
    with pytest.raises(ModelError, match="got none of the weights of LlamaForCausalLM's layers, but names like"):
        load_model(name, "student.model", may_miss=True)


def test_a_config_of_another_architecture_is_noted(tmp_path: Path) -> None:
    config = json.loads(Path(saved(tmp_path), "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "mistral"}))
    (note,) = loading_notes(load_model(str(tmp_path), "teacher.model"))
    assert "names LlamaForCausalLM, but has the model_type mistral: it was loaded as MistralForCausalLM" in note


def test_a_head_that_is_not_tied_stays_apart(tmp_path: Path) -> None:
    config = json.loads(Path(saved(tmp_path), "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    model = load_model(str(tmp_path), "teacher.model")
    assert "but their weights differ: both are kept" in loading_notes(model)[0]
    assert not model.config.tie_word_embeddings  # nor for a student that is designed after it
    assert torch.equal(model.lm_head.weight, load_file(tmp_path / "model.safetensors")["lm_head.weight"])


def test_what_else_is_tied_is_saved_beside_a_head_that_is_not(tmp_path: Path) -> None:
    """BERT ties the biases of its head too, and LUKE the embeddings of entities, but not its head."""
    for family, tied in (("bert", "cls.predictions.decoder.bias"), ("luke", "entity_predictions.decoder.weight")):
        families.model(family, AutoModelForMaskedLM).save_pretrained(tmp_path / "first")
        weights = load_file(tmp_path / "first" / "model.safetensors")
        assert tied not in weights
        if family == "bert":
            weights["cls.predictions.decoder.weight"] = weights["bert.embeddings.word_embeddings.weight"].flip(0)
            save_file(weights, tmp_path / "first" / "model.safetensors", metadata={"format": "pt"})
        model = load_model(str(tmp_path / "first"), "student.model", task="masked")
        assert model.config.tie_word_embeddings == (family == "luke")
        with torch.no_grad():
            model.get_parameter(tied).add_(1.0)
        model.save_pretrained(tmp_path / "second")
        again = load_model(str(tmp_path / "second"), "student.model", task="masked")
        assert loading_notes(again) == ()
        assert torch.equal(again.get_parameter(tied), model.get_parameter(tied))


def test_a_tied_head_is_not_missing(tmp_path: Path) -> None:
    name = saved(tmp_path, without_head, tie_word_embeddings=True)
    assert loading_notes(load_model(name, "teacher.model")) == ()


@pytest.mark.slow
@pytest.mark.parametrize("family", families.walked("causal"))
def test_every_family_is_probed(family: str) -> None:
    model = families.model(family)
    if family in NOT_CAUSAL:
        with pytest.raises(ModelError, match="depend on later tokens"):
            check_causal(model, "teacher.model")
    elif family in OF_LENGTH:
        with pytest.raises(ModelError, match="depend on the length of the row"):
            check_causal(model, "teacher.model")
    else:
        check_causal(model, "teacher.model")


def bert(dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    config = BertConfig(
        vocab_size=128,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        initializer_range=0.3,
    )
    return BertLMHeadModel(config).to(dtype).eval()


def test_padding_that_changes_logits_is_found() -> None:
    with pytest.raises(ModelError, match="length of the row, got ProphetNetForCausalLM"):
        check_causal(families.model("prophetnet"), "teacher.model")
    check_causal(families.model("llama").to(torch.bfloat16), "teacher.model")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_encoder_is_no_causal_model(tmp_path: Path, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    with pytest.raises(ModelError, match=r"teacher.model: expected a causal language model, got BertLMHeadModel"):
        check_causal(bert(dtype), "teacher.model")
    bert().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="depend on later tokens"):
        load_model(str(tmp_path), "teacher.model")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "mamba", "gpt2", "gemma3_text", "qwen3_next", "rwkv"])
def test_decoders_are_causal_in_any_precision(family: str, dtype: torch.dtype) -> None:
    check_causal(families.model(family).to(dtype), "student")


def test_models_that_read_padding_are_noted(tmp_path: Path) -> None:
    for family, auto, task, reads in (
        ("fnet", AutoModelForMaskedLM, "masked", "FNetForMaskedLM"),
        ("funnel", AutoModelForMaskedLM, "masked", "FunnelForMaskedLM"),
        ("convbert", AutoModelForSequenceClassification, "classification", "ConvBertForSequenceClassification"),
        ("bert", AutoModelForMaskedLM, "masked", ""),
        ("bert", AutoModelForSequenceClassification, "classification", ""),
    ):
        families.model(family, auto).save_pretrained(tmp_path / family)
        notes = loading_notes(load_model(str(tmp_path / family), "teacher.model", "float32", task))
        assert [note[: note.index(" as text")] for note in notes] == [f"teacher.model: {reads} reads padding"] * bool(
            reads
        )


def test_a_model_without_token_embeddings_is_refused(tmp_path: Path) -> None:
    families.model("perceiver", AutoModelForMaskedLM).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="embedding for each token, got PerceiverForMaskedLM, which has none"):
        load_model(str(tmp_path), "teacher.model", "float32", "masked")


def test_a_model_that_generates_no_text_is_refused(tmp_path: Path) -> None:
    families.model("blt").save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="got BltForCausalLM, whose config has no num_hidden_layers"):
        load_model(str(tmp_path), "teacher.model", "float32")


def test_the_distiller_refuses_an_encoder() -> None:
    torch.manual_seed(0)
    student = AutoModelForCausalLM.from_config(families.small("llama"))
    with pytest.raises(ModelError, match="Distiller teacher: expected a causal language model"):
        Distiller(student, bert(), [Logits(ForwardKL())])
