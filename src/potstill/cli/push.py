"""The command `potstill push`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from potstill.cli.app import app, console, show


@app.command()
def push(
    run: Annotated[Path, typer.Argument(help="directory of a finished run", show_default=False)],
    to: Annotated[str, typer.Option(help="repository on the Hub: owner/name")],
    public: Annotated[bool, typer.Option("--public", help="make it public; private by default")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="list the files, and push nothing")] = False,
) -> None:
    """Push a finished run to the Hub: the student, its card, its exports and the report.

    The token is read from the environment: HF_TOKEN.
    """
    from potstill.evaluate.formatting import size
    from potstill.runs.push import check_name, files_to_push
    from potstill.runs.push import push as push_run

    if not dry_run:
        console.print(push_run(run, to, public=public), highlight=False)
        return
    check_name(to)
    files = files_to_push(run.expanduser())
    show("\n".join(f"{name}  {size(path.stat().st_size)}" for name, path in files.items()))
    total = size(sum(path.stat().st_size for path in files.values()))
    show(f"{len(files)} files, {total}, to {to}, {'public' if public else 'private'}: nothing was pushed.")
