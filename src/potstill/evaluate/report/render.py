"""The one renderer of report pages and model cards: a page is a template and its data."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

from potstill.evaluate import formatting
from potstill.files import write_text


def render(template: str, path: Path, **data: Any) -> Path:
    """Render a template of this package to a file and return its path; HTML templates escape their data.

    A page extends page.html.j2 and sets `title`, `kind`, `date`, `version` and `source`.
    """
    write_text(path, _environment().get_template(template).render(data))
    return path


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("potstill.evaluate", "report"),
        autoescape=select_autoescape(["html.j2"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    names = ("count", "duration", "flops", "milliseconds", "nats", "percent", "size", "times")
    environment.filters |= {name: getattr(formatting, name) for name in names}
    environment.filters |= {"number": "{:g}".format, "thousands": "{:,}".format, "visible": _visible, "cell": _cell}
    environment.filters |= {"quoted": partial(json.dumps, ensure_ascii=False)}  # shows spaces and line ends
    return environment


def _visible(text: str) -> str:
    """Replace control characters, which HTML forbids or which reverse the text around them, with a visible mark."""
    control = r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]"
    return re.sub(control, "\N{REPLACEMENT CHARACTER}", text.replace("\r\n", "\n"))


def _cell(text: str) -> str:
    """Escape text for a line or table cell of Markdown."""
    return re.sub(r"([\\`*_|<>\[\]])", r"\\\1", " ".join(text.split()))


class Headline(NamedTuple):
    """A large figure at the top of a page."""

    value: str
    name: str
    detail: str


SMALLER = ("smaller", "larger", "the same size", formatting.count, " parameters")
FASTER = ("faster", "slower", "as fast", formatting.milliseconds, "")
WITHIN_SPREAD = ("faster, within the spread", "slower, within the spread", *FASTER[2:])


def ratio_headline(
    teacher: float, student: float, words: tuple[str, str, str, Callable[[float], str], str]
) -> Headline:
    """Compare costs, as in "4.1× smaller"; `words` for a ratio above, below and near 1, format and unit of a cost."""
    more, less, same, write, unit = words
    ratio, detail = teacher / student, f"{write(student)} against {write(teacher)}{unit}"
    if 0.95 < ratio < 1.05:
        return Headline("1×", same, detail)
    return Headline(f"{formatting.times(max(ratio, 1 / ratio))}×", more if ratio > 1 else less, detail)
