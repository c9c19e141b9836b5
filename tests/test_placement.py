"""A teacher that accelerate spreads over devices, memory and disk teaches like one in memory."""

from __future__ import annotations

import errno
import gc
from pathlib import Path
from typing import Any

import pytest
import torch

import families
from conftest import make_batch, make_tokenizer
from potstill.errors import ModelError, PotstillError
from potstill.losses.alignment import causal_alignment
from potstill.losses.divergences import ForwardKL
from potstill.models import placement
from potstill.models.loading import load_model, loading_notes
from potstill.models.placement import (
    is_spread,
    layer_bytes,
    move,
    resident_bytes,
    weight_in_memory,
    weights_by_name,
)
from potstill.runs import check as checks
from potstill.runs.build import build_run
from potstill.runs.cache import _digest
from potstill.runs.check import check
from potstill.runs.config.run import Recipe
from potstill.runs.run import run
from potstill.teachers.model import ModelSource
from potstill.train.distiller import Distiller
from potstill.train.terms.layers import Attention, Hidden, Relations
from potstill.train.terms.logits import Logits
from potstill.train.terms.routers import RouterMatch

ON_DISK = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
ON_DISK |= {"model.layers.0": "cpu", "model.layers.1": "disk"}


@pytest.fixture
def spread(recipe_values: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    recipe_values["teacher"] |= {"device_map": ON_DISK, "offload_folder": str(tmp_path / "offload")}
    recipe_values["student"] = {"design": {"num_hidden_layers": 1, "hidden_size": 8, "head_dim": 8}}
    recipe_values["student"]["initialize"] = {"method": "prune", "layers": [1], "fit": False}
    return recipe_values | {"evaluate": {"continuations": 0}}


def whole(values: dict[str, Any]) -> dict[str, Any]:
    return values | {"teacher": {"model": values["teacher"]["model"]}}


def test_layers_on_the_disk_teach_and_start_students(spread: dict[str, Any]) -> None:
    one, other = (build_run(Recipe.parse(values)) for values in (spread, whole(spread)))
    models: list[Any] = [built.loaded.model for built in (one, other)]
    assert [is_spread(model) for model in models] == [True, False]
    assert move(models[0], "meta") is models[0]
    assert resident_bytes(models[0]) < resident_bytes(models[1]) == models[1].get_memory_footprint()
    assert len({_digest(weights_by_name(model)) for model in models}) == 1
    name = "model.layers.1.mlp.up_proj.weight"
    with weight_in_memory(models[0], name) as weight:
        assert torch.equal(weight, models[1].get_parameter(name))
    assert models[0].get_parameter(name).is_meta
    weights = [built.new_student().state_dict() for built in (one, other)]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    batch = {"input_ids": torch.arange(1, 25).view(2, 12), "attention_mask": torch.ones(2, 12, dtype=torch.long)}
    alignment = causal_alignment(batch["input_ids"])
    logits = [built.teacher(batch, alignment).targets.dense() for built in (one, other)]
    torch.testing.assert_close(*logits)


def test_a_run_ends_as_with_a_teacher_in_memory(spread: dict[str, Any], tmp_path: Path) -> None:
    losses = []
    for number, values in enumerate((spread, whole(spread))):
        result = run(Recipe.parse(values | {"output": str(tmp_path / str(number))}))
        losses.append(result.summary["rows"]["student"]["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_check_counts_what_is_in_memory(spread: dict[str, Any]) -> None:
    needs = [check(Recipe.parse(values)) for values in (spread, whole(spread))]
    less = [resident_bytes(need.built.loaded.model) for need in needs]  # type: ignore[arg-type]
    assert needs[0].memory_bytes - needs[0].batch_bytes == pytest.approx(
        needs[1].memory_bytes - needs[1].batch_bytes - (less[1] - less[0])
    )


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        ({"max_memory": {"cpu": "1GiB"}}, "expected device_map with max_memory and offload_folder, got none"),
        ({"device_map": "auto", "device": "cpu"}, "expected device or device_map, got both"),
        ({"device_map": {"": "cpu"}, "max_memory": {"cpu": "1GiB"}}, "expected max_memory with device_map: auto"),
        ({"device_map": "balanced"}, "expected 'auto' or a valid dictionary, got 'balanced'"),
        ({"device_map": {"": "disk"}}, "expected embeddings in memory with device_map, got them on the disk"),
        ({"device_map": {"lm_head": "disk"}}, "expected a device for each module, got none for model.*Add '': cpu"),
        ({"device_map": {}}, "expected a device for each module, got none for any"),
        ({"device_map": {"modle": "cpu"}}, r"modules of LlamaForCausalLM, got modle\. Did you mean model\?"),
        ({"device_map": {"": "cpu", "model.layers.7": "disk"}}, r"got model\.layers\.7"),
        (
            {"device_map": {"": "cpu", "model.norm.weight": "disk"}},
            r"got model\.norm\.weight\. Did you mean model\.norm",
        ),
        ({"device_map": {"": "meta"}}, r"teacher\.device_map: expected cpu or disk.*, got meta\."),
        ({"device_map": {"": "nowhere"}}, r"teacher\.device_map: expected cpu or disk.*, got nowhere\."),
        ({"device_map": {"": 99}}, r"teacher\.device_map: expected cpu or disk.*, got 99\."),
        ({"device_map": "auto", "max_memory": {"gpu": "1GiB"}}, r"teacher\.max_memory: expected cpu.*, got gpu\."),
        ({"device_map": "auto", "max_memory": {"99": "1GiB"}}, r"teacher\.max_memory: expected cpu.*, got 99\."),
        ({"device_map": "auto", "max_memory": {"cpu": "lots"}}, "expected a size such as 20GiB for cpu, got lots"),
        (
            {"device_map": "auto", "max_memory": {"cpu": "20KB"}, "offload_folder": __file__},
            "folder with room.*test_pl",
        ),
    ],
)
def test_placements_that_cannot_be_are_refused(spread: dict[str, Any], teacher: dict[str, Any], message: str) -> None:
    spread["teacher"] = whole(spread)["teacher"] | teacher
    with pytest.raises(PotstillError, match=message):
        build_run(Recipe.parse(spread))


@pytest.mark.parametrize("name", ["model", "model.layers.0", "model.layers.0.mlp.up_proj"])
def test_parts_have_the_device_of_the_innermost_named_module(spread: dict[str, Any], name: str) -> None:
    places = {"": "cpu", name: "disk", "model.embed_tokens": "cpu"}
    spread["teacher"] = whole(spread)["teacher"] | {"device_map": places}
    model: Any = load_model(spread["teacher"]["model"], "teacher.model", placement={"device_map": places})
    on_disk = {weight for weight, value in model.named_parameters() if value.is_meta}
    assert on_disk == {w for w, _ in model.named_parameters() if w.startswith(name) and "embed_tokens" not in w}
    (note,) = [note for note in loading_notes(model) if "weights by device" in note]
    sizes = {place: sum(x.nbytes for w, x in model.named_parameters() if (w in on_disk) == (place == "disk"))
             for place in ("cpu", "disk")}  # fmt: skip
    assert all(f"{size / 1e9:.3g} GB on {place}" in note for place, size in sizes.items())


def test_weights_that_no_device_can_hold_are_refused_before_they_are_read(
    toys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = str(toys / "teacher")
    size = sum(weight.nbytes for weight in load_model(name, "teacher.model").parameters())
    monkeypatch.setattr(placement, "device_bytes", lambda device: size - 1)
    with pytest.raises(
        ModelError, match=rf"t.model: expected weights that fit into .* got {size / 1e9:.3g} GB.*--stream"
    ):
        load_model(name, "t.model")
    for places, key in (
        ({"device_map": {"": "cpu"}}, "device_map"),
        ({"device_map": "auto", "max_memory": {"cpu": "1GB"}}, "max_memory"),
    ):
        with pytest.raises(ModelError, match=rf"t.{key}: expected weights that fit into the .* GB of cpu, got"):
            load_model(name, "t.model", placement=places)
    load_model(name, "t.model", placement={"device_map": {"": "cpu", "model.layers": "disk"}})


@pytest.fixture
def experts(tmp_path: Path) -> list[Path]:
    """Two teachers whose files have experts one by one, and the model all of a layer in one tensor."""
    folders = [tmp_path / str(seed) for seed in range(2)]
    for seed, folder in enumerate(folders):
        families.model("qwen3_moe", vocab_size=300, seed=seed).save_pretrained(folder)
        make_tokenizer().save_pretrained(folder)
    return folders


def test_teachers_with_one_offload_folder_do_not_read_each_others_weights(experts: list[Path], tmp_path: Path) -> None:
    places = {"device_map": {"": "cpu", "model.layers": "disk"}, "offload_folder": str(tmp_path / "offload")}
    batch = make_batch()
    alignment = causal_alignment(batch["labels"])
    teachers = [ModelSource(str(folder), **places).load(None).teacher for folder in experts]
    for teacher, folder in zip(teachers, experts, strict=True):
        expected = ModelSource(str(folder)).load(None).teacher(batch, alignment).targets.dense()
        torch.testing.assert_close(teacher(batch, alignment).targets.dense(), expected)
    assert len([*(tmp_path / "offload").iterdir()]) == 2
    del teacher, teachers
    gc.collect()
    assert not [*(tmp_path / "offload").iterdir()]


@pytest.mark.parametrize("design", [{"num_experts": 2}, {"model_type": "qwen3"}], ids=["fewer experts", "dense"])
def test_experts_on_the_disk_start_students(
    experts: list[Path], tmp_path: Path, recipe_values: dict[str, Any], design: dict[str, Any]
) -> None:
    places = {"device_map": {"": "cpu", "model.layers": "disk"}, "offload_folder": str(tmp_path / "offload")}
    recipe_values["student"] = {"design": design, "initialize": {"method": "prune", "fit": False}}
    students = []
    for placed in ({}, places):
        values = recipe_values | {"teacher": {"model": str(experts[0])} | placed}
        students.append(build_run(Recipe.parse(values)).new_student().state_dict())
    assert all(torch.equal(value, students[1][name]) for name, value in students[0].items())


def test_terms_over_layers_read_those_on_the_disk(experts: list[Path], tmp_path: Path) -> None:
    places = {"device_map": {"": "cpu", "model.layers": "disk"}, "offload_folder": str(tmp_path / "offload")}
    logs = []
    for placed in ({}, places):
        teacher = ModelSource(str(experts[0]), **placed).load(None).teacher
        terms = [Logits(ForwardKL()), Hidden(), Attention(), Relations(heads=2), RouterMatch()]
        student = families.model("qwen3_moe", vocab_size=300, seed=2)
        logs.append(Distiller(student, teacher, terms).step(make_batch()).logs)
    assert len(logs[0]) > 4
    assert {n: float(x) for n, x in logs[1].items()} == pytest.approx({n: float(x) for n, x in logs[0].items()})


def test_a_missing_or_full_offload_folder_is_one_line(
    experts: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places: dict[str, Any] = {"device_map": {"": "cpu", "model.layers": "disk"}}
    with pytest.raises(ModelError, match=r"t\.offload_folder: expected a folder .* got none\. Set it"):
        load_model(str(experts[0]), "t.model", placement=places)

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("transformers.integrations.accelerate.save_file", fail)
    with pytest.raises(ModelError, match=r"t\.offload_folder: expected .* with room .*No space left.* Choose another"):
        load_model(str(experts[0]), "t.model", placement=places | {"offload_folder": str(tmp_path / "offload")})
    (experts[1] / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"t\.model: expected a causal language model"):
        load_model(str(experts[1]), "t.model", placement=places | {"offload_folder": str(tmp_path / "offload")})
    assert not [*(tmp_path / "offload").iterdir()]


def test_the_recipe_stays_as_it_was_and_its_tokens_too(spread: dict[str, Any], tmp_path: Path) -> None:
    spread["teacher"] = {"model": spread["teacher"]["model"], "device_map": "auto", "max_memory": {"cpu": "1GB"}}
    recipe = Recipe.parse(spread)
    build_run(recipe)
    assert recipe == Recipe.parse(spread)
    spread["teacher"] |= {"device_map": ON_DISK, "offload_folder": str(tmp_path / "offload"), "max_memory": None}
    spread["student"]["vocabulary"] = {"keep": 290}
    with pytest.raises(PotstillError, match=r"student\.vocabulary: expected a teacher on one device"):
        build_run(Recipe.parse(spread))


def test_check_reports_where_a_teacher_fits(recipe_values: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    built = build_run(Recipe.parse(recipe_values))
    model: Any = built.loaded.model
    layers, memory = layer_bytes(model), resident_bytes(model) + 1000
    assert sum(layers) == sum(p.numel() * 4 for name, p in model.named_parameters() if ".layers." in name)
    for room, message in (
        (memory, "a copy on each process fits into"),
        (memory - 1, "; teacher.shard fits, on 3 processes or more"),
        (memory - sum(layers) + max(layers), "; teacher.device_map: auto fits, or a cache"),
        (1000, ", and the student with its batch does not fit either: make them smaller"),
    ):
        monkeypatch.setattr(checks, "device_bytes", lambda device, room=room: room)
        assert message in (checks._placement(built, memory) or "")
