"""From a file to batches."""

from potstill.data.batches import Examples, PaddingCollator, encode, pad_token_id
from potstill.data.sources import Kind, Source, load

__all__ = ["Examples", "Kind", "PaddingCollator", "Source", "encode", "load", "pad_token_id"]
