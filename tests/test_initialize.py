"""Students that begin with their teacher's weights: the same function, layers left out, and the right built."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BloomConfig,
    DistilBertConfig,
    Gemma2Config,
    GlmConfig,
    GPT2Config,
    GPTJConfig,
    GPTNeoConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MixtralConfig,
    NemotronConfig,
    Olmo2Config,
    Phi3Config,
    PhiConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Starcoder2Config,
)

import families
from conftest import make_batch
from potstill.errors import ModelError, RecipeError
from potstill.models.design import ShapeSearch, student_config
from potstill.models.initialize import plan_initialization, random_student
from potstill.models.matrix_axes import fused_heads
from potstill.models.pruning import choose_layers, measure_importance, measure_influence, select_parts
from potstill.models.shapes import DesignShape
from potstill.models.structure import find_structure, is_transposed, split_projection
from potstill.runs.build import build_run
from potstill.runs.config.run import Recipe
from reference_students import cosine

SIZES: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "initializer_range": 0.3,
}
ENDS = {key: SIZES[key] for key in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id", "initializer_range")}
KINDS = {
    "llama": LlamaConfig(**SIZES),
    "llama, tied": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES, head_dim=8, tie_word_embeddings=True),
    "gemma2": Gemma2Config(**SIZES, head_dim=8, query_pre_attn_scalar=8, sliding_window=4),
    "gpt2": GPT2Config(**ENDS, n_embd=32, n_head=4, n_layer=5, n_inner=48),
    "phi3": Phi3Config(**SIZES, head_dim=8),
    "glm": GlmConfig(**SIZES, head_dim=8),
    "nemotron": NemotronConfig(**SIZES, head_dim=8),
    "starcoder2": Starcoder2Config(**SIZES),
    "phi": PhiConfig(**SIZES),
    "olmo2": Olmo2Config(**SIZES),
    "gptj": GPTJConfig(**ENDS, n_embd=32, n_head=4, n_layer=5, n_inner=48, rotary_dim=4),
    "gpt_neox": GPTNeoXConfig(**{k: v for k, v in SIZES.items() if k != "num_key_value_heads"}),
    "bert": BertConfig(**{k: v for k, v in SIZES.items() if k != "num_key_value_heads"}),
    "distilbert": DistilBertConfig(**ENDS, dim=32, n_heads=4, n_layers=5, hidden_dim=48),
}
LAYERS = {"gpt2": "n_layer", "gptj": "n_layer", "distilbert": "n_layers"}
PRUNED_HEADS = ("llama", "llama, tied", "qwen3", "phi3", "glm", "nemotron")  # whose config gives the width of a head
BATCH = {name: value for name, value in make_batch(4, 12, 60).items() if name != "labels"}


def model(kind: str, seed: int = 1) -> PreTrainedModel:
    made = random_student(copy.deepcopy(KINDS[kind]), seed).eval()
    for parameter in made.parameters():  # norms and biases too, so that nothing is equal by chance
        nn.init.normal_(parameter, std=0.3)
    return made


def logits(of: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return of.eval()(**BATCH).logits


def begun(teacher: PreTrainedModel, method: Any, layers: Any = None, **changes: Any) -> PreTrainedModel:
    vocabulary = changes.pop("vocabulary", 60)
    config = student_config(teacher.config, changes, vocabulary)
    return plan_initialization(teacher, config, method, layers=layers, calibration=lambda: [BATCH]).student(teacher, 7)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["copy", "truncate", "prune", "selective"])
def test_a_student_of_the_teachers_shape_is_the_teacher(kind: str, method: str) -> None:
    teacher = model(kind)
    assert torch.equal(logits(begun(teacher, method)), logits(teacher))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["copy", "truncate", "prune"])
def test_copied_layers_compute_what_dropping_the_others_does(kind: str, method: str) -> None:
    teacher = model(kind)
    student = begun(teacher, method, layers=[0, 2, 3], **{LAYERS.get(kind, "num_hidden_layers"): 3})
    shorter = copy.deepcopy(teacher)
    structure = find_structure(shorter)
    kept = [structure.layers[layer] for layer in (0, 2, 3)]
    for place, layer in enumerate(kept):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = place
    path, _, name = structure.path.rpartition(".")
    setattr(shorter.get_submodule(path), name, nn.ModuleList(kept))
    shorter.config.num_hidden_layers = 3
    if hasattr(shorter.config, "layer_types") and shorter.config.layer_types:
        shorter.config.layer_types = [teacher.config.layer_types[layer] for layer in (0, 2, 3)]
        assert student.config.layer_types == shorter.config.layer_types
    assert torch.equal(logits(student), logits(shorter))
    assert not torch.allclose(
        logits(student), logits(begun(teacher, "copy", layers=[0, 1, 4], **{LAYERS.get(kind, "num_hidden_layers"): 3}))
    )


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("gemma2", "qwen2")])
def test_units_that_do_nothing_are_pruned_without_a_trace(kind: str) -> None:
    teacher = model(kind)
    structure = find_structure(teacher)
    generator = torch.Generator().manual_seed(3)
    size, heads, kv_heads = structure.shape.head_size, structure.shape.heads, structure.shape.kv_heads
    value_heads = {"gpt2": heads + kv_heads, "phi3": heads + kv_heads}.get(
        kind, 0
    )  # which of a module are the first values
    for layer in structure.layers:
        dead = torch.randperm(48, generator=generator)[:32]
        for path in structure.matrices.up:
            units = torch.cat([dead, dead + 48]) if path.endswith("gate_up_proj") else dead
            kill_rows(layer.get_submodule(path), units)
        group = int(torch.randint(2, (1,), generator=generator))  # key and value heads whose query heads give 0
        of_group = kv_heads // 2 * group + torch.arange(kv_heads // 2)
        of_group = 3 * of_group + 2 if kind == "gpt_neox" else value_heads + of_group
        kill_rows(
            layer.get_submodule(structure.matrices.value), (of_group[:, None] * size + torch.arange(size)).flatten()
        )
    fields = {"gpt2": {"n_inner": 16}, "gptj": {"n_inner": 16}, "distilbert": {"hidden_dim": 16}}
    of_heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8} if kind in PRUNED_HEADS else {}
    changes = fields.get(kind, {"intermediate_size": 16}) | of_heads
    student = begun(teacher, "prune", layers=[0, 1, 2, 3, 4], **changes)
    torch.testing.assert_close(logits(student), logits(teacher), rtol=1e-5, atol=1e-5)
    assert student.num_parameters() < teacher.num_parameters()
    truncated = begun(teacher, "truncate", **changes)
    assert not torch.allclose(logits(truncated), logits(teacher), atol=1e-2)


def test_layers_that_all_stay_are_not_listed() -> None:
    teacher = model("llama")
    config = student_config(teacher.config, {"intermediate_size": 16}, 60)
    notes = plan_initialization(teacher, config, "prune", calibration=lambda: [BATCH]).notes
    assert notes[0] == "student: the larger model's 5 layers, 16 of 48 feed-forward units (the most active)."


@torch.no_grad()
def kill_rows(module: Any, rows: torch.Tensor) -> None:
    (module.weight.T if is_transposed(module) else module.weight)[rows] = 0
    if module.bias is not None:
        module.bias[rows] = 0


@pytest.mark.parametrize("grouped", [True, False])
def test_heads_of_one_module_for_queries_keys_and_values(grouped: bool) -> None:
    """Against the projection that terms over layers split."""
    teacher, size = DesignShape(1, 12, 6, 2, 4, 0), 4
    config = LlamaConfig(hidden_size=24, num_attention_heads=6, num_key_value_heads=2, head_dim=size)
    numbers = torch.arange(10 * size).view(1, 1, -1)
    parts = split_projection(numbers, config, grouped)
    heads, kv_heads = torch.tensor([0, 2, 4, 5]), torch.tensor([[0], [1]])
    rows = fused_heads(heads[:, None], kv_heads, teacher, grouped)[:, 0, None] * size + torch.arange(size)
    smaller = LlamaConfig(hidden_size=16, num_attention_heads=4, num_key_value_heads=2, head_dim=size)
    for own, whole, kept in zip(
        split_projection(rows.view(1, 1, -1), smaller, grouped), parts, (heads, *[kv_heads[:, 0]] * 2), strict=True
    ):
        assert torch.equal(own.unflatten(-1, (-1, size)), whole.unflatten(-1, (-1, size))[:, :, kept])
    merged = fused_heads(heads[:3, None], torch.tensor([[0, 1]]), teacher, grouped)
    assert merged.shape == (5, 2)
    assert (merged[:3, 0] == merged[:3, 1]).all() and (merged[3:, 0] != merged[3:, 1]).all()


def test_attention_with_a_norm_over_all_heads_stays() -> None:
    with pytest.raises(
        ModelError, match=r"hidden 32 as in Olmo2ForCausalLM, whose attention cannot be pruned, got 16\."
    ):
        begun(model("olmo2"), "prune", num_attention_heads=2, num_key_value_heads=2, hidden_size=16)


def test_channels_that_carry_nothing_are_pruned_without_a_trace() -> None:
    teacher = model("llama")
    dead = torch.tensor([i for i in range(32) if i % 4 == 1])
    with torch.no_grad():
        teacher.model.embed_tokens.weight[:, dead] = 0
        for layer in teacher.model.layers:
            for output in (layer.self_attn.o_proj, layer.mlp.down_proj):
                output.weight[dead] = 0
    student = begun(teacher, "prune", hidden_size=24, head_dim=8)
    torch.testing.assert_close(logits(student), logits(teacher), rtol=2e-4, atol=2e-4)


def test_importance_is_what_loops_find() -> None:
    teacher = model("llama")
    found = measure_importance(teacher, [BATCH])
    with torch.no_grad():
        states = teacher(**BATCH, output_hidden_states=True).hidden_states
    mask = BATCH["attention_mask"]
    for layer in range(4):  # the last hidden state of all is behind the final norm
        distances = []
        for row in range(4):
            for t in range(12):
                if mask[row, t]:
                    distances.append(1 - cosine(states[layer][row, t].tolist(), states[layer + 1][row, t].tolist()))
        assert float(found.layers[layer]) == pytest.approx(sum(distances) / len(distances), rel=1e-4)
    seen: dict[str, torch.Tensor] = {}
    handles = [
        teacher.model.layers[2]
        .get_submodule(path)
        .register_forward_pre_hook(lambda _, inputs, path=path: seen.update({path: inputs[0]}))
        for path in ("self_attn.o_proj", "mlp.down_proj")
    ]
    logits(teacher)
    for handle in handles:
        handle.remove()
    units, heads = torch.zeros(48, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    for row in range(4):
        real = mask[row].bool()
        units += seen["mlp.down_proj"][row][real].double().abs().mean(0) ** 2
        for head in range(4):
            head_output = seen["self_attn.o_proj"][row][real][:, 8 * head : 8 * head + 8].double()
            heads[head] += head_output.norm(dim=-1).mean() ** 2
    torch.testing.assert_close(found.units[2], units.sqrt(), rtol=1e-5, atol=0)
    torch.testing.assert_close(found.heads[2], heads.sqrt(), rtol=1e-5, atol=0)


def test_padding_does_not_change_importance() -> None:
    teacher = model("llama")
    other = {**BATCH, "input_ids": torch.where(BATCH["attention_mask"].bool(), BATCH["input_ids"], 17)}
    one, two = measure_importance(teacher, [BATCH]), measure_importance(teacher, [other])
    torch.testing.assert_close(one.units, two.units)
    torch.testing.assert_close(one.layers, two.layers)


def test_groups_that_grow_share_the_mean_of_their_keys() -> None:
    teacher = model("llama")
    student = begun(teacher, "truncate", num_attention_heads=4, num_key_value_heads=1, head_dim=8)
    for layer, source in zip(student.model.layers, teacher.model.layers, strict=True):
        expected = source.self_attn.k_proj.weight.view(2, 8, 32).mean(0)
        torch.testing.assert_close(layer.self_attn.k_proj.weight, expected)
        assert torch.equal(layer.self_attn.q_proj.weight, source.self_attn.q_proj.weight)
    whole = DesignShape(layers=1, hidden=48, heads=6, kv_heads=3, head_size=8, ffn=8)
    with pytest.raises(ModelError, match="Change num_key_value_heads"):
        select_parts(whole, replace(whole, heads=6, kv_heads=2), [0], None)


def test_fewer_tokens_are_the_first_rows_and_ties_are_noted() -> None:
    teacher = model("llama")
    student = begun(teacher, "copy", vocabulary=50)
    assert torch.equal(student.lm_head.weight, teacher.lm_head.weight[:50])
    config = student_config(teacher.config, {"tie_word_embeddings": True}, 60)
    tied = plan_initialization(teacher, config, "copy", calibration=lambda: [BATCH])
    assert any("own head is not copied" in note for note in tied.notes)
    assert torch.equal(tied.student(teacher, 0).lm_head.weight, teacher.model.embed_tokens.weight)


def test_cuts_are_spread_over_groups_of_neighbours() -> None:
    influence = torch.tensor([9.0, 1.0, 2.0, 8.0, 0.5, 7.0, 0.1, 0.2, 0.3, 6.0])
    assert choose_layers("importance", 10, 8, influence) == [0, 1, 2, 3, 4, 5, 8, 9]
    assert choose_layers("grouped", 10, 8, influence) == [0, 1, 2, 3, 5, 7, 8, 9]  # one of five goes
    assert choose_layers("grouped", 10, 5, influence) == [0, 3, 5, 7, 9]  # one of two stays
    assert choose_layers("grouped", 10, 2, influence) == [0, 5]
    assert choose_layers("grouped", 10, 10, influence) == choose_layers("grouped", 10, 10, None) == [*range(10)]


@pytest.mark.parametrize("method", ["copy", "prune"])
def test_by_default_layers_are_the_most_influential_of_their_groups(method: Any) -> None:
    teacher = model("llama")
    influence = measure_importance(teacher, [BATCH]).layers
    torch.testing.assert_close(measure_influence(teacher, teacher.model.layers, [BATCH]), influence)
    student = begun(teacher, method, num_hidden_layers=3)
    for layer, source in zip(student.model.layers, choose_layers("grouped", 5, 3, influence), strict=True):
        assert torch.equal(layer.mlp.up_proj.weight, teacher.model.layers[source].mlp.up_proj.weight)
    one = begun(teacher, method, num_hidden_layers=1)  # fewer than half: evenly spaced
    assert torch.equal(one.model.layers[0].mlp.up_proj.weight, teacher.model.layers[0].mlp.up_proj.weight)


@pytest.mark.parametrize("method", ["copy", "truncate", "prune"])
def test_a_layer_of_each_kind_stays(method: Any) -> None:
    teacher = model("gemma2")
    kinds = teacher.config.layer_types
    assert choose_layers("uniform", 5, 3, None) == [0, 2, 4]
    assert {kinds[layer] for layer in (0, 2, 4)} == {"sliding_attention"}
    student = begun(teacher, method, "uniform", num_hidden_layers=3)
    assert student.config.layer_types == [kinds[layer] for layer in (1, 2, 4)]
    for layer, source in zip(student.model.layers, (1, 2, 4), strict=True):
        assert torch.equal(layer.mlp.up_proj.weight, teacher.model.layers[source].mlp.up_proj.weight)
    assert begun(teacher, method, [0, 2, 4], num_hidden_layers=3).config.layer_types == ["sliding_attention"] * 3


def test_layers_of_kinds_that_the_family_changes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last layer of Gemma 4 has full attention."""
    monkeypatch.setitem(families.SMALL, "num_hidden_layers", 6)
    teacher = random_student(families.small("gemma4_text"), 1)
    assert teacher.config.layer_types == ["sliding_attention"] * 5 + ["full_attention"]
    assert begun(teacher, "copy", "skip", num_hidden_layers=3, vocabulary=128).config.layer_types[-2:] == (
        ["sliding_attention", "full_attention"]
    )
    with pytest.raises(
        ModelError, match=r"^student\.initialize\.layers: expected layers of the kinds that gemma4_text"
    ):
        begun(teacher, "copy", [0, 2, 4], num_hidden_layers=3, vocabulary=128)


def test_layers_without_attention_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(families.SMALL, "num_hidden_layers", 6)
    monkeypatch.setitem(families.OWN, "qwen3_next", {"layer_types": ["linear_attention", "full_attention"] * 3})
    teacher = random_student(families.small("qwen3_next"), 1)
    with pytest.raises(
        ModelError, match=r"^student\.initialize\.layers: expected a layer with attention, got \[0, 2\]"
    ):
        begun(teacher, "copy", [0, 2], num_hidden_layers=2, vocabulary=128)


def test_a_layer_of_each_kind_of_gpt_neo_stays() -> None:
    """It names kinds otherwise than other families."""
    types = [[["global", "local"], 2], [["global"], 1]]
    teacher = random_student(GPTNeoConfig(**ENDS, hidden_size=32, num_heads=4, num_layers=5, attention_types=types), 1)
    assert choose_layers("uniform", 5, 3, None) == [0, 2, 4]  # all are global
    student = begun(teacher, "copy", "uniform", num_layers=3)
    assert student.config.attention_layers == ["local", "global", "global"]
    smallest = ShapeSearch(teacher.config, "width", 60).smallest()
    assert smallest.shape.layers == 2


@pytest.mark.parametrize(
    ("family", "own", "layers", "note"),
    [
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, [0, 2], "attn.scaling of a layer is by its place"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, [0, 1], None),
        ("gpt2", {}, [0, 2], None),
        ("diffllama", {}, [0, 2], "self_attn.lambda_init of a layer is by its place"),
        ("minicpm3", {}, [0, 1], "residual_scale of a layer is by its place or the number of layers in minicpm3"),
        ("modernbert-decoder", {}, [1, 2], "without attn_norm.weight of layer 1, which layer 0 does not have"),
    ],
)
def test_layers_that_compute_something_else_in_another_place_are_noted(
    family: str, own: dict[str, Any], layers: list[int], note: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("num_hidden_layers", "n_layer"):
        monkeypatch.setitem(families.SMALL, name, 4)
    monkeypatch.setitem(families.OWN, family, families.OWN.get(family, {}) | own)
    teacher = random_student(families.small(family), 1)
    config = student_config(teacher.config, {"num_hidden_layers": 2}, 128)
    _, *notes = plan_initialization(teacher, config, "copy", layers=layers, calibration=list).notes
    assert len(notes) == (note is not None) and (note or "") in "".join(notes)


def test_a_kind_that_the_family_requires_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(families.SMALL, "num_hidden_layers", 4)
    kinds = {"layer_types": ["linear_attention", "full_attention"] * 2}
    monkeypatch.setitem(families.OWN, "olmo_hybrid", families.OWN.get("olmo_hybrid", {}) | kinds)
    teacher = random_student(families.small("olmo_hybrid"), 1)
    with pytest.raises(ModelError, match="at least one attention layer"):
        begun(teacher, "copy", [0, 2], num_hidden_layers=2, vocabulary=128)


@pytest.mark.parametrize(
    ("how", "teacher", "student", "layers"),
    [
        ("uniform", 6, 3, [0, 3, 5]),
        ("uniform", 6, 1, [0]),
        ("uniform", 6, 6, [0, 1, 2, 3, 4, 5]),
        ("skip", 6, 3, [0, 2, 4]),
        ("skip", 12, 5, [0, 2, 4, 7, 9]),
        ("first_last", 6, 3, [0, 1, 5]),
        ("first_last", 6, 1, [0]),
        ([1, 4], 6, 2, [1, 4]),
    ],
)
def test_layers_are_chosen(how: Any, teacher: int, student: int, layers: list[int]) -> None:
    assert choose_layers(how, teacher, student, None) == layers


@pytest.mark.parametrize(
    ("method", "changes", "message"),
    [
        ("copy", {"hidden_size": 16, "num_attention_heads": 2}, "use truncate or prune"),
        ("truncate", {"intermediate_size": 64}, "no larger than what it is cut from, got ffn 64 above 48"),
        (
            "truncate",
            {"num_attention_heads": 2, "num_key_value_heads": 1},
            "heads as wide as the larger model's, 8, got 16",
        ),
        ("copy", {"num_hidden_layers": 6}, "at most the larger model's 5"),
        ("shrink", {}, "expected copy, truncate, prune, selective"),
        ("selective", {"num_attention_heads": 2, "num_key_value_heads": 1}, "Set head_dim to 8."),
        ("selective", {"hidden_size": 64}, "heads as wide as the larger model's for selective, .* Set head_dim to 8"),
        ("copy", {"vocab_size": 70}, "expected at most the larger model's 60 tokens, got 70. Use selective"),
        (
            "selective",
            {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "head_dim": 8},
            "expected parameters whose shape is the larger model's for selective, got none",
        ),
    ],
)
def test_students_that_do_not_fit(method: str, changes: dict[str, int], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        begun(model("llama"), method, **changes)


def test_selective_embeddings_of_more_tokens_are_random() -> None:
    teacher = model("llama")
    config = student_config(teacher.config, {"tie_word_embeddings": False}, 70)
    student = plan_initialization(teacher, config, "selective", calibration=list).student(teacher, 7)
    fresh, copied = random_student(config, 7), dict(teacher.named_parameters())
    for name, weight in student.named_parameters():
        source = dict(fresh.named_parameters())[name] if len(weight) == 70 else copied[name]
        assert torch.equal(weight, source), name


def test_selective_copies_what_has_the_teachers_shape_and_lists_it() -> None:
    teacher = model("llama")
    config = student_config(teacher.config, {"num_hidden_layers": 2, "intermediate_size": 24}, 50)
    plan = plan_initialization(teacher, config, "selective", layers=[1, 4], calibration=list)
    student, fresh = plan.student(teacher, 7), random_student(config, 7)
    source = dict(teacher.named_parameters())
    copied = random = 0
    for name, parameter in student.named_parameters():
        of_teacher = source[name.replace("layers.1.", "layers.4.").replace("layers.0.", "layers.1.")]
        if "mlp" in name:
            assert torch.equal(parameter, fresh.get_parameter(name))
            random += parameter.numel()
        else:
            assert torch.equal(parameter, of_teacher[: len(parameter)])
            copied += parameter.numel()
    share = f"{copied / (copied + random):.0%}"
    assert plan.notes == (
        "student: the larger model's layers 1, 4 of 5 (as given), the parameters whose shape matches.",
        "student: the first 50 of the larger model's 60 token rows.",
        f"student: copied, {share} of its parameters: model.embed_tokens.weight, "
        + "".join(f"model.layers.*.self_attn.{name}_proj.weight, " for name in "qkvo")
        + "model.layers.*.input_layernorm.weight, model.layers.*.post_attention_layernorm.weight, model.norm.weight, "
        "lm_head.weight.",
        "student: of another shape than the larger model's, and random: "
        + ", ".join(f"model.layers.*.mlp.{name}_proj.weight" for name in ("gate", "up", "down"))
        + ".",
    )


@pytest.mark.parametrize("layers", [[0, 0], [1, 0], [0, 5], [0], "evenly"])
def test_layers_that_cannot_be(layers: Any) -> None:
    with pytest.raises(ModelError, match="expected"):
        begun(model("llama"), "copy", layers=layers, num_hidden_layers=2)


@pytest.mark.parametrize(
    "config",
    [
        MixtralConfig(**SIZES, num_local_experts=2),  # a mixture of experts
        BloomConfig(**ENDS, hidden_size=32, n_head=4, n_layer=5),  # the slope of a head's positions is by its number
    ],
)
def test_parts_of_unknown_architectures_are_refused(config: Any) -> None:
    with pytest.raises(ModelError, match="layers have other parts"):
        plan_initialization(random_student(config, 0), config, "truncate", calibration=list)


def test_another_family_is_refused() -> None:
    with pytest.raises(ModelError, match="student of the larger model's LlamaConfig, got GPT2Config"):
        plan_initialization(model("llama"), KINDS["gpt2"], "copy", calibration=list)


def recipe(values: dict[str, Any], **student: Any) -> Recipe:
    return Recipe.parse({**values, "student": student})


def test_a_recipe_prunes_its_teacher(recipe_values: dict[str, Any]) -> None:
    pruned = {"hidden_size": 8, "num_attention_heads": 1, "intermediate_size": 16, "num_hidden_layers": 1}
    built = build_run(recipe(recipe_values, design=pruned, initialize="prune"))
    assert any("the most active" in note for note in built.notes)
    one, two = built.new_student(), built.new_student()
    assert built.loaded.model is not None
    embedding = built.loaded.model.get_input_embeddings().weight
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert one.get_input_embeddings().weight.shape == (300, 8)
    columns = {tuple(column.tolist()) for column in embedding.T}
    assert all(tuple(column.tolist()) in columns for column in one.get_input_embeddings().weight.T)


def test_a_recipe_designs_by_a_budget(recipe_values: dict[str, Any]) -> None:
    built = build_run(recipe(recipe_values, design={"compression": 1.25, "keep": "balanced"}))
    assert built.loaded.model is not None
    whole = built.loaded.model.num_parameters()
    assert abs(built.new_student().num_parameters() * 1.25 / whole - 1) < 0.05


@pytest.mark.parametrize(
    ("student", "message"),
    [
        ({"design": {"params": "1M", "hidden_size": 8}}, r"student\.design\.hidden_size: unknown key"),
        ({"design": {"keep": "depth"}}, "at least one of params"),
        ({"design": {"task": "simple", "context": 64}}, "at least one of params"),
        ({"design": {"params": 5, "target": "edg"}}, "target"),
        ({"design": {"hidden_size": 8}, "initialize": "prun"}, "initialize"),
        ({"design": {"hidden_size": 8}, "initialize": {"method": "random", "layers": "skip"}}, "no layers with random"),
        ({"model": "here", "initialize": "copy"}, "beside a model"),
    ],
)
def test_mistakes_in_a_recipe(recipe_values: dict[str, Any], student: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        recipe(recipe_values, **student)


def test_layers_are_not_chosen_without_text() -> None:
    teacher = random_student(families.small("llama"), 1)
    config = student_config(teacher.config, {"num_hidden_layers": 1}, 128)
    with pytest.raises(ModelError, match="expected text to choose layers by, got none"):
        plan_initialization(teacher, config, "copy", layers="importance", calibration=list)
