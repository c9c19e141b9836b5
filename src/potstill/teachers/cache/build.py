"""A teacher runs over the data once, and a cache keeps what it says: by one process, by many, or by Ray."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors.torch import save_file
from torch import Tensor

from potstill.data.files import atomic_path, digest, write_text
from potstill.errors import DataError, RunError
from potstill.losses.alignment import causal_alignment
from potstill.losses.targets import DenseTargets, HeadTargets, SparseTargets
from potstill.teachers.cache.codec import Codec, Hidden, codec_of
from potstill.teachers.cache.store import (
    MANIFEST,
    Manifest,
    Plan,
    Row,
    Shard,
    read_manifest,
    write_manifest,
    write_shard,
)
from potstill.teachers.cached import COMPANIONS, HEAD, keys_of_batch, layers_of_batch
from potstill.teachers.teacher import Teacher

PLAN = "plan.json"

Collate = Callable[[Sequence[Any]], Mapping[str, Tensor]]


@dataclass(frozen=True)
class Capture:
    """The building of a cache, or of a part of it.

    What is there already is not done again. Shards do not depend on who writes them, in which order, or after how many
    kills: the finished cache is the same bytes.

    Args:
        plan: what the cache is made of.
        directory: where it comes to stand.
        teacher: who speaks, prepared for the layers of the plan.
        datasets: the rows of each source, with input_ids and labels.
        collate: rows to a padded batch.
        device: where batches go.
        companions: writes the folder teacher/ (config, tokenizer) into the cache's directory.
    """

    plan: Plan
    directory: Path
    teacher: Teacher
    datasets: Sequence[Any]
    collate: Collate
    device: torch.device
    companions: Callable[[Path], None]

    def begin(self) -> None:
        """Write the plan, or see that it is the one that was begun with.

        Raises:
            DataError: the directory holds another cache.
        """
        path = self.directory / PLAN
        earlier = read_manifest(self.directory).plan if self._finished else _read_plan(path)
        if earlier is None:
            self.directory.mkdir(parents=True, exist_ok=True)
            write_text(path, self.plan.model_dump_json(indent=1) + "\n")
        elif changed := self.plan.differs(earlier):
            raise DataError(
                f"cache: expected the plan that the cache in {self.directory} was begun with, got another "
                f"{', '.join(changed)}. Repeat the command that began it, or choose another directory with --out."
            )

    def todo(self, part: tuple[int, int] = (0, 1)) -> list[int]:
        """The shards of part i of n that are not there yet."""
        if self._finished:
            return []
        return [n for n in range(len(self._shards)) if n % part[1] == part[0] and self._done(n) is None]

    def build(self, number: int) -> Shard:
        """Write one shard."""
        source, rows = self._shards[number]
        dataset = self.datasets[source]
        said: dict[int, Row] = {}
        by_length = sorted(rows, key=lambda row: (-len(dataset[row]["input_ids"]), row))
        for start in range(0, len(by_length), self.plan.batch_rows):
            some = by_length[start : start + self.plan.batch_rows]
            said |= zip(some, self._ask([dataset[row] for row in some]), strict=True)
        path = self._shard_path(number)
        shard = write_shard(path, (said[row] for row in rows))
        write_text(path.with_suffix(".json"), shard.model_dump_json())  # vouches for the file
        return shard

    def finish(self) -> Manifest | None:
        """Write the manifest when all shards are there, whoever wrote them; None when some are missing."""
        if not self._finished:
            shards = [self._done(number) for number in range(len(self._shards))]
            whole = [shard for shard in shards if shard is not None]
            if len(whole) < len(shards):
                return None
            self.companions(self.directory)
            files = [path for path in sorted((self.directory / COMPANIONS).rglob("*")) if path.is_file()]
            if isinstance(self._codec, Hidden):
                self._write_head(self.directory / HEAD)
                files.append(self.directory / HEAD)
            digests = {path.relative_to(self.directory).as_posix(): digest(path) for path in files}
            begun = _read_plan(self.directory / PLAN) or self.plan
            write_manifest(self.directory, Manifest(plan=begun, shards=whole, files=digests))
        for number in range(len(self._shards)):
            self._shard_path(number).with_suffix(".json").unlink(missing_ok=True)
        (self.directory / PLAN).unlink(missing_ok=True)
        return read_manifest(self.directory)

    @property
    def _finished(self) -> bool:
        return (self.directory / MANIFEST).exists()

    @cached_property
    def _shards(self) -> list[tuple[int, range]]:
        """The rows of each shard, as (source, rows)."""
        step = self.plan.shard_rows
        return [
            (source, range(start, min(start + step, rows)))
            for source, (_, rows, _, _) in enumerate(self.plan.sources)
            for start in range(0, rows, step)
        ]

    @cached_property
    def _codec(self) -> Codec:
        return codec_of(self.plan.codec)

    def _shard_path(self, number: int) -> Path:
        return self.directory / "shards" / f"{number:05d}.arrow"

    def _done(self, number: int) -> Shard | None:
        path = self._shard_path(number)
        try:
            shard = Shard.model_validate_json(path.with_suffix(".json").read_text(encoding="utf-8"))
        except (OSError, ValidationError):
            return None
        return shard if path.exists() and digest(path) == shard.sha256 else None

    @torch.no_grad()
    def _ask(self, examples: Sequence[Any]) -> Iterator[Row]:
        """What is kept of each example."""
        batch = {name: value.to(self.device) for name, value in self.collate(examples).items()}
        alignment = causal_alignment(batch["labels"])
        output = self.teacher(batch, alignment)
        said = output.targets.slice(self.plan.vocabulary)
        tokens = (alignment.positions // alignment.length).bincount(minlength=len(examples)).tolist()
        keys = keys_of_batch(batch, alignment)
        if len(keys) < len(examples):
            raise RunError("cache: expected a token that counts in every row, got a row without one.")
        kept = self.plan.layers
        layers = [b""] * len(keys) if kept is None else layers_of_batch(batch, alignment, output.inside, kept.kept)
        start = 0
        for key, count, states in zip(keys, tokens, layers, strict=True):
            part = slice(start, start + count)
            mine = said.rows(part)
            seed = int.from_bytes(key[:8], "little")
            if isinstance(mine, SparseTargets):
                told = None if output.label_log_probs is None else output.label_log_probs[part]
                signal = self._codec.encode(mine, seed, label_log_probs=told)
            else:
                whole = mine if isinstance(self._codec, Hidden) else DenseTargets(mine.dense())
                signal = self._codec.encode(whole, seed, labels=alignment.labels[part])
            yield Row(key, count, signal, states)
            start += count

    def _write_head(self, path: Path) -> None:
        example = self.collate([self.datasets[0][0]])
        batch = {name: value.to(self.device) for name, value in example.items()}
        said = self.teacher(batch, causal_alignment(batch["labels"])).targets
        assert isinstance(said, HeadTargets)
        head = said.head
        tensors = {"weight": head.weight, "logit_scale": torch.tensor(head.logit_scale, dtype=torch.float64)}
        tensors["softcap"] = torch.tensor(head.softcap or 0.0, dtype=torch.float64)
        if head.bias is not None:
            tensors["bias"] = head.bias
        rows = {name: value[: self.plan.vocabulary] if value.ndim else value for name, value in tensors.items()}
        with atomic_path(path) as partial:
            save_file({name: value.detach().cpu().contiguous() for name, value in rows.items()}, partial)


def _read_plan(path: Path) -> Plan | None:
    try:
        return Plan.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        raise DataError(
            f"cache: expected the plan of a cache in {path}, got something else. Remove the directory and build again."
        ) from None
