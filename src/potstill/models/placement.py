"""Where a model is: on one device, or spread by accelerate over several devices, memory and disk."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn


def is_spread(model: Any) -> bool:
    """Whether accelerate has spread a model over several devices or the disk (`device_map`)."""
    places = {*(getattr(model, "hf_device_map", None) or {}).values()}
    return len(places) > 1 or "disk" in places


def move(model: Any, device: torch.device | str) -> Any:
    """Move a model to a device, in place; one that is spread stays where it is, and reads batches of any device."""
    return model if is_spread(model) else model.to(device)


def resident_bytes(model: nn.Module) -> int:
    """Count the bytes of a model's weights and buffers that are in memory, on any device, not on the disk."""
    tensors = {id(x): x for x in (*model.parameters(), *model.buffers()) if not x.is_meta}
    return sum(x.numel() * x.element_size() for x in tensors.values())


@contextmanager
def weight_in_memory(model: nn.Module, name: str) -> Iterator[Tensor]:
    """Give a parameter or buffer by its name; one on the disk is read for as long."""
    path, _, own = name.rpartition(".")
    module = model.get_submodule(path)
    with align_module_device(module):
        yield getattr(module, own)


def weights_by_name(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Give all weights and persistent buffers in order of their names; those on the disk are read one by one."""
    for name, value in sorted(model.state_dict().items()):
        with weight_in_memory(model, name) if value.is_meta else nullcontext(value) as weight:
            yield name, weight
