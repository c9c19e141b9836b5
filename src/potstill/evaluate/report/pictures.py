"""Pictures of training runs and of embedding runs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from markupsafe import Markup
from matplotlib.colors import hsv_to_rgb
from matplotlib.ticker import ScalarFormatter

from potstill.evaluate.report import canvas


def curves(
    name: str,
    title: str,
    curves: Mapping[str, canvas.Curve],
    floor: float | None = None,
    *,
    unit: str = "step",
    markers: int = 24,
    digits: int = 2,
) -> Markup:
    """Curves over steps or epochs, labelled with their last values; `floor` is the teacher's value.

    Curves of at most `markers` points have markers.
    """
    figure, axes = canvas.create(unit)
    ends, ranges = [], []
    if floor is not None:
        axes.axhline(floor, color=canvas.COLOUR["teacher"], **canvas.LINE["teacher"])
        ends.append(("teacher", floor, f"teacher {floor:.{digits}f}"))
    for model, curve in curves.items():
        canvas.line(axes, model, curve, marked=len(curve) <= markers)
        first, last = (f"{curve[i][1]:.{digits}f}" for i in (0, -1))
        ends.append((model, curve[-1][1], f"{model} {last}"))
        ranges.append(f"{model} from {first} to {last}")
    canvas.label_ends(axes, ends)
    axes.set_xlim(left=0)
    if floor is not None:
        ranges.append(f"teacher at {floor:.2f}")
    return canvas.svg(figure, name, f"{title} over {unit}s: {', '.join(ranges)}.")


def kl_by_position(edges: Sequence[float], values: Mapping[str, Sequence[float]]) -> Markup:
    """Mean KL to the teacher, nats, in bins of positions between `edges`; nan for an empty bin."""
    figure, axes = canvas.create("position in the window")
    ends = []
    for model, heights in values.items():
        style = canvas.LINE[model] | {"linewidth": 2.3 if model == "student" else 1.6}
        axes.stairs(heights, edges, baseline=None, color=canvas.COLOUR[model], **style)
        if measured := [height for height in heights if math.isfinite(height)]:
            ends.append((model, measured[-1], f"{model} {measured[-1]:.2f}"))
    axes.set_xlim(edges[0], edges[-1])
    axes.set_ylim(bottom=0)
    canvas.label_ends(axes, ends)
    if (edges[-1] - edges[0]) % 4 == 0:  # windows are powers of two
        axes.set_xticks([edges[0] + quarter * (edges[-1] - edges[0]) / 4 for quarter in range(5)])
    label = ", ".join(f"{text} at the end" for _, _, text in ends)
    return canvas.svg(figure, "positions", f"KL to the teacher in nats by position in the window: {label}.")


def space(title: str, points: Sequence[tuple[float, float]], hues: Sequence[float]) -> Markup:
    """Points of a plane, coloured by hues from 0 to 1; the same point has the same hue in every picture."""
    figure, axes = canvas.create()
    axes.set_position((0.02, 0.03, 0.96, 0.94))
    axes.grid(False)
    axes.set_axis_off()
    axes.set_aspect("equal", adjustable="datalim")
    colours = [(*hsv_to_rgb((hue, 0.62, 0.8)), 0.75) for hue in hues]
    x, y = zip(*points, strict=True)
    axes.scatter(x, y, s=9, c=colours, linewidths=0)
    return canvas.svg(figure, title.replace(" ", "-"), f"{title}: {len(points)} held-out vectors in the plane.")


def front(points: Mapping[str, tuple[float, float]], x_label: str, y_label: str) -> Markup:
    """The trade-off between two measures of points name -> (x, y); those named "focus..." are students, and joined."""
    figure, axes = canvas.create(x_label)
    students = sorted(point for name, point in points.items() if name.startswith("focus"))
    if len(students) > 1:
        canvas.line(axes, "student", students, linewidth=1.2)
    for name, point in points.items():
        model = "student" if name.startswith("focus") else "baseline"
        canvas.dots(axes, model, [point])
        canvas.annotate(axes, name, point, model, (6, 4))
    axes.margins(x=0.2, y=0.12)
    canvas.ticks(axes.xaxis, 5)
    axes.xaxis.set_major_formatter(ScalarFormatter(useOffset=False))
    label = "; ".join(f"{name} {x:.3f}, {y:.3f}" for name, (x, y) in points.items())
    return canvas.svg(figure, "front", f"{y_label} over {x_label}: {label}.")
