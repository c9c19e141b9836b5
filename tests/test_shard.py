"""A teacher whose layers are sharded over processes teaches like a copy on each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import PartialState
from torch.distributed.tensor import DTensor

from potstill.errors import PotstillError
from potstill.losses.alignment import causal_alignment
from potstill.losses.targets import HeadTargets
from potstill.models.placement import is_sharded
from potstill.runs.build import build_run
from potstill.runs.config.run import Recipe
from potstill.teachers.model import ModelSource
from processes import two_ranks
from test_scale import _run, in_one, same_losses, same_students, values, written

__all__ = ["values"]  # the fixture


def _targets(folder: str) -> None:
    """On one rank: the same targets as a whole teacher, a head in one piece, and half of each layer."""
    PartialState(cpu=True)
    source = ModelSource(folder, shard=True)
    loaded = source.load(None)
    model, whole = loaded.models["teacher"], ModelSource(folder).load(None)
    assert loaded.model is None and is_sharded(model) and not is_sharded(whole.models["teacher"])
    ids = torch.arange(1, 25).view(2, 12)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    targets = [teacher(batch, causal_alignment(ids)).targets for teacher in (loaded.teacher, whole.teacher)]
    assert isinstance(targets[0], HeadTargets)
    torch.testing.assert_close(*(of.dense() for of in targets))
    layers = [weight for name, weight in model.named_parameters() if ".layers." in name]
    assert all(isinstance(weight, DTensor) for weight in layers)  # gathered no longer
    local = sum(weight.to_local().numel() for weight in layers)  # type: ignore[attr-defined]
    assert local == sum(weight.numel() for weight in layers) // 2


def test_each_process_has_its_share(toys: Path, tmp_path: Path) -> None:
    two_ranks(tmp_path, _targets, str(toys / "teacher"))


def test_a_run_with_shares_is_one_with_copies(values: dict[str, Any], tmp_path: Path) -> None:
    sharded = values | {"teacher": {**values["teacher"], "shard": True}}
    sharded["objective"] = values["objective"] = [*values["objective"], {"term": "hidden"}]
    two = tmp_path / "two"
    two_ranks(tmp_path, _run, str(written(sharded, two, ranks=2)))
    one = in_one(values, tmp_path / "one")
    same_losses(one, two)
    same_students(one, two)


def test_one_process_has_all_of_it(values: dict[str, Any]) -> None:
    values["teacher"]["shard"] = True
    built = build_run(Recipe.parse(values))
    assert built.loaded.model is not None and not is_sharded(built.loaded.model)


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        ({"dtype": "int4"}, "expected shard with a dtype in full precision, got int4"),
        ({"device_map": "auto"}, "expected shard without device_map, got both"),
        ({"device": "cpu"}, "expected shard without device, got both"),
        ({"prefetch": True}, "expected shard without prefetch, got both"),
        ({"cache": "somewhere"}, "expected shard with model alone, got it with cache"),
    ],
)
def test_what_is_not_sharded_is_one_line(values: dict[str, Any], teacher: dict[str, Any], message: str) -> None:
    values["teacher"] |= {"shard": True, **teacher}
    with pytest.raises(PotstillError, match=message):
        Recipe.parse(values)


def test_samples_are_not_guided_by_a_share(values: dict[str, Any]) -> None:
    values["teacher"]["shard"] = True
    values["rollout"] = {"on_policy_fraction": 0.5, "teacher_mix": 0.2}
    with pytest.raises(PotstillError, match=r"a teacher that is a local model for teacher_mix .* without shard"):
        Recipe.parse(values)
