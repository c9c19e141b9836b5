"""Axes, lines and labels of all pictures, as SVG that takes its colours and typeface from the page around it."""

from __future__ import annotations

import html
import io
import math
import re
from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import Any

import matplotlib as mpl
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter, ScalarFormatter, StrMethodFormatter

Curve = Sequence[tuple[float, float]]

# Colours stand for CSS variables, so that the page can be light, dark or printed.
_VARIABLES = ("ink", "muted", "rule", "paper", "teacher", "random", "baseline", "student")
COLOUR = {variable: f"#01010{i}" for i, variable in enumerate(_VARIABLES, 1)}
# Lines differ in more than colour.
LINE: dict[str, dict[str, Any]] = {
    "teacher": {"linestyle": (0, (4, 2.5)), "linewidth": 1.4},
    "random": {"linestyle": (0, (1, 1.4)), "linewidth": 1.4},
    "baseline": {"linestyle": "solid", "linewidth": 1.4},
    "student": {"linestyle": "solid", "linewidth": 2.3},
}
_MARKER = {"teacher": ("D", 5), "random": ("^", 4.2), "baseline": ("s", 3.6), "student": ("o", 4.6)}  # shape and size
_MOST_POINTS = 240


def create(x_label: str = "", left: float = 0.078, width: float = 0.735, height: float = 0.82) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(6.0, 3.7))
    axes = figure.add_axes((left, 0.145, width, height))
    figure.patch.set_alpha(0)
    axes.patch.set_alpha(0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set(color=COLOUR["muted"], linewidth=0.8)
    axes.grid(axis="y", color=COLOUR["rule"], linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(axis="both", colors=COLOUR["muted"], labelsize=11, length=0, pad=5)
    axes.tick_params(axis="x", length=3.5, width=0.8)
    axes.set_xlabel(x_label, color=COLOUR["muted"], fontsize=11)
    axes.margins(x=0.015, y=0.06)
    ticks(axes.xaxis, 5, integer=True)
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    ticks(axes.yaxis, 7)
    axes.yaxis.set_major_formatter(ScalarFormatter(useOffset=False, useMathText=False))
    return figure, axes


def ticks(axis: Axis, number: int, **options: Any) -> None:
    """Place at most `number` intervals between round values."""
    axis.set_major_locator(MaxNLocator(number, steps=[1, 2, 2.5, 5, 10], **options))


def shares(axes: Axes) -> None:
    axes.set_ylim(0, 1.02)
    ticks(axes.yaxis, 5)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))


def line(axes: Axes, model: str, curve: Iterable[tuple[float, float]], *, marked: bool = False, **style: Any) -> None:
    """Plot a curve in a model's colour and style, with a marker at each point if `marked`."""
    if marked:
        marker, markersize = _MARKER[model]
        edge = {"markeredgecolor": COLOUR["paper"], "markeredgewidth": 1.0}
        style = {"marker": marker, "markersize": markersize, **edge, **style}
    axes.plot(*zip(*curve, strict=True), color=COLOUR[model], **LINE[model] | style)


def dots(axes: Axes, model: str, points: Iterable[tuple[float, float]], **style: Any) -> None:
    line(axes, model, points, marked=True, linestyle="none", **style)


def annotate(
    axes: Axes, text: str, at: tuple[float, float], model: str, offset: tuple[float, float], **style: Any
) -> None:
    """Write a text in a model's colour, `offset` points from a place."""
    style = {"textcoords": "offset points", "fontsize": 11, "annotation_clip": False, **style}
    axes.annotate(text, at, xytext=offset, color=COLOUR[model], **style)


def label_ends(axes: Axes, ends: Iterable[tuple[str, float, str]]) -> None:
    """Write texts at the right ends of lines (model for the colour, height, text), at least a line of text apart."""
    low, high = axes.get_ylim()
    distance = 0.075 * (high - low)
    ends = sorted(ends, key=lambda end: end[1])
    heights: list[float] = []
    for _, value, _ in ends:
        heights.append(max(value, heights[-1] + distance) if heights else value)
    pushed = sum(height - value for height, (_, value, _) in zip(heights, ends, strict=True))
    style = {"xycoords": axes.get_yaxis_transform(), "va": "center"}
    for height, (model, _, text) in zip(heights, ends, strict=True):
        weight = "bold" if model == "student" else "normal"
        annotate(axes, text, (1, height - pushed / len(ends)), model, (6, 0), fontweight=weight, **style)


def thin(curve: Curve) -> Curve:
    """Average neighbours until at most 240 points are left: the line of a long run is noise otherwise."""
    size = math.ceil(len(curve) / _MOST_POINTS)
    groups = [curve[start : start + size] for start in range(0, len(curve), size)]
    return [(fmean(step for step, _ in group), fmean(value for _, value in group)) for group in groups]


def svg(figure: Figure, name: str, label: str) -> Markup:
    """Convert a figure to an <svg> element with unique ids, to stand in a page beside others."""
    buffer = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "potstill"}):
        metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=metadata)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    # A style sheet inside an inlined SVG would apply to the page around it.
    text = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", text, count=1, flags=re.DOTALL)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'(url\(#|href="#)', rf"\g<1>{name}-", text)
    # Text keeps its size and weight and takes the page's typeface. Matplotlib's releases write it in two ways.
    text = re.sub(r'font-family: [^;"]*(; )?', "", text)
    text = re.sub(r'font: (?:bold|700) ([\d.]+px) [^;"]*', r"font-size: \1; font-weight: bold", text)
    text = re.sub(r'font: ([\d.]+px) [^;"]*', r"font-size: \1", text)
    for variable, colour in COLOUR.items():
        text = text.replace(colour, f"var(--{variable})")
    view_box = re.search(r'viewBox="[^"]*"', text)
    assert view_box is not None
    opening = f'<svg class="picture" role="img" aria-label="{html.escape(label)}" {view_box.group()}>'
    return Markup(opening + text[text.index(">") + 1 :])
