"""Notes on packed rows: the padding that they save, and teachers that read padded rows."""

from __future__ import annotations

from collections.abc import Iterator

from potstill.data.packing import PackedRows
from potstill.models.packing_probe import packing_mistake
from potstill.teachers.source import LoadedTeacher


def packing_notes(packed: PackedRows, batch_rows: int, loaded: LoadedTeacher) -> Iterator[str]:
    """Say how much padding is saved in batches of so many rows, and which teachers do not keep packed rows apart."""
    padded, filled = packed.shares(batch_rows)
    yield (
        f"data.packing: {len(packed.lengths):,} rows in {len(packed):,} of at most {packed.max_length} tokens: tokens "
        f"are {filled:.0%} of the positions of a batch, and {padded:.0%} without packing."
    )
    for key, model in loaded.models.items():
        if (mistake := packing_mistake(model, None, packed.max_length)) is not None:
            yield f"data.packing: {key} reads padded rows: it is {mistake}."
