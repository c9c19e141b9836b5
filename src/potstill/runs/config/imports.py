"""Import a user's Python file, so that a recipe can name the divergences and terms that it declares."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from pathlib import Path

from potstill.errors import UserError, nearest, one_line


def import_file(path: Path) -> None:
    """Import a Python file once; subclasses of `Divergence`, `Term` and the other families in it register themselves.

    Raises:
        UserError: there is no such file, or importing it raises an exception.
    """
    path = path.expanduser().absolute()
    if path.suffix != ".py" or not path.is_file():
        names = [file.name for file in path.parent.glob("*.py")]
        raise UserError(f"--import: expected a Python file, got {path}.{nearest(path.name, names)}")
    name = f"{path.stem}_{hashlib.sha256(bytes(path)).hexdigest()[:8]}"  # hides no module of the same name
    if name in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look up the module that declares them
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise UserError(
            f"--import: expected {path} to import without an error, got {type(error).__name__}: {one_line(error)}."
        ) from error
