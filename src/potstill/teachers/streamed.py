"""A model that runs one layer after the other over all batches of a cache, which neither GPU nor memory need hold."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from potstill.errors import ModelError, PotstillError, RunError, UserError, one_line
from potstill.files import atomic_path, remove
from potstill.losses.alignment import Alignment, causal_alignment
from potstill.models.capture import ActivationRequest
from potstill.models.integrity import check_causal
from potstill.models.loading import SPREAD_INSTEAD, accelerator, load_tokenizer
from potstill.models.parts import EMBEDDINGS, HEAD, ModelParts
from potstill.models.split import probe_batch, run, undisturbed
from potstill.teachers.model import ModelSource, ModelTeacher
from potstill.teachers.source import LoadedTeacher, TeacherSource
from potstill.teachers.teacher import TeacherOutput

Batches = Callable[[], Iterable[Mapping[str, Tensor]]]


@dataclass(frozen=True)
class ReplayedLayers:
    """What layers and embeddings do in one pass of the model."""

    outputs: Mapping[int, Tensor] = field(default_factory=dict)  # of layers that ran before; others pass their input on
    layer: int | None = None  # that runs
    ends: bool = True  # whether the pass ends with its output
    embeds: bool = False  # whether embeddings run; else they are zeros


class _LayerDone(Exception):  # noqa: N818  # it is no error
    """Ends a pass behind a layer."""

    def __init__(self, states: Tensor) -> None:
        super().__init__()
        self.states = states


class StreamedTeacher(ModelTeacher):
    """A model of which one layer is in memory. `precompute` runs all layers over all batches, each layer once.

    For each layer the model's own forward pass runs anew on every batch, which makes masks and positions as ever, with
    the output of the layer before read from the disk. Calls with these batches then run its last norm and its head:
    their outputs are those of `ModelTeacher`.

    Raises:
        ModelError: a layer needs more of the layers before than the output of the last one, so that it cannot run
            alone.
    """

    def __init__(self, parts: ModelParts) -> None:
        super().__init__(parts.model)
        self.parts = parts
        self._replay = ReplayedLayers()
        self._folder: Path | None = None  # of the outputs that calls read
        for i, layer in enumerate(parts.layers):
            layer.forward = partial(self._run_layer, i)
        self._embed_tokens = parts.embeddings.forward
        parts.embeddings.forward = self._embed
        try:
            self._check()
        except PotstillError:
            raise
        except Exception as error:
            raise self._refusal(one_line(error, 100)) from error

    def __call__(self, batch: Mapping[str, Tensor], alignment: Alignment) -> TeacherOutput:
        if self._folder is None:
            raise RunError("StreamedTeacher: expected precompute to run before the first call. Call it.")
        key, device = _key(batch), self.parts.device
        outputs = {i: _read(self._folder, i, key).to(device) for i in self._kept | {self._last}}
        with self._replaying(ReplayedLayers(outputs, embeds=self._reads_embeddings)):
            return super().__call__(batch, alignment)

    def outline(self, batch: Mapping[str, Tensor], alignment: Alignment) -> TeacherOutput:
        with self._replaying(ReplayedLayers()):
            if self._folder is not None:
                return super().__call__(batch, alignment)
            with self.parts.loaded(HEAD):
                return super().__call__(batch, alignment)

    def prepare(self, needs: ActivationRequest) -> None:
        if needs != ActivationRequest(needs.hidden):
            raise ModelError(
                f"{self.parts.key}: expected no attention maps with --stream, got --attention-layers. {SPREAD_INSTEAD}"
            )
        if needs:
            with self.parts.loaded(EMBEDDINGS, HEAD), self._replaying(ReplayedLayers(embeds=True)):
                super().prepare(needs)

    def precompute(self, batches: Batches, folder: Path) -> Iterator[None]:
        """Run the layers that did not run yet, over all batches; their outputs are in the folder meanwhile."""
        complete = [int(path.name) for path in folder.glob("[0-9]*") if path.name.isdecimal()]
        for layer in range(self._last + 1):
            if layer > max(complete, default=-1):
                self._compute(layer, batches(), folder)
            if layer and layer - 1 not in self._kept:
                remove(folder / str(layer - 1))
            yield
        self.parts.load(HEAD)
        if self._reads_embeddings and not self.parts.is_tied:
            self.parts.load(EMBEDDINGS)
        self._folder = folder

    def disk_bytes(self, positions: int) -> int:
        """Count the bytes of outputs that are on the disk at once, for batches of some positions with padding."""
        layers = 2 + len(self._kept - {self._last})
        return layers * positions * self.shape.width * self.model.dtype.itemsize

    @torch.no_grad()
    def _compute(self, layer: int, batches: Iterable[Mapping[str, Tensor]], folder: Path) -> None:
        """Run one layer over all batches, and write its outputs, all or none."""
        folder.mkdir(parents=True, exist_ok=True)
        with (
            self.parts.loaded(layer, *([EMBEDDINGS] if layer == 0 else [])),
            atomic_path(folder / str(layer)) as partial_folder,
        ):
            partial_folder.mkdir()
            for batch in batches:
                path = partial_folder / _key(batch)
                before = {layer - 1: _read(folder, layer - 1, path.name).to(self.parts.device)} if layer else {}
                with self._replaying(ReplayedLayers(before, layer, embeds=layer == 0)):
                    try:
                        super().__call__(batch, causal_alignment(batch["labels"]))
                    except _LayerDone as output:
                        save_file({"states": output.states.contiguous()}, path)
            for path in partial_folder.iterdir():  # before the folder has its name, which says that they are complete
                with path.open("rb+") as file:
                    os.fsync(file.fileno())

    def _run_layer(self, i: int, *args: Any, **kwargs: Any) -> Any:
        """Take the place of a layer's forward."""
        replay, layer = self._replay, self.parts.layers[i]
        states = _states(*args, **kwargs)
        if i != replay.layer:
            return replay.outputs.get(i, states)
        output = type(layer).forward(layer, *args, **kwargs)
        if not isinstance(output, Tensor) or output.shape != states.shape:
            raise self._refusal(f"layer {i} does not give hidden states alone")
        if replay.ends:
            raise _LayerDone(output)
        return output

    def _embed(self, ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Take the place of the embeddings' forward."""
        weight = self.parts.embeddings.weight
        if self._replay.embeds:
            return self._embed_tokens(ids, *args, **kwargs)
        return torch.zeros(*ids.shape, weight.shape[1], dtype=weight.dtype, device=self.parts.device)

    @contextmanager
    def _replaying(self, replay: ReplayedLayers) -> Iterator[None]:
        before, self._replay = self._replay, replay
        try:
            yield
        finally:
            self._replay = before

    @property
    def _last(self) -> int:
        return len(self.parts.layers) - 1

    @property
    def _kept(self) -> frozenset[int]:
        """Layers whose outputs calls give."""
        return frozenset(layer for layer in self._needs.hidden if isinstance(layer, int))

    @property
    def _reads_embeddings(self) -> bool:
        return "embeddings" in self._needs.hidden

    def _check(self) -> None:
        """Refuse a model unless each layer gets the same in a full pass as where only the layer before has run.

        Layers give random numbers here, so that none but the first is read.
        """
        model, layers, inputs = self.model, self.parts.layers, dict[int, Any]()

        def record(i: int, _: Any, args: Any, kwargs: Any) -> None:
            inputs[i] = args, tuple(kwargs.items())

        def logits(replay: ReplayedLayers) -> Tensor:
            with self._replaying(replay):
                output: Tensor = run(model, batch).logits
            return output

        with ExitStack() as hooks, self.parts.loaded(EMBEDDINGS, HEAD), undisturbed(model):
            batch = probe_batch(model)
            for i, layer in enumerate(layers):
                hooks.enter_context(layer.register_forward_pre_hook(partial(record, i), with_kwargs=True))
            with self.parts.loaded(0):
                logits(ReplayedLayers(layer=0, embeds=True, ends=False))  # which is refused here, not in check_causal
                states = _states(*inputs[0][0], **dict(inputs[0][1]))
                with self._replaying(ReplayedLayers(layer=0, embeds=True, ends=False)):
                    check_causal(model, self.parts.key)
            outputs = {i: torch.rand_like(states) for i in range(len(layers))}
            expected, of_full_pass = logits(ReplayedLayers(outputs, embeds=True)), dict(inputs)
            for i in range(len(layers)):
                found = logits(ReplayedLayers({i: outputs[i]}))
                if i < self._last and not _same(inputs[i + 1], of_full_pass[i + 1]):
                    raise self._refusal(f"layer {i + 1} reads more than the output of layer {i}")
            if not torch.equal(found, expected):
                raise self._refusal("its head reads more than the output of the last layer")
            with self._replaying(ReplayedLayers(embeds=True)):
                _ = self._split

    def _refusal(self, reason: str) -> ModelError:
        name = type(self.model).__name__
        return ModelError(
            f"{self.parts.key}: expected a model whose layers can run one by one for --stream, got {name}: {reason}. "
            f"{SPREAD_INSTEAD}"
        )


def load_streamed(source: TeacherSource) -> LoadedTeacher:
    """Load the teacher of a source that is a plain model, part by part."""
    kind = source.name
    if isinstance(source, ModelSource):
        kind = "device_map" if source.device_map else source.dtype
    if not isinstance(source, ModelSource) or kind in ("device_map", "int8", "int4"):
        raise UserError(
            f"cache build: expected teacher.model in float32, bfloat16 or float16 with --stream, got {kind}. Leave it "
            "out, or leave --stream out."
        )
    key, device = "teacher.model", torch.device(source.device or accelerator())
    teacher = StreamedTeacher(ModelParts(source.model, key, source.dtype, device))
    return LoadedTeacher(teacher, load_tokenizer(source.model, key), teacher.model, teacher.model.config)


def _states(*args: Any, **kwargs: Any) -> Any:
    """The hidden states in a layer's arguments."""
    return args[0] if args else kwargs["hidden_states"]


def _key(batch: Mapping[str, Tensor]) -> str:
    """The file's name of a batch, by its content."""
    digest = hashlib.blake2b(digest_size=16)
    for name in ("input_ids", "attention_mask", "token_type_ids"):
        if name in batch:
            digest.update(f"{name} {list(batch[name].shape)}".encode() + batch[name].cpu().numpy().tobytes())
    return digest.hexdigest()


def _read(folder: Path, layer: int, key: str) -> Tensor:
    try:
        return load_file(folder / str(layer) / key)["states"]
    except OSError:
        raise RunError(
            f"cache build: expected the activations of layer {layer} in {folder}, got none for a batch. Remove that "
            "folder, and repeat the command."
        ) from None


def _same(actual: Any, expected: Any) -> bool:
    """Whether a layer's arguments are equal, and such that no layer can change them for another."""
    if isinstance(actual, Tensor):
        return isinstance(expected, Tensor) and torch.equal(actual, expected)
    if isinstance(actual, tuple):
        return len(actual) == len(expected) and all(map(_same, actual, expected))
    plain = actual is None or isinstance(actual, bool | int | float | str | torch.dtype)
    return plain and bool(actual == expected)
