"""A run in words: numbers for people, and the verdict."""

from __future__ import annotations

import math

from potstill.evaluate.summary import Rows, Summary

# Below either a gain is called slight; a loss is by the second alone.
_SMALL_SHARE = 0.1
_SMALL_NATS = 0.01
# Below this, one run of each cannot tell a gain from the luck of the seed.
_LUCK_NATS = 0.05


def nats(value: float) -> str:
    return f"{value:.3f}" if math.isfinite(value) else "not a number"


def percent(share: float, digits: int = 0) -> str:
    if 0 < abs(share) < 0.01:
        digits = max(digits, 1)
    return minus(f"{100 * share:.{digits}f}%")


def count(number: float) -> str:
    """A number of things.

    >>> count(800), count(200_000), count(5_270_784), count(999_960)
    ('800', '200K', '5.3M', '1.0M')
    """
    return _scaled(number, ("", "K", "M", "B", "T"))


def size(number: float) -> str:
    """A number of bytes, in powers of 1000.

    >>> size(10541568)
    '10.5 MB'
    """
    return _scaled(number, (" bytes", " kB", " MB", " GB", " TB"))


def _scaled(number: float, units: tuple[str, ...]) -> str:
    for unit in units:
        if abs(number) < 999.95 or unit == units[-1]:
            break
        number /= 1000
    return f"{number:.0f}{unit}" if unit == units[0] or abs(number) >= 99.95 else f"{number:.1f}{unit}"


def milliseconds(value: float) -> str:
    if value >= 999.5:
        return f"{value / 1000:.1f} s"
    return f"{value:.2g} ms" if value < 1 else f"{value:.1f} ms" if value < 99.95 else f"{value:.0f} ms"


def duration(seconds: float) -> str:
    """A stretch of time.

    >>> duration(40.1), duration(85), duration(7384)
    ('40 s', '1 min 25 s', '2 h 3 min')
    """
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if minutes else f"{rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def perplexity(value: float) -> str:
    if not math.isfinite(value):
        return "not a number"
    return f"{value:,.0f}" if value >= 999.5 else f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"


def minus(text: str) -> str:
    return text.replace("-", "\N{MINUS SIGN}")


def times(ratio: float) -> str:
    return f"{ratio:.1f}" if ratio < 9.95 else f"{ratio:,.0f}"


def judge(summary: Summary) -> str:
    """What a run shows, in a sentence."""
    if summary.task == "encoder":
        return _judge_encoder(summary.rows)
    rows, unit = summary.rows, "squared error" if summary.task == "regression" else "nats"
    student = rows.student.loss
    teacher = rows.teacher.loss if rows.teacher else math.nan
    baseline = rows.baseline.loss if rows.baseline else math.nan
    if not math.isfinite(student):
        return (
            "The student's held-out loss is not a number: its training diverged; try a smaller learning rate, "
            "a longer warm-up or gradient clipping."
        )
    if not math.isfinite(baseline):
        return _without_baseline(rows, student, teacher, unit)
    gain = baseline - student
    pair = f"{nats(student)} against {nats(baseline)} {unit} held out"
    if abs(gain) < 0.0005:
        return (
            f"The teacher made no difference: the student and the baseline both reach {nats(student)} {unit} "
            "held out; try more steps, another temperature or another divergence."
        )
    if gain < 0:
        return (
            f"The student is {'slightly ' if -gain < _SMALL_NATS else ''}worse than the baseline, {pair}: in this "
            "run the teacher did not help; try temperature 1, a labels term beside the teacher's, more steps, "
            "or a teacher nearer to the student in size."
        )
    if not math.isfinite(teacher):
        return f"The student is {'slightly ' if gain < _SMALL_NATS else ''}better than the baseline, {pair}."
    if teacher >= baseline:
        return (
            f"The student is better than the baseline, {pair}, but the teacher ({nats(teacher)} {unit}) is not, so "
            "there is no gap to close; a stronger teacher is the first thing to try."
        )
    if student < teacher:
        return (
            f"The student is better than its own teacher, {nats(student)} against {nats(teacher)} {unit} held "
            f"out (baseline {nats(baseline)}): make sure that the held-out text is not in the training data, and if "
            "it is not, the teacher can be replaced by a stronger one."
        )
    share = summary.gap_closed if summary.gap_closed is not None else gain / (baseline - teacher)
    if share < _SMALL_SHARE or gain < _SMALL_NATS:
        advice = (
            "so small a difference may be chance, and needs other seeds before it is relied on"
            if gain < _LUCK_NATS
            else "there is room for more steps, another divergence or a larger student"
        )
        return (
            f"The student is only slightly better than the baseline, {pair}, or {percent(share)} of the gap to the "
            f"teacher: {advice}."
        )
    return (
        f"The student closes {percent(share)} of the gap between training without a teacher and the teacher itself"
        f"{_smaller(rows)}: {nats(student)} {unit} held out, against {nats(baseline)} for the baseline and "
        f"{nats(teacher)} for the teacher."
    )


def _judge_encoder(rows: Rows) -> str:
    kept, recall = rows.student.all_pairs, rows.student.recall
    if kept is None or recall is None or not math.isfinite(kept):
        return (
            "What the student keeps of the teacher's space is not known: its training diverged, or it was not measured."
        )
    return (
        f"The student keeps the teacher's similarities of held-out rows with a correlation of {kept:.3f}"
        f"{_smaller(rows)}, and {percent(recall)} of the ten rows nearest to each."
    )


def _without_baseline(rows: Rows, student: float, teacher: float, unit: str) -> str:
    why = "the baseline diverged" if rows.baseline else "no baseline was run"
    untold = f"{why}, so how much of this is owed to the teacher cannot be told"
    advice = "" if rows.baseline else '; "baseline: true" under "evaluate" in the recipe runs one'
    if not math.isfinite(teacher):
        return f"The student reaches {nats(student)} {unit} held out; {untold}{advice}."
    if student < teacher:
        return (
            f"The student is better than its own teacher, {nats(student)} against {nats(teacher)} {unit} held out; "
            f"{untold}{advice}."
        )
    return (
        f"The student comes within {nats(student - teacher)} {unit} of the teacher{_smaller(rows)}, "
        f"{nats(student)} against {nats(teacher)} held out; {untold}{advice}."
    )


def _smaller(rows: Rows) -> str:
    if not rows.teacher or not rows.teacher.parameters or not rows.student.parameters:
        return ""
    ratio = rows.teacher.parameters / rows.student.parameters
    return f", with {times(ratio)} times fewer parameters" if ratio >= 1.05 else ""
