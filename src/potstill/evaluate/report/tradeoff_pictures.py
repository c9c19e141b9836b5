"""The pictures of a sweep: quality over cost, and predicted over measured quality."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator, PercentFormatter

from potstill.evaluate.report.canvas import LINE, MARKER, MODEL, PAPER, STEPS, Curve, canvas, label_ends, svg
from potstill.evaluate.report.words import count, milliseconds

# The teacher, at 100%, is drawn where that leaves the students room to be told apart.
_NEAR = 0.6
# Where marks may stand on an axis of powers of ten, from the finest.
_HALVES = tuple(1 + 0.5 * i for i in range(18))
_MARKS = (_HALVES, (1.0, 1.5, 2.0, 3.0, 5.0, 7.0), (1.0, 2.0, 3.0, 5.0), (1.0, 2.0, 5.0), (1.0,))


class Dot(NamedTuple):
    """A student in a picture.

    Args:
        name: a few characters, beside it.
        cost: across.
        quality: up, a share of the teacher's.
        on_front: no other is better in both.
        chosen: the one that is recommended.
    """

    name: str
    cost: float
    quality: float
    on_front: bool
    chosen: bool


def pareto(dots: Sequence[Dot], across: str, teacher_cost: float | None = None) -> str:
    """Quality over a cost, on a logarithmic axis; the Pareto front is joined.

    Args:
        dots: at least one, with finite numbers.
        across: "parameters" or "latency_ms".
        teacher_cost: the teacher's, or None.
    """
    figure, axes = canvas()
    axes.set_position((0.1, 0.145, 0.86, 0.82))
    line = sorted((dot.cost, dot.quality) for dot in dots if dot.on_front)
    if line:
        axes.step(*zip(*line, strict=True), where="post", color=MODEL["student"], linewidth=1.4, zorder=1)
    for dot in sorted(dots, key=lambda dot: (dot.chosen, dot.on_front)):
        model = "student" if dot.on_front else "baseline"
        style = MARKER[model] | {"markersize": 9.5 if dot.chosen else 6 if dot.on_front else 5}
        edge: dict[str, Any] = {"markeredgecolor": PAPER, "markeredgewidth": 1.0}
        axes.plot(dot.cost, dot.quality, color=MODEL[model], linestyle="none", zorder=2, **edge, **style)
        axes.annotate(
            dot.name,
            (dot.cost, dot.quality),
            xytext=(0, 8 if dot.on_front else -8),
            textcoords="offset points",
            ha="center",
            va="bottom" if dot.on_front else "top",
            fontsize=11,
            fontweight="bold" if dot.chosen else "normal",
            color=MODEL[model],
            annotation_clip=False,
        )
    if teacher_cost is not None and max(dot.quality for dot in dots) > _NEAR:
        axes.plot(teacher_cost, 1.0, color=MODEL["teacher"], marker="D", markersize=5, linestyle="none")
        where: dict[str, Any] = {"xytext": (-7, 0), "textcoords": "offset points", "ha": "right", "va": "center"}
        axes.annotate("teacher", (teacher_cost, 1.0), fontsize=11, color=MODEL["teacher"], **where)
    axes.margins(x=0.08, y=0.14)
    write = count if across == "parameters" else milliseconds
    axes.set_ylim(bottom=max(0.0, axes.get_ylim()[0]))
    _logarithmic(axes, write)
    axes.set_xlabel(across if across == "parameters" else "one row, one forward pass")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
    said = "; ".join(f"{dot.name}: {write(dot.cost)}, {dot.quality:.1%}" for dot in dots)
    return svg(figure, f"pareto-{across}", f"Share of the teacher's quality over {across}: {said}.")


def expectations(measured: Sequence[tuple[float, float]], published: Mapping[str, Curve], fitted: Curve) -> str:
    """Measured quality over compression, with what published students keep and what the sweep's own law gives.

    Args:
        measured: (compression, quality) of every student.
        published: kind of task -> (compression, share of the teacher's score), rising compression.
        fitted: the same by the exponents of the sweep itself; may be empty.
    """
    figure, axes = canvas()
    axes.set_position((0.09, 0.145, 0.66, 0.82))
    ends = []
    for task, curve in published.items():
        axes.plot(*zip(*curve, strict=True), color=MODEL["teacher"], **LINE["teacher"])
        ends.append(("teacher", curve[-1][1], task))
    if fitted:
        axes.plot(*zip(*fitted, strict=True), color=MODEL["student"], linewidth=1.4)
        ends.append(("student", fitted[-1][1], "their law"))
    style: dict[str, Any] = {"linestyle": "none", "markeredgecolor": PAPER, **MARKER["student"]}
    axes.plot(*zip(*measured, strict=True), color=MODEL["student"], **style)
    axes.set_ylim(0, 1.02)
    label_ends(axes, ends, named=False)
    _logarithmic(axes, lambda value: f"{value:g}×")
    axes.set_xlabel("times fewer parameters than the teacher")
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=STEPS))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    said = "; ".join(f"{quality:.1%} at {compression:.1f} times smaller" for compression, quality in measured)
    return svg(figure, "expected", f"Share of the teacher's quality over compression, measured: {said}.")


def _logarithmic(axes: Axes, write: Callable[[float], str]) -> None:
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    marks = next((subs for subs in _MARKS if _between(low, high, subs) <= 5), _MARKS[-1])
    axes.xaxis.set_major_locator(LogLocator(subs=marks, numticks=30))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: write(value)))


def _between(low: float, high: float, subs: Sequence[float]) -> int:
    """How many of such marks are seen: more than a few would be written over each other."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)))
    return sum(low <= sub * 10**decade <= high for decade in decades for sub in subs)
