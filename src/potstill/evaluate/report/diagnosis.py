"""A diagnosis in pictures: a section of report.html, and a page of its own for a recipe that has not run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment
from markupsafe import Markup

from potstill.data.files import write_text
from potstill.errors import DataError
from potstill.evaluate.report import diagnosis_pictures as pictures


def told(path: Path) -> dict[str, Any] | None:
    """The content of diagnose.json with its pictures; None where there is none.

    Raises:
        DataError: it is not the record of a diagnosis.
    """
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = None
    if not isinstance(found, dict) or found.get("kind") != "diagnosis":
        raise DataError(
            f"report: expected what potstill diagnose writes in {path}, got something else. Diagnose again."
        )
    return {**found, "pictures": _pictures(found)}


def write_diagnosis_page(environment: Environment, folder: Path) -> Path:
    """Write diagnose.html, one self-contained page, from diagnose.json in a folder; its path."""
    page = environment.get_template("diagnose.html.j2")
    write_text(folder / "diagnose.html", page.render(diagnosis=told(folder / "diagnose.json"), headlines=[], models=[]))
    return folder / "diagnose.html"


def _pictures(found: Mapping[str, Any]) -> dict[str, Markup | None]:
    temperature, distributions, floor = (found[key] for key in ("temperature", "distributions", "irreducible"))
    drawn: dict[str, str | None] = {
        "temperature": temperature and pictures.temperature(temperature["rows"], temperature["recommended"]),
        "gradients": pictures.gradients(found["gradients"]["flow"]),
        "floor": distributions
        and pictures.floor(floor["teacher_entropy"], {name: one["kl"] for name, one in distributions.items()}),
        "rarity": distributions and pictures.rarity({name: one["by_frequency"] for name, one in distributions.items()}),
    }
    return {name: Markup(picture) if picture else None for name, picture in drawn.items()}
