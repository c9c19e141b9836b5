"""On-policy samples: the student generates a share of its own training rows. The `rollout` part of a recipe."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from itertools import islice, product
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import PreTrainedTokenizerBase

from potstill.data.batches import PaddingCollator, pad_token_id
from potstill.engines.decode import GeneratedTokens, Guide, generate_tokens
from potstill.engines.sampling import Sampling, TokenSampling
from potstill.errors import RecipeError, ShapeError, UserError
from potstill.files import write_text
from potstill.losses.alignment import IGNORE, SAMPLER_LOG_PROBS, STUDENT_LOG_PROBS, target_positions
from potstill.losses.declared import Range, Record
from potstill.losses.schedule import Schedule, Share, for_run, value_at
from potstill.models.chat import end_token_ids
from potstill.train.samples import SampleStats
from potstill.train.server_writer import ServedWriter, StudentServer

Batch = Mapping[str, Tensor]


@dataclass(frozen=True)
class Replay(Record):
    """Train again on samples of earlier steps, for generation is the most expensive part (DistiLLM).

    Args:
        size: number of samples that are kept, the latest.
        fresh: share of a step's on-policy rows that is newly generated; the others are kept ones.
        age: maximum number of optimiser steps since a sample was generated; none by default.
    """

    size: Annotated[int, Range(ge=1)] = 1000
    fresh: Share = 0.5
    age: Annotated[int | None, Range(ge=1)] = None


@dataclass(frozen=True)
class Adapt(Record):
    """Raise the on-policy share when the held-out loss gets worse (DistiLLM).

    Args:
        by: how much the share is raised.
        margin: nats by which the held-out loss must exceed that of the evaluation before.
    """

    by: Annotated[float, Range(gt=0, le=1)] = 0.1
    margin: Annotated[float, Range(ge=0)] = 0.1


class OnPolicySample(NamedTuple):
    """A row that the student generated. A checkpoint has these names."""

    ids: list[int]  # with the prompt
    prompt: int  # number of prompt tokens
    text: GeneratedTokens
    step: int  # optimiser step of the weights that generated it
    teacher_prompt: Sequence[int] = ()  # where the teacher reads a prompt of its own


@dataclass(eq=False)
class Rollout(Record):
    """Replaces a share of an optimiser step's rows by what the student generates from their prompts.

    Rows are replaced before target tokens are counted, so that both kinds share one normaliser. An on-policy row has
    labels on its generated tokens, and two more columns hold the student's and the sampler's log-probabilities of
    these; they are NaN on all other tokens.

    The prompt is what stands before the first target token; where the first token is a target, as in plain text, it is
    the first `prompt_tokens`, at most half of the row. Rows whose prompt leaves no room are not replaced.

    Args:
        sampling: max_new_tokens and how tokens are drawn; its seed is not used.
        share: of a step's rows that are generated: 0 is data alone, 1 on-policy alone. The number of rows is rounded up
            or down at random, so that the mean over steps is exact. A step's first rows are replaced: of its batches at
            most one is mixed.
        limit: maximum number of tokens in a row, as both models allow; None for any.
        own_weight: weight of the mean over all sampled tokens of a step, and 1 - own_weight that of the mean over its
            other target tokens; None weighs all tokens alike. A step with one of both kinds alone is not weighed.
        vocabulary: number of tokens that both models share; no other token is drawn.
        guide: teacher that takes part in sampling; see `teacher_mix` and `teacher_top_k`.
        seed: with the optimiser step and the rank it decides all random numbers.
        server: generates with the student's weights; None where the student generates here. `limit` is then also the
            server's, and there is no guide.

    References:
        Agarwal et al. 2023 (GKD), arXiv 2306.13649, algorithm 1; Ko et al. 2024 (DistiLLM), arXiv 2402.03898, section
        3.3, for `replay` and `adapt`.
    """

    tokenizer: PreTrainedTokenizerBase
    sampling: Sampling
    _: KW_ONLY
    share: Share = 0.5
    own_weight: Share | None = None
    prompt_tokens: int = 32
    limit: int | None = None
    vocabulary: int | None = None
    guide: Guide | None = None
    replay: Replay | None = None
    adapt: Adapt | None = None
    seed: int = 0
    batch_size: int = 64
    server: ServedWriter | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.guide is not None and self.server is not None:
            raise ShapeError("Rollout: expected a guide or a server, got both. A guide needs the student's logits.")
        if self.adapt is not None and callable(self.share):
            raise ShapeError("Rollout: expected a number as the share that adapts, got a schedule. Choose one of them.")
        if self.server is not None:
            self.limit = min(self.server.limit, self.limit or self.server.limit)
        self.stats = SampleStats()
        self.latest: list[OnPolicySample] = []
        self._kept: deque[OnPolicySample] = deque(maxlen=0 if self.replay is None else self.replay.size)
        self._raised = 0.0
        self._last_loss: float | None = None

    def share_at(self, step: int) -> float:
        return min(value_at(self.share, step) + self._raised, 1.0)

    def __call__(self, batches: Sequence[Batch], student: nn.Module, *, step: int, rank: int = 0) -> list[Batch]:
        """Replace a share of the rows of one optimiser step, counted from 0: input_ids, attention_mask and labels."""
        if self.server is not None and self.share_at(step) > 0:
            self.server.update(student, step, rank)
        data = [row for batch in batches for row in unpadded_rows(batch)]
        rng = np.random.default_rng((self.seed, step, rank))
        number = _round_randomly(self.share_at(step) * len(data), rng)
        replaced = [i for i, row in enumerate(data) if self.prompt(row) is not None][:number]
        replayed = self._replayed(len(replaced), step, rng)
        fresh = replaced[: len(replaced) - len(replayed)]
        seed = int(rng.integers(2**62))
        self.latest = self._generate(student, [data[i] for i in fresh], step, seed)
        self._kept.extend(self.latest)
        samples = dict(zip(replaced, [*self.latest, *replayed], strict=True))
        self.stats.add(((sample.text, step - sample.step) for sample in samples.values()), len(data))
        collate = PaddingCollator(pad_token_id(self.tokenizer)[0])
        numbers = iter(range(len(data)))
        mixed: list[Batch] = []
        for batch in batches:
            rows = [*islice(numbers, len(batch["input_ids"]))]
            made = dict(batch)
            if not samples.keys().isdisjoint(rows):
                made = collate([example(samples[i], data[i]) if i in samples else data[i] for i in rows])
            # The columns are there without on-policy rows too: all ranks must log the same names.
            for name, column in ((STUDENT_LOG_PROBS, "log_probs"), (SAMPLER_LOG_PROBS, "sampler_log_probs")):
                made[name] = torch.full(made["input_ids"].shape, torch.nan, dtype=torch.float32)
                for values, sample in zip(made[name], map(samples.get, rows), strict=True):
                    if sample is not None:
                        values[sample.prompt : len(sample.ids)] = torch.tensor(getattr(sample.text, column))
            mixed.append({name: value.to(batch["input_ids"].device) for name, value in made.items()})
        return mixed if self.own_weight is None else weighted_by_text(mixed, value_at(self.own_weight, step))

    def prompt(self, row: Mapping[str, Sequence[int]]) -> list[int] | None:
        """The prompt of a row of input_ids and labels; None where there is none, or no room behind it."""
        ids = list(row["input_ids"])
        prompt = _before_targets(row) or self._beginning(ids)
        longest = max(len(prompt), len(_before_targets(row, "teacher_")))
        return prompt if prompt and (self.limit is None or longest < self.limit) else None

    def _beginning(self, ids: list[int]) -> list[int]:
        """The first tokens of a plain text, without the end of a document behind them."""
        length = min(self.prompt_tokens, len(ids) // 2)
        while length > 1 and ids[length - 1] == self.tokenizer.eos_token_id:
            length -= 1
        return ids[:length]

    def check_prompts(self, rows: Sequence[Mapping[str, Sequence[int]]]) -> list[str]:
        """Return notes on the prompts of training rows, or raise RecipeError where no row has one."""
        lengths = [len(prompt) for prompt in map(self.prompt, rows) if prompt is not None]
        if not lengths:
            raise RecipeError(
                f"rollout: expected rows with a prompt, got none in {len(rows)} rows. A row needs two tokens, and its "
                "prompt must be shorter than the models' positions."
            )
        without, new = len(rows) - len(lengths), self.sampling.max_new_tokens
        short = 0 if self.limit is None else sum(length + new > self.limit for length in lengths)
        notes = {
            f"rollout: {without} of {len(rows)} rows have no prompt: used as data alone.": without,
            f"rollout: {short} of {len(rows)} prompts leave less room than max_new_tokens {new} within "
            f"{self.limit} positions: samples are cut there.": short,
        }
        return [note for note, number in notes.items() if number]

    def _generate(
        self, student: nn.Module, rows: list[dict[str, list[int]]], step: int, seed: int
    ) -> list[OnPolicySample]:
        prompts = [self.prompt(row) or [] for row in rows]
        teacher_prompts = [_before_targets(row, "teacher_") for row in rows]
        sampling = replace(self.sampling, seed=seed)
        longest = [max(len(own), len(other)) for own, other in zip(prompts, teacher_prompts, strict=True)]
        max_tokens = [sampling.max_new_tokens if self.limit is None else self.limit - length for length in longest]
        options: dict[str, Any] = {"max_tokens": max_tokens, "vocabulary": self.vocabulary}
        if self.server is not None:
            step = self.server.step
            texts = self.server.generate(student, prompts, sampling, **options)
        else:
            eos_ids = end_token_ids(self.tokenizer, student)
            options |= {"eos_ids": eos_ids, "guide": self.guide, "batch_size": self.batch_size}
            texts = generate_tokens(student, prompts, sampling, **options)
        return [
            OnPolicySample(prompt + text.ids, len(prompt), text, step, teacher_prompt)
            for prompt, teacher_prompt, text in zip(prompts, teacher_prompts, texts, strict=True)
        ]

    def _replayed(self, num_rows: int, step: int, rng: np.random.Generator) -> list[OnPolicySample]:
        """Samples of earlier steps for the on-policy rows that are not generated anew."""
        if self.replay is None:
            return []
        oldest = -1 if self.replay.age is None else step - self.replay.age
        usable = [sample for sample in self._kept if sample.step >= oldest]
        number = min(num_rows - _round_randomly(value_at(self.replay.fresh, step) * num_rows, rng), len(usable))
        return [usable[i] for i in rng.choice(len(usable), number, replace=False)] if number else []

    def update(self, loss: float) -> None:
        """Adapt the share to a held-out loss, in nats."""
        if self.adapt is None:
            return
        if self._last_loss is not None and loss > self._last_loss + self.adapt.margin:
            self._raised += self.adapt.by
        self._last_loss = loss

    def save(self, folder: Path, rank: int) -> None:
        """Save this rank's state in a checkpoint; a server gets new weights at the next step, as on resuming."""
        kept = [{**sample._asdict(), "text": vars(sample.text)} for sample in self._kept]
        state = {"raised": self._raised, "last_loss": self._last_loss, "kept": kept}
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / f"rollout-{rank}.json", json.dumps(state))
        if self.server is not None:
            self.server.push_due = True

    def load(self, folder: Path, rank: int) -> None:
        """Load what `save` wrote, or raise UserError without it."""
        path = folder / f"rollout-{rank}.json"
        if not path.exists():
            raise UserError(
                f"train: expected {path.name} in {folder}, got none. Resume with as many ranks as before, and with a "
                "rollout as before: each rank saves its own samples."
            )
        state = json.loads(path.read_text())
        self._raised, self._last_loss = state["raised"], state["last_loss"]
        self._kept.clear()
        self._kept.extend(OnPolicySample(**{**row, "text": GeneratedTokens(**row["text"])}) for row in state["kept"])

    def close(self) -> None:
        """Delete what a server read from the disk."""
        if self.server is not None:
            self.server.close()

    def decode(self, sample: OnPolicySample) -> tuple[str, str]:
        """A sample's prompt and generated text."""
        decode = self.tokenizer.decode
        return str(decode(sample.ids[: sample.prompt])), str(decode(sample.ids[sample.prompt :]))


def teacher_mix(teacher: nn.Module, share: float) -> Guide:
    """Sample from share * p + (1 - share) * q, for early samples worth training on (MiniLLM, arXiv 2306.08543, 2.2)."""
    return Guide(teacher, lambda q, p: share * p + (1 - share) * q)


def teacher_top_k(teacher: nn.Module, top_k: int) -> Guide:
    """Let the teacher draw again what is not among its top_k likeliest (Speculative KD, arXiv 2410.11325, algorithm 1).

    q_v [v in top_k] + q(others) * p_v
    """

    def blend(q: Tensor, p: Tensor) -> Tensor:
        likeliest = p.topk(min(top_k, p.shape[-1]), -1).indices
        kept = torch.zeros_like(q).scatter(-1, likeliest, q.gather(-1, likeliest))
        return kept + (1 - kept.sum(-1, keepdim=True)).clamp_min(0) * p

    return Guide(teacher, blend)


def _round_randomly(number: float, rng: np.random.Generator) -> int:
    """Round up or down at random, so that the mean is the number. Takes one random number, whatever it is."""
    return int(number + rng.random() * (1 - 1e-9))


def unpadded_rows(batch: Mapping[str, Tensor]) -> list[dict[str, list[Any]]]:
    """The rows of a batch without padding: input_ids, labels, weights, and the teacher's own where there are."""
    rows: list[dict[str, list[Any]]] = [{} for _ in batch["input_ids"]]
    for prefix, name in product(("", "teacher_"), ("input_ids", "labels", "weights")):
        if prefix + name in batch:
            masks = batch[f"{prefix}attention_mask"].bool().cpu()
            for row, values, mask in zip(rows, batch[prefix + name].cpu(), masks, strict=True):
                row[prefix + name] = values[mask].tolist()
    return rows


def weighted_by_text(batches: Sequence[Batch], own_weight: float) -> list[Batch]:
    """Weigh the tokens of an optimiser step with on-policy rows, over all ranks; see `Rollout.own_weight`."""
    own = [~batch[STUDENT_LOG_PROBS].isnan() for batch in batches]
    weights = [batch.get("weights", torch.ones_like(batch[STUDENT_LOG_PROBS])) for batch in batches]
    targets = [pad(target_positions(batch["labels"]), (1, 0)) for batch in batches]
    totals = torch.zeros(2, device=batches[0]["input_ids"].device)
    for weight, target, sampled in zip(weights, targets, own, strict=True):
        counted = weight * target
        totals += torch.stack([(counted * sampled).sum(), (counted * ~sampled).sum()])
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(totals)
    if not totals.all():
        return list(batches)
    factors = totals.new_tensor([own_weight, 1 - own_weight]) * totals.sum() / totals
    by_token = (w * torch.where(x, factors[0], factors[1]) for w, x in zip(weights, own, strict=True))
    return [{**batch, "weights": w} for batch, w in zip(batches, by_token, strict=True)]


def _before_targets(row: Mapping[str, Sequence[int]], prefix: str = "") -> list[int]:
    """The tokens before the first target token."""
    labels = row.get(f"{prefix}labels", ())
    first = next((i for i, label in enumerate(labels) if label != IGNORE), 0)
    return list(row[f"{prefix}input_ids"][:first]) if first else []


def example(sample: OnPolicySample, replaced: Mapping[str, Any]) -> dict[str, list[Any]]:
    """The training row of a sample, with the columns of the row that it replaces; each token has weight 1."""
    row = {}
    for prefix, prompt in (("", sample.ids[: sample.prompt]), ("teacher_", list(sample.teacher_prompt))):
        if f"{prefix}input_ids" in replaced:
            row[f"{prefix}input_ids"] = prompt + sample.text.ids
            row[f"{prefix}labels"] = [IGNORE] * len(prompt) + sample.text.ids
    return row | ({"weights": [1.0] * len(sample.ids)} if "weights" in replaced else {})


@dataclass(frozen=True)
class RolloutConfig(TokenSampling):
    """The student generates a share of its training rows from their prompts, and the teacher scores them (GKD).

    Args:
        on_policy_fraction: of the rows of a step: 0 is data alone, 1 on-policy samples alone
        own_weight: weight of the mean over sampled tokens, and 1 - own_weight of that over the data; by default each
            token weighs the same
        max_new_tokens: maximum number of tokens that the student generates after a prompt
        sampling_temperature: divides the logits for sampling; not the objective's temperature
        prompt_tokens: the prompt of plain text: a row's first tokens, at most half
        batch_size: samples that are generated together, without a server
        teacher_mix: the teacher's share in the distribution that is sampled (MiniLLM: 0.2)
        teacher_top_k: the teacher draws again what is not among its likeliest tokens (Speculative KD)
        server: generates the samples; by default the student itself, in this process, between its steps
        replay: train again on samples of earlier steps
        adapt: raise the share when the held-out loss gets worse
    """

    on_policy_fraction: Share = 0.5
    own_weight: Share | None = None
    max_new_tokens: Annotated[int, Range(ge=1)] = 128
    sampling_temperature: Annotated[float, Range(gt=0)] = 1.0
    prompt_tokens: Annotated[int, Range(ge=1)] = 32
    batch_size: Annotated[int, Range(ge=1)] = 64
    teacher_mix: Annotated[float, Range(ge=0, lt=1)] = 0.0
    teacher_top_k: Annotated[int | None, Range(ge=1)] = None
    server: StudentServer | None = None
    replay: Replay | None = None
    adapt: Adapt | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        key = "teacher_mix" if self.teacher_mix else "teacher_top_k"
        if self.teacher_mix and self.teacher_top_k is not None:
            raise ShapeError("expected teacher_mix or teacher_top_k, got both")
        if self.server is not None and self.guided:
            raise ShapeError(f"expected {key} without server, got both. It needs the student's logits in this process")
        if self.server is not None and self.batch_size != type(self).batch_size:
            raise ShapeError("expected batch_size without server, got both. Set server.concurrency instead")
        if self.own_weight is not None and self.adapt is None and self.on_policy_fraction in (0, 1):
            kind = "samples" if self.on_policy_fraction else "data"
            raise ShapeError(f"expected an on_policy_fraction between 0 and 1 with own_weight, got {kind} alone")
        if self.adapt is not None and isinstance(self.on_policy_fraction, Schedule):
            raise ShapeError("expected a number as the on_policy_fraction that adapts, got a schedule")

    @property
    def guided(self) -> bool:
        """Whether the teacher takes part in sampling."""
        return self.teacher_mix > 0 or self.teacher_top_k is not None

    def build(
        self, tokenizer: PreTrainedTokenizerBase, teacher: nn.Module | None, *, steps: int, **options: Any
    ) -> Rollout:
        """Build the rollout of a run; options are limit, vocabulary, seed and server of `Rollout`."""
        guide = None
        if self.guided:
            assert teacher is not None
            top_k, share = self.teacher_top_k, self.teacher_mix
            guide = teacher_mix(teacher, share) if top_k is None else teacher_top_k(teacher, top_k)
        sampling = Sampling(self.max_new_tokens, self.sampling_temperature, self.top_p, self.top_k)
        scheduled = for_run(self, steps)
        options |= {"share": scheduled.on_policy_fraction, "own_weight": scheduled.own_weight}
        options |= {"guide": guide, "adapt": self.adapt}
        options |= {"prompt_tokens": self.prompt_tokens, "batch_size": self.batch_size}
        replay = None if self.replay is None else for_run(self.replay, steps)
        return Rollout(tokenizer, sampling, replay=replay, **options)
