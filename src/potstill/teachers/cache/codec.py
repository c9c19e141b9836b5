"""Codecs, pure functions: a teacher's targets for one row of data as bytes, and back; docs/cache.md has the formats."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Annotated, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad

from potstill.errors import ShapeError, nearest
from potstill.losses.declared import Declared, Range
from potstill.losses.targets import DenseTargets, HeadTargets, LMHead, MixtureTargets, SparseTargets, Targets
from potstill.losses.token_losses import on_float64_device

ELEMENTS = 2**24  # of logits at a time
BLOCK = 64  # tokens of the vocabulary that are sampled from together
SCALE = 56.0  # the code of a log-probability of -x nats is round(SCALE * sqrt(x)): fine for large mass, to 20.6 nats
UNUSED = 255  # the code of a slot without a token; that before it stands for everything less likely

Temperature = Annotated[float, Range(gt=0, lt=math.inf)]


@dataclass(frozen=True)
class Codec(Declared):
    """A format of packed targets.

    Args:
        vocabulary: V, without padding rows of the head.
    """

    vocabulary: int

    def encode(
        self, targets: Targets, seed: int, *, labels: Tensor | None = None, label_log_probs: Tensor | None = None
    ) -> bytes:
        """Pack the targets of one row at its n target positions; the seed is of all random numbers of this row.

        Full distributions come with labels [n], other targets with log-probabilities of the labels [n] where known. A
        ShapeError where the codec cannot pack these targets, or they are NaN.
        """
        if isinstance(targets, MixtureTargets):
            raise ShapeError(
                f"{self.name}: expected one teacher, got a mixture, which is not known at another temperature. Cache "
                "each member, and mix the caches."
            )
        (size,) = targets.leading
        generator = torch.Generator().manual_seed(seed)  # on the CPU, so that every device draws the same numbers
        uniform = torch.rand((size, 1), generator=generator, dtype=torch.float64)
        pieces, known = [], []
        for some in _parts(size, self.vocabulary):
            part = targets.rows(some)
            logits = None if isinstance(part, SparseTargets) else part.dense()
            kept, normalizer = self._keep(part, logits, uniform[some])
            pieces.append(kept)
            if labels is not None:
                assert logits is not None, "labels are of full distributions"
                normalizer = logits.float().logsumexp(-1) if normalizer is None else normalizer
                known.append(logits.gather(-1, labels[some].unsqueeze(-1)).squeeze(-1).float() - normalizer)
        if labels is not None:
            label_log_probs = torch.cat(known)
        log_probs = torch.full((size,), math.nan) if label_log_probs is None else label_log_probs.cpu()
        arrays = self._pack(*(torch.cat(tensors) for tensors in zip(*pieces, strict=True)))
        return b"".join([pack(log_probs.half().numpy()), *arrays])

    def decode(
        self, rows: Sequence[bytes], tokens: Sequence[int], head: LMHead | None = None
    ) -> tuple[Targets, Tensor | None]:
        """Unpack one row or more, with n tokens each, on the CPU; codecs of hidden states need the teacher's head.

        Returns the targets over all their tokens, and the log-probabilities [N] of the labels or None. A ShapeError
        where the bytes have another number of tokens.
        """
        reader = Reader(rows)
        log_probs = reader.take("<f2", tokens)
        targets = self._decode(reader, np.asarray(tokens), head)
        reader.close()
        return targets, None if np.isnan(log_probs).any() else torch.from_numpy(log_probs.astype("f4"))

    @abstractmethod
    def _keep(
        self, targets: Targets, logits: Tensor | None, uniform: Tensor
    ) -> tuple[tuple[Tensor, ...], Tensor | None]:
        """What is kept of m positions, [m, ...] each, and log(sum(exp(logits))) [m] at temperature 1 as a by-product.

        `logits` [m, V] are those of full distributions, and `uniform` [m, 1] random numbers in [0, 1).
        """

    @abstractmethod
    def _pack(self, *kept: Tensor) -> list[bytes]:
        """The arrays of this codec, of what is kept of all n positions."""

    @abstractmethod
    def _decode(self, reader: Reader, tokens: NDArray[np.int64], head: LMHead | None) -> Targets: ...

    def record(self) -> dict[str, Any]:
        """Name and parameters, for `codec_of`."""
        return {"name": self.name, **asdict(self)}

    def _full(self, logits: Tensor | None) -> Tensor:
        if logits is None:
            raise ShapeError(
                f"{self.name}: expected a teacher with full distributions, got sparse targets. Use the codec top_k."
            )
        return logits

    @property
    def _id_bytes(self) -> int:
        return max(1, -(-(self.vocabulary - 1).bit_length() // 8))


@dataclass(frozen=True)
class Sampled(Codec):
    """N draws from the teacher, evenly spaced: the tokens drawn, and the count of each.

        the i-th draw of a token of text is the v with F(v - 1) <= (i + u) / N < F(v),   F(v) = p_0 + ... + p_v

    One number u in [0, 1) moves all N points (systematic resampling): v is drawn floor(N p_v) or ceil(N p_v) times, in
    expectation N p_v, with variance r (1 - r), where r is the fraction of N p_v, against N p_v (1 - p_v) of independent
    draws. Unbiased for divergences that are linear in the teacher (forward KL, soft cross-entropy).

    Args:
        draws: N, 1 to 255.
        temperature: of the distribution that is sampled; training must use the same.

    References:
        Anshumann et al. 2025 (random sampling distillation, with independent draws), arXiv 2503.16870; Kitagawa 1996,
        J. Comput. Graph. Stat. 5(1), appendix; Douc and Cappe 2005 (resampling schemes), arXiv cs/0507025.
    """

    draws: Annotated[int, Range(ge=1, le=255)] = 50
    temperature: Temperature = 1.0
    name = "sampled"

    def _keep(
        self, targets: Targets, logits: Tensor | None, uniform: Tensor
    ) -> tuple[tuple[Tensor, ...], Tensor | None]:
        logits = on_float64_device(self._full(logits))
        offsets = uniform.to(logits.device)
        drawn, normalizers = [], []
        width = max(self.vocabulary, self.draws * BLOCK)
        for part, offset in zip(_chunks(logits, width), _chunks(offsets, width), strict=True):
            top, blocks = _relative(part, self.temperature)
            ends = blocks.exp_().sum(-1).double().cumsum(-1)
            points = (offset + torch.arange(self.draws, device=offset.device)) / self.draws
            drawn.append(_tokens_at(points, blocks, ends).cpu())
            normalizers.append(top.squeeze(-1) + ends[:, -1].log())
        normalizer = _check_nan(torch.cat(normalizers))
        return (torch.cat(drawn),), normalizer if self.temperature == 1 else None

    def _pack(self, *kept: Tensor) -> list[bytes]:
        (ids,) = kept
        steps = torch.diff(ids, prepend=torch.zeros_like(ids[:, :1]))
        first = steps != 0
        first[:, 0] = True
        counts = torch.diff(first.flatten().nonzero().squeeze(-1), append=torch.tensor([ids.numel()]))
        return [
            pack(first.sum(-1).numpy().astype("u1")),
            pack(steps[first].numpy().astype("<u4"), self._id_bytes),
            pack((counts - 1).numpy().astype("u1")),
        ]

    def _decode(self, reader: Reader, tokens: NDArray[np.int64], head: LMHead | None) -> SparseTargets:
        unique = reader.take("u1", tokens)
        entries = [int(row.sum(dtype=np.int64)) for row in np.split(unique, np.cumsum(tokens)[:-1])]
        slots = np.arange(int(unique.max(initial=1)), dtype="u1") < unique[:, None]
        ids = np.zeros(slots.shape, np.int64)
        ids[slots] = reader.take("<u4", entries, self._id_bytes)
        np.cumsum(ids, axis=1, out=ids)
        log_probs = np.full(slots.shape, -np.inf, np.float32)
        log_probs[slots] = np.log(np.arange(1, 257, dtype=np.float32) / self.draws)[reader.take("u1", entries)]
        return SparseTargets(torch.from_numpy(ids), torch.from_numpy(log_probs), "sampled", self.temperature)


@dataclass(frozen=True)
class TopK(Codec):
    """The K likeliest tokens and the exact mass of all others; read, they add up to 1.

    Args:
        k: K, at most V.
        temperature: of the distribution; training must use the same.
    """

    k: int = 64
    temperature: Temperature = 1.0
    name = "top_k"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.k <= self.vocabulary:
            raise ShapeError(f"TopK: expected k in 1..{self.vocabulary}, got {self.k}.")

    def _keep(
        self, targets: Targets, logits: Tensor | None, uniform: Tensor
    ) -> tuple[tuple[Tensor, ...], Tensor | None]:
        if isinstance(targets, SparseTargets):
            return self._of_sparse(targets), None
        kept = [self._of_logits(part) for part in _chunks(self._full(logits), self.vocabulary)]
        *tensors, normalizer = (torch.cat(parts) for parts in zip(*kept, strict=True))
        return tuple(tensors), normalizer if self.temperature == 1 else None

    def _pack(self, *kept: Tensor) -> list[bytes]:
        ids, log_probs, others = kept
        log_probs = _check_nan(log_probs).cpu()
        codes = (SCALE * (-log_probs).clamp_min(0).sqrt()).round().clamp_max(UNUSED - 1)
        codes = codes.masked_fill(log_probs == -math.inf, UNUSED)
        steps = torch.diff(codes, prepend=torch.zeros_like(codes[:, :1]))
        return [
            pack(ids.cpu().numpy().astype("<u4").ravel(), self._id_bytes),
            pack(steps.numpy().astype("u1").ravel()),
            pack(others.cpu().numpy().astype("<f4")),
        ]

    def _of_logits(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        top, blocks = _relative(logits, self.temperature)
        # The K likeliest tokens are in the K blocks with the largest maxima.
        best = blocks.amax(-1).topk(min(self.k, blocks.shape[1])).indices
        kept, places = blocks.gather(1, best.unsqueeze(-1).expand(-1, -1, BLOCK)).flatten(1).topk(self.k)
        ids = best.gather(-1, places // BLOCK) * BLOCK + places % BLOCK
        mass = kept.exp().sum(-1)
        rest = blocks.exp_().flatten(1).scatter_(-1, ids, 0.0).sum(-1)  # a difference would be rounded
        total = (mass + rest).log()
        # Behind the end of the vocabulary there is -inf: a slot without a token, whose id does not matter.
        ids = ids.clamp_max(self.vocabulary - 1)
        return ids, kept - total.unsqueeze(-1), rest / (mass + rest), top.squeeze(-1) + total

    def _of_sparse(self, targets: SparseTargets) -> tuple[Tensor, Tensor, Tensor]:
        if targets.kind != "bucket" or targets.temperature != self.temperature:
            raise ShapeError(
                f"top_k: expected a teacher's likeliest tokens at temperature {self.temperature:g}, got {targets.kind} "
                f"targets at {targets.temperature:g}."
            )
        events = targets.events(self.temperature)
        width = min(self.k, targets.ids.shape[-1])
        kept, places = torch.where(targets.used(), targets.log_probs.float(), -math.inf).topk(width)
        rest = events[..., :-1].exp().sum(-1) - kept.exp().sum(-1) + events[..., -1].exp()
        rest = rest.clamp_min(0.0)
        missing = (0, self.k - width)
        return pad(targets.ids.gather(-1, places), missing), pad(kept, missing, value=-math.inf), rest

    def _decode(self, reader: Reader, tokens: NDArray[np.int64], head: LMHead | None) -> SparseTargets:
        ids = reader.take("<u4", tokens * self.k, self._id_bytes).reshape(-1, self.k)
        codes = np.cumsum(reader.take("u1", tokens * self.k).reshape(-1, self.k), axis=1, dtype="u1")
        others = torch.from_numpy(reader.take("<f4", tokens)).double()
        levels = -np.square(np.arange(256, dtype="f4") / np.float32(SCALE))
        levels[UNUSED] = -np.inf
        log_probs = torch.from_numpy(levels[codes]).double()
        shift = torch.log1p(-others) - log_probs.logsumexp(-1)
        log_probs = (log_probs + shift.unsqueeze(-1)).float()
        return SparseTargets(torch.from_numpy(ids.astype(np.int64)), log_probs, "bucket", self.temperature)


@dataclass(frozen=True)
class Dense(Codec):
    """All log-probabilities in half precision, f2[n * V]: for small vocabularies, at any temperature and divergence."""

    name = "dense"

    def _keep(
        self, targets: Targets, logits: Tensor | None, uniform: Tensor
    ) -> tuple[tuple[Tensor, ...], Tensor | None]:
        values = self._full(logits).float()
        normalizer = _check_nan(values.logsumexp(-1, keepdim=True))
        return ((values - normalizer).half().cpu(),), normalizer.squeeze(-1)

    def _pack(self, *kept: Tensor) -> list[bytes]:
        return [pack(kept[0].numpy().ravel())]

    def _decode(self, reader: Reader, tokens: NDArray[np.int64], head: LMHead | None) -> DenseTargets:
        values = torch.from_numpy(reader.take("<f2", tokens * self.vocabulary))
        return DenseTargets(values.reshape(-1, self.vocabulary))


@dataclass(frozen=True)
class HiddenStates(Codec):
    """The teacher's last hidden states, [n * H] as they are; the head is stored once. Any temperature and divergence.

    Args:
        width: H.
        dtype: float32, bfloat16 or float16.
    """

    width: int = 0
    dtype: str = "float32"
    name = "hidden"

    def _keep(
        self, targets: Targets, logits: Tensor | None, uniform: Tensor
    ) -> tuple[tuple[Tensor, ...], Tensor | None]:
        if not isinstance(targets, HeadTargets):
            raise ShapeError(
                f"hidden: expected a teacher with a plain head, got {type(targets).__name__}. "
                "Use the codec top_k or sampled."
            )
        return (_check_nan(targets.hidden).to(getattr(torch, self.dtype)),), None

    def _pack(self, *kept: Tensor) -> list[bytes]:
        return [pack_floats(kept[0])]

    def _decode(self, reader: Reader, tokens: NDArray[np.int64], head: LMHead | None) -> HeadTargets:
        assert head is not None
        return HeadTargets(reader.take_floats(self.dtype, tokens * self.width).reshape(-1, self.width), head)


def pack(values: NDArray[Any], planes: int | None = None) -> bytes:
    """Pack elements as planes of bytes, the lowest first, because such bytes compress well together."""
    split = values.view("u1").reshape(len(values), values.itemsize)[:, :planes]
    return np.ascontiguousarray(split.T).tobytes()


def pack_floats(values: Tensor) -> bytes:
    """Pack floats of any shape by their bits, because NumPy has no bfloat16."""
    kind = torch.int32 if values.dtype == torch.float32 else torch.int16
    return pack(values.detach().cpu().contiguous().view(kind).numpy().ravel())


class Reader:
    """Reads the arrays of several rows of bytes, one after the other."""

    def __init__(self, rows: Sequence[bytes]) -> None:
        self._rows = rows
        self._offsets = [0] * len(rows)

    def take(self, dtype: str, counts: Iterable[int], planes: int | None = None) -> NDArray[Any]:
        """Read the next array of each row, of as many elements as its count, and join them."""
        kind = np.dtype(dtype)
        planes = planes or kind.itemsize
        arrays = []
        for i, (row, count) in enumerate(zip(self._rows, counts, strict=True)):
            start, end = self._offsets[i], self._offsets[i] + planes * count
            if end > len(row):
                raise ShapeError(f"codec: expected a row of at least {end} bytes, got {len(row)}.")
            elements = np.zeros((count, kind.itemsize), "u1")
            elements[:, :planes] = np.frombuffer(row, "u1")[start:end].reshape(planes, count).T
            arrays.append(elements.view(kind).reshape(count))
            self._offsets[i] = end
        return np.concatenate([np.zeros(0, kind), *arrays])

    def take_floats(self, dtype: str, counts: Iterable[int]) -> Tensor:
        """Read floats of a torch dtype that `pack_floats` packed."""
        bits = self.take("<i4" if dtype == "float32" else "<i2", counts)
        return torch.from_numpy(bits).view(getattr(torch, dtype))

    def close(self) -> None:
        """Check that every row is read to its end."""
        for row, offset in zip(self._rows, self._offsets, strict=True):
            if offset < len(row):
                raise ShapeError(f"codec: expected a row of {offset} bytes, got {len(row)}.")


def codec_of(record: dict[str, Any]) -> Codec:
    """Make the codec that `Codec.record` describes."""
    parameters = dict(record)
    name = str(parameters.pop("name", None))
    if name not in Codec.kinds:
        raise ShapeError(f"codec: expected one of {', '.join(Codec.kinds)}, got {name}.{nearest(name, Codec.kinds)}")
    if unknown := set(parameters) - {field.name for field in fields(Codec.kinds[name])}:
        raise ShapeError(f"codec: expected the parameters of {name}, got {', '.join(sorted(unknown))}.")
    codec: Codec = Codec.kinds[name](**parameters)
    return codec


def _relative(logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """The largest logit [n, 1], and (logits - largest) / temperature in blocks [n, V / BLOCK, BLOCK], then -inf."""
    n, V = logits.shape
    top = logits.amax(-1, keepdim=True).float()
    buffer = torch.empty(n, -(-V // BLOCK) * BLOCK, dtype=torch.float32, device=logits.device)
    buffer[:, V:] = -math.inf
    relative = torch.sub(logits, top, out=buffer[:, :V])
    if temperature != 1:
        relative.div_(temperature)
    return top, buffer.unflatten(-1, (-1, BLOCK))


def _tokens_at(points: Tensor, blocks: Tensor, ends: Tensor) -> Tensor:
    """The tokens at points [n, N] of the cumulative distribution of blocks, whose sums to their ends are `ends`."""
    target = points * ends[:, -1:]
    block = _first_above(ends, target).clamp_max(ends.shape[-1] - 1)  # NaN is above nothing
    rest = target - pad(ends, (1, 0)).gather(-1, block)
    inner = blocks.gather(1, block.unsqueeze(-1).expand(-1, -1, BLOCK)).double().cumsum(-1)
    return block * BLOCK + _first_above(inner, rest.unsqueeze(-1)).squeeze(-1)


def _first_above(ends: Tensor, target: Tensor) -> Tensor:
    """The first place whose sum is above a number, but none behind the last that adds to it."""
    last = torch.searchsorted(ends, ends[..., -1:].contiguous())
    return torch.minimum(torch.searchsorted(ends, target, right=True), last)


def _check_nan(values: Tensor) -> Tensor:
    if values.isnan().any():
        raise ShapeError("teacher: expected numbers, got NaN. Check its weights, or run it in float32 or bfloat16.")
    return values


def _parts(size: int, vocabulary: int) -> Iterator[slice]:
    """Split positions so that the logits of a part have about ELEMENTS numbers; one empty part where there are none."""
    step = max(1, ELEMENTS // vocabulary)
    for start in range(0, max(1, size), step):
        yield slice(start, start + step)


def _chunks(rows: Tensor, width: int) -> tuple[Tensor, ...]:
    """Split rows of a width into chunks that fit a CPU's cache, or keep an accelerator busy."""
    return rows.split(max(1, (2**20 if rows.device.type == "cpu" else 2**24) // width))
