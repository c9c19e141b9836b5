"""The student's own text in place of a share of the data: what on-policy distillation learns from."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from potstill.data.batches import PaddingCollator, pad_token_id
from potstill.data.files import write_text
from potstill.engines.decode import Guide, Written, ends_of, write
from potstill.engines.sampling import Sampling
from potstill.errors import ShapeError, UserError
from potstill.losses.alignment import IGNORE, SAMPLER_LOG_PROBS, STUDENT_LOG_PROBS
from potstill.losses.schedule import Number, value_at
from potstill.train.samples import TextSums
from potstill.train.server_writer import ServedWriter

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Replay:
    """Texts of earlier steps are learnt from again: writing is what costs most.

    Args:
        size: how many texts are kept, the latest.
        fresh: the share of the own rows of a step that is newly written; the others are kept ones.
        age: none is used that the student of more optimiser steps ago wrote; None for any.

    References:
        Ko et al. 2024 (DistiLLM), arXiv 2402.03898, section 3.3.
    """

    size: int = 1000
    fresh: Number = 0.5
    age: int | None = None


@dataclass(frozen=True)
class Adapt:
    """The share of own text grows when the student gets worse on held-out text.

    Args:
        by: how much it grows.
        margin: by how much the held-out loss must be above that of the evaluation before, in nats.

    References:
        Ko et al. 2024 (DistiLLM), arXiv 2402.03898, section 3.3.
    """

    by: float = 0.1
    margin: float = 0.1


class Row(NamedTuple):
    """A row that the student wrote, and when."""

    ids: list[int]
    prompt: int  # how many of them are the prompt
    text: Written
    step: int  # whose student wrote it
    teacher_prompt: Sequence[int] = ()  # where the teacher reads one of its own


class Rollout:
    """Replaces a share of the rows of an optimiser step by what the student itself writes behind their prompts.

    The rows are replaced before their tokens are counted, so that one normaliser holds over both kinds. A row that the
    student wrote has -100 in the labels of its prompt, its own tokens behind it, and two more columns of the batch say
    what the student and the sampler gave them; they are NaN everywhere else.

    A prompt is what stands before the first token that counts; of a row that counts from its first token on, such as
    plain text, it is the first `prompt_tokens`, at most half of it. A row whose prompt leaves no room stays as it is.

    Args:
        tokenizer: the student's.
        sampling: max_new_tokens and how tokens are drawn. Its seed is not used.
        share: of the rows of a step that become own text: 0 is data alone, 1 own text alone. In between it is rounded
            up or down by chance, so that the mean over steps is exact. The first rows of the step are taken: where a
            step has several batches, at most one is mixed.
        prompt_tokens: see above.
        limit: tokens in a row at most, as both models allow; None for any.
        vocabulary: the tokens that both models share; no other is ever drawn.
        guide: a teacher that has a say in what is written; see `teacher_mix` and `teacher_top_k`.
        replay: see `Replay`.
        adapt: see `Adapt`; `share` is where it begins.
        seed: with the optimiser step and the rank it decides all that is drawn.
        batch_size: rows that are written together, here.
        server: who writes with the student's weights, behind a server; None where the student itself does, here. Its
            limit holds beside `limit`, and nobody can guide it.

    References:
        Agarwal et al. 2023 (GKD), arXiv 2306.13649, algorithm 1.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        sampling: Sampling,
        *,
        share: Number = 0.5,
        prompt_tokens: int = 32,
        limit: int | None = None,
        vocabulary: int | None = None,
        guide: Guide | None = None,
        replay: Replay | None = None,
        adapt: Adapt | None = None,
        seed: int = 0,
        batch_size: int = 64,
        server: ServedWriter | None = None,
    ) -> None:
        if guide is not None and server is not None:
            raise ShapeError(
                "Rollout: expected a guide or a server, got both. A guide reads along, token by token, here."
            )
        if adapt is not None and callable(share):
            raise ShapeError("Rollout: expected a number as the share that adapts, got a schedule. Choose one of them.")
        self.sampling, self.guide = sampling, guide
        self.replay, self.adapt = replay, adapt
        self.sums = TextSums()
        self.latest: list[Row] = []
        self._tokenizer = tokenizer
        self._share = share
        self._prompt_tokens = prompt_tokens
        self.limit = limit if server is None else min(server.limit, limit or server.limit)
        self._server = server
        self._vocabulary = vocabulary
        self._seed, self._batch_size = seed, batch_size
        self._kept: deque[Row] = deque(maxlen=replay.size if replay is not None else 0)
        self._raised = 0.0
        self._last_loss: float | None = None

    def share_at(self, step: int) -> float:
        """The share of own text at an optimiser step."""
        return min(value_at(self._share, step) + self._raised, 1.0)

    def __call__(
        self, batches: Sequence[Mapping[str, Tensor]], student: nn.Module, *, step: int, rank: int = 0
    ) -> list[Batch]:
        """The batches of one optimiser step, with a share of their rows replaced.

        Args:
            batches: input_ids, attention_mask and labels, [B, T] each.
            student: who writes. It is left as it was.
            step: the optimiser step, from 0.
            rank: of this process.
        """
        if self._server is not None and self.share_at(step) > 0:
            self._server.follow(student, step, rank)
        data = [row for batch in batches for row in _rows(batch)]
        chance = np.random.default_rng((self._seed, step, rank))
        wanted = _rounded(self.share_at(step) * len(data), chance)
        places = [i for i, row in enumerate(data) if self.prompt(row) is not None][:wanted]
        again = self._again(len(places), step, chance)
        fresh = places[: len(places) - len(again)]
        seed = int(chance.integers(2**62))
        own = dict(zip(fresh, self._write(student, [data[i] for i in fresh], step, seed), strict=True))
        self._kept.extend(own.values())
        self.latest = list(own.values())
        own |= dict(zip(places[len(fresh) :], again, strict=True))
        self.sums.add(own.values(), step, len(data))
        collate, first = PaddingCollator(pad_token_id(self._tokenizer)[0]), 0
        made: list[Batch] = []
        for batch in batches:
            rows = range(first, first + len(batch["input_ids"]))
            first = rows.stop
            mixed: Batch = dict(batch)
            if not own.keys().isdisjoint(rows):
                mixed = collate([_example(own[i], data[i]) if i in own else data[i] for i in rows])
            # The columns are there without own rows too: all ranks must have the same things to log.
            written = [own.get(i) for i in rows]
            mixed[STUDENT_LOG_PROBS] = _column(written, "log_probs", mixed["input_ids"])
            mixed[SAMPLER_LOG_PROBS] = _column(written, "sampler_log_probs", mixed["input_ids"])
            device = batch["input_ids"].device
            made.append({name: value.to(device) for name, value in mixed.items()})
        return made

    def prompt(self, row: Mapping[str, Sequence[int]]) -> list[int] | None:
        """What the student goes on from, of a row of input_ids and labels; None where there is nothing, or no room."""
        ids = list(row["input_ids"])
        prompt = _unlearnt(row) or ids[: min(self._prompt_tokens, len(ids) // 2)]
        longest = max(len(prompt), len(_unlearnt(row, "teacher_")))
        return prompt if prompt and (self.limit is None or longest < self.limit) else None

    def _write(self, student: nn.Module, rows: list[dict[str, list[int]]], step: int, seed: int) -> list[Row]:
        prompts = [self.prompt(row) or [] for row in rows]
        theirs = [_unlearnt(row, "teacher_") for row in rows]
        sampling = Sampling(**{**vars(self.sampling), "seed": seed})
        longest = [max(len(mine), len(other)) for mine, other in zip(prompts, theirs, strict=True)]
        rooms = [sampling.max_new_tokens if self.limit is None else self.limit - one for one in longest]
        if self._server is not None:
            step = self._server.step
            written = self._server.write(student, prompts, sampling, rooms=rooms, vocabulary=self._vocabulary)
        else:
            written = write(
                student,
                prompts,
                sampling,
                ends=ends_of(student, self._tokenizer.eos_token_id),
                rooms=rooms,
                vocabulary=self._vocabulary,
                guide=self.guide,
                batch_size=self._batch_size,
            )
        return [
            Row(mine + text.ids, len(mine), text, step, other)
            for mine, other, text in zip(prompts, theirs, written, strict=True)
        ]

    def _again(self, own: int, step: int, chance: np.random.Generator) -> list[Row]:
        """Texts of earlier steps for the own rows that are not to be written."""
        if self.replay is None:
            return []
        oldest = -1 if self.replay.age is None else step - self.replay.age
        usable = [row for row in self._kept if row.step >= oldest]
        number = min(own - _rounded(value_at(self.replay.fresh, step) * own, chance), len(usable))
        return [usable[i] for i in chance.choice(len(usable), number, replace=False)] if number else []

    def update(self, loss: float) -> None:
        """Take note of a held-out loss, in nats; see `Adapt`."""
        if self.adapt is None:
            return
        if self._last_loss is not None and loss > self._last_loss + self.adapt.margin:
            self._raised += self.adapt.by
        self._last_loss = loss

    # What a checkpoint keeps of it.

    def save(self, folder: Path, rank: int) -> None:
        """Keep in a checkpoint what a run that goes on must know: each rank what it wrote.

        The next step takes a server new weights, as that of a run that goes on does.
        """
        kept = [{**row._asdict(), "text": vars(row.text)} for row in self._kept]
        folder.mkdir(parents=True, exist_ok=True)
        state = {"raised": self._raised, "last_loss": self._last_loss, "kept": kept}
        write_text(folder / _name(rank), json.dumps(state))
        if self._server is not None:
            self._server.renew()

    def load(self, folder: Path, rank: int) -> None:
        """Go on from what `save` kept.

        Raises:
            UserError: it is not there.
        """
        if not (folder / _name(rank)).exists():
            raise UserError(
                f"train: expected {_name(rank)} in {folder}, got none. Each rank keeps the texts that it wrote: go on "
                "with as many ranks as before, and with a rollout as before."
            )
        state = json.loads((folder / _name(rank)).read_text())
        self._raised, self._last_loss = state["raised"], state["last_loss"]
        self._kept.clear()
        self._kept.extend(Row(**{**row, "text": Written(**row["text"])}) for row in state["kept"])

    def close(self) -> None:
        """Leave nothing behind on the disk."""
        if self._server is not None:
            self._server.close()

    def text(self, row: Row) -> tuple[str, str]:
        """A row's prompt and what was written behind it, for people."""
        decode = self._tokenizer.decode
        return str(decode(row.ids[: row.prompt])), str(decode(row.ids[row.prompt :]))


def teacher_mix(teacher: nn.Module, share: float) -> Guide:
    """Draw from a mixture of teacher and student, so that early texts are worth learning from.

        share * p + (1 - share) * q

    References:
        Gu et al. 2023 (MiniLLM), arXiv 2306.08543, section 2.2.
    """
    return Guide(teacher, lambda q, p: share * p + (1 - share) * q)


def teacher_top_k(teacher: nn.Module, top_k: int) -> Guide:
    """The student writes, and a token that is not among the teacher's top_k likeliest is drawn again, by the teacher.

        q_v [v in top_k] + q(others) * p_v

    References:
        Xu et al. 2024 (Speculative KD), arXiv 2410.11325, algorithm 1.
    """

    def blend(q: Tensor, p: Tensor) -> Tensor:
        likeliest = p.topk(min(top_k, p.shape[-1]), -1).indices
        kept = torch.zeros_like(q).scatter(-1, likeliest, q.gather(-1, likeliest))
        return kept + (1 - kept.sum(-1, keepdim=True)).clamp_min(0) * p

    return Guide(teacher, blend)


def _rounded(number: float, chance: np.random.Generator) -> int:
    """Up or down by chance, so that the mean is the number. It takes one random number, whatever it is."""
    return int(number + chance.random() * (1 - 1e-9))


def _rows(batch: Mapping[str, Tensor]) -> list[dict[str, list[Any]]]:
    """The rows of a batch without their padding: input_ids, labels, weights, and the teacher's own where there are."""
    rows: list[dict[str, list[Any]]] = [{} for _ in batch["input_ids"]]
    for whose in ("", "teacher_"):
        for name in (f"{whose}{one}" for one in ("input_ids", "labels", "weights")):
            if name in batch:
                kept = zip(batch[name].cpu(), batch[f"{whose}attention_mask"].bool().cpu(), strict=True)
                for row, (values, mask) in zip(rows, kept, strict=True):
                    row[name] = values[mask].tolist()
    return rows


def _unlearnt(row: Mapping[str, Sequence[int]], whose: str = "") -> list[int]:
    """What stands before the first token that counts."""
    labels = row.get(f"{whose}labels", ())
    first = next((place for place, label in enumerate(labels) if label != IGNORE), 0)
    return list(row[f"{whose}input_ids"][:first]) if first else []


def _example(row: Row, replaced: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Own text in place of a row of the data. Weights of that row are not its own: each token counts 1."""
    made = {}
    for whose, prompt in (("", row.ids[: row.prompt]), ("teacher_", list(row.teacher_prompt))):
        if f"{whose}input_ids" in replaced:
            new = row.ids[row.prompt :]
            made[f"{whose}input_ids"] = prompt + new
            made[f"{whose}labels"] = [IGNORE] * len(prompt) + new
    return made | ({"weights": [1.0] * len(row.ids)} if "weights" in replaced else {})


def _column(rows: Sequence[Row | None], name: str, like: Tensor) -> Tensor:
    """[B, T]: a number of each own token, NaN on all others."""
    made = [
        torch.tensor([] if row is None else [torch.nan] * row.prompt + getattr(row.text, name), dtype=torch.float32)
        for row in rows
    ]
    padded = pad_sequence(made, batch_first=True, padding_value=torch.nan)
    missing = like.shape[1] - padded.shape[1]
    return torch.nn.functional.pad(padded, (0, missing), value=torch.nan)


def _name(rank: int) -> str:
    return f"rollout-{rank}.json"


def with_weights_of(copy: nn.Module, wrapped: nn.Module) -> nn.Module:
    """A copy of the student with the weights of now, gathered from a Distiller whose student is sharded."""
    weights = get_model_state_dict(wrapped, options=StateDictOptions(full_state_dict=True))
    own = {name.removeprefix("student."): x for name, x in weights.items() if name.startswith("student.")}
    copy.load_state_dict(own)
    return copy
