"""A saved model of which one part is in memory at a time: a layer, the embeddings or the head."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import Tensor, nn

# What from_pretrained is made of; the names and signatures are those of transformers 5.10 to 5.23.
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.modeling_utils import LoadStateDictConfig

from potstill.errors import ModelError
from potstill.models.integrity import check_values
from potstill.models.loading import SPREAD_INSTEAD, load_config, load_outline, suppress_warnings
from potstill.models.precision import saved_weights, weight_bytes
from potstill.models.structure import layer_lists

Part = int | str  # the number of a layer, or a name below
EMBEDDINGS, HEAD, REST = "embeddings", "head", "rest"


class ModelParts:
    """A causal language model in safetensors, whose parts are loaded when they are needed, and released.

    A parameter that is not loaded is on the meta device. What is outside of layers, embeddings and head stays loaded.
    Weights are renamed, fused and cast as `from_pretrained` does it. Tied embeddings and head are one part.

    Args:
        name: of the model, a folder or a name on the Hub, whose files are on this disk.
        key: the recipe's key, for errors.
        dtype: float32, bfloat16, float16, or auto, as in `load_model`.
        device: for the parts.
    """

    def __init__(self, name: str, key: str, dtype: str, device: torch.device) -> None:
        self.name, self.key, self.device = name, key, device
        self.model = load_outline(name, key, dtype).requires_grad_(False)
        self.bytes_of: Counter[Part] = Counter()  # on the disk
        self.bytes_read = 0
        self._give_buffers()
        lists = layer_lists(self.model)
        if len(lists) != 1:
            found = ", ".join(path for path, _ in lists) or "none"
            raise ModelError(
                f"{key}: expected a model with one list of its layers for --stream, got {type(self.model).__name__} "
                f"with {found}. {SPREAD_INSTEAD}"
            )
        self.path, self.layers = lists[0][0], list(lists[0][1])
        names = {module: path for path, module in self.model.named_modules()}
        ends: tuple[Any, Any] = (self.model.get_input_embeddings(), self.model.get_output_embeddings())
        self.embeddings, self.head = ends
        self._ends = {names[module]: part for module, part in zip(ends, (EMBEDDINGS, HEAD), strict=True) if module}
        self.is_tied = self.head is not None and self.head.weight is self.embeddings.weight
        vars(self.model)["hf_device_map"] = {"": device, self.path: "disk"}  # so that nothing moves it as a whole
        self._conversions: Any = get_model_conversion_mapping(self.model)
        self._saved: dict[Part, list[tuple[Any, str]]] = defaultdict(list)  # file and name of each saved weight
        self._index()
        self.load(REST)

    def _give_buffers(self) -> None:
        """Compute buffers, such as rotary frequencies: the outline has them on the meta device."""
        config = load_config(self.name, self.key)
        with init_empty_weights(), suppress_warnings():
            computed = type(self.model)._from_config(config, dtype=self.model.dtype)
        for path, module in self.model.named_modules():
            for name, buffer in computed.get_submodule(path).named_buffers(recurse=False):
                module._buffers[name] = buffer.to(self.device)

    def _index(self) -> None:
        renamings = [entry for entry in self._conversions if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in self._conversions if isinstance(entry, WeightConverter)]
        own, prefix = self.model.state_dict(), self.model.base_model_prefix
        for file, saved, dtype, shape in saved_weights(self.name):
            renamed, _ = rename_source_key(saved, renamings, converters, prefix, own)
            name = renamed if renamed in own else saved
            if name in own:
                part = self._part_of(name)
                self._saved[part].append((file, saved))
                self.bytes_of[part] += weight_bytes(shape, dtype)

    def _part_of(self, weight: str) -> Part:
        if weight.startswith(f"{self.path}."):
            return int(weight.removeprefix(f"{self.path}.").partition(".")[0])
        part = next((part for path, part in self._ends.items() if weight.startswith(f"{path}.")), REST)
        return EMBEDDINGS if part == HEAD and self.is_tied else part

    def _modules(self, part: Part) -> list[nn.Module]:
        if isinstance(part, int):
            return [self.layers[part]]
        return [self.embeddings, *([self.head] if self.is_tied else [])] if part == EMBEDDINGS else [self.head]

    @contextmanager
    def loaded(self, *parts: Part) -> Iterator[None]:
        """Have some parts in memory for as long; they must not be loaded already."""
        chosen = {EMBEDDINGS if part == HEAD and self.is_tied else part for part in parts}
        try:
            for part in chosen:
                self.load(part)
            yield
        finally:
            for part in chosen:
                for module in self._modules(part):
                    _release(module)

    def load(self, part: Part) -> None:
        """Load a part, to keep it."""
        part = EMBEDDINGS if part == HEAD and self.is_tied else part
        weights: dict[str, Any] = {}
        self.bytes_read += self.bytes_of[part]
        with ExitStack() as files, suppress_warnings():
            opened = {file: files.enter_context(safe_open(file, "pt")) for file, _ in self._saved[part]}
            for file, saved in self._saved[part]:
                weights[saved] = opened[file].get_slice(saved)  # read when the model takes it
            config = LoadStateDictConfig(
                device_map={"": self.device}, dtype=self.model.dtype, weight_mapping=self._conversions
            )
            type(self.model)._load_pretrained_model(self.model, weights, None, config, expected_keys=[])
        if part == EMBEDDINGS and self.is_tied:
            weight = self.head.weight if self.embeddings.weight.is_meta else self.embeddings.weight
            self.embeddings.weight = self.head.weight = weight
        self.model.requires_grad_(False)
        names = [name for name, value in self.model.named_parameters() if self._part_of(name) == part and value.is_meta]
        if names:
            raise ModelError(
                f"{self.key}: expected all weights of one layer with its own name in {self.name}, got none for "
                f"{names[0]}, which another layer may share. {SPREAD_INSTEAD}"
            )

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Read all weights and persistent buffers by their names, in order of these; NaN and infinity are refused."""
        names = sorted(self.model.state_dict())
        part: Part = REST
        with ExitStack() as loaded:
            for name in names:
                if (needed := self._part_of(name)) not in (part, REST):
                    loaded.close()
                    loaded.enter_context(self.loaded(needed))
                    check_values(self.model, key=self.key, name=self.name)
                    part = needed
                path, _, own = name.rpartition(".")
                yield name, getattr(self.model.get_submodule(path), own)


def _release(module: nn.Module) -> None:
    for part in module.modules():
        for name, value in part._parameters.items():
            if value is not None:
                part._parameters[name] = nn.Parameter(value.to("meta"), requires_grad=False)
