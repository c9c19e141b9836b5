"""What a teacher said about one row of data, as bytes, and many rows of bytes as Targets again. Pure functions.

A row of n tokens is a few arrays one behind the other: first the log-probabilities that the teacher gave the data's own
tokens, f2[n] (NaN where it did not say), then those of its codec. Each array is cut into planes: the lowest byte of
every element, then the second byte of every element, and so on (little-endian), because bytes of one kind compress
well together. Bytes that are 0 for every token of the vocabulary (of ids) are left out.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from potstill.errors import ShapeError, nearest
from potstill.losses.targets import DenseTargets, HeadTargets, LMHead, MixtureTargets, SparseTargets, Targets
from potstill.teachers.cache.planes import Reader, pack, pack_floats

BLOCK = 64  # tokens of the vocabulary that are drawn from together
SCALE = 56.0  # a log-probability of -x nats has the code round(SCALE * sqrt(x)): fine where much mass is, to 20.6 nats
UNUSED = 255  # the code of a slot without a token
# Elements of [n, V] at a time while encoding: what stays in a CPU's cache, or keeps an accelerator busy.
CHUNK = 2**20
LARGE_CHUNK = 2**24


@dataclass(frozen=True)
class Codec(ABC):
    """How one kind of signal is packed.

    Args:
        vocabulary: V, of the real tokens.
    """

    vocabulary: int
    name: ClassVar[str]

    def encode(
        self, said: Targets, seed: int, *, labels: Tensor | None = None, label_log_probs: Tensor | None = None
    ) -> bytes:
        """One row to bytes.

        Args:
            said: Targets over its n counting tokens.
            seed: of all random numbers of this row.
            labels: [n] the data's own tokens, of a teacher that gives whole distributions.
            label_log_probs: [n] their log-probabilities, of one that gives no more than these.

        Raises:
            ShapeError: the teacher does not say what this codec keeps, or says NaN.
        """
        packed, normalizer = self._encode(said, seed)
        if labels is not None:
            logits = said.dense() if not isinstance(said, SparseTargets) else _logits(said, self.name)
            normalizer = logits.float().logsumexp(-1) if normalizer is None else normalizer
            label_log_probs = logits.gather(-1, labels.unsqueeze(-1)).squeeze(-1).float() - normalizer
        told = torch.full(said.leading, math.nan) if label_log_probs is None else label_log_probs.cpu()
        return pack(told.half().numpy()) + packed

    def decode(
        self, rows: Sequence[bytes], tokens: Sequence[int], head: LMHead | None = None
    ) -> tuple[Targets, Tensor | None]:
        """Rows of bytes, in this order, to what the teacher said about all their tokens, on the CPU.

        Args:
            rows: what `encode` gave; at least one.
            tokens: n of each row.
            head: the teacher's, for codecs that keep hidden states.

        Returns:
            The Targets, and the log-probabilities [N] of the data's own tokens or None.

        Raises:
            ShapeError: the bytes are not of so many tokens.
        """
        readers = [Reader(row) for row in rows]
        told = np.concatenate([reader.take("<f2", n) for reader, n in zip(readers, tokens, strict=True)])
        said = self._decode(readers, tokens, head)
        for reader in readers:
            reader.close()
        return said, None if np.isnan(told).any() else torch.from_numpy(told.astype("f4"))

    @abstractmethod
    def _encode(self, said: Targets, seed: int) -> tuple[bytes, Tensor | None]:
        """The arrays of this codec; and log(sum(exp(logits))) [n] at temperature 1 where it falls out on the way."""

    @abstractmethod
    def _decode(self, readers: Sequence[Reader], tokens: Sequence[int], head: LMHead | None) -> Targets:
        """The Targets of its arrays."""

    def record(self) -> dict[str, Any]:
        """Name and parameters, for `codec_of`."""
        return {"name": self.name, **asdict(self)}

    @property
    def _id_bytes(self) -> int:
        return max(1, -(-(self.vocabulary - 1).bit_length() // 8))


@dataclass(frozen=True)
class Sampled(Codec):
    """N draws from the teacher, evenly spaced: the tokens drawn, and how often each.

        the i-th draw of a token of text is the v with F(v - 1) <= (i + u) / N < F(v),   F(v) = p_0 + ... + p_v

    One number u in [0, 1) moves all N points (systematic resampling), so that v is drawn floor(N p_v) or ceil(N p_v)
    times. The expectation of count / N over u is p_v, as with independent draws, in whatever order the vocabulary is,
    and its variance is never more than theirs: r (1 - r) / N^2, where r is the fraction of N p_v, against
    p_v (1 - p_v) / N. Counts of different tokens go together in other ways than independent draws would.

    Unbiased for divergences that are linear in the teacher (forward KL, soft cross-entropy).

    A row: the number of different tokens u1[n]; their ids, rising within a token, each as the distance to the one
    before it [E]; their counts less one, u1[E].

    Args:
        draws: N, 1 to 255.
        temperature: of the distribution that is drawn from; training must use the same.

    References:
        Anshumann et al. 2025 (random sampling distillation, with independent draws), arXiv 2503.16870; Kitagawa 1996,
        Monte Carlo filter and smoother, J. Comput. Graph. Stat. 5(1), appendix; Douc and Cappe 2005, Comparison of
        resampling schemes for particle filtering, arXiv cs/0507025.
    """

    draws: int = 50
    temperature: float = 1.0
    name = "sampled"

    def __post_init__(self) -> None:
        if not 1 <= self.draws <= 255:
            raise ShapeError(f"Sampled: expected draws in 1..255, got {self.draws}.")
        _check_temperature("Sampled", self.temperature)

    def _encode(self, said: Targets, seed: int) -> tuple[bytes, Tensor | None]:
        logits = _logits(said, self.name)
        generator = torch.Generator().manual_seed(seed)  # on the CPU, so that no device draws other numbers
        offsets = torch.rand((len(logits), 1), generator=generator, dtype=torch.float64).to(logits.device)
        drawn, normalizers = [], []
        width = max(self.vocabulary, self.draws * BLOCK)
        for part, some in zip(_chunks(logits, width), _chunks(offsets, width), strict=True):
            top, blocks = _relative(part, self.temperature)
            ends = blocks.exp_().sum(-1).double().cumsum(-1)
            points = (some + torch.arange(self.draws, device=some.device)) / self.draws
            drawn.append(_at(points, blocks, ends).cpu())
            normalizers.append(top.squeeze(-1) + ends[:, -1].log())
        ids, normalizer = torch.cat(drawn), _numbers(torch.cat(normalizers))
        first = torch.ones_like(ids, dtype=torch.bool)
        first[:, 1:] = ids[:, 1:] != ids[:, :-1]
        places = first.flatten().nonzero().squeeze(-1)
        counts = torch.diff(places, append=torch.tensor([ids.numel()]))  # each token of the row begins with a first
        kept = ids[first]
        steps = torch.diff(kept, prepend=kept[:1])
        begins = first.sum(-1).cumsum(0)[:-1]  # where the ids of the tokens behind the first begin
        steps[begins], steps[:1] = kept[begins], kept[:1]
        arrays = (
            pack(first.sum(-1).numpy().astype("u1")),
            pack(steps.numpy().astype("<u4"), self._id_bytes),
            pack((counts - 1).numpy().astype("u1")),
        )
        return b"".join(arrays), normalizer if self.temperature == 1 else None

    def _decode(self, readers: Sequence[Reader], tokens: Sequence[int], head: LMHead | None) -> SparseTargets:
        parts = []
        for reader, n in zip(readers, tokens, strict=True):
            unique = reader.take("u1", n)
            entries = int(unique.sum(dtype=np.int64))
            parts.append((unique, reader.take("<u4", entries, self._id_bytes), reader.take("u1", entries)))
        unique, steps, counts = (np.concatenate(each) for each in zip(*parts, strict=True))
        width = int(unique.max(initial=1))
        slots = np.arange(width, dtype="u1") < unique[:, None]
        ids = np.zeros(slots.shape, np.int64)
        ids[slots] = steps
        np.cumsum(ids, axis=1, out=ids)
        chances = np.full(slots.shape, -np.inf, np.float32)
        chances[slots] = np.log(np.arange(1, 257, dtype=np.float32) / self.draws)[counts]
        return SparseTargets(torch.from_numpy(ids), torch.from_numpy(chances), "sampled", self.temperature)


@dataclass(frozen=True)
class TopK(Codec):
    """The K likeliest tokens and the exact mass of all others.

    A row: ids [n * K], the likeliest first; codes of their log-probabilities, each as the distance to the one before
    it, u1[n * K]: -(code / 56)^2 nats, 254 also for everything below, 255 for no token; the mass of the others, f4[n].
    Read again, the kept probabilities are scaled so that they and the others' mass are 1.

    Args:
        k: K, at most V.
        temperature: of the distribution; training must use the same.
    """

    k: int = 64
    temperature: float = 1.0
    name = "top_k"

    def __post_init__(self) -> None:
        if not 1 <= self.k <= self.vocabulary:
            raise ShapeError(f"TopK: expected k in 1..{self.vocabulary}, got {self.k}.")
        _check_temperature("TopK", self.temperature)

    def _encode(self, said: Targets, seed: int) -> tuple[bytes, Tensor | None]:
        if isinstance(said, SparseTargets):
            kept = [self._of_sparse(said)]
        else:
            kept = [self._of_logits(part) for part in _chunks(_logits(said, self.name), self.vocabulary)]
        ids, chances, others, normalizer = (torch.cat(each) for each in zip(*kept, strict=True))
        codes = (SCALE * (-_numbers(chances).cpu()).clamp_min(0).sqrt()).round().clamp_max(UNUSED - 1)
        codes = codes.masked_fill(chances.cpu() == -math.inf, UNUSED)
        steps = torch.diff(codes, prepend=torch.zeros_like(codes[:, :1]))
        arrays = (
            pack(ids.cpu().numpy().astype("<u4").ravel(), self._id_bytes),
            pack(steps.numpy().astype("u1").ravel()),
            pack(others.cpu().numpy().astype("<f4")),
        )
        return b"".join(arrays), normalizer if self.temperature == 1 and not isinstance(said, SparseTargets) else None

    def _of_logits(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        top, blocks = _relative(logits, self.temperature)
        # The K likeliest tokens lie in the K blocks with the largest maxima.
        best = blocks.amax(-1).topk(min(self.k, blocks.shape[1])).indices
        kept, places = blocks.gather(1, best.unsqueeze(-1).expand(-1, -1, BLOCK)).flatten(1).topk(self.k)
        ids = best.gather(-1, places // BLOCK) * BLOCK + places % BLOCK
        mine = kept.exp().sum(-1)
        rest = blocks.exp_().flatten(1).scatter_(-1, ids, 0.0).sum(-1)  # all less the kept would be rounded
        total = (mine + rest).log()
        # Behind the vocabulary's end there is -inf: a slot without a token, whose id says nothing.
        ids = ids.clamp_max(self.vocabulary - 1)
        return ids, kept - total.unsqueeze(-1), rest / (mine + rest), top.squeeze(-1) + total

    def _of_sparse(self, said: SparseTargets) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        if said.kind != "bucket" or said.temperature != self.temperature:
            raise ShapeError(
                f"top_k: expected a teacher's likeliest tokens at temperature {self.temperature:g}, got {said.kind} "
                f"targets at {said.temperature:g}."
            )
        events = said.events(self.temperature)
        width = min(self.k, said.ids.shape[-1])
        kept, places = torch.where(said.used(), said.log_probs.float(), -math.inf).topk(width)
        rest = events[..., :-1].exp().sum(-1) - kept.exp().sum(-1) + events[..., -1].exp()
        missing = self.k - width
        kept = torch.nn.functional.pad(kept, (0, missing), value=-math.inf)
        rest = rest.clamp_min(0.0)
        return torch.nn.functional.pad(said.ids.gather(-1, places), (0, missing)), kept, rest, rest

    def _decode(self, readers: Sequence[Reader], tokens: Sequence[int], head: LMHead | None) -> SparseTargets:
        parts = []
        for reader, n in zip(readers, tokens, strict=True):
            ids = reader.take("<u4", n * self.k, self._id_bytes)
            parts.append((ids, reader.take("u1", n * self.k), reader.take("<f4", n)))
        ids, steps, others = (np.concatenate(each) for each in zip(*parts, strict=True))
        codes = np.cumsum(steps.reshape(-1, self.k), axis=1, dtype="u1")
        levels = -np.square(np.arange(256, dtype="f4") / np.float32(SCALE))
        levels[UNUSED] = -np.inf
        chances = torch.from_numpy(levels[codes])
        mass = torch.log1p(-torch.from_numpy(others).double()) - chances.double().logsumexp(-1)
        chances = (chances + mass.unsqueeze(-1)).float()
        whole = torch.from_numpy(ids.reshape(-1, self.k).astype(np.int64))
        return SparseTargets(whole, chances, "bucket", self.temperature)


@dataclass(frozen=True)
class Dense(Codec):
    """All log-probabilities in half precision: for small vocabularies. Any temperature, any divergence.

    A row: f2[n * V].
    """

    name = "dense"

    def _encode(self, said: Targets, seed: int) -> tuple[bytes, Tensor | None]:
        logits = _logits(said, self.name).float()
        normalizer = _numbers(logits.logsumexp(-1, keepdim=True))
        return pack((logits - normalizer).half().cpu().numpy().ravel()), normalizer.squeeze(-1)

    def _decode(self, readers: Sequence[Reader], tokens: Sequence[int], head: LMHead | None) -> DenseTargets:
        parts = [reader.take("<f2", n * self.vocabulary) for reader, n in zip(readers, tokens, strict=True)]
        return DenseTargets(torch.from_numpy(np.concatenate(parts)).reshape(-1, self.vocabulary))


@dataclass(frozen=True)
class Hidden(Codec):
    """The teacher's last hidden states as they are; the head is kept once. Lossless: any temperature, any divergence.

    A row: [n * H] in the teacher's dtype.

    Args:
        width: H.
        dtype: float32, bfloat16 or float16.
    """

    width: int = 0
    dtype: str = "float32"
    name = "hidden"

    def _encode(self, said: Targets, seed: int) -> tuple[bytes, Tensor | None]:
        if not isinstance(said, HeadTargets):
            raise ShapeError(
                "hidden: expected a teacher with a plain head, got one that gives "
                f"{'logits' if isinstance(said, DenseTargets) else 'sparse targets'}. Use the codec top_k or sampled."
            )
        return pack_floats(_numbers(said.hidden).to(getattr(torch, self.dtype))), None

    def _decode(self, readers: Sequence[Reader], tokens: Sequence[int], head: LMHead | None) -> HeadTargets:
        assert head is not None
        parts = [reader.take_floats(self.dtype, n * self.width) for reader, n in zip(readers, tokens, strict=True)]
        return HeadTargets(torch.cat(parts).reshape(-1, self.width), head)


CODECS: dict[str, type[Codec]] = {codec.name: codec for codec in (Sampled, TopK, Dense, Hidden)}


def codec_of(record: dict[str, Any]) -> Codec:
    """The codec of a record that `Codec.record` made.

    Raises:
        ShapeError: there is no such codec or parameter.
    """
    name = record.get("name")
    kind = CODECS.get(str(name))
    if kind is None:
        raise ShapeError(f"codec: expected one of {', '.join(CODECS)}, got {name}.{nearest(str(name), CODECS)}")
    parameters = {key: value for key, value in record.items() if key != "name"}
    unknown = set(parameters) - {field.name for field in fields(kind)}
    if unknown:
        raise ShapeError(f"codec: expected the parameters of {name}, got {', '.join(sorted(unknown))}.")
    return kind(**parameters)


def _relative(logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """The largest of logits [n, V] as [n, 1], and (logits - largest) / temperature in blocks [n, V / BLOCK, BLOCK],
    filled up with -inf.
    """
    n, V = logits.shape
    top = logits.amax(-1, keepdim=True).float()
    buffer = torch.empty(n, -(-V // BLOCK) * BLOCK, dtype=torch.float32, device=logits.device)
    buffer[:, V:] = -math.inf
    mine = torch.sub(logits, top, out=buffer[:, :V])
    if temperature != 1:
        mine.div_(temperature)
    return top, buffer.unflatten(-1, (-1, BLOCK))


def _at(points: Tensor, blocks: Tensor, ends: Tensor) -> Tensor:
    """The tokens at points of the running sum of chances, found first among the sums of blocks, then within one.

    Args:
        points: [n, N] float64 in [0, 1), as shares of the whole sum.
        blocks: [n, V / BLOCK, BLOCK] chances of any sum.
        ends: [n, V / BLOCK] float64, the sums to the end of each block.
    """
    target = points * ends[:, -1:]
    block = _first_above(ends, target).clamp_max(ends.shape[-1] - 1)  # NaN is above nothing
    rest = target - torch.nn.functional.pad(ends, (1, 0)).gather(-1, block)
    inner = blocks.gather(1, block.unsqueeze(-1).expand(-1, -1, BLOCK)).double().cumsum(-1)
    return block * BLOCK + _first_above(inner, rest.unsqueeze(-1)).squeeze(-1)


def _first_above(ends: Tensor, target: Tensor) -> Tensor:
    """The first place whose sum is above a number, but never one behind the last that adds to it."""
    last = torch.searchsorted(ends, ends[..., -1:].contiguous())
    return torch.minimum(torch.searchsorted(ends, target, right=True), last)


def _logits(said: Targets, codec: str) -> Tensor:
    if isinstance(said, SparseTargets):
        raise ShapeError(
            f"{codec}: expected a teacher with whole distributions, got sparse targets. Use the codec top_k."
        )
    if isinstance(said, MixtureTargets):
        raise ShapeError(
            f"{codec}: expected one teacher, got several that are mixed: what they say together at another temperature "
            "would not be known. Keep each in a cache of its own, and mix the caches."
        )
    return said.dense()


def _numbers(values: Tensor) -> Tensor:
    if values.isnan().any():
        raise ShapeError("teacher: expected numbers, got NaN. Check its weights, or run it in float32 or bfloat16.")
    return values


def _chunks(rows: Tensor, width: int) -> tuple[Tensor, ...]:
    """Rows in pieces of a chunk's elements, counted in rows of a width; one piece at least."""
    chunk = CHUNK if rows.device.type == "cpu" else LARGE_CHUNK
    return rows.split(max(1, chunk // width))


def _check_temperature(caller: str, temperature: float) -> None:
    if not 0 < temperature < math.inf:
        raise ShapeError(f"{caller}: expected temperature > 0, got {temperature}.")
