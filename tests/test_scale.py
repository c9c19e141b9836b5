"""`potstill run` in two processes: what one process does, whole students, and the same again after a kill."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from potstill.cli import main
from potstill.errors import UserError
from potstill.runs import run as pipeline
from potstill.runs import steps
from potstill.runs.config.run import Recipe
from potstill.teachers.self_taught import EMATeacher
from potstill.teachers.teacher import Teacher
from potstill.train.arguments import DistillationConfig, check_sharding
from potstill.train.callbacks import MetricsFile
from processes import potstill, shard_on_cpu, two_ranks

FSDP = {"fsdp": True, "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}}


@pytest.fixture
def values(recipe_values: dict[str, Any]) -> dict[str, Any]:
    """Eight rows a step, of two ranks or of one."""
    recipe_values["student"] = {"design": {"hidden_size": 8, "num_hidden_layers": 2}}
    recipe_values["train"] |= {"per_device_train_batch_size": 8}
    recipe_values["evaluate"] = {"baseline": False, "continuations": 0}
    return recipe_values


def written(values: dict[str, Any], folder: Path, *, ranks: int, **train: Any) -> Path:
    """The recipe's file for so many ranks, whose run goes to the folder."""
    rows = values["train"]["per_device_train_batch_size"] // ranks
    recipe = values | {"output": str(folder), "train": values["train"] | train | {"per_device_train_batch_size": rows}}
    folder.parent.mkdir(parents=True, exist_ok=True)
    path = folder.parent / f"{folder.name}.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def _run(recipe: str, *more: str, kill_at: int | None = None) -> None:
    """The command, on one rank."""
    if "fsdp" in Path(recipe).read_text():
        shard_on_cpu()
    if kill_at is not None:
        steps.MetricsFile = type("Killing", (_Killing,), {"at": kill_at})
    sys.argv = ["potstill", "run", recipe, *more]
    try:
        main()
    except SystemExit as stop:
        if stop.code:
            raise


def _killed(recipe: str, at: int) -> None:
    _run(recipe, kill_at=at)


class _Killing(MetricsFile):
    at = 0

    def on_log(self, args: Any, state: Any, control: Any, **named: Any) -> None:
        super().on_log(args, state, control, **named)
        if state.global_step == self.at:
            os.kill(os.getpid(), signal.SIGKILL)


def losses(folder: Path) -> list[tuple[int, str, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], name, line[name]) for line in lines for name in ("loss", "eval_loss") if name in line]


def same_losses(one: Path, other: Path, rel: float = 1e-5) -> None:
    expected, actual = losses(one), losses(other)
    assert [line[:2] for line in expected] == [line[:2] for line in actual]
    assert [line[2] for line in expected] == pytest.approx([line[2] for line in actual], rel=rel)


def same_students(one: Path, other: Path) -> None:
    expected, actual = (load_file(folder / "student" / "model.safetensors") for folder in (one, other))
    assert expected.keys() == actual.keys()
    for name in expected:
        torch.testing.assert_close(expected[name], actual[name], rtol=1e-4, atol=1e-5)


def in_one(values: dict[str, Any], folder: Path) -> Path:
    pipeline.run(Recipe.load(written(values, folder, ranks=1)))
    return folder


@pytest.mark.parametrize("way", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_two_processes_do_what_one_does(values: dict[str, Any], tmp_path: Path, way: str) -> None:
    two = tmp_path / "two"
    recipe = written(values, two, ranks=2, **(FSDP if way == "fsdp" else {}))
    two_ranks(tmp_path, _run, str(recipe))
    one = in_one(values, tmp_path / "one")
    same_losses(one, two)
    same_students(one, two)
    model = AutoModelForCausalLM.from_pretrained(two / "student")
    assert all(torch.isfinite(weight).all() for weight in model.parameters())
    rows = [json.loads((run / "summary.json").read_text())["rows"]["student"] for run in (one, two)]
    assert rows[1]["loss"] == pytest.approx(rows[0]["loss"], rel=1e-5)
    printed = [(tmp_path / f"rank-{rank}").read_text() for rank in range(2)]
    assert ["Held-out loss" in text for text in printed] == [True, False]


@pytest.mark.slow
@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_killed_processes_go_on_to_the_same_student(values: dict[str, Any], tmp_path: Path, way: str) -> None:
    sharding = FSDP if way == "fsdp" else {}
    whole, killed = (written(values, tmp_path / name, ranks=2, save_steps=2, **sharding) for name in ("a", "b"))
    two_ranks(tmp_path, _run, str(whole))
    two_ranks(tmp_path, _killed, str(killed), 5, status=-signal.SIGKILL)
    assert not (tmp_path / "b" / "student").exists()
    two_ranks(tmp_path, _run, str(killed), "--resume")
    same_losses(tmp_path / "a", tmp_path / "b", rel=1e-6)
    same_students(tmp_path / "a", tmp_path / "b")


OTHERS: dict[str, dict[str, Any]] = {
    "an ensemble": {"teacher": {"ensemble": [{"model": "TEACHER"}, {"model": "TEACHER"}], "weights": "learned"}},
    "the student's average": {"teacher": {"ema": {"decay": 0.5}}, "student": {"model": "STUDENT"}},
    "hidden states": {"objective": [{"term": "logits"}, {"term": "hidden"}]},
    "layers alone": {"objective": [{"term": "hidden"}]},
    "a cache": {"teacher": {"cache": "CACHE"}},
    "prefetch": {"teacher": {"model": "TEACHER", "prefetch": True}},
    "an adapter": {"student": {"model": "STUDENT", "adapter": {"kind": "lora", "rank": 4}}},
}
REFUSED = {"the student's average"}  # by FSDP


@pytest.mark.slow
@pytest.mark.parametrize("way", ["ddp", "fsdp"])
@pytest.mark.parametrize("name", OTHERS)
def test_other_keys_of_a_recipe_work_on_two_processes(
    values: dict[str, Any], toys: Path, tmp_path: Path, name: str, way: str
) -> None:
    places = {"TEACHER": toys / "teacher", "STUDENT": toys / "student", "CACHE": tmp_path / "cache"}
    text = json.dumps(values | OTHERS[name])
    for word, path in places.items():
        text = text.replace(f'"{word}"', json.dumps(str(path)))
    values = json.loads(text)
    two = tmp_path / "two"
    if name == "a cache":
        build = ["cache", "build", "--teacher", str(toys / "teacher"), "--data", values["data"]["train"]["path"]]
        build += ["--max-length", "32", "--packing", "--codec", "top_k", "--out", str(places["CACHE"])]
        built = potstill(*build, printed=tmp_path / "printed")
        built.join()
        assert built.exitcode == 0, (tmp_path / "printed").read_text()
    recipe = written(values, two, ranks=2, **(FSDP if way == "fsdp" else {}))
    if way == "fsdp" and name in REFUSED:
        with pytest.raises(AssertionError, match="expected a full student on every rank"):
            two_ranks(tmp_path, _run, str(recipe))
        return
    two_ranks(tmp_path, _run, str(recipe))
    same_losses(in_one(values, tmp_path / "one"), two)


def test_fsdp_that_would_not_shard_is_refused(tmp_path: Path) -> None:
    for refused in (
        lambda: DistillationConfig(output_dir=str(tmp_path), fsdp=True),  # one process; below, several on a CPU
        lambda: check_sharding(
            fsdp=False, zero=None, fsdp_requested=True, teacher=None, rollout=False
        ),  # several, on a CPU
    ):
        with pytest.raises(UserError, match=r"train.fsdp: expected several processes with an accelerator each"):
            refused()


GATHERED = {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True}


@pytest.mark.parametrize(
    ("fsdp", "zero", "teacher", "message"),
    [
        (False, {"stage": 3}, None, "expected stage3_gather_16bit_weights_on_model_save: true"),
        (False, GATHERED, EMATeacher(), "got one that ZeRO-3 shards"),
        (True, None, EMATeacher(), "got one that FSDP shards"),
        (False, GATHERED, None, None),
        (False, {"stage": 2}, EMATeacher(), None),
        (False, None, EMATeacher(), None),
    ],
)
def test_what_sharding_rules_out(
    fsdp: bool, zero: dict[str, Any] | None, teacher: Teacher | None, message: str | None
) -> None:
    def check() -> None:
        check_sharding(fsdp=fsdp, zero=zero, fsdp_requested=False, teacher=teacher, rollout=False)

    if message is None:
        check()
    else:
        with pytest.raises(UserError, match=message):
            check()
