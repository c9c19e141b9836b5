"""The page of a sweep: sweep.html, from sweep.json."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator, PercentFormatter

from potstill.evaluate.formatting import count, milliseconds, percent, size
from potstill.evaluate.report import canvas
from potstill.evaluate.report.render import SMALLER, Headline, ratio_headline, render
from potstill.evaluate.summary import read_record
from potstill.evaluate.tradeoff import Limits
from potstill.models.capacity import expected_share

COSTS = {"parameters": "parameters", "bytes": "size", "latency_ms": "latency"}
FILE_COSTS = {"bytes": "size", "ms_per_token": "time"}  # of exported files
# The teacher, at 100%, is drawn if some student is better than this; otherwise students would be drawn on one spot.
_SHOW_TEACHER = 0.6
# Multiples of a power of ten for the ticks of a logarithmic axis, from the finest.
_HALVES = tuple(1 + 0.5 * i for i in range(18))
_TICKS = (_HALVES, (1.0, 1.5, 2.0, 3.0, 5.0, 7.0), (1.0, 2.0, 3.0, 5.0), (1.0, 2.0, 5.0), (1.0,))


def write_sweep_report(run_directory: Path) -> Path:
    """Write sweep.html, one self-contained page, from sweep.json; return its path."""
    summary = read_sweep(run_directory)
    return render(
        "sweep.html.j2",
        run_directory / "sweep.html",
        summary=summary,
        verdict=summary["recommended"]["why"],
        headlines=list(_headlines(summary)),
        costs=COSTS,
        pictures={key: _students(summary, key) for key in ("parameters", "latency_ms")} if summary["runs"] else {},
        files=summary.get("files", []),
        file_costs=FILE_COSTS,
        file_pictures={key: _files(summary, key) for key in FILE_COSTS} if summary.get("files") else {},
        expected=_expected(summary),
        limits=str(Limits(**summary["limits"])),
    )


def read_sweep(directory: Path) -> dict[str, Any]:
    advice = "Finish it with --resume first."
    return read_record(directory / "sweep.json", "sweep", "the summary of a sweep", advice)


def _headlines(summary: Mapping[str, Any]) -> Iterator[Headline]:
    place, teacher = summary["recommended"]["place"], summary["teacher"]
    axes = " × ".join(f"{len(values)} of {key.rpartition('.')[2]}" for key, values in summary["vary"].items())
    yield Headline(str(len(summary["runs"])), "students compared", axes)
    if place is None:
        return
    chosen = summary["runs"][place]
    yield Headline(percent(chosen["quality"]), "of the teacher's quality", f"by number {place + 1}")
    if teacher.get("parameters"):
        yield ratio_headline(teacher["parameters"], chosen["parameters"], SMALLER)
    yield Headline(milliseconds(chosen["latency_ms"]), "for one row", "one forward pass")


def _expected(summary: Mapping[str, Any]) -> dict[str, Any] | None:
    """Predicted beside measured quality: the picture, the tasks, and the error of the sweep's own law."""
    known = [row for row in summary["predictions"] if row["published"] and math.isfinite(row["measured"])]
    if not known:
        return None
    tasks = list(known[0]["published"])
    measured = [(row["compression"], row["measured"]) for row in known]
    least, most = (pick(compression for compression, _ in measured) for pick in (min, max))
    compressions = [least * (most / least) ** (i / 24) for i in range(25)]
    published = {task: [(c, expected_share(c, task).value) for c in compressions] for task in tasks}
    exponents = [-math.log(quality) / math.log(c) for c, quality in measured if c > 1 and quality > 0]
    mean = sum(exponents) / len(exponents) if exponents else None
    fitted = [(row["measured"], row["fitted"]) for row in known if row["fitted"]]
    return {
        "picture": _expectations(measured, published, [] if mean is None else [(c, c**-mean) for c in compressions]),
        "tasks": tasks,
        "sources": list(dict.fromkeys(known[0]["published"][task]["source"] for task in tasks)),
        "exponent": mean,
        "error": sum(abs(fit["value"] - quality) for quality, fit in fitted) / len(fitted) if fitted else None,
        "within": sum(fit["low"] <= quality <= fit["high"] for quality, fit in fitted),
        "fitted": len(fitted),
    }


def _students(summary: Mapping[str, Any], cost: str) -> Markup:
    """Quality of the students over "parameters" or "latency_ms"."""
    dots = {i: (row[cost], row["quality"]) for i, row in enumerate(summary["runs"]) if math.isfinite(row["quality"])}
    label, write = ("parameters", count) if cost == "parameters" else ("one row, one forward pass", milliseconds)
    return _pareto(
        dots,
        {i: str(i + 1) for i in dots},
        summary["fronts"][cost],
        (label, write, f"pareto-{cost}", f"Share of the teacher's quality over {COSTS[cost]}"),
        chosen=summary["recommended"]["place"],
        teacher_cost=summary["teacher"].get(cost),
    )


def _files(summary: Mapping[str, Any], cost: str) -> Markup:
    """Quality of the exported files over "bytes" or "ms_per_token"."""
    files = summary["files"]
    dots = {i: (file[cost], file["quality"]) for i, file in enumerate(files)}
    label, write = ("size of the file", size) if cost == "bytes" else ("generation, for one token", milliseconds)
    return _pareto(
        dots,
        {i: f"{files[i]['run'] + 1} {files[i]['kind']}" for i in dots},
        summary["file_fronts"][cost],
        (label, write, f"pareto-file-{cost}", f"Share of the teacher's quality over {label}"),
    )


def _pareto(
    dots: Mapping[int, tuple[float, float]],
    names: Mapping[int, str],
    front: Sequence[int],
    words: tuple[str, Callable[[float], str], str, str],
    *,
    chosen: int | None = None,
    teacher_cost: float | None = None,
) -> Markup:
    """Quality over a cost on a logarithmic axis, with the Pareto front as a line.

    Args:
        words: the axis, how its values are written, the id of the picture and what it shows.
    """
    label, write, key, shows = words
    if not dots:
        return Markup("")
    figure, axes = canvas.create(label, 0.1, 0.86)
    if line := sorted(dots[i] for i in dots if i in front):
        canvas.line(axes, "student", line, drawstyle="steps-post", linewidth=1.4, zorder=1)
    for i in sorted(dots, key=lambda i: (i == chosen, i in front)):
        model, above, edge, dot_size = ("student", 8, "bottom", 6) if i in front else ("baseline", -8, "top", 5)
        canvas.dots(axes, model, [dots[i]], markersize=9.5 if i == chosen else dot_size, zorder=2)
        style = {"ha": "center", "va": edge, "fontweight": "bold" if i == chosen else "normal"}
        canvas.annotate(axes, names[i], dots[i], model, (0, above), **style)
    if teacher_cost is not None and max(quality for _, quality in dots.values()) > _SHOW_TEACHER:
        canvas.dots(axes, "teacher", [(teacher_cost, 1.0)], markeredgewidth=0)
        canvas.annotate(axes, "teacher", (teacher_cost, 1.0), "teacher", (-7, 0), ha="right", va="center")
    axes.margins(x=0.08, y=0.14)
    axes.set_ylim(bottom=max(0.0, axes.get_ylim()[0]))
    _logarithmic(axes, write)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
    values = "; ".join(f"{names[i]}: {write(x)}, {quality:.1%}" for i, (x, quality) in dots.items())
    return canvas.svg(figure, key, f"{shows}: {values}.")


def _expectations(measured: canvas.Curve, published: Mapping[str, canvas.Curve], fitted: canvas.Curve) -> Markup:
    """Measured quality over compression, beside published students by task and the sweep's own law (may be empty)."""
    figure, axes = canvas.create("times fewer parameters than the teacher", 0.09, 0.66)
    ends = []
    for task, curve in published.items():
        canvas.line(axes, "teacher", curve)
        ends.append(("teacher", curve[-1][1], task))
    if fitted:
        canvas.line(axes, "student", fitted, linewidth=1.4)
        ends.append(("student", fitted[-1][1], "their law"))
    canvas.dots(axes, "student", measured)
    canvas.shares(axes)
    canvas.label_ends(axes, ends)
    _logarithmic(axes, lambda value: f"{value:g}×")
    values = "; ".join(f"{quality:.1%} at {compression:.1f} times smaller" for compression, quality in measured)
    return canvas.svg(figure, "expected", f"Share of the teacher's quality over compression, measured: {values}.")


def _logarithmic(axes: Axes, write: Callable[[float], str]) -> None:
    """Make the horizontal axis logarithmic, with at most five ticks if possible: labels would overlap otherwise."""
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)))
    for multiples in _TICKS:
        if sum(low <= multiple * 10**decade <= high for decade in decades for multiple in multiples) <= 5:
            break
    axes.xaxis.set_major_locator(LogLocator(subs=multiples, numticks=30))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: write(value)))
