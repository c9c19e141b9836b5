"""Teacher signals read from a cache on disk."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sized
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor

from potstill.errors import DataError, ModelError
from potstill.losses.alignment import Alignment, Task, target_positions
from potstill.losses.targets import DenseTargets, LMHead
from potstill.models.capture import ActivationRequest, Activations
from potstill.models.loading import load_config, load_tokenizer
from potstill.models.shapes import ModelShape
from potstill.teachers.cache.codec import HiddenStates, Reader, codec_of, pack_floats
from potstill.teachers.cache.store import Cache, CachedLayers, row_key
from potstill.teachers.model import ModelSource, Precision
from potstill.teachers.source import LoadedTeacher, MemberSource
from potstill.teachers.teacher import Teacher, TeacherOutput

HEAD = "head.safetensors"  # beside the manifest
COMPANIONS = "teacher"  # the folder of config and tokenizer


class CachedTeacher(Teacher):
    """Teacher signals precomputed on disk, by a finished `potstill cache build`; nothing is computed.

    A row is found by its token ids and target positions, whatever the order, the batch or the epoch. Targets are what
    the codec stored: samples, top-k with a bucket, full distributions, or hidden states and a head. Hidden states and
    attention maps are there for the layers that the cache was built with. `verify` compares every byte with the
    checksums.

    Raises:
        DataError: there is no finished cache, or it has changed since it was written.
    """

    without_own_prompts = "a cache"

    def __init__(self, directory: str | Path, *, verify: bool = True) -> None:
        self.cache = Cache(directory, verify=verify)
        self.plan = self.cache.manifest.plan
        self.codec = codec_of(self.plan.codec)
        self._needs = ActivationRequest()
        self._head = _read_head(self.cache.directory / HEAD) if isinstance(self.codec, HiddenStates) else None

    def __call__(self, batch: Mapping[str, Tensor], alignment: Alignment) -> TeacherOutput:
        rows = self.cache.find(keys_of_batch(batch, alignment))
        if (rows < 0).any():
            raise DataError(self.missing_rows)
        device = batch["input_ids"].device
        inside = self._layers(batch, alignment, rows).to(device) if self._needs else Activations()
        if not len(rows):
            return TeacherOutput(DenseTargets(torch.zeros(0, self.plan.vocabulary, device=device)), inside=inside)
        self._head = None if self._head is None else _to(self._head, device)
        targets, log_probs = self.codec.decode(*self.cache.signals(rows), self._head)
        return TeacherOutput(_to(targets, device), None if log_probs is None else log_probs.to(device), inside)

    @property
    def shape(self) -> ModelShape:
        kept = self.plan.layers
        if kept is None:
            raise self._no_layers()
        return ModelShape(
            kept.depth, kept.width, kept.heads, kept.narrowest, attention_dropout=0.0, family="of the cached teacher"
        )

    def prepare(self, needs: ActivationRequest) -> None:
        if self._stored | needs != self._stored:
            raise self._no_layers(needs)
        self._needs |= needs

    @property
    def _stored(self) -> ActivationRequest:
        kept = self.plan.layers
        hidden, attentions = ([], []) if kept is None else (kept.kept, kept.attentions)
        return ActivationRequest(frozenset(hidden), frozenset(attentions))

    def _no_layers(self, needs: ActivationRequest | None = None) -> ModelError:
        needed = "the layers that terms of the objective need" if needs is None else _in_words(needs)
        return ModelError(
            f"cache: expected one with {needed}, got one with {_in_words(self._stored) or 'targets alone'}. Build it "
            "with --layers and --attention-layers, use a model as the teacher, or the terms logits and labels."
        )

    def _layers(self, batch: Mapping[str, Tensor], alignment: Alignment, rows: NDArray[np.int64]) -> Activations:
        """Hidden states [B, T, H] and maps [B, A, T, T], 0 at padding and in rows without a target position."""
        kept = self.plan.layers
        assert kept is not None
        stored, reader = _stored_positions(batch, alignment), Reader(self.cache.layers(rows))
        places = {row: stored[row].nonzero() for row in stored.any(1).nonzero().flatten().tolist()}
        lengths, length, dtype = [*map(len, places.values())], stored.shape[1], getattr(torch, kept.dtype)
        of_token, of_pair = (len(kept.kept), kept.width), (len(kept.attentions), kept.heads)
        states = torch.zeros(*stored.shape, *of_token, dtype=dtype)
        packed = reader.take_floats(kept.dtype, [n * math.prod(of_token) for n in lengths])
        states[stored] = packed.view(sum(lengths), *of_token)
        hidden = {layer: states[:, :, kept.kept.index(layer)] for layer in sorted(self._needs.hidden, key=str)}
        if not self._needs.attentions:
            return Activations(hidden)
        maps = torch.zeros(len(stored), *of_pair, length, length, dtype=dtype)
        sizes = [n * n * math.prod(of_pair) for n in lengths]
        for (row, at), values in zip(places.items(), reader.take_floats(kept.dtype, sizes).split(sizes), strict=True):
            maps[row][:, :, at, at.T] = values.view(*of_pair, len(at), len(at))
        return Activations(hidden, {layer: maps[:, kept.attentions.index(layer)] for layer in self._needs.attentions})

    def holds(self, batch: Mapping[str, Tensor], alignment: Alignment) -> bool:
        """Whether every row of a batch with a target position is in the cache."""
        return bool((self.cache.find(keys_of_batch(batch, alignment)) >= 0).all())

    def covers(self, dataset: Any) -> bool:
        # In a stream, a missing row is an error when it comes.
        return not isinstance(dataset, Sized) or bool((self.cache.find([*keys_of(dataset)]) >= 0).all())


class CachedOrLiveTeacher(Teacher):
    """Reads a cache for batches that it holds, and runs another teacher on the others: those with on-policy samples.

    A batch comes from one of them as a whole, because their targets may be of different kinds.
    """

    answers_samples_apart = True

    def __init__(self, cached: CachedTeacher, live: Teacher) -> None:
        self.cached, self.live = cached, live

    def __call__(self, batch: Mapping[str, Tensor], alignment: Alignment) -> TeacherOutput:
        teacher = self.cached if self.cached.holds(batch, alignment) else self.live
        return teacher(batch, alignment)


@dataclass(frozen=True)
class CacheSource(MemberSource):
    """A cache of teacher signals. With a model beside it, training reads the cache and the report measures the model.

    Args:
        cache: a directory made by `potstill cache build`
        model: the teacher itself: a folder, or a name on the hub
        dtype: the model's precision
        device: the model's device; by default the student's
    """

    cache: str
    model: str | None = None
    dtype: Precision = "auto"
    device: str | None = None
    name = "cache"
    tasks = frozenset({"causal"})

    @property
    def title(self) -> str:
        return self.model or f"the cache {self.cache}"

    @property
    def live(self) -> ModelSource | None:
        return None if self.model is None else ModelSource(self.model, self.dtype, self.device)

    def load(self, student: str | None, task: Task = "causal", key: str = "teacher") -> LoadedTeacher:
        live = None if self.live is None else self.live.load(student, task, key)
        teacher, folder = CachedTeacher(self.cache), Path(self.cache) / COMPANIONS
        from_server = not (folder / "config.json").exists()
        config = None if from_server else load_config(str(folder), f"{key}.cache")
        tokenizer = load_tokenizer(str(folder), f"{key}.cache")
        if live is None:
            return LoadedTeacher(teacher, tokenizer, config=config)
        return replace(live, teacher=teacher, tokenizer=tokenizer, config=config, live=live.teacher)


def keys_of(dataset: Any) -> Iterator[bytes]:
    """The key of each row with a target position."""
    for row in dataset:
        counts = target_positions(torch.tensor(row["labels"])[None])[0].numpy()
        if counts.any():
            yield row_key(np.asarray(row["input_ids"]), counts)


def keys_of_batch(batch: Mapping[str, Tensor], alignment: Alignment) -> list[bytes]:
    """The key of each row of a padded batch, except rows without a target position."""
    ids, mask = (batch[name].cpu().numpy() for name in ("input_ids", "attention_mask"))
    counts = np.zeros(ids.shape, bool)
    counts.reshape(-1)[alignment.positions.cpu().numpy()] = True
    attended = mask.astype(bool)
    return [row_key(ids[i][attended[i]], counts[i][attended[i]][:-1]) for i in np.flatnonzero(counts.any(1))]


def layers_of_batch(
    batch: Mapping[str, Tensor], alignment: Alignment, inside: Activations, layers: CachedLayers
) -> list[bytes]:
    """Pack the activations of each row of a padded batch, without padding: [T, layers, H], then [layers, A, T, T]."""
    stored, dtype = _stored_positions(batch, alignment), getattr(torch, layers.dtype)
    rows = []
    for row in stored.any(1).nonzero().flatten().tolist():
        places = stored[row].nonzero()
        hidden = [inside.hidden[layer][row].cpu()[stored[row]] for layer in layers.kept]
        maps = [inside.attentions[layer][row].cpu()[:, places, places.T] for layer in layers.attentions]
        parts = [torch.stack(tensors, dim).to(dtype) for tensors, dim in ((hidden, 1), (maps, 0)) if tensors]
        rows.append(b"".join(map(pack_floats, parts)))
    return rows


def _in_words(stored: ActivationRequest) -> str:
    layers: dict[str, list[Any]] = {
        "hidden states": sorted(stored.hidden, key=str),
        "attention maps": sorted(stored.attentions),
        "queries, keys and values": sorted(stored.vectors),
    }
    parts = (f"the {kind} of layers {', '.join(map(str, of))}" for kind, of in layers.items() if of)
    return " and ".join(parts)


def _stored_positions(batch: Mapping[str, Tensor], alignment: Alignment) -> Tensor:
    """[B, T] bool, on the CPU: positions without padding, in rows with a target position."""
    mask = batch["attention_mask"].bool().cpu()
    counts = alignment.row.cpu().bincount(minlength=len(mask))
    return mask & (counts > 0).unsqueeze(-1)


def _to(record: Any, device: torch.device) -> Any:
    """Move a dataclass's own tensors to a device."""
    tensors = {name: value.to(device) for name, value in vars(record).items() if isinstance(value, Tensor)}
    return replace(record, **tensors)


def _read_head(path: Path) -> LMHead:
    tensors = load_file(path)
    scale, softcap = tensors["logit_scale"].item(), tensors["softcap"].item()
    return LMHead(tensors["weight"], tensors.get("bias"), scale, softcap or None)
