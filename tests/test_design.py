"""The shape of a student within a budget: published configs, exact counts, and what cannot be."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import CONFIG_MAPPING, AutoConfig, LayoutLMv3Config, LlamaConfig, PretrainedConfig
from typer.testing import CliRunner

import families
from conftest import make_llama
from potstill.cli import app
from potstill.errors import ModelError, ShapeError, UserError
from potstill.models.budget import Budget, parse_count
from potstill.models.capacity import (
    CAPABILITIES,
    PUBLISHED,
    DistillationLaw,
    SupervisedLaw,
    expected_share,
    smallest_student,
)
from potstill.models.compression import recommend_compression
from potstill.models.design import design, student_config
from potstill.models.pruning import select_parts
from potstill.models.references import REFERENCES
from potstill.models.shapes import design_shape
from potstill.models.size import build, count_parameters, size_of
from reference_students import PUBLIC, parameters, sizes

LLAMA_8B = CONFIG_MAPPING["llama"](**PUBLIC["Llama 3.1 8B"][1])


def seconds(config: PretrainedConfig, tokens: int) -> float:
    """Time of a forward pass, as if it were that of the products alone."""
    return count_parameters(config) * tokens / 2048 * 1e-11


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_config_is_counted_exactly_and_made_smaller(name: str) -> None:
    family, fields, published = PUBLIC[name]
    teacher = CONFIG_MAPPING[family](**fields)
    assert count_parameters(teacher) == published
    assert parameters(family, design_shape(teacher), teacher.vocab_size, teacher.tie_word_embeddings) == published

    student = design(teacher, published // 3)
    whole, shape = design_shape(teacher), design_shape(student)
    found = count_parameters(student)
    assert type(student) is type(teacher)
    assert abs(found / (published / 3) - 1) <= 0.05
    assert found == parameters(family, shape, student.vocab_size, student.tie_word_embeddings)
    assert shape.head_size == whole.head_size
    assert shape.heads % shape.kv_heads == 0
    assert shape.hidden % (64 if shape.hidden < 1024 else 128) == 0
    assert shape.ffn % (64 if shape.ffn < 1024 else 128) == 0
    for size in ("layers", "hidden", "heads", "kv_heads", "ffn"):
        assert 1 <= getattr(shape, size) <= getattr(whole, size)


def test_keeping_attention_cuts_units_before_layers() -> None:
    teacher = design_shape(LLAMA_8B)
    most = design_shape(design(LLAMA_8B, 5_000_000_000, keep="attention"))
    assert replace(most, ffn=teacher.ffn) == teacher
    assert teacher.ffn / 3 < most.ffn < teacher.ffn
    fewer = design_shape(design(LLAMA_8B, 3_000_000_000, keep="attention"))
    assert replace(fewer, ffn=teacher.ffn, layers=teacher.layers) == teacher
    assert fewer.ffn == pytest.approx(teacher.ffn / 3, rel=0.05)
    assert fewer.layers < teacher.layers


@pytest.mark.parametrize("keep", ["balanced", "depth", "width"])
def test_what_is_kept_is_kept(keep) -> None:
    shape = design_shape(design(LLAMA_8B, 3_000_000_000, keep=keep))
    assert (shape.layers == 32) is (keep == "depth")
    assert (shape.hidden == 4096) is (keep == "width")


def test_a_designs_heads_can_be_pruned_from_the_teachers() -> None:
    teacher = LlamaConfig(**sizes(2000, 576, 1536, 4, 9, 3))
    whole = design_shape(teacher)
    for budget in range(5_000_000, 15_000_000, 2_000_000):
        shape = design_shape(design(teacher, budget))
        select_parts(whole, shape, range(shape.layers), None)


def test_a_design_can_be_built_saved_and_read(tmp_path: Path) -> None:
    teacher = LlamaConfig(**sizes(2000, 512, 1408, 8, 8, 4))
    student = design(teacher, 5_000_000, vocabulary=1900)
    student.save_pretrained(tmp_path)
    model = build(AutoConfig.from_pretrained(tmp_path))
    assert model.get_input_embeddings().weight.shape[0] == 1900
    assert sum(parameter.numel() for parameter in model.parameters()) == count_parameters(student)


def test_an_impossible_budget_is_refused_with_the_smallest_one() -> None:
    with pytest.raises(
        ModelError, match=r"at least ([\d,]+) parameters, got 1,000,000\. The smallest .* 1 layer"
    ) as error:
        design(LLAMA_8B, 1_000_000)
    smallest = int(str(error.value).split("at least ")[1].split(" ")[0].replace(",", ""))
    assert count_parameters(design(LLAMA_8B, smallest)) == smallest
    with pytest.raises(ModelError, match=r"as wide as the teacher.*keep balanced\): from"):
        design(LLAMA_8B, 100_000_000, keep="width")
    with pytest.raises(ModelError, match="below the teacher's 8,030,261,248"):
        design(LLAMA_8B, 9_000_000_000)


def test_costs_are_what_a_sum_finds() -> None:
    found = size_of(LLAMA_8B, 1024)
    matrices = 32 * (4096 * 4096 * 2 + 4096 * 1024 * 2 + 3 * 4096 * 14336) + 128256 * 4096
    attention = sum(2 * 2 * seen * 32 * 4096 for seen in range(1, 1025)) / 1024
    assert found.flops_per_token == round(2 * matrices + attention)
    assert found.kv_cache_bytes_per_token == 2 * 2 * 32 * 8 * 128
    assert found.train_bytes == 16 * found.parameters
    assert found.serve_bytes == 2 * found.parameters + 1024 * found.kv_cache_bytes_per_token
    assert size_of(CONFIG_MAPPING["bert"](), 128).kv_cache_bytes_per_token == 0


def test_budgets_of_all_kinds() -> None:
    whole = count_parameters(LLAMA_8B)
    assert abs(count_parameters(Budget(compression=7).student(LLAMA_8B)) * 7 / whole - 1) <= 0.05
    assert abs(count_parameters(Budget(target="edge").student(LLAMA_8B)) / 5e8 - 1) <= 0.05
    memory = size_of(Budget(memory_gb=4, context=4096).student(LLAMA_8B), 4096).serve_bytes
    assert 0.9 * 4e9 <= memory <= 4e9

    timed = Budget(latency_ms=20).student(LLAMA_8B, seconds=seconds)
    assert 18 <= 1000 * seconds(timed, 2048) <= 20
    shorter = Budget(latency_ms=20, context=1024).student(LLAMA_8B, seconds=seconds)
    assert count_parameters(shorter) > 1.8 * count_parameters(timed)
    with pytest.raises(ModelError, match=r"got at most 0\.0001 GB: the smallest one takes"):
        Budget(memory_gb=1e-4).student(LLAMA_8B)
    with pytest.raises(ModelError, match="Take the teacher"):
        Budget(memory_gb=100).student(LLAMA_8B)


def test_memory_is_for_a_row_that_the_teacher_can_read() -> None:
    """By default as `potstill design` counts it."""
    teacher = LlamaConfig(hidden_size=64, num_hidden_layers=4, max_position_embeddings=128, vocab_size=300)
    limit = 0.6 * size_of(teacher, 128).serve_bytes / 1e9
    short, default = (Budget(memory_gb=limit, **context).student(teacher) for context in ({"context": 128}, {}))
    assert short.to_dict() == default.to_dict()


def test_a_budget_of_active_parameters() -> None:
    teacher = families.small("mixtral")
    limit = 0.6 * size_of(teacher, 64).active_parameters
    student = Budget(active_params=int(limit), context=64).student(teacher)
    size = size_of(student, 64)
    assert 0.8 * limit < size.active_parameters <= limit < size.parameters
    both = Budget(active_params=int(limit), params=int(0.8 * size.parameters), context=64).student(teacher)
    assert size_of(both, 64).parameters < size.parameters


def test_a_language_model_loses_units_first_where_that_is_enough() -> None:
    student = design_shape(Budget(compression=1.5).student(LLAMA_8B))
    whole = design_shape(LLAMA_8B)
    assert (student.layers, student.hidden, student.heads) == (whole.layers, whole.hidden, whole.heads)
    assert student.ffn < whole.ffn

    tokens = make_llama(vocab_size=5000, hidden_size=64).config  # most weights are embeddings
    assert design_shape(Budget(compression=2).student(tokens)).hidden < 64
    with pytest.raises(ModelError, match="with the teacher's attention"):
        Budget(compression=2, keep="attention").student(tokens)


@pytest.mark.parametrize(
    "teacher",
    [
        CONFIG_MAPPING["bert"](),
        CONFIG_MAPPING["llama"](**PUBLIC["Llama 3.1 8B"][1], architectures=["LlamaForSequenceClassification"]),
        CONFIG_MAPPING["qwen3_moe"](),
    ],
)
def test_other_models_lose_depth_and_width(teacher: PretrainedConfig) -> None:
    by_default, balanced = (Budget(compression=2, keep=keep).student(teacher) for keep in (None, "balanced"))
    assert design_shape(by_default) == design_shape(balanced)


def test_all_limits_hold_at_once() -> None:
    whole = count_parameters(LLAMA_8B)
    limits: list[tuple[dict[str, Any], float]] = [
        ({"params": 2_000_000_000, "compression": 8.0}, whole / 8),
        ({"compression": 2.0, "target": "server"}, 3e9),
        ({"target": "server", "memory_gb": 4.0}, 2e9),
        ({"target": "mobile", "memory_gb": 4.0}, 1e9),
        ({"memory_gb": 4.0, "latency_ms": 2.0}, 1.6e9),
        ({"target": "server", "memory_gb": 4.0, "latency_ms": 6.0, "compression": 3.0, "min_share": 0.5}, 2e9),
        ({"min_share": 0.9, "task": "knowledge"}, smallest_student(whole, 0.9, "knowledge").value),
    ]
    for number, (given, expected) in enumerate(limits):
        student = Budget(**given, context=256).student(LLAMA_8B, seconds=seconds)
        assert abs(count_parameters(student) / expected - 1) <= 0.06, number
        assert size_of(student, 256).serve_bytes <= 1e9 * given.get("memory_gb", math.inf)
        assert 1000 * seconds(student, 256) <= given.get("latency_ms", math.inf)
    with pytest.raises(
        ModelError, match=r"expected limits that leave .* keep 95% of their teacher's score \(reasoning"
    ):
        Budget(target="edge", min_share=0.95, task="reasoning").student(LLAMA_8B)


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({}, "at least one of params, active_params, compression, memory_gb, latency_ms, target, min_share, got none"),
        ({"params": 5, "compression": 0.5}, "above 1"),
        ({"min_share": 1.0}, "min_share between 0 and 1, got 1"),
        ({"min_share": 0.9, "task": "poetry"}, "Budget.task: expected one of understanding"),
        ({"params": "100M"}, "Budget.params: expected a whole number, got '100M'"),
        ({"compression": 0.5}, "above 1"),
        ({"compression": float("nan")}, "above 1"),
        ({"memory_gb": -1.0}, "above 0"),
        ({"target": "brwser"}, "Did you mean browser"),
    ],
)
def test_budgets_that_are_none(limits: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Budget(**limits)


def test_a_design_is_made_from_a_config() -> None:
    with pytest.raises(ModelError, match="expected a config of the teacher, got a dict"):
        Budget(compression=2.0).student({"hidden_size": 8})


def test_a_latency_needs_a_clock_and_a_plan_a_known_task() -> None:
    with pytest.raises(ModelError, match="expected seconds for latency_ms, got none"):
        Budget(latency_ms=5).student(LLAMA_8B)
    with pytest.raises(ShapeError, match="expected a task of understanding"):
        recommend_compression(10**9, target="edge", task="poetry")  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["", "many", "-5M", "0", "5T", "nan"])
def test_counts_that_are_none(text: str) -> None:
    with pytest.raises(ModelError, match="such as 100M"):
        parse_count(text)


def test_a_mixture_of_shapes_has_no_design() -> None:
    with pytest.raises(ModelError, match="one stack of layers"):
        design(CONFIG_MAPPING["t5"](), 1000)


def test_published_shapes_have_their_published_sizes() -> None:
    found = {reference.name: count_parameters(reference.config()) for reference in REFERENCES}
    for name, (_, _, published) in PUBLIC.items():
        assert found.get(name, published) == published
    assert found["DistilBERT"] == 66_985_530
    assert found["SmolLM2 135M"] == 134_515_008
    assert round(found["Llama 3.1 Minitron 4B"], -8) == 4_500_000_000
    for name, width, ffn, kv_heads in (("tiny-500m", 1024, 2816, 4), ("small-1b", 2048, 5504, 8)):
        keys = 2 * width * kv_heads * width // 16
        layer = 2 * width**2 + keys + 3 * width * ffn + 2 * width
        assert found[name] == 32_000 * width + 24 * layer + width


def test_estimates_go_through_the_published_points() -> None:
    for point in PUBLISHED:
        found = expected_share(point.compression, point.task)
        assert found.low - 1e-9 <= point.share <= found.high + 1e-9
        assert found.low <= found.value <= found.high
        assert point.source in found.source
    assert expected_share(1, "knowledge").value == 1
    assert expected_share(20, "knowledge").extrapolated
    exponents = {
        task: sorted(-math.log(x.share) / math.log(x.compression) for x in PUBLISHED if x.task in capabilities)
        for task, capabilities in CAPABILITIES.items()
    }
    assert {point.task for point in PUBLISHED} == {*CAPABILITIES["general"]}
    for task, found in exponents.items():  # the median: a student that failed does not decide
        middle = (found[(len(found) - 1) // 2] + found[len(found) // 2]) / 2
        assert expected_share(3, task).value == pytest.approx(3**-middle)
    shares = [expected_share(4, task).value for task in ("simple", "medium", "complex")]
    assert shares == sorted(shares, reverse=True)
    needed = smallest_student(8_000_000_000, 0.9, "knowledge")
    assert needed.low <= needed.value <= needed.high
    assert expected_share(8e9 / needed.value, "knowledge").value == pytest.approx(0.9)


@pytest.mark.parametrize(
    "call",
    [
        lambda: expected_share(0.5, "knowledge"),
        lambda: expected_share(2, "poetry"),
        lambda: smallest_student(9, 1.0, "knowledge"),
    ],
)
def test_estimates_of_what_is_not(call) -> None:
    with pytest.raises(ShapeError, match="expected"):
        call()


def test_a_plan_names_what_to_begin_with() -> None:
    plan = recommend_compression(8_000_000_000, target="edge", task="complex")
    assert (plan.parameters, plan.compression, plan.precision, plan.temperature) == (500_000_000, 16, "int4", 1.0)
    assert plan.share == expected_share(16, "complex") and plan.share.extrapolated
    assert "jsd" in plan.method and "chains of thought" in plan.data[0]
    plan = recommend_compression(8_000_000_000, target="server", task="classification", min_share=0.95)
    needed = smallest_student(8_000_000_000, 0.95, "classification").value
    assert plan.parameters == round(min(3e9, needed)) and plan.temperature == 2.0
    near = recommend_compression(8_000_000_000, min_share=0.9)
    assert "forward_kl" in near.method and near.precision == "bfloat16" and len(near.data) == 4
    for options, message in (
        ({}, "expected target or min_share"),
        ({"target": "phone"}, "expected target browser"),
        ({"target": "server", "teacher_parameters": 10**9}, "It needs no smaller student"),
    ):
        with pytest.raises(ModelError, match=message):
            recommend_compression(**{"teacher_parameters": 8_000_000_000} | options)


def test_the_distillation_law_is_its_formula() -> None:
    supervised = SupervisedLaw(irreducible=1.2, size=3000.0, alpha=0.4, data=18000.0, beta=0.43, gamma=0.45)
    law = DistillationLaw(supervised, 2.5, 500.0, 1.3, 0.09, 2000.0, 0.32, 24000.0, 0.64, 0.76)
    n, d, teacher = 3e8, 2e10, 2.4
    alone = 1.2 + (3000 / n**0.4 + 18000 / d**0.43) ** 0.45
    gap = (1 + (teacher / (alone * 1.3)) ** (1 / 0.09)) ** (-500 * 0.09)
    expected = teacher + teacher**-2.5 * gap * (2000 / n**0.32 + 24000 / d**0.64) ** 0.76
    assert law.loss(teacher, n, d) == pytest.approx(expected, rel=1e-12)
    assert law.loss(teacher, n, 10 * d) < law.loss(teacher, n, d)


def potstill(*arguments: str):
    return CliRunner().invoke(app, ["design", *arguments], catch_exceptions=True)


def test_the_command_writes_a_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **sizes(2000, 512, 1408, 8, 8, 4)}))
    done = potstill("--teacher", str(tmp_path), "--compression", "4", "--out", str(tmp_path / "student"))
    assert done.exit_code == 0, done.output
    config = AutoConfig.from_pretrained(tmp_path / "student")
    assert f"{count_parameters(config):,}" in done.output
    timed = potstill("--teacher", str(tmp_path), "--latency-ms", "1e5", "--context", "8")
    assert "Take the teacher" in str(timed.exception)


def test_the_command_counts_fewer_tokens(toys: Path) -> None:
    teacher, data = ("--teacher", str(toys / "teacher")), ("--data", str(toys / "train.jsonl"))
    whole = AutoConfig.from_pretrained(toys / "teacher")
    fewer = student_config(whole, {}, 270)
    done = potstill(*teacher, *data, "--vocabulary", "270", "--context", "64")
    assert done.exit_code == 0, done.output
    words = " ".join(done.output.split())
    assert f"parameters {count_parameters(whole):,} {count_parameters(fewer):,}" in words
    assert f"of embeddings and head {2 * 300 * 16:,} {2 * 270 * 16:,}" in words
    part = yaml.safe_load(done.output[done.output.index("student:\n") :])["student"]
    assert part["vocabulary"] == {"keep": 270, "text": {"path": str(toys / "train.jsonl")}}
    assert part["model"] == str(toys / "teacher")
    smaller = potstill(*teacher, *data, "--vocabulary", "270", "--params", "6100")
    part = yaml.safe_load(smaller.output[smaller.output.index("student:\n") :])["student"]
    assert count_parameters(student_config(whole, part["design"], 270)) == pytest.approx(6100, rel=0.05)
    for options, message in (
        ((*data, "--vocabulary", "auto"), "expected a limit such as --params 80M with --search and --vocabulary auto"),
        (("--vocabulary", "270"), "expected --data FILE with --vocabulary and --search"),
        (data, "expected --vocabulary or --search with --data, got neither"),
        (
            (*data, "--vocabulary", "many"),
            "--vocabulary: expected data, auto or a number of tokens such as 32000, got many.",
        ),
        ((*data, "--vocabulary", "7"), "the added ones and the alphabet, got 7. Keep more."),
    ):
        assert message in str(potstill(*teacher, *options).exception)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected --teacher"),
        (["--teacher", "nowhere/at/all", "--params", "1M"], "not one"),
        (["--teacher", "TOYS", "--params", "1M", "--keep", "dpeth"], "--keep: expected"),
        (["--teacher", "TOYS"], "at least one of params"),
        (["--teacher", "TOYS", "--params", "1M", "--context", "65"], "--context: expected at most 64"),
        (["--teacher", "TOYS", "--params", "100 M parameters"], "such as 100M"),
    ],
)
def test_mistakes_on_the_command_line(arguments: list[str], message: str, toys: Path) -> None:
    done = potstill(*[argument.replace("TOYS", str(toys / "teacher")) for argument in arguments])
    assert message in str(done.exception)


def test_toys_have_designs_too() -> None:
    teacher = make_llama(hidden_size=32, layers=4).config
    student = design(teacher, count_parameters(teacher) // 2)
    assert abs(count_parameters(student) * 2 / count_parameters(teacher) - 1) <= 0.05


def test_the_list_of_shapes_fits_into_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    done = potstill("--list")
    assert done.exit_code == 0, done.output
    lines = {line[:22].strip(): line for line in done.output.splitlines()}
    assert {reference.name for reference in REFERENCES} <= lines.keys()
    assert "\N{HORIZONTAL ELLIPSIS}" not in done.output
    assert lines["TinyLlama 1.1B"].split()[2:] == ["1.1B", "22", "2048", "32/4", "5632", "22.5", "kB", "scratch"]


def test_layoutlmv3_has_sizes_of_places_that_make_its_width() -> None:
    teacher = LayoutLMv3Config()
    with pytest.raises(ModelError, match="expected 4 coordinate_size"):
        student_config(teacher, {"hidden_size": 384}, 300)
    changes = {"hidden_size": 384, "coordinate_size": 64, "shape_size": 64, "num_attention_heads": 6}
    assert student_config(teacher, changes, 300).hidden_size == 384
