"""Statistics of the student's on-policy samples, and a warning when they have degenerated."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from potstill.engines.decode import GeneratedTokens

NGRAM = 3  # tokens, for repetition
MAX_REPETITION = 0.8  # share of repeated n-grams above which samples carry nothing new
MIN_LENGTH = 1.5  # tokens with EOS, below which samples are all but empty


def repetition(ids: list[int]) -> float:
    """The share of 3-grams that occurred in the text before; 0 for a shorter text.

    >>> repetition([1, 2, 3, 1, 2, 3, 1])
    0.4
    """
    ngrams = [tuple(ids[i : i + NGRAM]) for i in range(len(ids) - NGRAM + 1)]
    return 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0


class SampleStats:
    """Sums over the on-policy samples since the last log line."""

    def __init__(self) -> None:
        self._sums = [0.0] * 7  # rows, texts, tokens, ended, repetition, -log q, age

    def add(self, samples: Iterable[tuple[GeneratedTokens, int]], num_rows: int) -> None:
        """Add the samples of an optimiser step of so many rows, each with its age in steps."""
        self._sums[0] += num_rows
        for text, age in samples:
            values = (0, 1, len(text.ids), text.ended, repetition(text.ids), -sum(text.log_probs), age)
            self._sums = [total + value for total, value in zip(self._sums, values, strict=True)]

    def take(self, accelerator: Any) -> dict[str, float]:
        """Return means over all ranks for the log, and start again.

        own_share: of the rows; own_length: tokens with EOS; own_ended: share that EOS ended; own_repetition: see
        `repetition`; own_entropy: mean of -log q over tokens, the student's entropy when sampled at temperature 1
        without a guide; own_age: optimiser steps since the weights that generated them.
        """
        total = accelerator.reduce(torch.tensor(self._sums, device=accelerator.device))
        self._sums = [0.0] * 7
        rows, texts, tokens, ended, repeated, surprise, age = total.tolist()
        if not texts:
            return {"own_share": 0.0}
        logs = {"own_share": texts / rows, "own_length": tokens / texts, "own_ended": ended / texts}
        return logs | {"own_repetition": repeated / texts, "own_entropy": surprise / tokens, "own_age": age / texts}


def collapse_warning(logs: Mapping[str, Any]) -> str | None:
    """What is wrong with the on-policy samples of a log line and what helps; None if nothing is."""
    if logs.get("own_repetition", 0.0) > MAX_REPETITION:
        return (
            f"rollout: expected varied on-policy samples, got {logs['own_repetition']:.0%} of their {NGRAM}-grams "
            "repeated: the student has collapsed into loops. Lower rollout.on_policy_fraction or train.learning_rate, "
            "mix in the teacher (rollout.teacher_mix: 0.2), or start from a student trained on data."
        )
    if logs.get("own_length", MIN_LENGTH) < MIN_LENGTH:
        return (
            f"rollout: expected on-policy samples with text, got {logs['own_length']:.1f} tokens per sample: the "
            "student ends at once. Lower rollout.on_policy_fraction, normalise returns by length (term minillm), or "
            "start from a student trained on data."
        )
    return None
