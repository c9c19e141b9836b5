"""A divergence's `pointwise` as a list of elementary operations, so that compiled kernels need no formula of it."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from torch import fx

from potstill.losses.divergences import Divergence

# The operations of the compiled kernels, by the names of torch's functions and methods and of Python's operators.
UNARY = ("neg", "exp", "log", "log1p", "expm1", "sqrt", "abs", "sign", "square", "reciprocal")
BINARY = ("add", "sub", "mul", "div", "logaddexp", "maximum", "minimum", "lt", "gt")
NUM_ARGUMENTS = dict.fromkeys(UNARY, 1) | dict.fromkeys(BINARY, 2) | {"where": 3}
SYNONYMS = {"truediv": "div", "clamp_min": "maximum", "clamp_max": "minimum"}
# Those that C and Triton write alike.
OPERATORS = {"add": "{} + {}", "sub": "{} - {}", "mul": "{} * {}", "div": "{} / {}", "lt": "{} < {}", "gt": "{} > {}"}
OPERATORS |= {"neg": "-{}", "square": "{0} * {0}"}

# (name, function, arguments); an argument is the name of an earlier operation, log_q, log_p, or a number.
Operation = tuple[str, str, tuple[str | float, ...]]


class Formula(NamedTuple):
    """Operations in order, and the names of those that give value and slope."""

    operations: tuple[Operation, ...]
    value: str
    slope: str


@lru_cache(maxsize=256)
def trace_formula(divergence: Divergence) -> Formula | None:
    """Trace `divergence.pointwise`; None if it is more than elementary arithmetic."""
    names: dict[fx.Node, str] = {}
    operations: list[Operation] = []
    try:
        graph = fx.symbolic_trace(lambda log_q, log_p: divergence.pointwise(log_q, log_p)).graph
        *nodes, output = graph.nodes
        for node in nodes:
            if node.op == "placeholder":
                names[node] = ("log_q", "log_p")[len(names)]
            else:
                names[node] = f"t{len(operations)}"
                operations.append((names[node], *_operation(node, names)))
        value, slope = output.args[0]
        return Formula(tuple(operations), names[value], names[slope])
    except (fx.proxy.TraceError, TypeError, AttributeError, KeyError):
        return None


def _operation(node: fx.Node, names: dict[fx.Node, str]) -> tuple[str, tuple[str | float, ...]]:
    """Return function and arguments of a node; raises TypeError if it is no elementary operation."""
    function = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    arguments: list[str | float] = []
    for value in node.args:
        if isinstance(value, bool) or not isinstance(value, int | float | fx.Node):
            raise TypeError(f"{value} is no number.")
        arguments.append(names[value] if isinstance(value, fx.Node) else float(value))
    if function == "pow" and arguments[1:] == [2]:
        function, arguments = "square", arguments[:1]
    elif function == "where" and node.op == "call_method":
        arguments[:2] = arguments[1::-1]  # x.where(condition, y)
    function = SYNONYMS.get(function, function)
    if node.kwargs or len(arguments) != NUM_ARGUMENTS.get(function):
        raise TypeError(f"{function} is no elementary operation.")
    return function, tuple(arguments)
