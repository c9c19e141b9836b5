"""Embedding students: a large model's vectors in a handful of dimensions."""
