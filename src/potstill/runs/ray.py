"""Ray: rows processed on any number of machines, restarted where a process dies."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, cast

from potstill.errors import PotstillError, UserError

Row = dict[str, Any]
RowFunction = Callable[[Row], Row]
_MISTAKE = "potstill_mistake"  # key of a pickled error in place of a result


def start_ray(command: str) -> Any:
    try:
        import ray
    except ImportError:
        raise UserError(f"{command}: expected Ray for --engine ray, got none. pip install 'potstill[ray]'") from None
    return ray


def map_rows(
    command: str, rows: Sequence[Row], make_function: Callable[..., RowFunction], request: Any, *, gpus: int = 0
) -> Iterator[Row]:
    """Map rows in as many Ray processes as there is room for; results come in any order.

    Each process has so many GPUs, works in this process's directory, and calls `make_function` once with the request,
    which must be picklable, for the function of a row, which Arrow must be able to hold. Errors name `command`.
    """
    ray = start_ray(command)
    if not rows:
        return
    results = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
        cast(Any, _RowWorker),
        fn_constructor_args=(Path.cwd(), make_function, request),
        concurrency=(1, len(rows)),
        num_gpus=gpus,
    )
    for row in results.iter_rows():
        if _MISTAKE in row:
            raise pickle.loads(row[_MISTAKE])
        yield row


class _RowWorker:
    def __init__(self, folder: Path, make_function: Callable[..., RowFunction], request: Any) -> None:
        os.chdir(folder)  # paths in recipes are relative to it
        self._make_function = cache(partial(make_function, request))

    def __call__(self, row: Row) -> Row:
        try:
            return self._make_function()(row)
        except PotstillError as error:  # which Ray would wrap, each version in its own way
            return {_MISTAKE: pickle.dumps(error)}
