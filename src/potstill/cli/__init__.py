"""The command line: each command is one function, in the file of its kind."""

from potstill.cli import cache, design, evaluate, generate, init, runs, seeing  # noqa: F401  # each file adds its commands to the app
from potstill.cli.app import app, main

__all__ = ["app", "main"]
