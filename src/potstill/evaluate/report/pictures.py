"""The report's pictures: SVG to be put inside a page, which lends them its colours and its typeface."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from matplotlib.colors import hsv_to_rgb
from matplotlib.ticker import MaxNLocator, ScalarFormatter

from potstill.evaluate.report.canvas import (
    LINE,
    MARKER,
    MODEL,
    MOST_MARKERS,
    STEPS,
    Curve,
    canvas,
    draw,
    label_ends,
    over_steps,
    svg,
    thin,
)


def held_out_curves(curves: Mapping[str, Curve], teacher_loss: float | None) -> str:
    """Held-out cross-entropy over the steps of each run, with the teacher's as the floor.

    Args:
        curves: "baseline" and "student" -> (step, nats), rising steps; at least one point in all.
        teacher_loss: nats, or None.
    """
    figure, axes = canvas()
    ends: list[tuple[str, float, str]] = []
    if teacher_loss is not None and math.isfinite(teacher_loss):
        axes.axhline(teacher_loss, color=MODEL["teacher"], **LINE["teacher"])
        ends.append(("teacher", teacher_loss, f"{teacher_loss:.2f}"))
    for model, curve in curves.items():
        draw(axes, model, curve, marked=len(curve) <= MOST_MARKERS)
        ends.append((model, curve[-1][1], f"{curve[-1][1]:.2f}"))
    label_ends(axes, ends)
    over_steps(axes)
    said = [f"{model} from {curve[0][1]:.2f} to {curve[-1][1]:.2f}" for model, curve in curves.items()]
    if teacher_loss is not None:
        said.append(f"teacher at {teacher_loss:.2f}")
    return svg(figure, "held-out", f"Held-out cross-entropy in nats over steps: {', '.join(said)}.")


def training_curves(curves: Mapping[str, Curve]) -> str:
    """Training loss over the steps; each run's is that of its own objective."""
    figure, axes = canvas()
    thinned = {model: thin(curve) for model, curve in curves.items()}
    for model, curve in thinned.items():
        draw(axes, model, curve, marked=len(curve) == 1)
    label_ends(axes, [(model, curve[-1][1], f"{curve[-1][1]:.2f}") for model, curve in thinned.items()])
    over_steps(axes)
    said = [f"{model} from {curve[0][1]:.2f} to {curve[-1][1]:.2f}" for model, curve in thinned.items()]
    return svg(figure, "training", f"Training loss over steps: {', '.join(said)}.")


def kl_by_position(edges: Sequence[float], values: Mapping[str, Sequence[float]]) -> str:
    """Mean KL to the teacher in stretches of the window.

    Args:
        edges: the first position of each stretch, then the end of the last.
        values: "baseline" and "student" -> nats per stretch; nan where there was nothing to measure.
    """
    figure, axes = canvas()
    ends = []
    for model, heights in values.items():
        style = {**LINE[model], "linewidth": 2.3 if model == "student" else 1.6}
        axes.stairs(heights, edges, baseline=None, color=MODEL[model], **style)
        measured = [height for height in heights if math.isfinite(height)]
        if measured:
            ends.append((model, measured[-1], f"{measured[-1]:.2f}"))
    axes.set_xlim(edges[0], edges[-1])
    axes.set_ylim(bottom=0)
    label_ends(axes, ends)
    axes.set_xlabel("position in the window")
    if (edges[-1] - edges[0]) % 4 == 0:  # windows are powers of two
        axes.set_xticks([edges[0] + quarter * (edges[-1] - edges[0]) / 4 for quarter in range(5)])
    said = ", ".join(f"{model} {height} at the end" for model, _, height in ends)
    return svg(figure, "positions", f"KL to the teacher in nats by position in the window: {said}.")


def space(title: str, points: Sequence[tuple[float, float]], hues: Sequence[float]) -> str:
    """Points of a plane, each in the colour of its hue.

    Args:
        title: whose space it is.
        points: in the plane.
        hues: 0 to 1, around the colour wheel; the same point has the same one in every picture.
    """
    figure, axes = canvas()
    axes.set_position((0.02, 0.03, 0.96, 0.94))
    axes.grid(False)
    axes.set_axis_off()
    axes.set_aspect("equal", adjustable="datalim")
    across, up = zip(*points, strict=True)
    colours = [(*hsv_to_rgb((hue, 0.62, 0.8)), 0.75) for hue in hues]
    axes.scatter(across, up, s=9, c=colours, linewidths=0)
    return svg(figure, title.replace(" ", "-"), f"{title}: {len(points)} held-out vectors in the plane.")


def front(points: Mapping[str, tuple[float, float]], across: str, up: str) -> str:
    """What is traded between two measures.

    Args:
        points: name -> (across, up), both better when larger. Names that begin with "focus" are students, and joined.
        across: what the horizontal axis measures.
        up: the vertical one.
    """
    figure, axes = canvas()
    students = sorted(point for name, point in points.items() if name.startswith("focus"))
    if len(students) > 1:
        axes.plot(*zip(*students, strict=True), color=MODEL["student"], linewidth=1.2)
    for name, point in points.items():
        model = "student" if name.startswith("focus") else "baseline"
        axes.plot(*point, color=MODEL[model], linestyle="none", **MARKER[model])
        axes.annotate(
            name,
            point,
            xytext=(6, 4),
            textcoords="offset points",
            fontsize=11,
            color=MODEL[model],
            annotation_clip=False,
        )
    axes.margins(x=0.2, y=0.12)
    axes.set_xlabel(across)
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=STEPS))
    axes.xaxis.set_major_formatter(ScalarFormatter(useOffset=False))
    said = "; ".join(f"{name} {x:.3f}, {y:.3f}" for name, (x, y) in points.items())
    return svg(figure, "front", f"{up} over {across}: {said}.")


def correlation_curve(curve: Curve) -> str:
    """Held-out rank correlation with the teacher over the epochs."""
    figure, axes = canvas()
    draw(axes, "student", curve, marked=len(curve) <= MOST_MARKERS)
    label_ends(axes, [("student", curve[-1][1], f"{curve[-1][1]:.3f}")])
    axes.set_xlim(left=0)
    axes.set_xlabel("epoch")
    return svg(figure, "correlation", f"Held-out rank correlation: {curve[0][1]:.3f} to {curve[-1][1]:.3f}.")
