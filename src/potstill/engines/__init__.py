"""Who writes text and scores it."""

from potstill.engines.engine import Engine, Prompt
from potstill.engines.local import LocalEngine
from potstill.engines.sampling import Completion, Sampling
from potstill.engines.server import ModelServer, Scores

__all__ = ["Completion", "Engine", "LocalEngine", "ModelServer", "Prompt", "Sampling", "Scores"]
