"""A teacher that has spoken already: its signals come from a cache on disk."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Sized
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor

from potstill.errors import DataError, ModelError
from potstill.losses.alignment import Alignment, target_positions
from potstill.losses.targets import DenseTargets, HeadTargets, LMHead, SparseTargets, Targets
from potstill.models.capture import ActivationRequest, Activations
from potstill.models.structure import ModelShape
from potstill.teachers.cache.codec import Hidden, codec_of
from potstill.teachers.cache.planes import Reader, pack_floats
from potstill.teachers.cache.store import Cache, Plan, row_key
from potstill.teachers.teacher import NOT_COVERED, Teacher, TeacherOutput

HEAD = "head.safetensors"  # beside the manifest
COMPANIONS = "teacher"  # the folder of config and tokenizer


class CachedTeacher(Teacher):
    """Reads what a teacher said about each row of a batch; nothing is computed.

    A row is found by its token ids and by which of them count: order, batches and epochs do not matter. What is said
    is what the codec kept: samples, top-k with a bucket, whole distributions, or hidden states and a head. Terms that
    look inside find the hidden states of the layers that were kept.

    Args:
        directory: a cache that `potstill cache build` finished.
        verify: compare every byte with the checksums first.

    Raises:
        DataError: there is no finished cache, or it is not what was written.
    """

    def __init__(self, directory: str | Path, *, verify: bool = True) -> None:
        self.cache = Cache(directory, verify=verify)
        self.codec = codec_of(self.plan.codec)
        self._needs = ActivationRequest()
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
        inside = self._layers(batch, alignment, rows).to(device) if self._needs else Activations()
        if not keys:
            return TeacherOutput(DenseTargets(torch.zeros(0, self.plan.vocabulary, device=device)), inside=inside)
        said, told = self.codec.decode(*self.cache.signals(rows), self._head)
        return TeacherOutput(_to(said, device), None if told is None else told.to(device), inside)

    @property
    def shape(self) -> ModelShape:
        """The shape of the model that has spoken."""
        kept = self.plan.layers
        if kept is None:
            raise self._closed()
        return ModelShape(kept.depth, kept.width, kept.heads, kept.narrowest, attention_dropout=0.0)

    def prepare(self, needs: ActivationRequest) -> None:
        """See `Teacher`. Only hidden states are kept."""
        kept = [] if self.plan.layers is None else self.plan.layers.kept
        if needs != ActivationRequest(hidden=needs.hidden & {*kept}):
            raise self._closed(sorted(needs.hidden))
        self._needs |= needs

    def _closed(self, layers: Sequence[int] = ()) -> ModelError:
        wanted = f"layers {', '.join(map(str, layers))}" if layers else "the layers that terms of the objective ask for"
        kept = self.plan.layers
        held = "targets alone" if kept is None else f"layers {', '.join(map(str, kept.kept))}"
        return ModelError(
            f"cache: expected one with the hidden states of {wanted}, got one with {held}. Attention is never kept. "
            "Build it with --layers, use a model as the teacher, or the terms logits and labels."
        )

    def _layers(self, batch: Mapping[str, Tensor], alignment: Alignment, rows: NDArray[np.int64]) -> Activations:
        """Hidden states [B, T, H], 0 at padding and in rows where nothing counts."""
        kept = self.plan.layers
        assert kept is not None
        parts = []
        for row in self.cache.layers(rows):
            reader = Reader(row)
            parts.append(reader.take_floats(kept.dtype, reader.left // getattr(torch, kept.dtype).itemsize))
        there = _spoken_of(batch, alignment)
        states = torch.zeros(*there.shape, len(kept.kept), kept.width, dtype=getattr(torch, kept.dtype))
        if parts:
            states[there] = torch.cat(parts).reshape(-1, len(kept.kept), kept.width)
        return Activations({layer: states[:, :, kept.kept.index(layer)] for layer in sorted(self._needs.hidden)})

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
        counts = target_positions(torch.tensor(row["labels"])[None])[0].numpy()
        if counts.any():
            yield row_key(np.asarray(row["input_ids"]), counts), int(counts.sum())


def keys_of_batch(batch: Mapping[str, Tensor], alignment: Alignment) -> list[bytes]:
    """The key of each row of a padded batch, those without a counting token left out."""
    ids, mask = (batch[name].cpu().numpy() for name in ("input_ids", "attention_mask"))
    counts = np.zeros(ids.shape, bool)
    counts.reshape(-1)[alignment.positions.cpu().numpy()] = True
    kept = mask.astype(bool)
    return [row_key(ids[i][kept[i]], counts[i][kept[i]][:-1]) for i in np.flatnonzero(counts.any(1))]


def layers_of_batch(
    batch: Mapping[str, Tensor], alignment: Alignment, inside: Activations, layers: Sequence[int]
) -> list[bytes]:
    """What is kept of the hidden states of each row of a padded batch: [T, layers, H] without padding."""
    there = _spoken_of(batch, alignment)
    states = torch.stack([inside.hidden[layer].cpu()[there] for layer in layers], 1)
    lengths = there.sum(1)
    return [pack_floats(part) for part in states.split(lengths[lengths > 0].tolist())]


def _spoken_of(batch: Mapping[str, Tensor], alignment: Alignment) -> Tensor:
    """[B, T] bool: all that is no padding, in rows where something counts; on the CPU."""
    mask = batch["attention_mask"].bool().cpu()
    counts = (alignment.positions.cpu() // alignment.length).bincount(minlength=len(mask))
    return mask & (counts > 0).unsqueeze(-1)


def _to(said: Targets, device: torch.device) -> Targets:
    if isinstance(said, SparseTargets):
        return SparseTargets(said.ids.to(device), said.log_probs.to(device), said.kind, said.temperature)
    if isinstance(said, DenseTargets):
        return DenseTargets(said.logits.to(device))
    assert isinstance(said, HeadTargets)  # no codec keeps a mixture
    head = said.head
    if head.weight.device != device:
        bias = None if head.bias is None else head.bias.to(device)
        head = LMHead(head.weight.to(device), bias, head.logit_scale, head.softcap)
    return HeadTargets(said.hidden.to(device), head)


def _read_head(path: Path) -> LMHead:
    tensors = load_file(path)
    scale, softcap = tensors["logit_scale"].item(), tensors["softcap"].item()
    return LMHead(tensors["weight"], tensors.get("bias"), scale, softcap or None)
