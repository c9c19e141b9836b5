"""Families that differ from Llama: composite configs, layers of several kinds, experts, and none of the usual parts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    PretrainedConfig,
    Qwen2Config,
)

import families
from conftest import make_batch
from potstill import Distiller, ForwardKL, Hidden, Logits, Relations
from potstill.errors import ModelError
from potstill.evaluate.speed import latency_ms
from potstill.models.budget import Budget
from potstill.models.capture import ActivationCapture
from potstill.models.design import ShapeSearch, design, student_config
from potstill.models.heads import max_positions
from potstill.models.initialize import plan_initialization, random_student
from potstill.models.loading import load_model
from potstill.models.shapes import design_shape, model_shape, position_limit
from potstill.models.size import build, count_parameters, size_of
from potstill.models.split import split_model
from potstill.train.terms.layers import Attention

MIXTURES = {
    "qwen3_moe": {
        "vocab_size": 151936,
        "hidden_size": 2048,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "moe_intermediate_size": 768,
    },
    "deepseek_v2": {"num_hidden_layers": 27, "first_k_dense_replace": 1},
    "qwen3_next": {},
}


def counted(config: PretrainedConfig) -> int:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return sum(parameter.numel() for parameter in model.parameters())


def rows() -> dict[str, torch.Tensor]:
    return make_batch(rows=3, length=10, vocab_size=100)


@pytest.mark.parametrize("family", MIXTURES)
def test_mixtures_of_experts_have_designs(family: str) -> None:
    teacher = CONFIG_MAPPING[family](**MIXTURES[family])
    student = Budget(compression=4).student(teacher)
    assert counted(student) == count_parameters(student)
    assert abs(4 * counted(student) / counted(teacher) - 1) <= 0.05
    of_teacher, of_student = size_of(teacher, 64), size_of(student, 64)
    assert of_student.flops_per_token < of_teacher.flops_per_token < 2 * of_teacher.parameters


def test_a_token_passes_through_its_own_experts_alone() -> None:
    config = families.small("mixtral")
    config.num_experts_per_tok = config.num_local_experts
    dense = size_of(config, 16).flops_per_token
    config.num_experts_per_tok = 1
    experts = 3 * config.hidden_size * config.intermediate_size * config.num_hidden_layers
    assert dense - size_of(config, 16).flops_per_token == 2 * experts * (config.num_local_experts - 1)


@pytest.mark.parametrize("family", ["mamba", "jamba", "bamba", "gpt_neo", "nemotron_h", "gemma3_text"])
def test_layers_of_several_kinds_have_designs(family: str) -> None:
    teacher = families.small(family)
    depth = max(2, teacher.num_hidden_layers - 1)
    student = student_config(teacher, {teacher.attribute_map.get("num_hidden_layers", "num_hidden_layers"): depth}, 100)
    assert student.num_hidden_layers == depth
    build(student).eval()(**{name: rows()[name] for name in ("input_ids", "attention_mask")})


def test_layers_without_attention_are_no_student() -> None:
    teacher = families.small("qwen3_next")  # a linear layer, then one with attention
    with pytest.raises(ModelError, match="expected a layer with attention, got the first 1 of qwen3_next"):
        student_config(teacher, {"num_hidden_layers": 1}, 100)


def test_a_design_keeps_each_kind_of_layer() -> None:
    teacher = CONFIG_MAPPING["qwen3_next"](num_hidden_layers=16, hidden_size=256, vocab_size=1000, num_experts=8)
    student = Budget(compression=3).student(teacher)
    assert student.num_hidden_layers % 4 == 0
    assert student.layer_types == teacher.layer_types[: student.num_hidden_layers]


def test_widths_that_a_family_computes_are_computed_again() -> None:
    student = student_config(CONFIG_MAPPING["mamba"](), {"hidden_size": 256}, 100)
    assert (student.intermediate_size, student.time_step_rank) == (512, 16)


def test_a_student_of_a_model_that_reads_images_is_its_text_part() -> None:
    teacher = families.model("gemma3")
    config = student_config(teacher.config, {"num_hidden_layers": 1}, 100)
    assert config.model_type == "gemma3_text"
    plan = plan_initialization(teacher, config, "copy", layers=[0], calibration=list)
    student = plan.student(teacher, 0)
    assert not any("random" in note for note in plan.notes)
    weights = dict(teacher.named_parameters())
    for name, weight in student.named_parameters():
        source = weights[name.replace("model.", "model.language_model.", 1)]
        assert torch.equal(weight, source[: len(weight)]), name
    whole = student_config(teacher.config, {}, families.VOCABULARY)
    student = plan_initialization(teacher, whole, "truncate", calibration=list).student(teacher, 0).eval()
    ids = {"input_ids": rows()["input_ids"]}
    torch.testing.assert_close(student(**ids).logits, teacher.eval()(**ids).logits)


def test_the_tower_of_a_model_that_reads_images_does_not_keep_it_whole() -> None:
    split = split_model(families.model("gemma3"))
    assert split is not None
    assert split.body == "model.language_model"


def test_a_family_that_reads_images_alone_is_loaded_as_a_teacher(tmp_path: Path) -> None:
    text = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    vision = {"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2}
    config = CONFIG_MAPPING["qwen2_vl"](text_config=text, vision_config=vision)
    build(config).save_pretrained(tmp_path)
    model = load_model(str(tmp_path), "teacher.model", "float32")
    assert type(model).__name__ == "Qwen2VLForConditionalGeneration"
    assert ActivationCapture(model).shape.layers == 2
    with pytest.raises(ModelError, match="qwen2_vl_text"):
        design(config, 20_000)


def test_families_without_heads_are_named() -> None:
    student, teacher = families.model("mamba"), families.model("mamba", seed=1)
    assert model_shape(student.config).heads == 0
    for term in (Relations(), Attention()):
        with pytest.raises(ModelError, match=r"objective.1: .* attention heads, got the family mamba"):
            Distiller(student, teacher, [Logits(ForwardKL()), term])
    loss = Distiller(student, teacher, [Logits(ForwardKL()), Hidden()]).step(rows()).loss
    assert loss.isfinite()


@pytest.mark.parametrize("family", ["mixtral", "olmo2", "mamba", "qwen3_next", "deepseek_v2", "llama4_text"])
def test_layers_of_any_family_are_copied(family: str) -> None:
    teacher = families.model(family)
    config = student_config(teacher.config, {}, families.VOCABULARY)
    student = plan_initialization(teacher, config, "copy", calibration=list).student(teacher, 7).eval()
    ids = {"input_ids": rows()["input_ids"]}
    torch.testing.assert_close(student(**ids).logits, teacher(**ids).logits)


def test_layers_of_another_kind_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(families.SMALL, "num_hidden_layers", 6)
    teacher = random_student(families.small("jamba"), 0)  # attention in each second layer
    config = student_config(teacher.config, {"num_hidden_layers": 4}, families.VOCABULARY)
    with pytest.raises(ModelError, match=r"layer 3 of the larger model, a .*, for layer 2, .* such as layers: \[0, 1"):
        plan_initialization(teacher, config, "copy", layers=[0, 1, 3, 5], calibration=list)
    shared = {"layers_block_type": ["linear_attention", "hybrid"] * 3, "hybrid_layer_ids": [1, 3, 5]}
    monkeypatch.setitem(families.OWN, "zamba2", shared | {"num_hidden_layers": 6})
    teacher = random_student(families.small("zamba2"), 0)
    config = student_config(teacher.config, {"num_hidden_layers": 4}, families.VOCABULARY)
    with pytest.raises(
        ModelError, match=r"first ones of zamba2's layers \[1, 3, 5\], which share weights, got \[1, 5\]"
    ):
        plan_initialization(teacher, config, "copy", layers=[0, 1, 4, 5], calibration=list)


@pytest.mark.parametrize(
    ("family", "own", "layers", "fields"),
    [
        ("deepseek_v3", {"first_k_dense_replace": 3}, [0, 2, 4, 5], {"first_k_dense_replace": 2}),
        ("glm4_moe", {"first_k_dense_replace": 1}, [1, 3, 4, 5], {"first_k_dense_replace": 0}),
        ("lfm2_moe", {"layer_types": ["conv", "full_attention"] * 3}, [1, 2, 3, 4], {"num_dense_layers": 1}),
        ("ernie4_5_moe", {}, [1, 2, 4, 5], {"moe_layer_start_index": 0}),
        ("qwen3_moe", {"mlp_only_layers": [0, 3]}, [0, 2, 3, 5], {"mlp_only_layers": [0, 2]}),
        ("qwen2_moe", {"decoder_sparse_step": 2}, [0, 2, 3, 5], {"mlp_only_layers": [0, 1], "decoder_sparse_step": 1}),
        ("llama4_text", {"interleave_moe_layer_step": 2}, [0, 2, 3, 5], {"moe_layers": [2, 3]}),
        ("bamba", {"attn_layer_indices": [1, 4]}, [0, 1, 3, 4], {"attn_layer_indices": [1, 3]}),
        ("zamba2", {"layers_block_type": ["linear_attention", "hybrid", "hybrid"] * 2}, [0, 1, 2, 3], {}),
        ("jamba", {}, [0, 2, 4, 5], {"attn_layer_period": 4, "attn_layer_offset": 3}),
        ("jamba", {}, [0, 1, 2, 3], {"attn_layer_period": 2, "attn_layer_offset": 1}),
    ],
)
def test_layers_that_are_of_a_kind_by_their_number_stay_of_it(
    family: str, own: dict[str, Any], layers: list[int], fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The student computes what the teacher does without the other layers."""
    monkeypatch.setitem(families.SMALL, "num_hidden_layers", 6)
    numbers = {"hybrid_layer_ids": [1, 2, 4, 5]} if family == "zamba2" else {}
    monkeypatch.setitem(families.OWN, family, families.OWN.get(family, {}) | own | numbers | {"num_hidden_layers": 6})
    teacher = random_student(families.small(family), 0).eval()
    config = student_config(teacher.config, {"num_hidden_layers": 4}, families.VOCABULARY)
    student = plan_initialization(teacher, config, "copy", layers=layers, calibration=list).student(teacher, 7).eval()
    assert student.config.to_dict().items() >= fields.items()
    for number, layer in enumerate(teacher.model.layers):
        if number not in layers:
            layer.register_forward_hook(_leave_out, with_kwargs=True)
    ids = {"input_ids": rows()["input_ids"]}
    torch.testing.assert_close(student(**ids).logits, teacher(**ids).logits)


def _leave_out(_: Any, inputs: tuple[Any, ...], named: dict[str, Any], output: Any) -> Any:
    """Return a layer's hidden states as they came in."""
    states = inputs[0] if inputs else named["hidden_states"]
    return states if isinstance(output, torch.Tensor) else (states, *output[1:])


@pytest.mark.parametrize(
    ("family", "method", "auto"),
    [
        ("apertus", "copy", AutoModelForCausalLM),  # its activation has scalars as parameters
        ("electra", "prune", AutoModelForSequenceClassification),  # its embeddings are narrower than its layers
        ("rembert", "prune", AutoModelForMaskedLM),  # or wider
    ],
)
def test_models_with_other_parts_begin_a_student(family: str, method: Any, auto: Any) -> None:
    teacher = families.model(family, auto)
    whole = teacher.config
    fields = {"num_hidden_layers": max(1, whole.num_hidden_layers - 1)}
    if method == "prune":
        fields |= {name: getattr(whole, name) // 2 for name in ("hidden_size", "num_attention_heads")}
    config = student_config(whole, fields, families.VOCABULARY)
    planned = plan_initialization(teacher, config, method, calibration=lambda: [make_batch(vocab_size=50)])
    student = planned.student(teacher, 7).eval()
    assert student(input_ids=rows()["input_ids"]).logits.isfinite().all()


def test_positions_of_rotary_models_are_the_scaled_ones() -> None:
    def limit(**fields: Any) -> int | None:
        return position_limit(LlamaConfig(max_position_embeddings=2048, **fields))

    assert limit() == 2048
    assert limit(rope_scaling={"rope_type": "linear", "factor": 4.0}) == 8192
    assert limit(rope_scaling={"rope_type": "dynamic", "factor": 2.0}) == 4096
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}
    assert limit(rope_scaling=yarn) == 8192
    stated = Qwen2Config(
        max_position_embeddings=131072, rope_scaling={**yarn, "original_max_position_embeddings": 32768}
    )
    assert position_limit(stated) == 131072
    llama3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    known = LlamaConfig(
        max_position_embeddings=131072, rope_scaling={**llama3, "original_max_position_embeddings": 8192}
    )
    assert position_limit(known) == 131072


@pytest.mark.parametrize("unknown", [-1, None])
def test_an_unknown_number_of_positions_is_no_limit(unknown: int | None) -> None:
    config = families.small("mamba")
    config.max_position_embeddings = unknown
    assert position_limit(config) is None
    assert max_positions(families.model("bloom")) is None


def test_an_architectures_own_error_names_the_family() -> None:
    config = student_config(families.small("rwkv"), {"num_hidden_layers": 1}, 100)
    with pytest.raises(ModelError, match=r"a model of the family rwkv can have, got: .*\. Change student.design"):
        build(config)


def test_attention_windows_are_those_of_the_layers() -> None:
    teacher = families.small("longformer")
    teacher.attention_window = [4, 8]
    assert student_config(teacher, {"num_hidden_layers": 1}, 100).attention_window == [4]


def test_queries_of_a_row_that_the_model_pads_itself_are_refused() -> None:
    student, teacher = (families.model("longformer", AutoModelForMaskedLM, seed) for seed in (0, 1))
    with pytest.raises(ModelError, match="LongformerForMaskedLM: expected queries of shape"):
        Distiller(student, teacher, [Logits(ForwardKL()), Relations(heads=2)], task="masked")


def test_queries_and_keys_that_come_mixed_are_refused() -> None:
    student, teacher = families.model("zaya"), families.model("zaya", seed=1)
    with pytest.raises(ModelError, match="zaya: expected queries, keys and values from one projection, got"):
        Distiller(student, teacher, [Logits(ForwardKL()), Relations(heads=2)])


def test_speed_is_measured_on_tokens_that_are_no_padding() -> None:
    model = families.model("funnel", AutoModelForMaskedLM)  # a warning about padding without a mask fails on it
    assert latency_ms(model, 8, repeats=1) > 0
    model = families.model("llama", pad_token_id=None)
    assert latency_ms(model, 8, repeats=1) > 0


def test_attention_sinks_are_not_truncated() -> None:
    teacher = families.model("granite_swa")
    config = student_config(teacher.config, {"num_attention_heads": 2}, families.VOCABULARY)
    with pytest.raises(ModelError, match="got GraniteSWAForCausalLM, whose layers have other parts"):
        plan_initialization(teacher, config, "truncate", calibration=list)


def test_a_second_name_of_the_depth_follows_it() -> None:
    assert student_config(families.small("xlstm"), {"num_hidden_layers": 1}, 100).num_blocks == 1


@pytest.mark.parametrize("family", ["dbrx", "mimo_v2_flash"])
def test_heads_that_are_not_the_same_everywhere_stay(family: str) -> None:
    teacher = families.small(family)
    best = ShapeSearch(teacher, "balanced", teacher.vocab_size).best(count_parameters(teacher) * 2 // 3)
    student = design(teacher, best.parameters)
    assert (student.num_attention_heads, student.hidden_size < teacher.hidden_size) == (4, True)
    build(student)(input_ids=rows()["input_ids"])


def test_sizes_that_differ_by_layer_are_kept() -> None:
    shape = design_shape(families.small("gemma4_text"))
    assert (shape.heads, shape.head_size) in ((0, 0), (4, 8))
    config = CONFIG_MAPPING["gemma3n_text"](
        num_hidden_layers=4, num_kv_shared_layers=2, intermediate_size=[8, 8, 16, 16]
    )
    assert design_shape(config).ffn == 0
    assert student_config(config, {"num_hidden_layers": 3}, 100).intermediate_size == [8, 8, 16]
    assert student_config(config, {"num_hidden_layers": 3}, 100).num_kv_shared_layers == 1
