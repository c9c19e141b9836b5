"""What the student's own texts are like, and the alarm when they are not worth learning from any more."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from potstill.engines.decode import Written

GRAM = 3  # tokens in a run, for repetition
REPETITIVE = 0.8  # share of runs that have been there before, above which a text says nothing new
EMPTY = 1.5  # tokens of a text, EOS included, below which it is all but empty


def repetition(ids: list[int]) -> float:
    """The share of a text's runs of 3 tokens that have stood in it before; 0 where it is shorter.

    >>> repetition([1, 2, 3, 1, 2, 3, 1])
    0.4
    """
    runs = [tuple(ids[i : i + GRAM]) for i in range(len(ids) - GRAM + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


NAMES = ("rows", "texts", "tokens", "ended", "repetition", "surprise", "age")


class TextSums:
    """Sums over the own texts since the last log line."""

    def __init__(self) -> None:
        self._sums = dict.fromkeys(NAMES, 0.0)

    def add(self, texts: Iterable[Any], step: int, rows: int) -> None:
        """Add the own rows of an optimiser step that has so many rows in all."""
        self._sums["rows"] += rows
        for row in texts:
            text: Written = row.text
            self._sums["texts"] += 1
            self._sums["tokens"] += len(text.ids)
            self._sums["ended"] += text.ended
            self._sums["repetition"] += repetition(text.ids)
            self._sums["surprise"] -= sum(text.log_probs)
            self._sums["age"] += step - row.step

    def take(self, accelerator: Any) -> dict[str, float]:
        """What is logged, over all ranks: means over texts, and over tokens for the entropy. Begins anew.

        own_share: of the rows; own_length: tokens with EOS; own_ended: the share that EOS ended; own_repetition: see
        `repetition`; own_entropy: how unsure the student was of what it wrote, -log q of each token, whose mean is its
        entropy where it is sampled at temperature 1 without a guide; own_age: how many optimiser steps the student was
        behind that wrote it.
        """
        total = accelerator.reduce(torch.tensor([self._sums[name] for name in NAMES], device=accelerator.device))
        self._sums = dict.fromkeys(NAMES, 0.0)
        sums = dict(zip(NAMES, total.tolist(), strict=True))
        texts = sums["texts"]
        if not texts:
            return {"own_share": 0.0}
        return {
            "own_share": texts / sums["rows"],
            "own_length": sums["tokens"] / texts,
            "own_ended": sums["ended"] / texts,
            "own_repetition": sums["repetition"] / texts,
            "own_entropy": sums["surprise"] / sums["tokens"],
            "own_age": sums["age"] / texts,
        }


def collapse(logs: Mapping[str, Any]) -> str | None:
    """What is wrong with the own texts of a logged line, and what helps; None where nothing is.

    Args:
        logs: what `TextSums.take` gave.
    """
    if logs.get("own_repetition", 0.0) > REPETITIVE:
        return (
            f"rollout: expected own text that goes on, got {logs['own_repetition']:.0%} of its runs of {GRAM} tokens "
            "repeated: it has collapsed into loops. Lower rollout.on_policy_fraction or train.learning_rate, let the "
            "teacher have a say (rollout.teacher_mix: 0.2), or begin with a student that has learnt from data."
        )
    if logs.get("own_length", EMPTY) < EMPTY:
        return (
            f"rollout: expected own text, got {logs['own_length']:.1f} tokens a text: the student ends at once. "
            "Lower rollout.on_policy_fraction, divide returns by their length (term minillm), or begin with a student "
            "that has learnt from data."
        )
    return None
