"""Rows of a padded batch side by side in longer rows, just while a model runs.

Everything else reads one sequence in each row. A model that reads them side by side computes less padding; its position
ids begin again at each sequence, by which transformers keeps attention within it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from potstill.losses.alignment import Alignment
from potstill.losses.torch_compile import disable_compile

PACKED_LENGTH = "packed_length"  # in a batch: the most tokens of a packed row; models read a batch without it as it is


@dataclass(frozen=True)
class PackedLayout:
    """Where the tokens of a batch [B, T] stand in packed rows [P, L]."""

    shape: tuple[int, int]  # P, L
    places: Tensor  # [B, T], of each token in the flattened packed rows; of padding nothing that is used
    mask: Tensor  # [B, T] bool, without padding

    @classmethod
    @disable_compile
    def of(cls, batch: Mapping[str, Tensor], *, flat: bool = False) -> PackedLayout | None:
        """Fill packed rows in order, each with all sequences that still fit; None for a batch that is read as it is.

        Where sequences in this order fit into some number of rows, they fit into these. A sequence that is longer than
        all others together gets a longer row. `flat` is one row for all.
        """
        if PACKED_LENGTH not in batch:
            return None
        mask = batch["attention_mask"].bool()
        limit = mask.numel() if flat else int(batch[PACKED_LENGTH])
        begins: list[tuple[int, int]] = []  # of each sequence: its row, and its place in it
        row = end = longest = 0
        for length in mask.sum(1).tolist():
            if end and end + length > limit:
                row, end = row + 1, 0
            begins.append((row, end))
            end += length
            longest = max(longest, end)
        first = torch.tensor([row * longest + place for row, place in begins], device=mask.device)
        return cls((row + 1, longest), first[:, None] + torch.arange(mask.shape[1], device=mask.device), mask)

    def pack(self, values: Tensor) -> Tensor:
        """Move values [B, T] of tokens into packed rows [P, L], with the batch's first behind the last of each.

        That is a token of its own at position 0. A pad token there would be alone in its sequence, and in some models
        the zeros that it is made of have no gradient.
        """
        packed = values[0, 0].repeat(self.shape)
        packed.view(-1)[self.places[self.mask]] = values[self.mask]
        return packed

    def unpack(self, values: Tensor) -> Tensor:
        """Move values [P, L, ...] back into the batch, [B, T, ...], with 0 on padding."""
        rows = values.new_zeros(*self.mask.shape, *values.shape[2:])
        rows[self.mask] = values.flatten(0, 1)[self.places[self.mask]]
        return rows

    def unpack_pairs(self, maps: Tensor) -> Tensor:
        """Move maps [P, A, L, L] of pairs of tokens back into the batch, [B, A, T, T], with 0 at padding."""
        places = self.places * self.mask
        row, column = places[:, :1, None] // self.shape[1], places % self.shape[1]
        pairs = maps[row, :, column[:, :, None], column[:, None, :]].movedim(-1, 1)
        return pairs * (self.mask[:, None, :, None] & self.mask[:, None, None, :])


def packed(
    batch: Mapping[str, Tensor], alignment: Alignment, *, flat: bool = False
) -> tuple[Mapping[str, Tensor], Alignment]:
    """Return what a model reads of a batch, and where in it the target positions are."""
    layout = PackedLayout.of(batch, flat=flat)
    if layout is None:
        return batch, alignment
    position = torch.arange(layout.mask.shape[1], device=layout.mask.device).expand_as(layout.mask)
    names = ("input_ids", "token_type_ids")
    columns = {name: layout.pack(batch[name]) for name in names if name in batch}
    places = layout.places.flatten()[alignment.positions]
    aligned = replace(alignment, positions=places, length=layout.shape[1])
    return columns | {"position_ids": layout.pack(position)}, aligned
