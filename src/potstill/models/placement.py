"""Where a model is: on one device, spread by accelerate over devices, memory and disk, or sharded over processes."""

from __future__ import annotations

import errno
import os
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import align_module_device, convert_file_size_to_int
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from potstill.errors import ModelError, nearest, one_line
from potstill.files import remove, temporary_path
from potstill.models.structure import layer_lists

Place = int | str  # a GPU's number or name, cpu or disk


def is_spread(model: Any) -> bool:
    """Whether accelerate has spread a model over several devices or the disk (`device_map`)."""
    places = {*(getattr(model, "hf_device_map", None) or {}).values()}
    return len(places) > 1 or "disk" in places


def move(model: Any, device: torch.device | str) -> Any:
    """Move a model to a device, in place; one that is spread stays where it is, and reads batches of any device."""
    return model if is_spread(model) else model.to(device)


@contextmanager
def placing(model: nn.Module, placement: Mapping[str, Any], key: str, itemsize: float) -> Iterator[dict[str, Any]]:
    """Check device_map, max_memory and offload_folder; give them as `from_pretrained` takes them, which runs within.

    Args:
        model: without its weights, on the meta device.
        placement: as a recipe has it.
        key: of the recipe, that has device_map and the others.
        itemsize: bytes of a weight in memory; of a quantized model those of most.

    Raises:
        ModelError: a module, a device or a folder is not there, a part has no device, a device has too little memory,
            or loading fails for want of a folder or of room in it.
    """
    options, mapped = dict(placement), placement["device_map"]
    sizes = {name: int(weight.numel() * itemsize) for name, weight in model.named_parameters()}
    if isinstance(mapped, Mapping):
        options["device_map"] = mapped = _device_of_each(model, mapped, key)
        for place in {*mapped.values()}:
            needed = sum(size for name, size in sizes.items() if place_of(name, mapped) == place)
            _check_room(place, needed, f"{key}.device_map")
    for place, limit in (placement.get("max_memory") or {}).items():
        try:
            most = convert_file_size_to_int(limit)
        except ValueError:
            raise ModelError(f"{key}.max_memory: expected a size such as 20GiB for {place}, got {limit}.") from None
        _check_place(place, f"{key}.max_memory", ("cpu",))
        _check_room(place, min(most, sum(sizes.values())), f"{key}.max_memory")
    folder = placement.get("offload_folder")
    expected = (
        f"{key}.offload_folder: expected a folder with room for weights that the model's files have in another form"
    )
    if folder is not None:
        # A folder of its own: files there are named by their weights alone, which other models have too.
        own = temporary_path(Path(folder).expanduser() / "weights")
        try:
            own.mkdir(parents=True)
        except OSError as error:
            raise ModelError(f"{expected}, got {folder}: {error.strerror}. Choose another.") from None
        options["offload_folder"] = str(own)
    try:
        yield options
    except Exception as error:
        if folder is not None:
            remove(own)
            if any(os.strerror(number) in str(error) for number in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)):
                raise ModelError(f"{expected}, got {folder}: {one_line(error, 100)}. Choose another.") from None
        elif "offload_folder" in str(error):
            raise ModelError(f"{expected}, got none. Set it.") from None
        raise


def remove_with(model: nn.Module, placed: Mapping[str, Any]) -> None:
    """Remove a model's own offload folder, if it has one, when this process has no use for the model any more."""
    if "offload_folder" in placed:
        weakref.finalize(model, _remove_in, os.getpid(), Path(placed["offload_folder"]))


def _remove_in(process: int, folder: Path) -> None:
    """Remove a folder, in the process alone that made it, not in its forked children."""
    if os.getpid() == process:
        with suppress(OSError):
            remove(folder)


def _device_of_each(model: nn.Module, device_map: Mapping[str, Place], key: str) -> dict[str, Place]:
    """Name the device of each part: that of the innermost named module that it is in.

    accelerate itself does not take a device for all ('') beside the disk for some.
    """
    modules = {name for name, _ in model.named_modules()}
    for name, place in device_map.items():
        if name not in modules:
            raise ModelError(
                f"{key}.device_map: expected modules of {type(model).__name__}, got {name}."
                f"{nearest(name, modules - {''})}"
            )
        _check_place(place, f"{key}.device_map", ("cpu", "disk"))
    result: dict[str, Place] = {}

    def add(path: str, part: nn.Module | None, place: Place | None) -> None:
        place = device_map.get(path, place)
        within = f"{path}." if path else ""
        if part is not None and any(name != path and name.startswith(within) for name in device_map):
            for name, child in part.named_children():
                add(f"{within}{name}", child, place)
            for name, _ in part.named_parameters(recurse=False):
                add(f"{within}{name}", None, place)
        elif place is not None:
            result[path] = place
        elif part is None or next(part.parameters(), None) is not None:
            raise ModelError(
                f"{key}.device_map: expected a device for each module, got none for {path or 'any'}. Add '': cpu, or "
                "another device, for all that have no other."
            )

    add("", model, None)
    return result


def place_of(name: str, device_map: Mapping[str, Place]) -> Place | None:
    """Return the place of a parameter by the names of the modules that it is in; None where none of them has one."""
    while name not in device_map and name:
        name = name.rpartition(".")[0]
    return device_map.get(name)


def _check_place(place: Place, key: str, others: tuple[str, ...]) -> None:
    """Refuse a place that is no GPU of this machine, nor one of the others."""
    accelerator, number = torch.accelerator.current_accelerator(), torch.accelerator.device_count()
    try:
        device = torch.device(place) if place not in others else None
    except RuntimeError:  # also of a number, where there is no GPU
        device = torch.device("meta")
    if device is not None and (accelerator is None or device.type != accelerator.type or (device.index or 0) >= number):
        gpus = f" or a GPU from 0 to {number - 1}" if number else ""
        lacking = "" if number else " This machine has no GPU."
        raise ModelError(f"{key}: expected {' or '.join(others)}{gpus}, got {place}.{lacking}")


def _check_room(place: Place, needed: int, key: str) -> None:
    """Refuse more bytes than a device has, before they are read."""
    room = None if place == "disk" else device_bytes(torch.device(place))
    if room is not None and needed > room:
        raise ModelError(
            f"{key}: expected weights that fit into the {room / 1e9:.3g} GB of {place}, got {needed / 1e9:.3g} GB. "
            "Place less there: layers may be on the disk."
        )


def check_fits(needed: int, key: str, name: str) -> None:
    """Refuse a model that is larger than the memory of this machine, before it is read."""
    room = device_bytes(torch.device("cpu"))
    if room is not None and needed > room:
        raise ModelError(
            f"{key}: expected weights that fit into the {room / 1e9:.3g} GB of memory, got {needed / 1e9:.3g} GB in "
            f"{name}. Choose a smaller model. In a recipe, spread a teacher (teacher.device_map: auto), run it layer "
            "by layer into a cache (potstill cache build --stream), or run it behind a server."
        )


def weight_notes(model: Any, key: str) -> Iterator[str]:
    """Say where the weights of a model are that is spread, and in which precision those of a quantized one are."""
    if is_spread(model):
        sizes = Counter[str]()
        for name, weight in model.named_parameters():
            place = place_of(name, model.hf_device_map)
            sizes[f"on the GPU {place}" if isinstance(place, int) else f"on {place or weight.device}"] += weight.nbytes
        yield f"{key}: weights by device: {_listed(sizes)}."
    if getattr(model, "is_quantized", False):
        sizes = Counter[str]()
        for weight in model.parameters():
            sizes[f"in {weight.dtype}".replace("torch.", "")] += weight.nbytes
        yield f"{key}: weights by precision: {_listed(sizes)}."


def _listed(sizes: Counter[str]) -> str:
    return ", ".join(f"{size / 1e9:.3g} GB {name}" for name, size in sizes.most_common())


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
