"""A limit on the time of a measurement that has several parts."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")


class TimeLimit:
    """A number of seconds from now on. What a part leaves of its share is there for the parts after it."""

    def __init__(self, seconds: float = math.inf) -> None:
        self._end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        """Seconds that are left; negative ones never."""
        return max(self._end - time.monotonic(), 0.0)

    @property
    def over(self) -> bool:
        return self.left == 0

    def share(self, share: float) -> TimeLimit:
        """A share of the time that is left."""
        return TimeLimit(share * self.left)

    def within(self, items: Iterable[Item]) -> Iterator[Item]:
        """Yield items until the time is over; the first in any case."""
        for number, item in enumerate(items):
            if number and self.over:
                return
            yield item
