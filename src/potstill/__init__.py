"""Potstill: a small model out of a large one.

The public names stand in `__init__.pyi`, for type checkers and for `__getattr__`, which imports each when it is first
used: the losses need torch alone, the command line's help not even that.
"""

import ast
from importlib import import_module
from pathlib import Path
from typing import Any

_STUB = ast.parse(Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8"))
_MODULES = {
    alias.name: f".{node.module}" for node in _STUB.body if isinstance(node, ast.ImportFrom) for alias in node.names
}
__all__ = sorted(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'potstill' has no attribute {name!r}")
    module = import_module(_MODULES[name], __name__)
    return getattr(module, name) if hasattr(module, name) else import_module(f"{_MODULES[name]}.{name}", __name__)
