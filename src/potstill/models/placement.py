"""Where a model is: on one device, spread by accelerate over devices, memory and disk, or sharded over processes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import align_module_device
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from potstill.errors import ModelError
from potstill.models.structure import layer_lists


def is_spread(model: Any) -> bool:
    """Whether accelerate has spread a model over several devices or the disk (`device_map`)."""
    places = {*(getattr(model, "hf_device_map", None) or {}).values()}
    return len(places) > 1 or "disk" in places


def move(model: Any, device: torch.device | str) -> Any:
    """Move a model to a device, in place; one that is spread stays where it is, and reads batches of any device."""
    return model if is_spread(model) else model.to(device)


def load_sharded(load: Callable[[], Any], key: str) -> Any:
    """Load a frozen model and shard its layers over all processes by FSDP2; embeddings, norms and head stay whole.

    The processes of a machine take turns, so that its memory holds one whole model at a time. Every process must run
    the model equally often: a layer is gathered while it runs. The head is whole, so that losses are fused with it.
    """
    state = PartialState()
    mesh = init_device_mesh(state.device.type, (state.num_processes,))
    for turn in range(int(os.environ.get("LOCAL_WORLD_SIZE", state.num_processes))):
        if turn == state.local_process_index:
            model = load().requires_grad_(False)
            lists, kind = layer_lists(model), type(model).__name__
            if getattr(model, "is_quantized", False):
                raise ModelError(
                    f"{key}: expected a model in full precision, got a {kind} saved quantized. Leave it out."
                )
            if not lists:
                raise ModelError(f"{key}: expected a model with a list of layers, got a {kind}. Leave it out.")
            for layer in (layer for _, layers in lists for layer in layers):
                fully_shard(layer, mesh=mesh, reshard_after_forward=True)
            model.to(state.device)
        state.wait_for_everyone()
    return model


def is_sharded(model: nn.Module) -> bool:
    """Whether the layers of a model are sharded over processes, which then have to run it together."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def layer_bytes(model: nn.Module) -> list[int]:
    """Count the bytes of the weights of each layer, which `load_sharded` shards."""
    layers = [layer for _, layers in layer_lists(model) for layer in layers]
    return [sum(weight.numel() * weight.element_size() for weight in layer.parameters()) for layer in layers]


def resident_bytes(model: nn.Module) -> int:
    """Count the bytes of a model's weights and buffers that are in memory, on any device, not on the disk."""
    tensors = {id(x): x for x in (*model.parameters(), *model.buffers()) if not x.is_meta}
    return sum(x.numel() * x.element_size() for x in tensors.values())


def device_bytes(device: torch.device) -> int | None:
    """Count the bytes of memory of a GPU, or of the machine for a CPU; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    if device.type == "cpu" and "SC_PHYS_PAGES" in getattr(os, "sysconf_names", ()):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


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
