"""What the report's pictures are drawn on: SVG to be put inside a page, which lends it its colours and typeface."""

from __future__ import annotations

import html
import io
import math
import re
from collections.abc import Sequence
from statistics import fmean
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, ScalarFormatter, StrMethodFormatter

Curve = Sequence[tuple[float, float]]

# Drawn in colours that stand for a CSS variable, so that the page can be light, dark or printed.
_INK, MUTED, _RULE, PAPER = "#010101", "#010102", "#010103", "#010104"
MODEL = {"teacher": "#010105", "baseline": "#010106", "student": "#010107"}
_VARIABLES = {_INK: "ink", MUTED: "muted", _RULE: "rule", PAPER: "paper"} | {
    colour: model for model, colour in MODEL.items()
}
# Told apart without colour too.
LINE: dict[str, dict[str, Any]] = {
    "teacher": {"linestyle": (0, (4, 2.5)), "linewidth": 1.4},
    "baseline": {"linestyle": "solid", "linewidth": 1.4},
    "student": {"linestyle": "solid", "linewidth": 2.3},
}
MARKER: dict[str, dict[str, Any]] = {
    "baseline": {"marker": "s", "markersize": 3.6},
    "student": {"marker": "o", "markersize": 4.6},
}

_INCHES = (6.0, 3.7)
STEPS = [1, 2, 2.5, 5, 10]
MOST_MARKERS = 24
_MOST_POINTS = 240


def canvas() -> tuple[Figure, Axes]:
    figure = Figure(figsize=_INCHES)
    figure.patch.set_alpha(0)
    axes = figure.add_axes((0.078, 0.145, 0.735, 0.82))
    axes.patch.set_alpha(0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(MUTED)
    axes.spines["bottom"].set_linewidth(0.8)
    axes.grid(axis="y", color=_RULE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(axis="both", colors=MUTED, labelsize=11, length=0, pad=5)
    axes.tick_params(axis="x", length=3.5, width=0.8)
    axes.xaxis.label.set(color=MUTED, fontsize=11)
    axes.margins(x=0.015, y=0.06)
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=STEPS, integer=True))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.yaxis.set_major_locator(MaxNLocator(7, steps=STEPS))
    axes.yaxis.set_major_formatter(ScalarFormatter(useOffset=False, useMathText=False))
    return figure, axes


def over_steps(axes: Axes) -> None:
    axes.set_xlim(left=0)
    axes.set_xlabel("step")


def draw(axes: Axes, model: str, curve: Curve, *, marked: bool) -> None:
    style = LINE[model] | (MARKER[model] if marked else {})
    steps, values = zip(*curve, strict=True)
    axes.plot(steps, values, color=MODEL[model], markeredgecolor=PAPER, markeredgewidth=1.0, **style)


def thin(curve: Curve) -> Curve:
    """At most _MOST_POINTS points, each the mean of its neighbours: the line of a long run is noise otherwise."""
    size = math.ceil(len(curve) / _MOST_POINTS)
    groups = [curve[start : start + size] for start in range(0, len(curve), size)]
    return [(fmean(step for step, _ in group), fmean(value for _, value in group)) for group in groups]


def label_ends(axes: Axes, ends: list[tuple[str, float, str]], *, named: bool = True) -> None:
    """Name each line at its right end, at least a line of text apart.

    Args:
        axes: where the lines are.
        ends: the model whose colour it is, the height, and what else to say.
        named: say the model too.
    """
    low, high = axes.get_ylim()
    apart = 0.075 * (high - low)
    ends = sorted(ends, key=lambda end: end[1])
    heights: list[float] = []
    for _, value, _ in ends:
        heights.append(max(value, heights[-1] + apart) if heights else value)
    pushed = sum(height - value for height, (_, value, _) in zip(heights, ends, strict=True))
    for height, (model, _, text) in zip(heights, ends, strict=True):
        axes.annotate(
            f"{model} {text}" if named else text,
            (1, height - pushed / len(ends)),
            xycoords=axes.get_yaxis_transform(),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            color=MODEL[model],
            fontsize=11,
            fontweight="bold" if model == "student" else "normal",
            annotation_clip=False,
        )


def svg(figure: Figure, name: str, label: str) -> str:
    """The figure as an <svg> element that can stand in a page beside others."""
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "potstill"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    # A style sheet inside an inlined SVG would hold for the whole page.
    text = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", text, count=1, flags=re.DOTALL)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'(url\(#|href="#)', rf"\g<1>{name}-", text)
    text = _without_typeface(text)
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, f"var(--{variable})")
    view_box = re.search(r'viewBox="[^"]*"', text)
    assert view_box is not None
    opening = f'<svg class="picture" role="img" aria-label="{html.escape(label)}" {view_box.group()}>'
    return opening + text[text.index(">") + 1 :]


def _without_typeface(svg: str) -> str:
    """Text keeps its size and weight and takes the page's typeface. Matplotlib's releases write it in two ways."""
    svg = re.sub(r'font-family: [^;"]*(; )?', "", svg)
    svg = re.sub(r'font: (?:bold|700) ([\d.]+px) [^;"]*', r"font-size: \1; font-weight: bold", svg)
    return re.sub(r'font: ([\d.]+px) [^;"]*', r"font-size: \1", svg)
