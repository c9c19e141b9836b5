"""Who writes text and scores it."""

from potstill.engines.sampling import Completion, Sampling
from potstill.engines.server import ModelServer, Scores

__all__ = ["Completion", "ModelServer", "Sampling", "Scores"]
