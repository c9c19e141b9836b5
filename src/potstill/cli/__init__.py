"""The command line: one file for each command."""

from potstill.cli import (  # noqa: F401  # each adds its command, in the order in which --help lists them
    cache,
    check,
    demo,
    design,
    diagnose,
    evaluate,
    generate,
    init,
    report,
    run,
    schema,
    sweep,
)
from potstill.cli.app import app, main

__all__ = ["app", "main"]
