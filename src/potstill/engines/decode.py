"""Tokens from a causal language model, one after another: with its KV cache, and without the rows that have ended."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import Cache

from potstill.engines.sampling import Sampling
from potstill.models.split import run, undisturbed

Rows = list[list[int]]


@dataclass
class Written:
    """What a model wrote behind one prompt.

    Args:
        ids: the new tokens, with the one that ended them.
        log_probs: what the model itself gave each of them, at temperature 1 and over all tokens, nats.
        sampler_log_probs: what the distribution gave them that they were drawn from, nats; 0 where nothing was drawn,
            NaN where nobody tells.
        ended: the model ended it; False where there was no more room.
    """

    ids: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    sampler_log_probs: list[float] = field(default_factory=list)
    ended: bool = False


@dataclass(frozen=True)
class Guide:
    """Another model that has a say in every token, for a student whose teacher reads along.

    Args:
        model: a causal language model over the same tokens.
        blend: the probabilities [R, V] to draw from, out of the writer's and the guide's.
    """

    model: nn.Module
    blend: Callable[[Tensor, Tensor], Tensor]


def write(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    ends: frozenset[int],
    rooms: Sequence[int] | None = None,
    vocabulary: int | None = None,
    guide: Guide | None = None,
    stopped: Callable[[Rows], Sequence[bool]] | None = None,
    batch_size: int = 32,
) -> list[Written]:
    """One continuation of each prompt, in order. The model and everybody's random numbers are left as they were.

    A row has random numbers of its own, made of `sampling.seed` and its place: how many rows are written together, and
    when others end, changes rounding alone.

    Args:
        model: a causal language model of transformers, adapted or not; it runs in evaluation mode.
        prompts: token ids, at least one in each.
        sampling: how tokens are drawn; `samples` and `stop` are the caller's.
        ends: tokens that end a text.
        rooms: how many tokens each may have at most, >= 1; default: sampling.max_new_tokens.
        vocabulary: only the first so many tokens are ever drawn; None for all.
        guide: who has a say in every token.
        stopped: whether texts of new tokens end there, for what is no token.
        batch_size: rows that are written together; those of like length are.
    """
    generator = torch.Generator()
    if sampling.seed is None:
        generator.seed()
    else:
        generator.manual_seed(sampling.seed)
    most = sampling.max_new_tokens
    chances = torch.rand(len(prompts), most, dtype=torch.float64, generator=generator)
    rooms = [most] * len(prompts) if rooms is None else [min(room, most) for room in rooms]
    written = [Written() for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    device = next(model.parameters()).device
    mixed, dtype = torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)
    with undisturbed(model), torch.autocast(device.type, dtype, enabled=mixed):
        for start in range(0, len(order), batch_size):
            places = order[start : start + batch_size]
            rows = [list(prompts[i]) for i in places]
            voices = [_reader(model, rows)] + ([] if guide is None else [_reader(guide.model, rows)])
            while places:
                step = len(written[places[0]].ids)
                logits = [voice.logits[:, :vocabulary].float() for voice in voices]
                chance = chances[places, step].to(device)
                drawn = _draw(logits, sampling, chance, None if guide is None else guide.blend)
                for place, token, own, sampler in zip(places, *(one.tolist() for one in drawn), strict=True):
                    text = written[place]
                    text.ids.append(token)
                    text.log_probs.append(own)
                    text.sampler_log_probs.append(sampler)
                    text.ended = token in ends
                if stopped is not None:
                    for place, over in zip(places, stopped([written[i].ids for i in places]), strict=True):
                        written[place].ended |= bool(over)
                alive = [k for k, i in enumerate(places) if not written[i].ended and step + 1 < rooms[i]]
                if len(alive) < len(places):
                    places = [places[k] for k in alive]
                    if places:
                        for voice in voices:
                            voice.keep(alive)
                if places:
                    for voice in voices:
                        voice.read([written[i].ids[-1] for i in places])
    return written


def ends_of(model: Any, eos_token_id: int | None) -> frozenset[int]:
    """The tokens that end a text, by the tokenizer or by the model."""
    config = getattr(model, "generation_config", None)
    ends = None if config is None else config.eos_token_id
    return frozenset({eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None})


# Drawing.


def _draw(
    logits: list[Tensor], sampling: Sampling, chance: Tensor, blend: Callable[[Tensor, Tensor], Tensor] | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The next token of each row, its log-probability by the writer, and by what it was drawn from; [R] each."""
    own = logits[0]
    if sampling.sampling_temperature == 0:
        token = own.argmax(-1, keepdim=True)
        return token[:, 0], _log_prob(own, token), torch.zeros(len(own), device=own.device)
    chances = _chances(own, sampling)
    if blend is not None:
        chances = blend(chances, (logits[1] / sampling.sampling_temperature).softmax(-1))
    # The inverse of the cumulative distribution: one random number for each row, where torch.multinomial takes one for
    # each token of the vocabulary. In float64, because small steps are lost in float32 near 1.
    sums = chances.cumsum(-1, dtype=torch.float64)
    token = torch.searchsorted(sums, chance[:, None] * sums[:, -1:], right=True).clamp_max(own.shape[-1] - 1)
    sampler = chances.gather(-1, token)[:, 0].log() - sums[:, -1].log().float()
    return token[:, 0], sampler if blend is None and sampling.plain else _log_prob(own, token), sampler


def _log_prob(logits: Tensor, token: Tensor) -> Tensor:
    return logits.gather(-1, token)[:, 0] - logits.logsumexp(-1)


def _chances(logits: Tensor, sampling: Sampling) -> Tensor:
    """The probabilities [R, V] to draw from."""
    scaled = logits / sampling.sampling_temperature
    if 0 < sampling.top_k < scaled.shape[-1]:
        least = scaled.topk(sampling.top_k, -1).values[:, -1:]
        scaled = scaled.masked_fill(scaled < least, -torch.inf)
    chances = scaled.softmax(-1)
    if sampling.top_p < 1:
        sorted_chances, order = chances.sort(-1, descending=True)
        before = sorted_chances.cumsum(-1) - sorted_chances
        kept = sorted_chances.masked_fill(before >= sampling.top_p, 0.0)  # the likeliest always stays
        chances = torch.zeros_like(chances).scatter(-1, order, kept)
        chances = chances / chances.sum(-1, keepdim=True)
    return chances


# Reading.


class _Reader(ABC):
    """A model that reads along some rows; `logits` [R, V] is what it says of the token that comes next."""

    logits: Tensor

    @abstractmethod
    def read(self, tokens: list[int]) -> None:
        """One more token of each row."""

    @abstractmethod
    def keep(self, rows: list[int]) -> None:
        """Go on with these rows alone."""


def _reader(model: nn.Module, rows: Rows) -> _Reader:
    adapter = getattr(model, "active_peft_config", None)
    if adapter is None or not adapter.is_prompt_learning:
        reader = _CachedReader(model, rows)
        if isinstance(reader.cache, Cache):
            return reader
    return _WholeReader(model, rows)


class _CachedReader(_Reader):
    """With the model's KV cache. Rows are padded on the left, which mask and positions leave out."""

    def __init__(self, model: nn.Module, rows: Rows) -> None:
        device, width = next(model.parameters()).device, max(map(len, rows))
        # Padding repeats the first token: it is read by nobody, and exists in every vocabulary.
        ids = torch.tensor([row[:1] * (width - len(row)) + row for row in rows], device=device)
        self._mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
        self._padded = not bool(self._mask.all())
        known = inspect.signature(getattr(model, "get_base_model", lambda: model)().forward).parameters
        self._options = {"logits_to_keep": 1} if "logits_to_keep" in known else {}
        self._placed = "position_ids" in known
        self._model = model
        self._places = (self._mask.cumsum(1) - 1).clamp_min(0)
        self.cache: Any = None
        self._run(ids)

    def read(self, tokens: list[int]) -> None:
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(tokens), 1)], 1)
        self._places = self._places[:, -1:] + 1
        self._run(torch.tensor(tokens, device=self._mask.device)[:, None])

    def keep(self, rows: list[int]) -> None:
        kept = torch.tensor(rows, device=self._mask.device)
        self._mask, self._places = self._mask[kept], self._places[kept]
        self.cache.batch_select_indices(kept)

    def _run(self, ids: Tensor) -> None:
        made = self._model(
            input_ids=ids,
            attention_mask=self._mask if self._padded else None,
            past_key_values=self.cache,
            use_cache=True,
            **({"position_ids": self._places} if self._placed else {}),
            **self._options,
        )
        self.logits, self.cache = made.logits[:, -1], getattr(made, "past_key_values", None)


class _WholeReader(_Reader):
    """The whole rows again for each token: for models without a KV cache, or with tokens of their own in front."""

    def __init__(self, model: nn.Module, rows: Rows) -> None:
        self._model, self._rows = model, [list(row) for row in rows]
        self._run()

    def read(self, tokens: list[int]) -> None:
        for row, token in zip(self._rows, tokens, strict=True):
            row.append(token)
        self._run()

    def keep(self, rows: list[int]) -> None:
        self._rows = [self._rows[k] for k in rows]

    def _run(self) -> None:
        device = next(self._model.parameters()).device
        ids = pad_sequence([torch.tensor(row) for row in self._rows], batch_first=True, padding_value=self._rows[0][0])
        lengths = torch.tensor([len(row) for row in self._rows])
        mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
        logits = run(self._model, {"input_ids": ids.to(device), "attention_mask": mask.to(device)}).logits
        last = logits.shape[1] - ids.shape[1] + lengths - 1
        self.logits = logits[torch.arange(len(ids), device=device), last.to(device)]
