"""Embedding students: a large model's vectors in a handful of dimensions, from its vectors or from text."""

from potstill.embedding.heads import VectorHead
from potstill.embedding.objective import PairObjective
from potstill.embedding.training import EmbeddingDistiller
from potstill.embedding.vectors import open_vectors
from potstill.evaluate.space import Judge, Kept

__all__ = ["EmbeddingDistiller", "Judge", "Kept", "PairObjective", "VectorHead", "open_vectors"]
