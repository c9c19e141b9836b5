"""Summarize the outcome of a run in a sentence or two."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

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
    rows, unit = summary.rows, "squared error" if summary.task == "regression" else "nats"
    student = rows.student.loss
    teacher, baseline = (row.loss if row else math.nan for row in (rows.teacher, rows.baseline))
    if not math.isfinite(student):
        return (
            "The student's held-out loss is not a number: training diverged. Try a smaller learning rate, a longer "
            "warm-up or gradient clipping."
        )
    whole = _loss_with_all_tokens(rows)
    own = "its own teacher" if whole is None else "its own teacher with the same tokens"
    surpassed = f"The student is better than {own}, {nats(student)} against {nats(teacher)} {unit} held out"
    if not math.isfinite(baseline):
        why = "the baseline diverged" if rows.baseline else "no baseline was run"
        unknown = f"{why}, so the teacher's contribution cannot be measured"
        if not rows.baseline:
            unknown += ' (set "baseline: true" under "evaluate" in the recipe)'
        if not math.isfinite(teacher):
            return f"The student reaches {nats(student)} {unit} held out; {unknown}."
        if student < teacher:
            return f"{surpassed}; {unknown}."
        within = f"within {nats(student - teacher)} {unit} of the teacher{_smaller(rows)}"
        return f"The student comes {within}, {nats(student)} against {nats(teacher)} held out; {unknown}."
    gain = baseline - student
    losses = f"{nats(student)} against {nats(baseline)} {unit} held out"
    slightly = "slightly " if abs(gain) < _SMALL_NATS else ""
    if abs(gain) < 0.0005:
        same = f"student and baseline both reach {nats(student)} {unit} held out"
        return f"The teacher made no difference: {same}. Try more steps, another temperature or another divergence."
    if (error := summary.gain_error) is not None and abs(gain) < 2 * error:
        side = "better" if gain > 0 else "worse"
        return (
            f"The student is {side} than the baseline, {losses}, by less than two standard errors of the difference "
            f"({nats(2 * error)}): these rows are too few to tell them apart. Hold out more text, or train longer."
        )
    if gain < 0:
        advice = "temperature 1, an additional labels term, more steps, or a teacher closer to the student in size"
        unhelpful = f"worse than the baseline, {losses}: the teacher did not help in this run"
        return f"The student is {slightly}{unhelpful}. Instead try {advice}."
    if not math.isfinite(teacher):
        return f"The student is {slightly}better than the baseline, {losses}."
    if teacher >= baseline:
        return (
            f"The student is better than the baseline, {losses}, but the teacher ({nats(teacher)} {unit}) is not, so "
            "there is no gap to close. Use a stronger teacher first."
        )
    if student < teacher:
        if whole is not None:
            return f"{surpassed} (baseline {nats(baseline)}). With all its tokens the teacher has {nats(whole)}."
        return (
            f"{surpassed} (baseline {nats(baseline)}). Check that the held-out text is not in the training data; if it "
            "is not, a stronger teacher can help further."
        )
    share = summary.gap_closed if summary.gap_closed is not None else gain / (baseline - teacher)
    if share < _SMALL_SHARE or gain < _SMALL_NATS:
        advice = "there is room for more steps, another divergence or a larger student"
        if gain < _SEED_NOISE_NATS:
            advice = "a difference this small may be chance, so repeat the run with other seeds"
        better = f"only slightly better than the baseline, {losses}, or {percent(share)} of the gap to the teacher"
        return f"The student is {better}: {advice}."
    gap = f"the gap between training without a teacher and the teacher itself{_smaller(rows)}"
    others = f"against {nats(baseline)} for the baseline and {nats(teacher)} for the teacher"
    closes = f"The student closes {percent(share)} of {gap}: {nats(student)} {unit} held out, {others}."
    random = math.nan if rows.random is None else rows.random.loss
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


def _loss_with_all_tokens(rows: ScoresByModel) -> float | None:
    """The loss of the teacher with all its tokens, where that is better than the student's; None where it is not."""
    whole = rows.whole_teacher
    if whole is None or whole.loss is None:
        return None
    return whole.loss if whole.loss < rows.student.loss else None


def _smaller(rows: ScoresByModel) -> str:
    teacher = rows.uncut_teacher
    if not teacher or not teacher.parameters or not rows.student.parameters:
        return ""
    ratio = teacher.parameters / rows.student.parameters
    return f", with {times(ratio)} times fewer parameters" if ratio >= 1.05 else ""
