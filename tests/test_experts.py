"""Students cut from mixtures of experts: the same function where nothing is lost, and the scores that loops find."""

from __future__ import annotations

import io
import itertools
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

import families
from conftest import make_batch, make_llama
from potstill.cli.check import _parameters
from potstill.errors import ModelError
from potstill.models.adapted import parameter_count
from potstill.models.dense import DENSE_FAMILIES
from potstill.models.design import student_config
from potstill.models.expert_selection import matched_units, merged_shares, network_sizes
from potstill.models.feed_forward import ExpertBlock, Mixture, Units, find_mixture, read_experts, write_experts
from potstill.models.initialize import Initialization, plan_initialization
from potstill.models.pruning import measure_importance
from potstill.models.shapes import ACTIVE_FIELDS
from potstill.models.size import size_of
from potstill.runs.build import build_run
from potstill.runs.config.student import StudentPart
from potstill.runs.run import run
from walk import Walk

BATCH = {name: value for name, value in make_batch(4, 12, 100).items() if name != "labels"}
ALWAYS, NEVER = 60.0, -60.0  # entries of router rows on the channel that is the same for all tokens
# Families whose weights depend on the chosen experts alone, and fields for that.
NORMALIZED: dict[str, dict[str, Any]] = {
    "mixtral": {},
    "gpt_oss": {},
    "qwen3_moe": {"norm_topk_prob": True},
    "deepseek_v3": {},
    "phimoe": {},
    "minimax_m2": {},
}
OTHERS = ["qwen2_moe", "olmoe", "deepseek_v2", "jamba", "qwen3_next", "glm4_moe", "granitemoe"]


def model(family: str, **fields: Any) -> Any:
    """A model with random weights, whose hidden channel 0 is the same for all tokens and layers."""
    made = families.model(family, **({"first_k_dense_replace": 1} if family == "deepseek_v3" else {}), **fields)
    with torch.no_grad():
        for weight in made.parameters():
            if weight.ndim > 1:
                nn.init.normal_(weight, std=0.2)
        for name, weight in layers(made).named_parameters():
            module = layers(made).get_submodule(name.rpartition(".")[0])
            if name.endswith("experts.down_proj"):
                (weight[..., 0] if module.is_transposed else weight[:, 0]).zero_()
            elif name.endswith("down_proj_bias"):
                weight[:, 0] = 0.0
            elif name.rpartition(".")[0].rpartition(".")[2] in ("o_proj", "down_proj", "out_proj"):
                weight[0] = 0.0
        made.get_input_embeddings().weight[:, 0] = 4.0
    return made


def mixture(of: Any) -> Mixture:
    found = find_mixture(of)
    assert found is not None
    return found


def layers(of: Any) -> Any:
    return mixture(of).layers


def blocks(of: Any) -> list[tuple[Any, ExpertBlock]]:
    """The layers with experts, and where they are."""
    pairs = zip(mixture(of).layers, mixture(of).blocks, strict=True)
    return [(layer, block) for layer, block in pairs if isinstance(block, ExpertBlock)]


def routers(of: Any) -> list[Any]:
    return [layer.get_submodule(block.router) for layer, block in blocks(of)]


def units_of(layer: nn.Module, block: ExpertBlock) -> list[Units]:
    return read_experts(nn.ModuleDict({"layer": layer}), "layer", block)


def logits(of: Any) -> torch.Tensor:
    with torch.no_grad():
        return of.eval()(**BATCH, use_cache=False).logits[BATCH["attention_mask"].bool()]


def plan(teacher: Any, changes: dict[str, Any], **options: Any) -> Initialization:
    config = student_config(teacher.config, changes, teacher.config.vocab_size)
    return plan_initialization(teacher, config, "prune", calibration=lambda: [BATCH], **options)


def pruned(teacher: Any, changes: dict[str, Any], **options: Any) -> Any:
    return plan(teacher, changes, **options).student(teacher, 7)


def number_field(of: Any) -> str:
    return next(x for x in ("num_local_experts", "n_routed_experts", "num_experts") if x in of.config.to_dict())


@pytest.mark.parametrize("family", [*NORMALIZED, *OTHERS])
def test_a_student_of_the_teachers_shape_is_the_teacher(family: str) -> None:
    teacher = model(family)
    assert torch.equal(logits(pruned(teacher, {})), logits(teacher))


@pytest.mark.parametrize("family", NORMALIZED)
@pytest.mark.parametrize("merge", [False, True])
def test_experts_that_are_never_chosen_go_without_a_trace(family: str, merge: bool) -> None:
    teacher = model(family, **NORMALIZED[family])
    with torch.no_grad():
        for router in routers(teacher):
            router.weight[1, 0] = NEVER
    student = pruned(teacher, {number_field(teacher): 3}, merge=merge)
    torch.testing.assert_close(logits(student), logits(teacher), rtol=1e-5, atol=1e-5)
    assert student.num_parameters() < teacher.num_parameters()
    other = pruned(teacher, {number_field(teacher): 2}, merge=merge)
    assert not torch.allclose(logits(other), logits(teacher), atol=1e-2)


@pytest.mark.parametrize("family", [family for family in NORMALIZED if family != "phimoe"])  # it weighs copies anew
def test_copies_of_an_expert_are_merged_without_a_trace(family: str) -> None:
    teacher = model(family, **NORMALIZED[family])
    for (layer, block), number in zip(blocks(teacher), itertools.count(3)):
        units = units_of(layer, block)
        order = torch.randperm(len(units[2]), generator=torch.Generator().manual_seed(number))
        units[3] = units[2].take(order)
        write_experts(layer, block, units)
        router = layer.get_submodule(block.router)
        with torch.no_grad():
            router.weight[0, 0] = ALWAYS
            router.weight[3] = router.weight[2]
    student = pruned(teacher, {number_field(teacher): 3}, merge=True)
    torch.testing.assert_close(logits(student), logits(teacher), rtol=1e-4, atol=1e-4)


def evenly_routed(family: str, **fields: Any) -> Any:
    """A mixture that gives all its experts the same weight for all tokens."""
    config = families.small(family)
    active = next(name for name in ACTIVE_FIELDS if name in config.to_dict())
    teacher = model(family, **{active: 4}, **fields)
    with torch.no_grad():
        for layer, block in blocks(teacher):
            layer.get_submodule(block.router).weight.zero_()
            if block.shared_gate is not None:
                layer.get_submodule(block.shared_gate).weight.zero_()
    return teacher


def all_units(teacher: Any) -> int:
    """The units of a layer: of four experts and the shared network."""
    layer, block = blocks(teacher)[0]
    shared = (
        0 if block.shared is None else layer.get_submodule(f"{block.shared.path}.{block.shared.output}").in_features
    )
    return int(4 * network_sizes(layer)[1] + shared)


@pytest.mark.parametrize(
    ("family", "dense"), [(family, dense) for family, known in DENSE_FAMILIES.items() for dense in known]
)
def test_experts_of_constant_weight_are_one_network_of_a_dense_family(family: str, dense: str) -> None:
    teacher = evenly_routed(family)
    changes = {"model_type": dense, "intermediate_size": all_units(teacher)}
    student = pruned(teacher, changes)
    assert student.config.model_type == dense
    torch.testing.assert_close(logits(student), logits(teacher), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("deepseek_v3", {"first_k_dense_replace": 2, "mlp_layer_types": ["dense", "dense"], "intermediate_size": 160}),
        ("deepseek_v2", {"first_k_dense_replace": 2, "mlp_layer_types": ["dense", "dense"], "intermediate_size": 160}),
        ("qwen3_moe", {"mlp_only_layers": [0, 1], "intermediate_size": 128}),
        ("qwen2_moe", {"mlp_only_layers": [0, 1], "intermediate_size": 160}),
        ("gpt_oss", {"num_local_experts": 1, "num_experts_per_tok": 1, "intermediate_size": 256}),
        ("olmoe", {"num_experts": 1, "num_experts_per_tok": 1, "intermediate_size": 256}),
    ],
)
def test_experts_of_constant_weight_are_one_network_in_their_own_family(family: str, changes: dict[str, Any]) -> None:
    teacher = evenly_routed(family)
    student = pruned(teacher, {name: x for name, x in changes.items() if name in teacher.config.to_dict()})
    torch.testing.assert_close(logits(student), logits(teacher), rtol=1e-4, atol=1e-4)


def test_copies_of_one_expert_add_up_in_one_network() -> None:
    teacher = model("mixtral")
    for layer, block in blocks(teacher):
        write_experts(layer, block, [units_of(layer, block)[0]] * 4)
    student = pruned(teacher, {"model_type": "mistral", "intermediate_size": 256})
    torch.testing.assert_close(logits(student), logits(teacher), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "qwen2_moe", "deepseek_v3", "nemotron_h"])
def test_units_that_do_nothing_go_without_a_trace(family: str) -> None:
    teacher = model(family)
    for layer, block in blocks(teacher):
        units = units_of(layer, block)
        for number, own in enumerate(units):
            dead = torch.randperm(len(own), generator=torch.Generator().manual_seed(number))[: len(own) // 2]
            own.inputs[dead] = 0.0
            if own.input_biases is not None:
                own.input_biases[dead] = 0.0
        write_experts(layer, block, units)
    width = next(name for name in ("moe_intermediate_size", "intermediate_size") if name in teacher.config.to_dict())
    half = network_sizes(blocks(teacher)[0][0])[1] // 2
    for layer, block in blocks(teacher) if family == "deepseek_v3" else ():  # whose shared network is as narrow
        for name in block.shared.inputs:
            layer.get_submodule(f"{block.shared.path}.{name}").weight.data[::2] = 0.0
    student = pruned(teacher, {width: half})
    torch.testing.assert_close(logits(student), logits(teacher), rtol=1e-4, atol=1e-4)


def test_heads_and_channels_go_as_in_other_models() -> None:
    teacher = model("mixtral")
    dead = torch.tensor([i for i in range(1, 32) if i % 4 == 1])
    with torch.no_grad():
        teacher.model.embed_tokens.weight[:, dead] = 0
        for layer in layers(teacher):
            layer.self_attn.o_proj.weight[dead] = 0
            layer.mlp.experts.down_proj[:, dead] = 0
            layer.self_attn.v_proj.weight[8:] = 0  # the second key and value head, with its two query heads
    fields = {"hidden_size": 24, "head_dim": 8, "num_attention_heads": 2, "num_key_value_heads": 1}
    torch.testing.assert_close(logits(pruned(teacher, fields)), logits(teacher), rtol=1e-3, atol=1e-3)


def test_a_saved_correction_of_the_choice_of_experts_is_copied() -> None:
    teacher = model("deepseek_v3")
    for router in routers(teacher):
        router.e_score_correction_bias.copy_(torch.tensor([0.0, 9.0, 0.0, 9.0]))
    config = student_config(teacher.config, {}, 128)
    copied = plan_initialization(teacher, config, "copy", calibration=lambda: [BATCH]).student(teacher, 7)
    assert torch.equal(logits(copied), logits(teacher))
    torch.testing.assert_close(logits(pruned(teacher, {"n_routed_experts": 2})), logits(teacher), rtol=1e-5, atol=1e-5)


def test_a_router_keeps_its_groups_of_experts() -> None:
    teacher = model("deepseek_v3", n_routed_experts=8, n_group=2, topk_group=1)
    with torch.no_grad():
        for router in routers(teacher):
            router.e_score_correction_bias.copy_(torch.tensor([9.0, 9, 0, 0, 0, 0, 8, 8]))
    student = pruned(teacher, {"n_routed_experts": 4})
    for router in routers(student):
        assert router.e_score_correction_bias[:2].tolist() == [9.0, 9.0]
    torch.testing.assert_close(logits(student), logits(teacher), rtol=1e-5, atol=1e-5)
    for number in (2, 5):
        with pytest.raises(ModelError, match=f"router's 2 groups of experts, at least 2 in each, got {number}"):
            pruned(teacher, {"n_routed_experts": number})


def test_scores_are_what_loops_find() -> None:
    teacher = model("qwen2_moe")
    found = measure_importance(teacher, [BATCH]).blocks[1]
    layer, mask = layers(teacher)[1], BATCH["attention_mask"]
    seen: list[torch.Tensor] = []
    with layer.mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0])):
        logits(teacher)
    units, squares, products = (torch.zeros(5, 32, dtype=torch.float64) for _ in range(3))
    weights, sizes, outputs = torch.zeros(5).double(), torch.zeros(4).double(), []
    for row in range(4):
        of_row = torch.zeros(5, 32, dtype=torch.float64)
        for t in range(12):
            if not mask[row, t]:
                continue
            x = seen[0][row, t].detach()
            probabilities = (layer.mlp.gate.weight @ x).softmax(0).detach()
            chosen = probabilities.topk(2).indices.tolist()
            outputs.append([])
            for network in range(5):
                if network < 4:
                    gate, up = (layer.mlp.experts.gate_up_proj[network] @ x).chunk(2)
                    weight = probabilities[network].item() if network in chosen else 0.0
                else:
                    gate, up = (layer.mlp.shared_expert.get_submodule(n).weight @ x for n in ("gate_proj", "up_proj"))
                    weight = (layer.mlp.shared_expert_gate.weight @ x).sigmoid().item()
                a = (nn.functional.silu(gate) * up).detach().double()
                of_row[network] += weight * a.abs()
                squares[network] += a**2
                products[network] += weight * a**2
                weights[network] += weight
                if network < 4:
                    outputs[-1].append(layer.mlp.experts.down_proj[network].detach().double() @ a)
                    sizes[network] += weight * outputs[-1][-1].norm()
        units += (of_row / mask[row].sum()) ** 2
    tokens = int(mask.sum())
    stacked = torch.stack([torch.stack(x) for x in outputs], 1).flatten(1)
    for network in range(5):
        torch.testing.assert_close(found.units[network], units[network].sqrt(), rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(found.scales[network], products[network] / squares[network], rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(found.weights, weights / tokens, rtol=1e-5, atol=0)
    torch.testing.assert_close(found.experts, sizes / tokens, rtol=1e-5, atol=0)
    torch.testing.assert_close(found.products, stacked @ stacked.T / tokens, rtol=1e-4, atol=1e-6)


def test_outputs_shrink_where_probabilities_of_experts_that_go_are_shared() -> None:
    teacher = model("olmoe", norm_topk_prob=False, seed=1)
    states: list[torch.Tensor] = []
    with routers(teacher)[0].register_forward_pre_hook(lambda _, args: states.append(args[0])):
        logits(teacher)
    attended = states[0].flatten(0, -2)[BATCH["attention_mask"].flatten().bool()]
    probabilities = (attended @ routers(teacher)[0].weight.T).softmax(-1)
    chosen = probabilities.topk(2).indices
    student = pruned(teacher, {"num_experts": 3})
    kept = [
        i
        for i in range(4)
        if any(torch.equal(routers(teacher)[0].weight[i], row) for row in routers(student)[0].weight)
    ]
    assert len(kept) == 3
    assert len([expert for expert in kept if (chosen == expert).any()]) == 2
    for own, expert in enumerate(kept):
        if not (chosen == expert).any():
            continue
        share = probabilities[(chosen == expert).any(-1)][:, kept].sum(-1).mean()
        expected = layers(teacher)[0].mlp.experts.down_proj[expert] * share
        torch.testing.assert_close(layers(student)[0].mlp.experts.down_proj[own], expected, rtol=1e-4, atol=1e-6)
    assert measure_importance(model("mixtral"), [BATCH]).blocks[0].together is None


def test_groups_have_the_least_squared_error_of_two() -> None:
    generator = torch.Generator().manual_seed(0)
    outputs = torch.randn(5, 64, generator=generator).double()  # of experts, for tokens and channels
    weights = torch.rand(5, generator=generator).double()

    def error(first: int, second: int) -> float:
        pair = [first, second]
        mean = (weights[pair, None] * outputs[pair]).sum(0) / weights[pair].sum()
        return float((weights[pair, None] * (outputs[pair] - mean) ** 2).sum())

    best = min(combinations(range(5), 2), key=lambda pair: error(*pair))
    shares = merged_shares(weights, outputs @ outputs.T, 4)
    (group,) = (row for row in shares if int((row > 0).sum()) == 2)
    assert tuple(group.nonzero().flatten().tolist()) == best
    torch.testing.assert_close(group[list(best)], weights[list(best)] / weights[list(best)].sum())
    torch.testing.assert_close(merged_shares(weights, outputs @ outputs.T, 1)[0], weights / weights.sum())


def test_units_are_matched_by_their_weights() -> None:
    generator = torch.Generator().manual_seed(0)
    one = Units(torch.randn(20, 2, 8, generator=generator), None, torch.randn(20, 8, generator=generator), None)
    order = torch.randperm(20, generator=generator)
    noise = 0.1 * torch.randn(20, 8, generator=generator)
    other = Units(one.inputs[order], None, one.outputs[order] + noise, None)
    assert torch.equal(order[matched_units(one, other)], torch.arange(20))


def test_one_network_is_fitted_to_the_hidden_states() -> None:
    teacher = model("mixtral")
    batches = [{name: x + (name == "input_ids") * i for name, x in BATCH.items()} for i in range(8)]
    config = student_config(teacher.config, {"model_type": "mistral", "num_hidden_layers": 1}, 128)
    assert config.intermediate_size == 2 * teacher.config.intermediate_size  # as wide as what a token passes through
    found = plan_initialization(teacher, config, "prune", fit=True, calibration=lambda: batches)
    assert "one network of the 128 most important units of 4 experts" in found.notes[0]
    assert "fitted to the larger model's hidden states" in found.notes[-1]
    smaller = student_config(teacher.config, {"num_local_experts": 2}, 128)
    found = plan_initialization(teacher, smaller, "prune", fit=True, calibration=lambda: batches)
    assert "2 of 4 experts (those that add most)" in found.notes[0]
    assert "its layers are not fitted" in found.notes[-1]


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("llama4_text", {"num_local_experts": 2}, "got Llama4ForCausalLM, whose layers have other parts"),
        ("zaya", {"num_experts": 2}, "got ZayaForCausalLM, whose layer 0 has other parts"),
        ("jetmoe", {"num_local_experts": 2}, "got JetMoeForCausalLM"),
        ("cohere2_moe", {"num_experts": 3}, "expected experts whose weighted sum is a layer's output, got Cohere2Moe"),
        (
            "gpt_oss",
            {"hidden_size": 16},
            "expected hidden 32 as in GptOssForCausalLM, whose attention cannot be pruned",
        ),
        ("mixtral", {"num_local_experts": 8}, "at most the larger model's 4 experts, got 8"),
        ("mixtral", {"num_local_experts": 1}, "expected at least the 2 experts that a token is sent to, got 1"),
        ("mixtral", {"model_type": "qwen2"}, "expected mistral, llama or mixtral for a teacher of mixtral, got qwen2"),
        ("gpt_oss", {"model_type": "llama"}, "ask for one expert: num_local_experts: 1, num_experts_per_tok: 1"),
        (
            "mixtral",
            {"model_type": "mistral", "intermediate_size": 300},
            "at most .* 256 feed-forward units, got 300",
        ),
        (
            "deepseek_v3",
            {"n_routed_experts": 1, "num_experts_per_tok": 1},
            "gives its only expert the same weight .*, got that of DeepseekV3MoE",
        ),
    ],
)
def test_what_cannot_be_pruned_is_refused(family: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message) as error:
        pruned(model(family) if family == "deepseek_v3" else families.model(family), changes)
    assert "\n" not in str(error.value)


def test_merging_is_for_fewer_experts() -> None:
    for teacher, changes in (
        (model("mixtral"), {}),
        (model("mixtral"), {"model_type": "mistral"}),
        (make_llama(), {"num_hidden_layers": 1}),
    ):
        with pytest.raises(ModelError, match=r"student.initialize.experts: expected a student with at least two"):
            pruned(teacher, changes, merge=True)


def test_a_dense_family_is_for_pruning() -> None:
    teacher = model("mixtral")
    with pytest.raises(ModelError, match=r"got MistralConfig\. Use prune, which makes one network of experts"):
        config = student_config(teacher.config, {"model_type": "mistral"}, 128)
        plan_initialization(teacher, config, "copy", calibration=list)


def test_the_parameters_that_are_active_for_a_token_are_counted() -> None:
    config = families.small("qwen2_moe")
    found, of_expert = size_of(config, 16), 3 * 32 * 32
    assert found.parameters - found.active_parameters == 2 * 2 * of_expert  # two of four experts, in two layers
    assert parameter_count(families.model("qwen2_moe")).active == found.active_parameters
    dense = size_of(make_llama().config, 16)
    assert dense.active_parameters == dense.parameters


def test_merging_is_an_option_of_pruning() -> None:
    design = {"design": {"num_local_experts": 2}}
    part = StudentPart.model_validate(design | {"initialize": {"method": "prune", "experts": "merge"}})
    assert part.initialize.experts == "merge"
    with pytest.raises(ValueError, match="expected prune with experts: merge, got copy"):
        StudentPart.model_validate(design | {"initialize": {"method": "copy", "experts": "merge"}})


def test_a_run_counts_all_parameters_and_those_that_are_active(tmp_path: Path) -> None:
    student = {"design": {"num_local_experts": 3}, "initialize": {"method": "prune", "experts": "merge"}}
    recipe = Walk("mixtral", "causal", tmp_path).recipe(student=student)
    result = run(recipe, console=Console(file=io.StringIO()))
    teacher, of_student = (result.summary["rows"][name] for name in ("teacher", "student"))
    assert of_student["active_parameters"] < of_student["parameters"] < teacher["parameters"]
    assert teacher["active_parameters"] < teacher["parameters"]
    assert "Active parameters" in (result.directory / "report.html").read_text()
    assert any("3 of 4 experts (merged by their outputs)" in note for note in result.summary["notes"])
    size = build_run(recipe).size
    assert (size.all, size.active) == (of_student["parameters"], of_student["active_parameters"])
    assert _parameters(size) == f"{size.all:,} parameters, {size.active:,} of them active for a token"
