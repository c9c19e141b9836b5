"""Building a cache shard by shard: in one process, in many, or with Ray."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from safetensors.torch import save_file
from torch import Tensor

from potstill.errors import DataError, RunError
from potstill.files import atomic_path, write_json, write_text
from potstill.losses.alignment import causal_alignment
from potstill.losses.targets import HeadTargets, SparseTargets
from potstill.models.checksums import digest, with_checksum, without_checksum
from potstill.teachers.cache import store
from potstill.teachers.cache.codec import Codec, HiddenStates, codec_of
from potstill.teachers.cache.store import CachedRow, CachePlan, Manifest, Shard
from potstill.teachers.cached import COMPANIONS, HEAD, keys_of_batch, layers_of_batch
from potstill.teachers.teacher import Teacher


@dataclass(frozen=True)
class CacheBuilder:
    """Builds a cache, or a part of it, and skips the shards that are there already.

    A shard does not depend on who writes it, in which order or after how many kills: the finished cache is the same
    bytes.
    """

    plan: CachePlan
    directory: Path
    teacher: Teacher  # prepared for the layers of the plan
    datasets: Sequence[Any]  # the rows of each source, with input_ids and labels
    collate: Callable[[Sequence[Any]], Mapping[str, Tensor]]
    device: torch.device
    write_companions: Callable[[Path], None]  # writes teacher/ (config, tokenizer) into the cache's directory

    def begin(self) -> None:
        """Write the plan, or check that it is the one that the cache was begun with."""
        begun = self._begun_plan()
        if begun is None:
            self.directory.mkdir(parents=True, exist_ok=True)
            write_json(self.directory / store.PLAN, with_checksum(asdict(self.plan)))
        elif changed := self.plan.differs(begun):
            raise DataError(
                f"cache: expected the plan that the cache in {self.directory} was begun with, got another "
                f"{', '.join(changed)}. Repeat the command that began it, or choose another directory with --out."
            )

    def todo(self, part: tuple[int, int] = (0, 1)) -> list[int]:
        """The missing shards of part i of n."""
        if self._finished:
            return []
        return [n for n in range(len(self._shards)) if n % part[1] == part[0] and self._completed(n) is None]

    def build(self, number: int) -> Shard:
        source, rows = self._shards[number]
        cached: dict[int, CachedRow] = {}
        for chosen in self._batches(number):
            batch = self._batch([self.datasets[source][row] for row in chosen])
            cached |= zip(chosen, self._encode(batch, len(chosen)), strict=True)
        path = self._shard_path(number)
        shard = store.write_shard(path, (cached[row] for row in rows))
        write_json(path.with_suffix(".json"), with_checksum({"shard": asdict(shard)}))  # marks it as complete
        return shard

    def precompute(self, todo: Sequence[int], folder: Path) -> Iterator[None]:
        """Let the teacher compute ahead, in steps, what it computes for the batches of some shards at once."""

        def batches() -> Iterator[Mapping[str, Tensor]]:
            for number in todo:
                dataset = self.datasets[self._shards[number][0]]
                yield from (self._batch([dataset[row] for row in chosen]) for chosen in self._batches(number))

        return self.teacher.precompute(batches, folder)

    def positions(self, todo: Sequence[int]) -> int:
        """Count the positions of the batches of some shards, with padding."""
        total = 0
        for number in todo:
            dataset = self.datasets[self._shards[number][0]]
            total += sum(len(rows) * len(dataset[rows[0]]["input_ids"]) for rows in self._batches(number))
        return total

    def finish(self) -> Manifest | None:
        """Write the manifest once all shards are there, whoever wrote them; None while some are missing."""
        if not self._finished:
            shards = [shard for n in range(len(self._shards)) if (shard := self._completed(n)) is not None]
            if len(shards) < len(self._shards):
                return None
            self.write_companions(self.directory)
            files = [path for path in sorted((self.directory / COMPANIONS).rglob("*")) if path.is_file()]
            if isinstance(self._codec, HiddenStates):
                self._write_head(self.directory / HEAD)
                files.append(self.directory / HEAD)
            checksums = {path.relative_to(self.directory).as_posix(): digest(path) for path in files}
            manifest = Manifest(self._begun_plan() or self.plan, shards, checksums)
            write_text(self.directory / store.MANIFEST, store.manifest_text(asdict(manifest)))
        for number in range(len(self._shards)):
            self._shard_path(number).with_suffix(".json").unlink(missing_ok=True)
        (self.directory / store.PLAN).unlink(missing_ok=True)
        return store.read_manifest(self.directory)

    @property
    def _finished(self) -> bool:
        return (self.directory / store.MANIFEST).exists()

    @cached_property
    def _shards(self) -> list[tuple[int, range]]:
        """The source and the rows of each shard."""
        step, sizes = self.plan.shard_rows, enumerate(rows for _, rows, _, _ in self.plan.sources)
        return [(source, range(rows)[start : start + step]) for source, rows in sizes for start in range(0, rows, step)]

    @cached_property
    def _codec(self) -> Codec:
        return codec_of(self.plan.codec)

    def _shard_path(self, number: int) -> Path:
        return self.directory / "shards" / f"{number:05d}.arrow"

    def _completed(self, number: int) -> Shard | None:
        path = self._shard_path(number)
        try:
            marker = without_checksum(json.loads(path.with_suffix(".json").read_bytes()))
            shard = TypeAdapter(Shard).validate_python(marker["shard"])
        except (OSError, ValueError, KeyError):
            return None
        return shard if path.exists() and digest(path) == shard.sha256 else None

    def _begun_plan(self) -> CachePlan | None:
        if self._finished:
            return store.read_manifest(self.directory).plan
        path = self.directory / store.PLAN
        try:
            return TypeAdapter(CachePlan).validate_python(without_checksum(json.loads(path.read_bytes())))
        except FileNotFoundError:
            return None
        except (OSError, ValueError):
            raise DataError(
                f"cache: expected the plan of a cache in {path}, got something else. Remove the directory and build "
                "again."
            ) from None

    def _batches(self, number: int) -> Iterator[list[int]]:
        """The rows of each batch of a shard, the longest first."""
        source, rows = self._shards[number]
        dataset = self.datasets[source]
        by_length = sorted(rows, key=lambda row: (-len(dataset[row]["input_ids"]), row))
        for start in range(0, len(by_length), self.plan.batch_rows):
            yield by_length[start : start + self.plan.batch_rows]

    def _batch(self, examples: Sequence[Any]) -> Mapping[str, Tensor]:
        return {name: value.to(self.device) for name, value in self.collate(examples).items()}

    @torch.no_grad()
    def _encode(self, batch: Mapping[str, Tensor], rows: int) -> Iterator[CachedRow]:
        alignment = causal_alignment(batch["labels"])
        output = self.teacher(batch, alignment)
        targets = output.targets.slice(self.plan.vocabulary)
        keys = keys_of_batch(batch, alignment)
        if len(keys) < rows:
            raise RunError("cache: expected a target token in every row, got a row without one.")
        kept = self.plan.layers
        layers = [b""] * len(keys) if kept is None else layers_of_batch(batch, alignment, output.inside, kept)
        start = 0
        for key, count, states in zip(keys, alignment.row.bincount().tolist(), layers, strict=True):
            positions = slice(start, start + count)
            start += count
            row, seed = targets.rows(positions), int.from_bytes(key[:8], "little")
            if isinstance(row, SparseTargets):
                known = None if output.label_log_probs is None else output.label_log_probs[positions]
                signal = self._codec.encode(row, seed, label_log_probs=known)
            else:
                signal = self._codec.encode(row, seed, labels=alignment.labels[positions])
            yield CachedRow(key, count, signal, states)

    def _write_head(self, path: Path) -> None:
        batch = self._batch([self.datasets[0][0]])
        targets = self.teacher.outline(batch, causal_alignment(batch["labels"])).targets
        assert isinstance(targets, HeadTargets)
        head = targets.head
        rows = {"weight": head.weight, "bias": head.bias}
        tensors = {name: x[: self.plan.vocabulary] for name, x in rows.items() if x is not None}
        for name, number in (("logit_scale", head.logit_scale), ("softcap", head.softcap or 0.0)):
            tensors[name] = torch.tensor(number, dtype=torch.float64)
        with atomic_path(path) as partial:
            save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, partial)
