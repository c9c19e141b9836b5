"""What torch.compile leaves alone."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar, cast

import torch

P = ParamSpec("P")
R = TypeVar("R")


def uncompiled(function: Callable[P, R]) -> Callable[P, R]:
    """The function as `torch.compiler.disable` makes it, from the moment on when something is compiled.

    That one imports the compiler at once, which takes as long as torch itself, and most programs compile nothing.
    """
    made: list[Callable[P, R]] = []

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if "torch._dynamo" not in sys.modules:
            return function(*args, **kwargs)
        if not made:
            made.append(cast(Callable[P, R], torch.compiler.disable(function)))  # type: ignore[no-untyped-call]
        return made[0](*args, **kwargs)

    return call
