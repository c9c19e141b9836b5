"""Token generation with a causal language model: batched, with its KV cache, finished rows leave the batch."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import Cache

from potstill.engines.sampling import Sampling
from potstill.losses.token_losses import on_float64_device
from potstill.models.split import run, undisturbed


@dataclass
class GeneratedTokens:
    """Tokens that a model generated after one prompt, with the end-of-text token where there is one.

    Log-probabilities are in nats: the model's own at temperature 1 over the full vocabulary, and those under the
    distribution that was sampled, which are 0 for greedy decoding and NaN where unknown.
    """

    ids: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    sampler_log_probs: list[float] = field(default_factory=list)
    ended: bool = False  # by the model; False where the token limit cut it


@dataclass(frozen=True)
class Guide:
    """A teacher over the same tokens that changes the distribution from which the student's tokens are drawn."""

    model: nn.Module
    blend: Callable[
        [Tensor, Tensor], Tensor
    ]  # probabilities [R, V] to draw from, given the student's and the teacher's


def generate_tokens(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    eos_ids: frozenset[int],
    max_tokens: Sequence[int] | None = None,
    vocabulary: int | None = None,
    guide: Guide | None = None,
    is_stopped: Callable[[list[list[int]]], Sequence[bool]] | None = None,
    batch_size: int = 32,
) -> list[GeneratedTokens]:
    """Generate one continuation of each prompt, in order, in evaluation mode; the global random state stays untouched.

    Each row has random numbers of its own, from `sampling.seed` and its index: batch size and the ends of other rows
    change rounding alone.

    Args:
        model: a causal language model of transformers, with or without an adapter.
        prompts: token ids, at least one in each.
        sampling: how tokens are drawn; `samples` and `stop` are not used.
        max_tokens: limit of each row, >= 1, besides sampling.max_new_tokens.
        vocabulary: only the first so many tokens are drawn; None for all.
        is_stopped: whether rows of new tokens end there, for stop strings.
        batch_size: rows in one batch; rows of similar length share one.
    """
    generator = torch.Generator()
    generator.manual_seed(generator.seed() if sampling.seed is None else sampling.seed)
    limit = sampling.max_new_tokens
    uniform = torch.rand(len(prompts), limit, dtype=torch.float64, generator=generator)
    limits = [limit] * len(prompts) if max_tokens is None else [min(number, limit) for number in max_tokens]
    outputs = [GeneratedTokens() for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    device = next(model.parameters()).device
    autocast, dtype = torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)
    with undisturbed(model), torch.autocast(device.type, dtype, enabled=autocast):
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            ids = [list(prompts[i]) for i in rows]
            decoders = [_decoder(model, ids)] + ([] if guide is None else [_decoder(guide.model, ids)])
            while True:
                step = len(outputs[rows[0]].ids)
                logits = [decoder.logits[:, :vocabulary].float() for decoder in decoders]
                drawn = _draw(logits, sampling, uniform[rows, step], None if guide is None else guide.blend)
                for i, token, log_prob, sampler in zip(rows, *(column.tolist() for column in drawn), strict=True):
                    output = outputs[i]
                    output.ids.append(token)
                    output.log_probs.append(log_prob)
                    output.sampler_log_probs.append(sampler)
                    output.ended = token in eos_ids
                if is_stopped is not None:
                    for i, stopped in zip(rows, is_stopped([outputs[i].ids for i in rows]), strict=True):
                        outputs[i].ended |= bool(stopped)
                active = [k for k, i in enumerate(rows) if not outputs[i].ended and step + 1 < limits[i]]
                if not active:
                    break
                for decoder in decoders if len(active) < len(rows) else ():
                    decoder.keep(active)
                rows = [rows[k] for k in active]
                for decoder in decoders:
                    decoder.append([outputs[i].ids[-1] for i in rows])
    return outputs


def _draw(
    logits: list[Tensor], sampling: Sampling, uniform: Tensor, blend: Callable[[Tensor, Tensor], Tensor] | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The next token of each row, its log-probability by the model, and by the sampled distribution; [R] each."""
    own = logits[0]
    if sampling.sampling_temperature == 0:
        token = own.argmax(-1, keepdim=True)
        return token[:, 0], _log_prob(own, token), torch.zeros(len(own), device=own.device)
    probs = _sampling_probs(own, sampling)
    if blend is not None:
        probs = blend(probs, (logits[1] / sampling.sampling_temperature).softmax(-1))
    # The inverse of the cumulative distribution: one random number for each row, where torch.multinomial takes one for
    # each token of the vocabulary. In float64, because small steps are lost in float32 near 1.
    sums = on_float64_device(probs).cumsum(-1, dtype=torch.float64)
    drawn = torch.searchsorted(sums, uniform.to(sums.device)[:, None] * sums[:, -1:], right=True)
    token = drawn.clamp_max(own.shape[-1] - 1).to(own.device)
    sampler = probs.gather(-1, token)[:, 0].log() - sums[:, -1].log().float().to(own.device)
    return token[:, 0], sampler if blend is None and sampling.plain else _log_prob(own, token), sampler


def _log_prob(logits: Tensor, token: Tensor) -> Tensor:
    return logits.gather(-1, token)[:, 0] - logits.logsumexp(-1)


def _sampling_probs(logits: Tensor, sampling: Sampling) -> Tensor:
    """The probabilities [R, V] to draw from, behind temperature, top_k and top_p."""
    scaled = logits / sampling.sampling_temperature
    if 0 < sampling.top_k < scaled.shape[-1]:
        least = scaled.topk(sampling.top_k, -1).values[:, -1:]
        scaled = scaled.masked_fill(scaled < least, -torch.inf)
    probs = scaled.softmax(-1)
    if sampling.top_p < 1:
        sorted_probs, order = probs.sort(-1, descending=True)
        before = sorted_probs.cumsum(-1) - sorted_probs
        kept = sorted_probs.masked_fill(before >= sampling.top_p, 0.0)  # the likeliest always stays
        probs = torch.zeros_like(probs).scatter(-1, order, kept)
        probs = probs / probs.sum(-1, keepdim=True)
    return probs


def _decoder(model: nn.Module, rows: list[list[int]]) -> _CachedDecoder | _UncachedDecoder:
    adapter = getattr(model, "active_peft_config", None)
    if adapter is None or not adapter.is_prompt_learning:
        decoder = _CachedDecoder(model, rows)
        if isinstance(decoder.cache, Cache):
            return decoder
    return _UncachedDecoder(model, rows)


class _CachedDecoder:
    """Next-token `logits` [R, V] with a KV cache. Rows are padded on the left; mask and positions leave padding out."""

    def __init__(self, model: nn.Module, rows: list[list[int]]) -> None:
        device, width = next(model.parameters()).device, max(map(len, rows))
        # Padding repeats the first token: it is never attended to, and exists in every vocabulary.
        ids = torch.tensor([row[:1] * (width - len(row)) + row for row in rows], device=device)
        self._mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
        self._padded = not bool(self._mask.all())
        parameters = inspect.signature(getattr(model, "get_base_model", lambda: model)().forward).parameters
        self._options = {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}
        self._takes_positions = "position_ids" in parameters
        self._model = model
        self._positions = (self._mask.cumsum(1) - 1).clamp_min(0)
        self.cache: Any = None
        self._run(ids)

    def append(self, tokens: list[int]) -> None:
        """Read one more token of each row."""
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(tokens), 1)], 1)
        self._positions = self._positions[:, -1:] + 1
        self._run(torch.tensor(tokens, device=self._mask.device)[:, None])

    def keep(self, rows: list[int]) -> None:
        """Drop all other rows."""
        kept = torch.tensor(rows, device=self._mask.device)
        self._mask, self._positions = self._mask[kept], self._positions[kept]
        self.cache.batch_select_indices(kept)

    def _run(self, ids: Tensor) -> None:
        output = self._model(
            input_ids=ids,
            attention_mask=self._mask if self._padded else None,
            past_key_values=self.cache,
            use_cache=True,
            **({"position_ids": self._positions} if self._takes_positions else {}),
            **self._options,
        )
        self.logits, self.cache = output.logits[:, -1], getattr(output, "past_key_values", None)


class _UncachedDecoder:
    """The same from full forward passes: for models without a KV cache, or with virtual tokens in front."""

    def __init__(self, model: nn.Module, rows: list[list[int]]) -> None:
        self._model, self._rows = model, [list(row) for row in rows]
        self._run()

    def append(self, tokens: list[int]) -> None:
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
