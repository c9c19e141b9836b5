"""Summarize the outcome of a run in a sentence or two."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from potstill.evaluate.formatting import nats, percent, times
from potstill.evaluate.summary import ScoresByModel, Summary, check_summary

_SMALL_SHARE, _SMALL_NATS = 0.1, 0.01  # a gain below either is called slight, and a loss below the second
_LEAKED_SHARE = 0.01  # of held-out rows that are training rows: from there on nothing is concluded from them
_SEED_NOISE_NATS = 0.05  # a gain below this may come from the seed alone


def verdict(summary: Summary | Mapping[str, Any]) -> str:
    """Summarize what a run shows, good or bad; of the content of summary.json, rows.student.loss is enough."""
    if not isinstance(summary, Summary):
        summary = check_summary(summary, "the summary")
    if leak := leakage(summary.data.eval_in_train):
        return leak
    if summary.task == "encoder":
        return _encoder_verdict(summary.rows)
    outcome = _Outcome.of(summary)
    if not math.isfinite(outcome.student):
        return (
            "The student's held-out loss is not a number: training diverged. Try a smaller learning rate, a longer "
            "warm-up or gradient clipping."
        )
    if not math.isfinite(outcome.baseline):
        return outcome.without_baseline()
    return outcome.undecided() or (outcome.worse() if outcome.gain < 0 else outcome.better())


@dataclass(frozen=True)
class _Outcome:
    """Held-out losses of a run, nan where there is none, and what to conclude from them."""

    rows: ScoresByModel
    unit: str
    gap_closed: float | None
    gain_error: float | None
    student: float
    teacher: float
    baseline: float
    whole_teacher: float | None  # the loss of the teacher with all its tokens, where that is better than the student's

    @classmethod
    def of(cls, summary: Summary) -> Self:
        rows, unit = summary.rows, "squared error" if summary.task == "regression" else "nats"
        teacher, baseline = (row.loss if row else math.nan for row in (rows.teacher, rows.baseline))
        whole = None if rows.whole_teacher is None else rows.whole_teacher.loss
        better = whole if whole is not None and whole < rows.student.loss else None
        errors = summary.gap_closed, summary.gain_error
        return cls(rows, unit, *errors, rows.student.loss, teacher, baseline, better)

    @property
    def gain(self) -> float:
        return self.baseline - self.student

    @property
    def losses(self) -> str:
        return f"{nats(self.student)} against {nats(self.baseline)} {self.unit} held out"

    @property
    def slightly(self) -> str:
        return "slightly " if abs(self.gain) < _SMALL_NATS else ""

    @property
    def surpassed(self) -> str:
        own = "its own teacher" if self.whole_teacher is None else "its own teacher with the same tokens"
        return (
            f"The student is better than {own}, {nats(self.student)} against {nats(self.teacher)} {self.unit} held out"
        )

    def without_baseline(self) -> str:
        """The student beside the teacher alone."""
        why = "the baseline diverged" if self.rows.baseline else "no baseline was run"
        unknown = f"{why}, so the teacher's contribution cannot be measured"
        if not self.rows.baseline:
            unknown += ' (set "baseline: true" under "evaluate" in the recipe)'
        if not math.isfinite(self.teacher):
            return f"The student reaches {nats(self.student)} {self.unit} held out; {unknown}."
        if self.student < self.teacher:
            return f"{self.surpassed}; {unknown}."
        within = f"within {nats(self.student - self.teacher)} {self.unit} of the teacher{_smaller(self.rows)}"
        return f"The student comes {within}, {nats(self.student)} against {nats(self.teacher)} held out; {unknown}."

    def undecided(self) -> str | None:
        """The sentence for a difference from the baseline that is none, or that these rows cannot show; else None."""
        if abs(self.gain) < 0.0005:
            same = f"student and baseline both reach {nats(self.student)} {self.unit} held out"
            return f"The teacher made no difference: {same}. Try more steps, another temperature or another divergence."
        if self.gain_error is None or abs(self.gain) >= 2 * self.gain_error:
            return None
        side = "better" if self.gain > 0 else "worse"
        return (
            f"The student is {side} than the baseline, {self.losses}, by less than two standard errors of the "
            f"difference ({nats(2 * self.gain_error)}): these rows are too few to tell them apart. Hold out more text, "
            "or train longer."
        )

    def worse(self) -> str:
        advice = "temperature 1, an additional labels term, more steps, or a teacher closer to the student in size"
        unhelpful = f"worse than the baseline, {self.losses}: the teacher did not help in this run"
        return f"The student is {self.slightly}{unhelpful}. Instead try {advice}."

    def better(self) -> str:
        if not math.isfinite(self.teacher):
            return f"The student is {self.slightly}better than the baseline, {self.losses}."
        if self.teacher >= self.baseline:
            return (
                f"The student is better than the baseline, {self.losses}, but the teacher ({nats(self.teacher)} "
                f"{self.unit}) is not, so there is no gap to close. Use a stronger teacher first."
            )
        if self.student >= self.teacher:
            return self._closes_gap()
        surpassed = f"{self.surpassed} (baseline {nats(self.baseline)})."
        if self.whole_teacher is not None:
            return f"{surpassed} With all its tokens the teacher has {nats(self.whole_teacher)}."
        return (
            f"{surpassed} Check that the held-out text is not in the training data; if it is not, a stronger teacher "
            "can help further."
        )

    def _closes_gap(self) -> str:
        """How much of the gap between baseline and teacher is closed."""
        share = self.gap_closed if self.gap_closed is not None else self.gain / (self.baseline - self.teacher)
        if share < _SMALL_SHARE or self.gain < _SMALL_NATS:
            advice = "there is room for more steps, another divergence or a larger student"
            if self.gain < _SEED_NOISE_NATS:
                advice = "a difference this small may be chance, so repeat the run with other seeds"
            better = (
                f"only slightly better than the baseline, {self.losses}, or {percent(share)} of the gap to the teacher"
            )
            return f"The student is {better}: {advice}."
        gap = f"the gap between training without a teacher and the teacher itself{_smaller(self.rows)}"
        others = f"against {nats(self.baseline)} for the baseline and {nats(self.teacher)} for the teacher"
        closes = f"The student closes {percent(share)} of {gap}: {nats(self.student)} {self.unit} held out, {others}."
        random = math.nan if self.rows.random is None else self.rows.random.loss
        return f"{closes} From random weights it reaches {nats(random)}." if math.isfinite(random) else closes


def leakage(share: float | None) -> str | None:
    """Say that nothing can be concluded, where this share of the held-out rows are training rows; None for a few."""
    if share is None or share < _LEAKED_SHARE:
        return None
    return (
        f"No conclusion: {percent(share)} of the held-out rows are training rows, so these figures measure what the "
        "models remember, not what they learned. Hold out other rows and run again."
    )


def _encoder_verdict(rows: ScoresByModel) -> str:
    correlation, recall = rows.student.all_pairs, rows.student.recall
    if correlation is None or recall is None or not math.isfinite(correlation):
        return "The student's embeddings could not be compared with the teacher's: training diverged, or no scores."
    return (
        f"The student's similarities of held-out rows correlate with the teacher's at {correlation:.3f}"
        f"{_smaller(rows)}, and it keeps {percent(recall)} of the ten nearest rows of each."
    )


def _smaller(rows: ScoresByModel) -> str:
    teacher = rows.uncut_teacher
    if not teacher or not teacher.parameters or not rows.student.parameters:
        return ""
    ratio = teacher.parameters / rows.student.parameters
    return f", with {times(ratio)} times fewer parameters" if ratio >= 1.05 else ""
