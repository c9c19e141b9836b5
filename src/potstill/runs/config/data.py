"""The `data` section of a recipe."""

from __future__ import annotations

from pydantic import Field

from potstill.data.sources import Source
from potstill.runs.config.document import Part

MASKED_SHARE = 0.15  # BERT's


class DataPart(Part):
    """Training and held-out data."""

    train: Source
    eval: Source
    max_length: int = Field(512, ge=2, description="tokens in a row at most")
    packing: bool = Field(False, description="concatenate plain text into rows of max_length instead of padding")
    masked_share: float = Field(MASKED_SHARE, gt=0, lt=1, description="of the tokens, for the task masked")
