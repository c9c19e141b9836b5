"""The console that the command line prints to."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions
from rich.segment import Segment

from potstill.errors import printable


class Terminal(Console):
    """A console for texts of others: control characters are escaped, and [brackets] and :names: mean nothing."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"markup": False, "highlight": False, "emoji": False, **options})

    def render(self, renderable: Any, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Render as `Console` does; what rich itself writes to move the cursor or to colour is no text."""
        for text, style, control in super().render(renderable, options):
            yield Segment(text if control else printable(text), style, control)
