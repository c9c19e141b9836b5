"""The command line: one file for each command."""

# Each module adds its command to the app; --help lists them in this order.
from potstill.cli import run, demo, init, schema, generate, check  # noqa: F401  # isort: skip
from potstill.cli import design, evaluate, sweep, diagnose, report, export, push, cache, data  # noqa: F401  # isort: skip
from potstill.cli.app import app, main

__all__ = ["app", "main"]
