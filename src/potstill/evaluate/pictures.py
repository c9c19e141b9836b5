"""The report's pictures: SVG to be put inside a page, which lends them its colours and its typeface."""

from __future__ import annotations

import html
import io
import math
import re
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.colors import hsv_to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, ScalarFormatter, StrMethodFormatter

Curve = Sequence[tuple[float, float]]

# Drawn in colours that stand for a CSS variable, so that the page can be light, dark or printed.
_INK, _MUTED, _RULE, _PAPER = "#010101", "#010102", "#010103", "#010104"
_MODEL = {"teacher": "#010105", "baseline": "#010106", "student": "#010107"}
_VARIABLES = {_INK: "ink", _MUTED: "muted", _RULE: "rule", _PAPER: "paper"} | {
    colour: model for model, colour in _MODEL.items()
}
# Told apart without colour too.
_LINE: dict[str, dict[str, Any]] = {
    "teacher": {"linestyle": (0, (4, 2.5)), "linewidth": 1.4},
    "baseline": {"linestyle": "solid", "linewidth": 1.4},
    "student": {"linestyle": "solid", "linewidth": 2.3},
}
_MARKER: dict[str, dict[str, Any]] = {
    "baseline": {"marker": "s", "markersize": 3.6},
    "student": {"marker": "o", "markersize": 4.6},
}

_INCHES = (6.0, 3.7)
_STEPS = [1, 2, 2.5, 5, 10]
_MOST_MARKERS = 24
_MOST_POINTS = 240


def held_out_curves(curves: Mapping[str, Curve], teacher_loss: float | None) -> str:
    """Held-out cross-entropy over the steps of each run, with the teacher's as the floor.

    Args:
        curves: "baseline" and "student" -> (step, nats), rising steps; at least one point in all.
        teacher_loss: nats, or None.
    """
    figure, axes = _canvas()
    ends: list[tuple[str, float, str]] = []
    if teacher_loss is not None and math.isfinite(teacher_loss):
        axes.axhline(teacher_loss, color=_MODEL["teacher"], **_LINE["teacher"])
        ends.append(("teacher", teacher_loss, f"{teacher_loss:.2f}"))
    for model, curve in curves.items():
        _draw(axes, model, curve, marked=len(curve) <= _MOST_MARKERS)
        ends.append((model, curve[-1][1], f"{curve[-1][1]:.2f}"))
    _label_ends(axes, ends)
    _over_steps(axes)
    said = [f"{model} from {curve[0][1]:.2f} to {curve[-1][1]:.2f}" for model, curve in curves.items()]
    if teacher_loss is not None:
        said.append(f"teacher at {teacher_loss:.2f}")
    return _svg(figure, "held-out", f"Held-out cross-entropy in nats over steps: {', '.join(said)}.")


def training_curves(curves: Mapping[str, Curve]) -> str:
    """Training loss over the steps; each run's is that of its own objective."""
    figure, axes = _canvas()
    thinned = {model: _thin(curve) for model, curve in curves.items()}
    for model, curve in thinned.items():
        _draw(axes, model, curve, marked=len(curve) == 1)
    _label_ends(axes, [(model, curve[-1][1], f"{curve[-1][1]:.2f}") for model, curve in thinned.items()])
    _over_steps(axes)
    said = [f"{model} from {curve[0][1]:.2f} to {curve[-1][1]:.2f}" for model, curve in thinned.items()]
    return _svg(figure, "training", f"Training loss over steps: {', '.join(said)}.")


def kl_by_position(edges: Sequence[float], values: Mapping[str, Sequence[float]]) -> str:
    """Mean KL to the teacher in stretches of the window.

    Args:
        edges: the first position of each stretch, then the end of the last.
        values: "baseline" and "student" -> nats per stretch; nan where there was nothing to measure.
    """
    figure, axes = _canvas()
    ends = []
    for model, heights in values.items():
        style = {**_LINE[model], "linewidth": 2.3 if model == "student" else 1.6}
        axes.stairs(heights, edges, baseline=None, color=_MODEL[model], **style)
        measured = [height for height in heights if math.isfinite(height)]
        if measured:
            ends.append((model, measured[-1], f"{measured[-1]:.2f}"))
    axes.set_xlim(edges[0], edges[-1])
    axes.set_ylim(bottom=0)
    _label_ends(axes, ends)
    axes.set_xlabel("position in the window")
    if (edges[-1] - edges[0]) % 4 == 0:  # windows are powers of two
        axes.set_xticks([edges[0] + quarter * (edges[-1] - edges[0]) / 4 for quarter in range(5)])
    said = ", ".join(f"{model} {height} at the end" for model, _, height in ends)
    return _svg(figure, "positions", f"KL to the teacher in nats by position in the window: {said}.")


def space(title: str, points: Sequence[tuple[float, float]], hues: Sequence[float]) -> str:
    """Points of a plane, each in the colour of its hue.

    Args:
        title: whose space it is.
        points: in the plane.
        hues: 0 to 1, around the colour wheel; the same point has the same one in every picture.
    """
    figure, axes = _canvas()
    axes.set_position((0.02, 0.03, 0.96, 0.94))
    axes.grid(False)
    axes.set_axis_off()
    axes.set_aspect("equal", adjustable="datalim")
    across, up = zip(*points, strict=True)
    colours = [(*hsv_to_rgb((hue, 0.62, 0.8)), 0.75) for hue in hues]
    axes.scatter(across, up, s=9, c=colours, linewidths=0)
    return _svg(figure, title.replace(" ", "-"), f"{title}: {len(points)} held-out vectors in the plane.")


def front(points: Mapping[str, tuple[float, float]], across: str, up: str) -> str:
    """What is traded between two measures.

    Args:
        points: name -> (across, up), both better when larger. Names that begin with "focus" are students, and joined.
        across: what the horizontal axis measures.
        up: the vertical one.
    """
    figure, axes = _canvas()
    students = sorted(point for name, point in points.items() if name.startswith("focus"))
    if len(students) > 1:
        axes.plot(*zip(*students, strict=True), color=_MODEL["student"], linewidth=1.2)
    for name, point in points.items():
        model = "student" if name.startswith("focus") else "baseline"
        axes.plot(*point, color=_MODEL[model], linestyle="none", **_MARKER[model])
        axes.annotate(
            name,
            point,
            xytext=(6, 4),
            textcoords="offset points",
            fontsize=11,
            color=_MODEL[model],
            annotation_clip=False,
        )
    axes.margins(x=0.2, y=0.12)
    axes.set_xlabel(across)
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=_STEPS))
    axes.xaxis.set_major_formatter(ScalarFormatter(useOffset=False))
    said = "; ".join(f"{name} {x:.3f}, {y:.3f}" for name, (x, y) in points.items())
    return _svg(figure, "front", f"{up} over {across}: {said}.")


def correlation_curve(curve: Curve) -> str:
    """Held-out rank correlation with the teacher over the epochs."""
    figure, axes = _canvas()
    _draw(axes, "student", curve, marked=len(curve) <= _MOST_MARKERS)
    _label_ends(axes, [("student", curve[-1][1], f"{curve[-1][1]:.3f}")])
    axes.set_xlim(left=0)
    axes.set_xlabel("epoch")
    return _svg(figure, "correlation", f"Held-out rank correlation: {curve[0][1]:.3f} to {curve[-1][1]:.3f}.")


def _canvas() -> tuple[Figure, Axes]:
    figure = Figure(figsize=_INCHES)
    figure.patch.set_alpha(0)
    axes = figure.add_axes((0.078, 0.145, 0.735, 0.82))
    axes.patch.set_alpha(0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(_MUTED)
    axes.spines["bottom"].set_linewidth(0.8)
    axes.grid(axis="y", color=_RULE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(axis="both", colors=_MUTED, labelsize=11, length=0, pad=5)
    axes.tick_params(axis="x", length=3.5, width=0.8)
    axes.xaxis.label.set(color=_MUTED, fontsize=11)
    axes.margins(x=0.015, y=0.06)
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=_STEPS, integer=True))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.yaxis.set_major_locator(MaxNLocator(7, steps=_STEPS))
    axes.yaxis.set_major_formatter(ScalarFormatter(useOffset=False, useMathText=False))
    return figure, axes


def _over_steps(axes: Axes) -> None:
    axes.set_xlim(left=0)
    axes.set_xlabel("step")


def _draw(axes: Axes, model: str, curve: Curve, *, marked: bool) -> None:
    style = _LINE[model] | (_MARKER[model] if marked else {})
    steps, values = zip(*curve, strict=True)
    axes.plot(steps, values, color=_MODEL[model], markeredgecolor=_PAPER, markeredgewidth=1.0, **style)


def _thin(curve: Curve) -> Curve:
    """At most _MOST_POINTS points, each the mean of its neighbours: the line of a long run is noise otherwise."""
    size = math.ceil(len(curve) / _MOST_POINTS)
    groups = [curve[start : start + size] for start in range(0, len(curve), size)]
    return [(fmean(step for step, _ in group), fmean(value for _, value in group)) for group in groups]


def _label_ends(axes: Axes, ends: list[tuple[str, float, str]]) -> None:
    """Name each line at its right end, at least a line of text apart."""
    low, high = axes.get_ylim()
    apart = 0.075 * (high - low)
    ends = sorted(ends, key=lambda end: end[1])
    heights: list[float] = []
    for _, value, _ in ends:
        heights.append(max(value, heights[-1] + apart) if heights else value)
    pushed = sum(height - value for height, (_, value, _) in zip(heights, ends, strict=True))
    for height, (model, _, text) in zip(heights, ends, strict=True):
        axes.annotate(
            f"{model} {text}",
            (1, height - pushed / len(ends)),
            xycoords=axes.get_yaxis_transform(),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            color=_MODEL[model],
            fontsize=11,
            fontweight="bold" if model == "student" else "normal",
            annotation_clip=False,
        )


def _svg(figure: Figure, name: str, label: str) -> str:
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
