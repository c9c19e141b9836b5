"""Terms over maps of every token with every other are refused where the memory of the device cannot hold the maps."""

from __future__ import annotations

from typing import Any

from accelerate import PartialState

from potstill.data.packing import row_lengths
from potstill.errors import RecipeError
from potstill.evaluate.formatting import size
from potstill.models.capture import ActivationCapture
from potstill.models.placement import device_bytes
from potstill.runs.build import BuiltRun


def check_map_memory(built: BuiltRun, student: Any) -> None:
    """Raise RecipeError for a term whose maps of the longest batch need more than all memory of the device."""
    device = PartialState().device
    room = device_bytes(device)
    if room is None or not built.objective.reads_teacher_layers:
        return
    shapes, rows = (ActivationCapture(student).shape, built.teacher.shape), built.plan.batch_rows
    tokens = int(row_lengths(built.train.dataset).max()) if built.packed is None else built.packed.max_length
    for place, term in enumerate(built.objective.terms):
        if (needed := rows * term.map_bytes(*shapes, tokens)) > room:
            raise RecipeError(
                f"objective.{place}: expected maps of {term.name} that fit into the {size(room)} of {device}, got at "
                f"least {size(needed)} for a batch of {rows} x {tokens:,} tokens, whose square they grow with. Lower "
                "data.max_length or the batch size, name fewer layers, or use hidden."
            )
