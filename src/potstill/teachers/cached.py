"""A teacher that has spoken already: its signals come from a cache on disk."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sized
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from potstill.cache.codec import Hidden, codec_of
from potstill.cache.store import Cache, Plan, row_key
from potstill.errors import DataError
from potstill.targets import Alignment, DenseTargets, HeadTargets, LMHead, SparseTargets, Targets, counting
from potstill.teachers.teacher import NOT_COVERED, Teacher, TeacherOutput

HEAD = "head.safetensors"  # beside the manifest
COMPANIONS = "teacher"  # the folder of config and tokenizer


class CachedTeacher(Teacher):
    """Reads what a teacher said about each row of a batch; nothing is computed.

    A row is found by its token ids and by which of them count: order, batches and epochs do not matter. What is said
    is what the codec kept: samples, top-k with a bucket, whole distributions, or hidden states and a head.

    Args:
        directory: a cache that `potstill cache build` finished.
        verify: compare every byte with the checksums first.

    Raises:
        DataError: there is no finished cache, or it is not what was written.
    """

    def __init__(self, directory: str | Path, *, verify: bool = True) -> None:
        self.cache = Cache(directory, verify=verify)
        self.codec = codec_of(self.plan.codec)
        self._head = _read_head(self.cache.directory / HEAD) if isinstance(self.codec, Hidden) else None

    @property
    def plan(self) -> Plan:
        """What the cache was made of."""
        return self.cache.manifest.plan

    def __call__(self, batch: Mapping[str, Tensor], alignment: Alignment) -> TeacherOutput:
        keys = keys_of_batch(batch, alignment)
        rows = self.cache.find(keys)
        if (rows < 0).any():
            raise DataError(NOT_COVERED)
        device = batch["input_ids"].device
        if not keys:
            return TeacherOutput(DenseTargets(torch.zeros(0, self.plan.vocabulary, device=device)))
        said, told = self.codec.decode(*self.cache.signals(rows), self._head)
        return TeacherOutput(_to(said, device), None if told is None else told.to(device))

    def holds(self, batch: Mapping[str, Tensor], alignment: Alignment) -> bool:
        """Whether every row of a batch with a counting token is in the cache."""
        return bool((self.cache.find(keys_of_batch(batch, alignment)) >= 0).all())

    def covers(self, dataset: Any) -> bool:
        if not isinstance(dataset, Sized):
            return True  # a stream: what is missing is told when it comes
        return bool((self.cache.find([key for key, _ in keys_of(dataset)]) >= 0).all())


def keys_of(dataset: Any) -> Iterator[tuple[bytes, int]]:
    """The key and the number of counting tokens of each row of a dataset, those without one left out."""
    for row in dataset:
        counts = counting(torch.tensor(row["labels"])[None])[0].numpy()
        if counts.any():
            yield row_key(np.asarray(row["input_ids"]), counts), int(counts.sum())


def keys_of_batch(batch: Mapping[str, Tensor], alignment: Alignment) -> list[bytes]:
    """The key of each row of a padded batch, those without a counting token left out."""
    ids, mask = (batch[name].cpu().numpy() for name in ("input_ids", "attention_mask"))
    counts = np.zeros(ids.shape, bool)
    counts.reshape(-1)[alignment.positions.cpu().numpy()] = True
    kept = mask.astype(bool)
    return [row_key(ids[i][kept[i]], counts[i][kept[i]][:-1]) for i in np.flatnonzero(counts.any(1))]


def _to(said: Targets, device: torch.device) -> Targets:
    if isinstance(said, SparseTargets):
        return SparseTargets(said.ids.to(device), said.log_probs.to(device), said.kind, said.temperature)
    if isinstance(said, DenseTargets):
        return DenseTargets(said.logits.to(device))
    head = said.head
    if head.weight.device != device:
        bias = None if head.bias is None else head.bias.to(device)
        head = LMHead(head.weight.to(device), bias, head.logit_scale, head.softcap)
    return HeadTargets(said.hidden.to(device), head)


def _read_head(path: Path) -> LMHead:
    tensors = load_file(path)
    scale, softcap = tensors["logit_scale"].item(), tensors["softcap"].item()
    return LMHead(tensors["weight"], tensors.get("bias"), scale, softcap or None)
