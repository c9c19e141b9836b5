"""A cache on disk: the same as the live teacher, the same bytes however it was built, and never silently wrong."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from rich.console import Console
from transformers import AutoModelForCausalLM

import processes
from conftest import make_llama, make_tokenizer
from potstill.data.batches import PaddingCollator, encode
from potstill.data.sources import Source
from potstill.errors import DataError, ShapeError
from potstill.losses.alignment import causal_alignment
from potstill.losses.divergences import JSD, ForwardKL, SoftCrossEntropy
from potstill.losses.token_losses import token_divergence
from potstill.runs import cache as caching
from potstill.runs.cache import CacheRequest, build
from potstill.teachers.cache.store import Cache, read_manifest
from potstill.teachers.cached import CachedTeacher
from potstill.teachers.model import ModelSource, ModelTeacher

QUIET = Console(quiet=True)
CODECS: dict[str, dict[str, Any]] = {"sampled": {"draws": 50}, "top_k": {"k": 16}, "dense": {}, "hidden": {}}


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caching, "SHARD_TOKENS", 300)


def request(toys: Path, out: Path, codec: str = "sampled", **changes: Any) -> CacheRequest:
    values = {
        "teacher": ModelSource(model=str(toys / "teacher")),
        "sources": [Source(str(toys / "train.jsonl"))],
        "max_length": 32,
        "packing": False,
        "codec": codec,
        "parameters": CODECS[codec],
        "out": out,
        "batch_rows": 4,
    }
    return CacheRequest(**values | changes)


def files(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def caches(toys: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of each codec."""
    folder = tmp_path_factory.mktemp("caches")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(caching, "SHARD_TOKENS", 300)
        for codec in CODECS:
            assert build(request(toys, folder / codec, codec), console=QUIET) is not None
    return folder


@pytest.fixture(scope="module")
def rows(toys: Path, tokenizer: Any) -> Dataset:
    return encode(Source(str(toys / "train.jsonl")), tokenizer, max_length=32).dataset


def batch_of(rows: Dataset, numbers: list[int]) -> dict[str, torch.Tensor]:
    return PaddingCollator(1)([rows[number] for number in numbers])


def both(toys: Path, directory: Path, rows: Dataset, numbers: list[int]):
    """The targets of the live teacher and of the cache for a batch."""
    batch = batch_of(rows, numbers)
    alignment = causal_alignment(batch["labels"])
    live = ModelTeacher(AutoModelForCausalLM.from_pretrained(toys / "teacher"))(batch, alignment)
    return alignment, live, CachedTeacher(directory)(batch, alignment)


@pytest.mark.parametrize("codec", CODECS)
def test_a_cache_has_the_teachers_targets_in_any_order_and_batch(
    toys: Path, caches: Path, rows: Dataset, codec: str
) -> None:
    numbers = random.Random(1).sample(range(len(rows)), 9)
    alignment, live, cached = both(toys, caches / codec, rows, numbers)
    student = torch.randn(len(alignment), 300)
    divergence = ForwardKL() if codec == "top_k" else SoftCrossEntropy()
    true, found = (token_divergence(student, each.targets, divergence).double() for each in (live, cached))
    if codec == "top_k":  # tokens within the bucket are not distinguished
        assert ((found > 0) & (found < true + 1e-3)).all()
    elif codec == "sampled":
        assert found.mean() == pytest.approx(float(true.mean()), rel=0.02)
    else:
        torch.testing.assert_close(found, true, atol=2e-3, rtol=1e-3)
    expected = live.targets.dense().log_softmax(-1).gather(-1, alignment.labels[:, None]).squeeze(-1)
    torch.testing.assert_close(cached.label_log_probs, expected, atol=1e-2, rtol=1e-3)


def test_hidden_states_train_like_the_live_teacher(toys: Path, caches: Path, rows: Dataset) -> None:
    alignment, live, cached = both(toys, caches / "hidden", rows, [0, 1, 2, 3])
    student = torch.randn(len(alignment), 300)
    for temperature in (1.0, 3.0):
        a, b = (token_divergence(student, s.targets, JSD(0.3), temperature=temperature) for s in (live, cached))
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_a_batch_with_padding_on_the_left_finds_its_rows(toys: Path, caches: Path, rows: Dataset) -> None:
    teacher = CachedTeacher(caches / "dense")
    right = batch_of(rows, [0, 5])
    short = int(right["attention_mask"][1].sum())
    missing = right["input_ids"].shape[1] - short
    if missing <= 0:
        right = batch_of(rows, [5, 0])
    left = {name: value.clone() for name, value in right.items()}
    for row in range(2):
        shift = int((right["attention_mask"][row] == 0).sum())
        for value in left.values():
            value[row] = value[row].roll(shift)
    targets = [teacher(each, causal_alignment(each["labels"])).targets.dense() for each in (right, left)]
    assert torch.equal(*targets)


def test_the_same_bytes_after_kills_in_parts_and_at_once(toys: Path, tmp_path: Path, caches: Path) -> None:
    whole = files(caches / "sampled")
    assert sum(name.endswith(".arrow") for name in whole) >= 3

    parts = tmp_path / "parts"
    assert build(request(toys, parts), part=(1, 2), console=QUIET) is None
    assert build(request(toys, parts), part=(0, 2), console=QUIET) is not None
    assert files(parts) == whole

    torn = tmp_path / "torn"
    torn_request = request(toys, torn)
    capture = caching.prepare(torn_request, QUIET)
    capture.begin()
    capture.build(1)
    (torn / "shards" / "00000.arrow").write_bytes(b"half")  # without a checksum beside it
    (torn / "shards" / "00001.json").write_text("{")
    build(torn_request, console=QUIET)
    assert files(torn) == whole

    assert build(torn_request, console=QUIET) == read_manifest(torn)  # nothing to do
    assert files(torn) == whole


def _build_and_wait(toys: Path, out: Path) -> None:
    """Build a part, print that, and go no further."""
    caching.SHARD_TOKENS = 300
    build_part = caching.CacheBuilder.build

    def wait(self: caching.CacheBuilder, number: int) -> None:
        build_part(self, number)
        print("built", number, flush=True)
        time.sleep(30)

    caching.CacheBuilder.build = wait  # type: ignore[method-assign, assignment]
    build(request(toys, out), console=QUIET)


def test_a_build_that_is_killed_goes_on(toys: Path, tmp_path: Path, caches: Path) -> None:
    out, printed = tmp_path / "killed", tmp_path / "printed"
    process = processes.start(printed, _build_and_wait, toys, out)
    deadline = time.monotonic() + 120
    while not (printed.exists() and "built 0" in printed.read_text()) and process.is_alive():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    assert processes.finish(process) == -signal.SIGKILL
    with pytest.raises(DataError, match="got one that is being built"):
        CachedTeacher(out)
    began = (out / "shards" / "00000.arrow").stat().st_mtime_ns
    build(request(toys, out), console=QUIET)
    assert (out / "shards" / "00000.arrow").stat().st_mtime_ns == began
    assert files(out) == files(caches / "sampled")


def test_a_full_disk_leaves_what_is_whole(toys: Path, tmp_path: Path, caches: Path, monkeypatch) -> None:
    written = caching.CacheBuilder.build

    def full(self: caching.CacheBuilder, number: int) -> Any:
        if number == 1:
            raise OSError(28, "No space left on device")
        return written(self, number)

    monkeypatch.setattr(caching.CacheBuilder, "build", full)
    with pytest.raises(OSError, match="No space left"):
        build(request(toys, tmp_path / "full"), console=QUIET)
    assert not [name for name in files(tmp_path / "full") if name.endswith(".partial")]
    monkeypatch.undo()
    monkeypatch.setattr(caching, "SHARD_TOKENS", 300)
    build(request(toys, tmp_path / "full"), console=QUIET)
    assert files(tmp_path / "full") == files(caches / "sampled")


@pytest.mark.parametrize("codec", ["sampled", "hidden"])
def test_no_flipped_byte_goes_unnoticed(caches: Path, tmp_path: Path, codec: str) -> None:
    directory = tmp_path / "flipped"
    shutil.copytree(caches / codec, directory)
    chosen = random.Random(0)
    for path in [path for path in sorted(directory.rglob("*")) if path.is_file()]:
        good = path.read_bytes()
        places = {0, len(good) - 1, *(chosen.randrange(len(good)) for _ in range(12))}
        for place in places:
            bad = bytearray(good)
            bad[place] ^= 1 << chosen.randrange(8)
            path.write_bytes(bad)
            with pytest.raises(DataError, match="cache: expected"):
                CachedTeacher(directory)
        path.write_bytes(good[:-1])
        with pytest.raises(DataError, match="cache: expected"):
            CachedTeacher(directory)
        path.unlink()
        with pytest.raises(DataError, match="cache: expected"):
            CachedTeacher(directory)
        path.write_bytes(good)
    CachedTeacher(directory)


def test_a_later_version_is_told_apart_from_damage(caches: Path, tmp_path: Path) -> None:
    directory = tmp_path / "future"
    shutil.copytree(caches / "sampled", directory)
    body = json.loads((directory / "manifest.json").read_text())
    body["plan"]["format"] = 3
    (directory / "manifest.json").write_text(json.dumps(body))
    with pytest.raises(DataError, match=r"expected format 2 .* got 3\. Another version of potstill wrote it"):
        CachedTeacher(directory)


def test_a_folder_without_a_cache_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"got no manifest.json there\. Check the path"):
        CachedTeacher(tmp_path)


def test_data_that_changed_is_refused(caches: Path, rows: Dataset) -> None:
    teacher = CachedTeacher(caches / "sampled")
    teacher.require(rows)
    teacher.require(rows.shuffle(seed=1).select(range(7)))
    changed = [dict(rows[i]) for i in range(4)]
    changed[2] = changed[2] | {"input_ids": [*changed[2]["input_ids"][:-1], 7]}
    unmasked = [rows[0] | {"labels": [-100, -100, -100, *rows[0]["labels"][3:]]}]
    for other in (changed, unmasked):
        with pytest.raises(DataError, match="a cache that holds every row"):
            teacher.require(other)
        batch = PaddingCollator(1)(other)
        with pytest.raises(DataError, match="a cache that holds every row"):
            teacher(batch, causal_alignment(batch["labels"]))


def test_a_sample_serves_its_temperature_and_linear_divergences_only(toys: Path, caches: Path, rows: Dataset) -> None:
    alignment, _, cached = both(toys, caches / "sampled", rows, [0])
    student = torch.randn(len(alignment), 300)
    with pytest.raises(ShapeError, match="a sample is biased"):
        token_divergence(student, cached.targets, JSD(0.5))
    with pytest.raises(ShapeError, match="expected the temperature 1 of the"):
        token_divergence(student, cached.targets, ForwardKL(), temperature=2.0)


def test_another_plan_is_refused(toys: Path, caches: Path, tmp_path: Path) -> None:
    shutil.copytree(caches / "sampled", tmp_path / "c")
    for changes in ({"parameters": {"draws": 20}}, {"max_length": 16}, {"batch_rows": 3}):
        with pytest.raises(DataError, match="expected the plan that the cache"):
            build(request(toys, tmp_path / "c", **changes), console=QUIET)
    make_llama(seed=9).save_pretrained(tmp_path / "other")
    make_tokenizer().save_pretrained(tmp_path / "other")
    with pytest.raises(DataError, match="got another weights"):
        build(request(toys, tmp_path / "c", teacher=ModelSource(model=str(tmp_path / "other"))), console=QUIET)


def test_where_things_lie_does_not_matter(toys: Path, caches: Path, tmp_path: Path) -> None:
    shutil.copytree(toys, tmp_path / "elsewhere")
    out = tmp_path / "c"
    assert build(request(toys, out), part=(0, 2), console=QUIET) is None
    assert build(request(tmp_path / "elsewhere", out), part=(1, 2), console=QUIET) is not None
    assert files(out) == files(caches / "sampled")


def test_opening_reads_keys_and_not_signals(caches: Path) -> None:
    cache = Cache(caches / "sampled", verify=False)
    assert len(cache.find([])) == 0
    assert cache.find([b"0" * 16]).tolist() == [-1]
    assert cache.manifest.rows == sum(shard.rows for shard in cache.manifest.shards)


@pytest.mark.slow
def test_ray_builds_the_same_bytes(toys: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    alone, many = tmp_path / "alone", tmp_path / "many"
    script = (
        "import sys; from pathlib import Path; from rich.console import Console\n"
        "from potstill.runs import cache as caching; from potstill.data.sources import Source\n"
        "from potstill.teachers.model import ModelSource\n"
        "for out, engine in ((sys.argv[3], 'process'), (sys.argv[4], 'ray')):\n"
        "    caching.build(caching.CacheRequest(ModelSource(sys.argv[1]), [Source(sys.argv[2])], 32, False,"
        " 'sampled', {'draws': 50}, Path(out), 4), engine=engine, console=Console(quiet=True))\n"
    )
    arguments = [str(toys / "teacher"), str(toys / "train.jsonl"), str(alone), str(many)]
    subprocess.run([sys.executable, "-c", script, *arguments], check=True, timeout=500)
    assert files(alone) == files(many)
