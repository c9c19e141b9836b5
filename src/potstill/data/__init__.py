"""From a file to batches."""

from potstill.data.batches import Examples, PaddingCollator, encode, in_batches, pad_token_id
from potstill.data.masking import MaskedRows
from potstill.data.sources import Kind, Source, load

__all__ = [
    "Examples",
    "Kind",
    "MaskedRows",
    "PaddingCollator",
    "Source",
    "encode",
    "in_batches",
    "load",
    "pad_token_id",
]
