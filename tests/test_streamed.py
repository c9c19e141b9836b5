"""A cache whose teacher ran one layer at a time is, byte for byte, that of a teacher in memory."""

from __future__ import annotations

import shutil
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

import families
from conftest import make_batch, make_tokenizer, mostly_slow
from potstill.data.sources import Source
from potstill.errors import ModelError, PotstillError, UserError
from potstill.evaluate.formatting import size
from potstill.losses.alignment import causal_alignment
from potstill.models.loading import load_model
from potstill.models.parts import ModelParts
from potstill.runs import cache as caching
from potstill.runs.cache import CacheRequest, build
from potstill.teachers.cache.build import CacheBuilder
from potstill.teachers.model import ModelSource, ModelTeacher
from potstill.teachers.streamed import StreamedTeacher
from test_cache import CODECS, files, request

QUIET = Console(quiet=True)


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caching, "SHARD_TOKENS", 900)


def save(folder: Path, family: str, dtype: torch.dtype = torch.bfloat16, **fields: Any) -> Path:
    """A small model of a family with the toys' tokenizer, in several files."""
    model = families.model(family, vocab_size=300, num_hidden_layers=3, **fields).to(dtype)
    model.save_pretrained(folder / family, max_shard_size="20KB")
    make_tokenizer().save_pretrained(folder / family)
    return folder / family


def both(toys: Path, folder: Path, teacher: Path, codec: str = "top_k", **changes: Any) -> list[dict[str, bytes]]:
    """The files of the ordinary cache and of the streamed one."""
    dtype = changes.pop("dtype", "bfloat16")
    values = {
        "teacher": ModelSource(str(teacher), dtype),
        "sources": [Source(str(toys / "train.jsonl"))],
        "max_length": 32,
        "packing": False,
        "codec": codec,
        "parameters": CODECS[codec],
        "batch_rows": 4,
    } | changes
    for name, stream in (("ordinary", False), ("streamed", True)):
        assert build(CacheRequest(**values, out=folder / name, stream=stream), console=QUIET) is not None
    return [files(folder / name) for name in ("ordinary", "streamed")]


FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "gemma3_text": {
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "sliding_window": 8,
    },
    "qwen3": {"tie_word_embeddings": True, "layer_types": ["full_attention"] * 3},
    "mixtral": {},
    "qwen3_moe": {},
    "gpt2": {},
}


@pytest.mark.parametrize("family", mostly_slow(FAMILIES, "llama", "gemma3_text", "qwen3_moe"))
def test_a_streamed_cache_is_the_ordinary_one(toys: Path, tmp_path: Path, family: str) -> None:
    ordinary, streamed = both(toys, tmp_path, save(tmp_path, family, **FAMILIES[family]))
    assert sum(name.endswith(".arrow") for name in ordinary) > 1
    assert streamed == ordinary


@pytest.mark.parametrize(
    "changes",
    [
        {"codec": "sampled", "packing": True, "dtype": "float32"},
        {"codec": "hidden", "layers": [0, -1, "embeddings", "last_hidden_state"]},
        {"codec": "dense", "layers": [-2]},
    ],
    ids=["packed, float32", "hidden", "layers"],
)
def test_every_kind_of_signal(toys: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    ordinary, streamed = both(toys, tmp_path, save(tmp_path, "llama", tie_word_embeddings=True), **changes)
    assert streamed == ordinary


def streamed_request(toys: Path, out: Path, **changes: Any) -> CacheRequest:
    return request(toys, out, **{"stream": True, "batch_rows": 4} | changes)


def test_a_build_that_was_interrupted_goes_on_at_a_layer_or_a_shard(
    toys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert build(request(toys, tmp_path / "ordinary"), console=QUIET) is not None
    out, loaded = tmp_path / "streamed", list[Any]()
    load = ModelParts.load

    def count(self: ModelParts, part: Any) -> None:
        loaded.append(part)
        load(self, part)

    monkeypatch.setattr(ModelParts, "load", count)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(StreamedTeacher, "_compute", interrupted(StreamedTeacher._compute, after=1))
        build(streamed_request(toys, out), console=QUIET)
    (activations,) = out.glob("activations-*")
    assert [path.name for path in activations.iterdir()] == ["0"]
    (activations / "1.half.partial").mkdir()  # as a kill leaves it
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(CacheBuilder, "build", interrupted(CacheBuilder.build, after=1))
        loaded.clear()
        build(streamed_request(toys, out), console=QUIET)
    assert loaded.count(0) == 2 and loaded.count(1) == 2  # for the probe and the checksum; and the checksum, and to run
    loaded.clear()
    build(streamed_request(toys, out), console=QUIET)
    assert loaded.count(1) == 1
    assert files(out) == files(tmp_path / "ordinary")


def interrupted(method: Any, after: int) -> Any:
    """A method that is interrupted when it is called once more."""
    calls: list[None] = []

    def call(*args: Any) -> Any:
        if len(calls) == after:
            raise KeyboardInterrupt
        calls.append(None)
        return method(*args)

    return call


def test_parts_and_an_ordinary_build_meet_in_one_cache(toys: Path, tmp_path: Path) -> None:
    out = tmp_path / "parts"
    assert build(streamed_request(toys, out), part=(0, 2), console=QUIET) is None
    assert build(request(toys, out), part=(1, 2), console=QUIET) is not None
    assert build(request(toys, tmp_path / "ordinary"), console=QUIET) is not None
    assert files(out) == files(tmp_path / "ordinary")


def test_a_build_reports_what_it_reads_and_keeps(toys: Path, tmp_path: Path) -> None:
    console = Console(record=True, file=StringIO(), width=200)
    build(streamed_request(toys, tmp_path / "cache"), console=console)
    model = load_model(str(toys / "teacher"), "teacher")
    weights = sum(value.nbytes for value in model.state_dict().values())
    ends_and_layer = [model.model.embed_tokens, model.lm_head, model.model.layers[0]]
    probed = sum(value.nbytes for module in ends_and_layer for value in module.state_dict().values())
    text = console.export_text()
    assert f"reads {size(weights)} of weights once more, and keeps up to" in text
    read = 2 * weights + probed - model.model.norm.weight.nbytes  # the norm stays
    assert f"read {size(read)} of weights in all, with their checksum" in text


def test_a_build_reports_the_devices_of_a_spread_teacher(toys: Path, tmp_path: Path) -> None:
    console = Console(record=True, file=StringIO(), width=200)
    teacher = ModelSource(str(toys / "teacher"), device_map={"": "cpu", "model.layers.1": "disk"})
    build(request(toys, tmp_path / "cache", teacher=teacher), console=console)
    assert "teacher.model: weights by device: " in console.export_text()
    build(request(toys, tmp_path / "ordinary"), console=QUIET)
    assert files(tmp_path / "cache") == files(tmp_path / "ordinary")


def test_a_full_disk_is_refused_before_it_begins(toys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(UserError, match=r"of disk for the activations of all rows, got 1.0 kB"):
        build(streamed_request(toys, tmp_path / "cache"), console=QUIET)


@pytest.mark.parametrize("family", ["bloom", "gemma4_text", "zamba2"])
def test_layers_that_cannot_run_alone_are_refused(toys: Path, tmp_path: Path, family: str) -> None:
    families.model(family, vocab_size=300).save_pretrained(tmp_path / family)
    make_tokenizer().save_pretrained(tmp_path / family)
    teacher = ModelSource(str(tmp_path / family))
    with pytest.raises(ModelError, match=r"whose layers can run one by one .*teacher\.offload_folder\.$"):
        build(streamed_request(toys, tmp_path / "cache", teacher=teacher), console=QUIET)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "int8"}, "in float32, bfloat16 or float16 with --stream, got int8"),
        ({"device_map": "auto"}, "with --stream, got device_map"),
    ],
)
def test_quantized_and_spread_teachers_are_refused(
    toys: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    teacher = ModelSource(str(toys / "teacher"), **changes)
    with pytest.raises(UserError, match=message):
        build(streamed_request(toys, tmp_path / "cache", teacher=teacher), console=QUIET)


def test_attention_maps_and_ray_are_refused(toys: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="expected no attention maps with --stream"):
        build(streamed_request(toys, tmp_path / "cache", attentions=[-1]), console=QUIET)
    with pytest.raises(UserError, match="expected --engine process with --stream, got ray"):
        build(streamed_request(toys, tmp_path / "cache"), engine="ray", console=QUIET)


def test_wrong_weights_are_refused(toys: Path, tmp_path: Path) -> None:
    save(tmp_path, "llama")
    (broken,) = sorted((tmp_path / "llama").glob("*.safetensors"))[:1]
    weights = load_file(broken)
    name = next(iter(weights))
    for value, message in (
        (torch.full_like(weights[name], torch.nan), "NaN or infinity in"),
        (None, "without weights"),
    ):
        state = {key: x for key, x in weights.items() if key != name} | ({} if value is None else {name: value})
        save_file(state, broken, {"format": "pt"})
        with pytest.raises(ModelError, match=message):
            build(
                streamed_request(toys, tmp_path / "cache", teacher=ModelSource(str(tmp_path / "llama"))), console=QUIET
            )


@pytest.mark.slow
@pytest.mark.parametrize("family", families.walked("causal"))
def test_every_family_is_refused_or_equal(tmp_path: Path, family: str) -> None:
    families.model(family).save_pretrained(tmp_path / "model")
    try:
        live = ModelTeacher(load_model(str(tmp_path / "model"), "teacher.model", "float32"))
        streamed = StreamedTeacher(ModelParts(str(tmp_path / "model"), "teacher.model", "float32", torch.device("cpu")))
    except PotstillError:
        return
    batches = [make_batch(3, 14, 120, seed) for seed in range(2)]
    assert len(list(streamed.precompute(lambda: batches, tmp_path / "activations"))) == len(streamed.parts.layers)
    for batch in batches:
        alignment = causal_alignment(batch["labels"])
        targets = [teacher(batch, alignment).targets for teacher in (live, streamed)]
        assert type(targets[0]) is type(targets[1])
        assert torch.equal(*(x.dense() for x in targets))
