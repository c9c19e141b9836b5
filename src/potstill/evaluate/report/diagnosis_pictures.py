"""The pictures of a diagnosis: temperature, gradients, the floor of the loss, and rare tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.ticker import MaxNLocator, NullLocator, PercentFormatter

from potstill.evaluate.report.canvas import LINE, MARKER, MODEL, MUTED, PAPER, STEPS, canvas, label_ends, svg

_MOST_NAMES = 7  # along an axis
_DECADES = 30  # from largest to smallest, beyond which a logarithmic axis says more


def temperature(rows: Sequence[Mapping[str, Any]], recommended: float) -> str:
    """What the teacher's likeliest tokens have together, over the temperature.

    Args:
        rows: temperature and mass (number of tokens, as text -> share), rising temperature.
        recommended: marked.
    """
    figure, axes = canvas()
    along = [row["temperature"] for row in rows]
    axes.axvline(recommended, color=MODEL["student"], linewidth=1.2, linestyle=(0, (2, 2)))
    where: dict[str, Any] = {"xytext": (0, 4), "textcoords": "offset points", "fontsize": 11}
    axes.annotate(f"recommended {recommended:g}", (recommended, 1.02), color=MODEL["student"], **where)
    ends = []
    for k in rows[0]["mass"]:
        shares = [row["mass"][k] for row in rows]
        axes.plot(along, shares, color=MODEL["teacher"], marker="o", markersize=3.6, linewidth=1.6)
        ends.append(("teacher", shares[-1], "1 token" if k == "1" else f"{k} tokens"))
    axes.set_position((0.078, 0.145, 0.735, 0.76))
    axes.set_ylim(0, 1.02)
    label_ends(axes, ends, named=False)
    axes.set_xlabel("temperature")
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=STEPS))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    said = "; ".join(f"at {row['temperature']:g} the likeliest has {row['mass']['1']:.0%}" for row in rows)
    return svg(figure, "temperature", f"Mass of the teacher's likeliest tokens over temperature: {said}.")


def gradients(flow: Sequence[Mapping[str, Any]]) -> str:
    """The root mean square of the gradient in each part of the student, from input to output."""
    figure, axes = canvas()
    axes.set_position((0.1, 0.145, 0.87, 0.82))
    sizes = [part["gradient"] if math.isfinite(part["gradient"]) else 0.0 for part in flow]
    axes.plot(
        range(len(flow)), sizes, color=MODEL["student"], markeredgecolor=PAPER, **LINE["student"], **MARKER["student"]
    )
    if min(sizes) > 0 and max(sizes) > _DECADES * min(sizes):
        axes.set_yscale("log")
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.2g}")
    every = math.ceil(len(flow) / _MOST_NAMES)
    places = sorted({*range(0, len(flow), every), len(flow) - 1})
    names = [part["part"].replace("layer ", "").replace("embed_tokens", "embed") for part in flow]
    axes.set_xticks(places, [names[place] for place in places])
    axes.set_xlabel("layer, from input to output")
    said = "; ".join(f"{part['part']} {part['gradient']:.2g}" for part in flow)
    return svg(figure, "gradients", f"Root mean square of the gradient by part: {said}.")


def floor(entropy: float, divergences: Mapping[str, float]) -> str:
    """Cross-entropy with the teacher's distributions: its entropy, and what each model adds.

    Args:
        entropy: the teacher's, nats.
        divergences: model -> KL(teacher || model), nats.
    """
    figure, axes = canvas()
    axes.set_position((0.16, 0.145, 0.78, 0.82))
    for place, (model, kl) in enumerate(divergences.items()):
        axes.barh(place, entropy, color=MODEL["teacher"], height=0.5)
        axes.barh(place, kl, left=entropy, color=MODEL[model], height=0.5, alpha=0.75)
        where: dict[str, Any] = {"xytext": (5, 0), "textcoords": "offset points", "va": "center", "fontsize": 11}
        axes.annotate(f"{entropy + kl:.2f}", (entropy + kl, place), color=MODEL[model], annotation_clip=False, **where)
    axes.set_yticks(range(len(divergences)), list(divergences))
    axes.set_ylim(max(len(divergences), 2) - 0.4, -0.6)
    axes.grid(visible=False)
    axes.set_xlim(0, 1.08 * (entropy + max(divergences.values())))
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=STEPS))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel("nats per token")
    said = "; ".join(f"{model} {entropy + kl:.2f}" for model, kl in divergences.items())
    return svg(figure, "floor", f"Teacher's entropy {entropy:.2f} nats, with each model's divergence: {said}.")


def rarity(groups: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """KL to the teacher by how often the training data has the token.

    Args:
        groups: model -> name and kl of each group, the same groups in the same order.
    """
    figure, axes = canvas()
    names = [group["name"] for group in next(iter(groups.values()))]
    ends = []
    for model, found in groups.items():
        values = [group["kl"] for group in found]
        style = LINE[model] | MARKER[model]
        axes.plot(range(len(values)), values, color=MODEL[model], markeredgecolor=PAPER, **style)
        ends.append((model, values[-1], f"{values[-1]:.2f}"))
    axes.set_ylim(bottom=0)
    axes.set_xlim(-0.3, len(names) - 0.9)
    label_ends(axes, ends)
    axes.set_xticks(range(len(names)), [name.replace(" times", "").replace(" or more", "+") for name in names])
    axes.set_xlabel("times in the training data", color=MUTED)
    said = "; ".join(f"{model} {values[0]['kl']:.2f} to {values[-1]['kl']:.2f}" for model, values in groups.items())
    return svg(figure, "rarity", f"KL to the teacher in nats by frequency of the token: {said}.")
