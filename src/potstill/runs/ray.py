"""Work for many processes on any number of machines: Ray starts them, and starts others for those that die."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

from potstill.errors import PotstillError, UserError


def start_ray(command: str) -> Any:
    """The package ray, for a command that was asked to use it.

    Raises:
        UserError: it is not installed.
    """
    try:
        import ray
    except ImportError:
        raise UserError(f"{command}: expected Ray for --engine ray, got none. pip install 'potstill[ray]'") from None
    return ray


def spread(
    command: str,
    rows: Sequence[dict[str, Any]],
    begin: Callable[..., Callable[[dict[str, Any]], dict[str, Any]]],
    request: Any,
    *,
    gpus: int = 0,
) -> Iterator[dict[str, Any]]:
    """What becomes of each row, in any order, as it comes: by processes of Ray's, as many as there is room for.

    Args:
        command: who asks, for errors.
        rows: that Arrow can hold.
        begin: makes of the request what turns a row into another; called once in each process, in the folder of this
            one.
        request: that can be pickled.
        gpus: of each process.

    Raises:
        UserError: Ray is not installed, or the request cannot be met where the processes are.
    """
    ray = start_ray(command)
    if not rows:
        return
    made = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
        cast(Any, _Worker),
        fn_constructor_args=(Path.cwd(), begin, request),
        concurrency=(1, len(rows)),
        num_gpus=gpus,
    )
    try:
        yield from made.iter_rows()
    except ray.exceptions.RayError as error:
        cause = error.cause if isinstance(error, ray.exceptions.RayTaskError) else None
        raise cause if isinstance(cause, PotstillError) else error from None


class _Worker:
    """One of Ray's processes."""

    def __init__(self, folder: Path, begin: Callable[..., Any], request: Any) -> None:
        os.chdir(folder)  # paths in recipes are meant from there
        self._do = begin(request)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        return self._do(row)
