"""A diagnosis with pictures: a section of report.html, or its own page for a recipe that has not run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup
from matplotlib.ticker import NullLocator

from potstill.evaluate.report import canvas
from potstill.evaluate.report.render import render
from potstill.evaluate.summary import read_record

_MOST_NAMES = 7  # along an axis
_LOG_RATIO = 30  # largest over smallest value, above which an axis is logarithmic


def read_diagnosis(path: Path) -> dict[str, Any] | None:
    """Read diagnose.json and draw its pictures; None if there is no such file."""
    if not path.exists():
        return None
    diagnosis = read_record(path, "diagnosis", "what potstill diagnose writes", "Diagnose again.")
    temperature, models, floor = (diagnosis[key] for key in ("temperature", "distributions", "irreducible"))
    pictures = {
        "temperature": temperature and _temperature(temperature["rows"], temperature["recommended"]),
        "gradients": _gradients(diagnosis["gradients"]["flow"]),
        "floor": models and _floor(floor["teacher_entropy"], {name: model["kl"] for name, model in models.items()}),
        "rarity": models and _rarity({name: model["by_frequency"] for name, model in models.items()}),
    }
    return {**diagnosis, "pictures": pictures}


def write_diagnosis_page(folder: Path) -> Path:
    """Write diagnose.html, one self-contained page, from diagnose.json in a folder; return its path."""
    diagnosis = read_diagnosis(folder / "diagnose.json")
    return render("diagnose.html.j2", folder / "diagnose.html", diagnosis=diagnosis)


def _temperature(rows: Sequence[Mapping[str, Any]], recommended: float) -> Markup:
    """Total probability of the teacher's most likely tokens over temperature, the recommended one marked."""
    figure, axes = canvas.create("temperature", height=0.76)
    axes.axvline(recommended, color=canvas.COLOUR["student"], linewidth=1.2, linestyle=(0, (2, 2)))
    canvas.annotate(axes, f"recommended {recommended:g}", (recommended, 1.02), "student", (0, 4))
    for k in rows[0]["mass"]:
        curve = [(row["temperature"], row["mass"][k]) for row in rows]
        canvas.line(axes, "teacher", curve, marker="o", markersize=3.6, linewidth=1.6, linestyle="solid")
    canvas.shares(axes)
    last = rows[-1]["mass"].items()
    canvas.label_ends(axes, [("teacher", mass, "1 token" if k == "1" else f"{k} tokens") for k, mass in last])
    values = "; ".join(f"at {row['temperature']:g} the top token has {row['mass']['1']:.0%}" for row in rows)
    return canvas.svg(figure, "temperature", f"Probability of the most likely tokens over temperature: {values}.")


def _gradients(flow: Sequence[Mapping[str, Any]]) -> Markup:
    """Root mean square of the gradient in each part of the student, from input to output."""
    figure, axes = canvas.create("layer, from input to output", 0.1, 0.87)
    sizes = [part["gradient"] if math.isfinite(part["gradient"]) else 0.0 for part in flow]
    canvas.line(axes, "student", enumerate(sizes), marked=True)
    if min(sizes) > 0 and max(sizes) > _LOG_RATIO * min(sizes):
        axes.set_yscale("log")
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.2g}")
    places = sorted({*range(0, len(flow), math.ceil(len(flow) / _MOST_NAMES)), len(flow) - 1})
    names = [part["part"].replace("layer ", "").replace("embed_tokens", "embed") for part in flow]
    axes.set_xticks(places, [names[place] for place in places])
    values = "; ".join(f"{part['part']} {part['gradient']:.2g}" for part in flow)
    return canvas.svg(figure, "gradients", f"Root mean square of the gradient by part: {values}.")


def _floor(entropy: float, divergences: Mapping[str, float]) -> Markup:
    """Cross-entropy with the teacher's distributions: its entropy plus each model's KL, nats."""
    figure, axes = canvas.create("nats per token", 0.16, 0.78)
    for place, (model, kl) in enumerate(divergences.items()):
        axes.barh(place, entropy, color=canvas.COLOUR["teacher"], height=0.5)
        axes.barh(place, kl, left=entropy, color=canvas.COLOUR[model], height=0.5, alpha=0.75)
        canvas.annotate(axes, f"{entropy + kl:.2f}", (entropy + kl, place), model, (5, 0), va="center")
    axes.set_yticks(range(len(divergences)), list(divergences))
    axes.set_ylim(max(len(divergences), 2) - 0.4, -0.6)
    axes.grid(visible=False)
    axes.set_xlim(0, 1.08 * (entropy + max(divergences.values())))
    canvas.ticks(axes.xaxis, 6)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    values = "; ".join(f"{model} {entropy + kl:.2f}" for model, kl in divergences.items())
    return canvas.svg(figure, "floor", f"Teacher's entropy {entropy:.2f} nats, plus each model's KL: {values}.")


def _rarity(groups: Mapping[str, Sequence[Mapping[str, Any]]]) -> Markup:
    """KL to the teacher by frequency of the token in the training data; the same groups for each model."""
    figure, axes = canvas.create("times in the training data")
    names = [group["name"] for group in next(iter(groups.values()))]
    for model, rows in groups.items():
        canvas.line(axes, model, enumerate(row["kl"] for row in rows), marked=True)
    axes.set_ylim(bottom=0)
    axes.set_xlim(-0.3, len(names) - 0.9)
    last = {model: rows[-1]["kl"] for model, rows in groups.items()}
    canvas.label_ends(axes, [(model, kl, f"{model} {kl:.2f}") for model, kl in last.items()])
    axes.set_xticks(range(len(names)), [name.replace(" times", "").replace(" or more", "+") for name in names])
    values = "; ".join(f"{model} {rows[0]['kl']:.2f} to {last[model]:.2f}" for model, rows in groups.items())
    return canvas.svg(figure, "rarity", f"KL to the teacher in nats by frequency of the token: {values}.")
