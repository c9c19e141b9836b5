"""Functions that torch.compile leaves alone."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar, cast

import torch

P = ParamSpec("P")
R = TypeVar("R")


def disable_compile(function: Callable[P, R]) -> Callable[P, R]:
    """Apply `torch.compiler.disable` once something is compiled.

    Applied at once it would import the compiler, which takes as long as importing torch; most programs never compile.
    """
    disabled: list[Callable[P, R]] = []

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if "torch._dynamo" not in sys.modules:
            return function(*args, **kwargs)
        if not disabled:  # not functools.cache, which the compiler warns about
            disabled.append(cast(Callable[P, R], torch.compiler.disable(function)))  # type: ignore[no-untyped-call]
        return disabled[0](*args, **kwargs)

    return call
