"""Every error that Potstill raises on purpose.

    PotstillError
    ├── UserError               something to correct in what was asked; exit status 2
    │   ├── RecipeError         a recipe does not say what it must
    │   ├── DataError           a file, a field or an example is not usable
    │   │   └── EmptyDataError  no token of the data is a target
    │   ├── VocabularyError     teacher and student do not speak of the same tokens
    │   ├── ModelError          a model cannot be read or built
    │   ├── RefusedError        a server does not do what it is asked
    │   └── ShapeError          tensors that do not fit together
    └── RunError                a run could not go on; exit status 1
        ├── ServerError         a server does not answer
        └── DivergedError       the loss is not a number any more

Each message is one line: `<what was called>: expected <X>, got <Y>. <why>. <what to do>.`
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class PotstillError(Exception):
    """The root of the tree."""


class UserError(PotstillError):
    """Something to correct in what was asked."""


class RecipeError(UserError, ValueError):
    """A recipe does not say what it must."""


class DataError(UserError, ValueError):
    """A file, a field or an example is not usable."""


class EmptyDataError(DataError):
    """No token of the data is a target."""


class VocabularyError(UserError, ValueError):
    """Teacher and student do not speak of the same tokens."""


class ModelError(UserError, ValueError):
    """A model cannot be read or built."""


class RefusedError(UserError, ValueError):
    """A server does not do what it is asked; `status` is its HTTP status, where that is how it refuses."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class ShapeError(UserError, ValueError):
    """Tensors that do not fit together, or a number outside its range."""


class RunError(PotstillError, RuntimeError):
    """A run could not go on."""


class ServerError(RunError):
    """A server does not answer, or not as it should."""


class DivergedError(RunError):
    """The loss is not a number any more."""


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: " Did you mean <the nearest known one>?", or nothing."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean {near[0]}?" if near else ""


def one_line(error: object, limit: int | None = None) -> str:
    """Join the lines of a message, and keep the first `limit` characters."""
    return " ".join(str(error).split())[:limit]
