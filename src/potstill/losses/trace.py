"""A divergence's `pointwise` as a list of elementary steps, for the tails that are compiled.

So a formula is written once, in torch, and a divergence of one's own is compiled like the built-in ones.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

from torch import fx

from potstill.losses.divergences import Divergence

# What the compiled tails can say, by the names of torch's functions and methods and of Python's operators.
ONE = ("neg", "exp", "log", "log1p", "expm1", "sqrt", "abs", "sign", "square", "reciprocal")
TWO = ("add", "sub", "mul", "div", "logaddexp", "maximum", "minimum", "lt", "gt")
SAME = {"truediv": "div", "clamp_min": "maximum", "clamp_max": "minimum"}
ARGUMENTS = {**dict.fromkeys(ONE, 1), **dict.fromkeys(TWO, 2), "where": 3}


class Step(NamedTuple):
    """name = operation(arguments); an argument is the name of an earlier step, log_q, log_p, or a number."""

    name: str
    operation: str
    arguments: tuple[str | float, ...]


class Program(NamedTuple):
    """The steps in order, and which of them are the value and the slope."""

    steps: tuple[Step, ...]
    value: str
    slope: str


@lru_cache(maxsize=256)
def program(divergence: Divergence) -> Program | None:
    """The steps of `divergence.pointwise`; None where it does more than elementary arithmetic."""
    try:
        graph = fx.symbolic_trace(lambda log_q, log_p: divergence.pointwise(log_q, log_p)).graph
        return _program(graph)
    except (fx.proxy.TraceError, _NotElementary, TypeError, AttributeError, KeyError):
        return None


class _NotElementary(Exception):  # noqa: N818
    """A step that no compiled tail can say."""


def _program(graph: fx.Graph) -> Program:
    names: dict[fx.Node, str] = {}
    steps: list[Step] = []
    for node in graph.nodes:
        if node.op == "placeholder":
            names[node] = ("log_q", "log_p")[len(names)]
        elif node.op == "output":
            value, slope = node.args[0]
            return Program(tuple(steps), names[value], names[slope])
        else:
            names[node] = f"t{len(steps)}"
            steps.append(_step(node, names))
    raise _NotElementary


def _step(node: fx.Node, names: dict[fx.Node, str]) -> Step:
    called = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    arguments = tuple(_argument(each, names) for each in node.args)
    if called == "pow" and arguments[1:] == (2,):
        called, arguments = "square", arguments[:1]
    elif called == "where" and node.op == "call_method":
        arguments = (arguments[1], arguments[0], *arguments[2:])  # x.where(condition, y)
    operation = SAME.get(called, called)
    if node.kwargs or len(arguments) != ARGUMENTS.get(operation):
        raise _NotElementary
    return Step(names[node], operation, arguments)


def _argument(value: Any, names: dict[fx.Node, str]) -> str | float:
    if isinstance(value, fx.Node):
        return names[value]
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _NotElementary
    return float(value)
