"""Plan a cache of teacher signals and build it."""

from __future__ import annotations

import hashlib
import importlib.metadata
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from potstill.data.batches import PaddingCollator, encode, in_batches, pad_token_id
from potstill.data.sources import Source
from potstill.data.vocabulary import fingerprint
from potstill.errors import ModelError, UserError
from potstill.evaluate.formatting import size
from potstill.files import lock_folder, remove
from potstill.losses.alignment import causal_alignment
from potstill.losses.targets import HeadTargets
from potstill.models.capture import ActivationRequest
from potstill.models.chat import set_chat_template
from potstill.models.layer_map import Layer, layer_index
from potstill.models.loading import accelerator, loading_notes, suppress_warnings, vocabulary_size
from potstill.models.placement import weights_by_name
from potstill.runs.progress import PartProgress
from potstill.runs.ray import Row, RowFunction, map_rows
from potstill.teachers.cache.build import CacheBuilder
from potstill.teachers.cache.codec import Codec, codec_of
from potstill.teachers.cache.store import FORMAT, CachedLayers, CachePlan, Manifest
from potstill.teachers.cached import COMPANIONS, keys_of
from potstill.teachers.source import TeacherSource
from potstill.teachers.streamed import StreamedTeacher, load_streamed
from potstill.teachers.teacher import Teacher

SHARD_TOKENS = 2**17  # the most work that a kill can cost, in tokens of the teacher
ALIGNMENT = "causal: the signal of position t is about the token at t + 1, where the label at t + 1 counts"


@dataclass(frozen=True)
class CacheRequest:
    """A cache to build. It can be pickled: Ray takes it to other machines."""

    teacher: TeacherSource
    sources: Sequence[Source]
    max_length: int
    packing: bool
    codec: str  # sampled, top_k, dense or hidden
    parameters: dict[str, Any]  # of the codec: draws, k, temperature
    out: Path
    batch_rows: int = 8  # in a batch of the teacher, and concurrent requests to a server
    tokenizer: str | None = None  # folder of the tokenizer for a server
    layers: Sequence[Layer] = ()  # whose hidden states are stored too, from 0; negative ones from the end; or names
    attentions: Sequence[int] = ()  # whose attention maps are stored too
    chat_template: str | None = None  # a Jinja file, in place of the tokenizer's
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)  # its arguments
    stream: bool = False  # run the teacher layer by layer, with its activations on the disk


def build(
    request: CacheRequest, *, part: tuple[int, int] = (0, 1), engine: str = "process", console: Console
) -> Manifest | None:
    """Build a cache, or continue one; return its manifest, or None while other parts are missing.

    `part` (i, n) is the i-th of n parts, counted from 0; whoever writes the last shard finishes the cache.
    """
    if request.stream and engine == "ray":
        raise UserError("cache build: expected --engine process with --stream, got ray. Use --shard on each machine.")
    name = f"{part[0]}-of-{part[1]}"
    with lock_folder(request.out, "--out", name), suppress_warnings():
        builder = prepare(request, console)
        builder.begin()
        todo = builder.todo(part)
        activations = request.out / f"activations-{name}"
        if request.stream and todo:
            _run_layers(builder, todo, activations, console)
        with PartProgress(console, "shards").start(total=len(todo)) as progress:
            done: Iterable[Any] = map(builder.build, todo)
            if engine == "ray":  # each of its processes has a teacher of its own
                shards = [{"shard": number} for number in todo]
                done = map_rows("cache build", shards, _begin, request, gpus=int(torch.cuda.is_available()))
            for number, _ in enumerate(done, 1):
                progress.update(number)
        remove(activations)
        with lock_folder(request.out, "--out", "finish", wait=True):
            return builder.finish()


def _run_layers(builder: CacheBuilder, todo: Sequence[int], folder: Path, console: Console) -> None:
    """Run all layers of a streamed teacher over the rows of some shards, with what they give in a folder."""
    teacher = cast(StreamedTeacher, builder.teacher)
    disk, weights = teacher.disk_bytes(builder.positions(todo)), teacher.parts.bytes_of.total()
    room = _room(folder)
    if disk > room:
        raise UserError(
            f"cache build: expected {size(disk)} of disk for the activations of all rows, got {size(room)} in "
            f"{builder.directory}. Build it in parts (--shard), or choose another --out."
        )
    console.print(
        f"cache: runs layer by layer: reads {size(weights)} of weights once more, and keeps up to {size(disk)} of "
        f"activations of {size(room)} of disk.",
        style="dim",
        highlight=False,
        markup=False,
    )
    with PartProgress(console, "layers").start(total=len(teacher.parts.layers)) as progress:
        for number, _ in enumerate(builder.precompute(todo, folder), 1):
            progress.update(number)
    read = f"cache: read {size(teacher.parts.bytes_read)} of weights in all, with their checksum"
    console.print(read, style="dim", highlight=False, markup=False)


def _room(folder: Path) -> int:
    """Count the bytes that a folder may take: those free on its disk, and its own."""
    own = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return own + shutil.disk_usage(next(x for x in (folder, *folder.absolute().parents) if x.exists())).free


def prepare(request: CacheRequest, console: Console) -> CacheBuilder:
    """Load the teacher and the data, and plan the cache."""
    source = request.teacher.live
    if source is None:
        raise UserError("cache build: expected teacher.model or teacher.server, got neither.")
    loaded = load_streamed(source) if request.stream else source.load(request.tokenizer)
    tokenizer = loaded.tokenizer
    set_chat_template(tokenizer, request.chat_template, request.chat_template_kwargs)
    options: dict[str, Any] = {"max_length": request.max_length, "packing": request.packing}
    examples = [encode(part, tokenizer, **options) for part in request.sources]
    parts = (*loaded.models.values(), *((loaded.model,) if request.stream else ()), tokenizer)
    for note in (*chain(*map(loading_notes, parts)), *chain(*(encoded.notes for encoded in examples))):
        console.print(note, style="dim", highlight=False, markup=False)
    device = torch.device(source.model_device or (accelerator() if loaded.model is not None else "cpu"))
    datasets = [encoded.dataset for encoded in examples]
    (batch,) = in_batches([datasets[0][0]], tokenizer, 1, device)
    vocabulary = vocabulary_size(tokenizer)
    layers = _layers(request, loaded.teacher, batch)
    if layers is not None:
        console.print(_check_room(layers, datasets, request.out), style="dim", highlight=False, markup=False)
    tokens, rows = sum(encoded.tokens for encoded in examples), sum(map(len, datasets))
    sources = []
    for part, encoded in zip(request.sources, examples, strict=True):
        key = hashlib.sha256(b"".join(keys_of(encoded.dataset))).hexdigest()
        sources.append((str(part.path), len(encoded.dataset), encoded.tokens, key))
    weights = None if loaded.model is None else weights_by_name(loaded.model)
    if isinstance(loaded.teacher, StreamedTeacher):
        weights = loaded.teacher.parts.weights()
    plan = CachePlan(
        format=FORMAT,
        teacher=source.title,
        weights=source.title if weights is None else _digest(weights),
        tokenizer=fingerprint(tokenizer),
        vocabulary=vocabulary,
        codec=_codec(request, vocabulary, loaded.teacher, batch).record(),
        alignment=ALIGNMENT,
        sources=sources,
        shard_rows=max(1, SHARD_TOKENS * rows // tokens),
        batch_rows=request.batch_rows,
        versions={name: importlib.metadata.version(name) for name in ("potstill", "torch", "transformers")},
        layers=layers,
    )
    collate = PaddingCollator(pad_token_id(tokenizer)[0])
    companions = partial(_save_companions, loaded.config, tokenizer)
    return CacheBuilder(plan, request.out, loaded.teacher, datasets, collate, device, companions)


def _layers(request: CacheRequest, teacher: Teacher, batch: dict[str, torch.Tensor]) -> CachedLayers | None:
    """The layers to store; the teacher is prepared for them."""
    if not request.layers and not request.attentions:
        return None
    if not teacher.has_layers:
        raise ModelError(
            "cache build: expected a teacher that is a model for --layers and --attention-layers, got "
            f"{request.teacher.title}. Leave them out."
        )
    shape = teacher.shape
    kept = {layer_index("teacher", layer, shape.layers) for layer in request.layers}
    attentions = sorted({layer_index("teacher", layer, shape.layers) for layer in request.attentions})
    teacher.prepare(ActivationRequest(hidden=frozenset(kept), attentions=frozenset(attentions)))
    inside = teacher.outline(batch, causal_alignment(batch["labels"])).inside
    dtype = str(next(chain(inside.hidden.values(), inside.attentions.values())).dtype).removeprefix("torch.")
    ordered = sorted(kept, key=lambda layer: (isinstance(layer, str), layer))
    return CachedLayers(ordered, shape.layers, shape.width, shape.heads, shape.narrowest, dtype, attentions)


def _check_room(layers: CachedLayers, datasets: Iterable[Any], out: Path) -> str:
    """Say how much the layers of all rows may take; a UserError where the disk has less."""
    largest = sum(layers.bytes_of_row(len(row["input_ids"])) for dataset in datasets for row in dataset)
    room = _room(out)
    if largest > room:
        raise UserError(
            f"cache build: expected {size(largest)} of disk for the layers of all rows, got {size(room)} in {out}. "
            "Store fewer layers (attention maps are the largest) or shorter rows, or choose another --out."
        )
    return f"cache: layers take up to {size(largest)}, before compression, of {size(room)} of disk."


def _codec(request: CacheRequest, vocabulary: int, teacher: Teacher, batch: dict[str, torch.Tensor]) -> Codec:
    parameters = {"name": request.codec, "vocabulary": vocabulary, **request.parameters}
    if request.codec == "hidden":
        targets = teacher.outline(batch, causal_alignment(batch["labels"])).targets
        if not isinstance(targets, HeadTargets):
            raise ModelError(
                "cache build: expected a teacher with a plain head for the codec hidden, got "
                f"{request.teacher.title}, which gives no hidden states. Use the codec top_k or sampled."
            )
        hidden = targets.hidden
        parameters |= {"width": hidden.shape[-1], "dtype": str(hidden.dtype).removeprefix("torch.")}
    return codec_of(parameters)


def _begin(request: CacheRequest) -> RowFunction:
    with suppress_warnings():
        builder = prepare(request, Console(quiet=True))

    def build(row: Row) -> Row:
        builder.build(int(row["shard"]))
        return row

    return build


def _save_companions(config: PretrainedConfig | None, tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    if config is not None:
        config.save_pretrained(directory / COMPANIONS)
    tokenizer.save_pretrained(directory / COMPANIONS)


def _digest(weights: Iterable[tuple[str, Tensor]]) -> str:
    """Compute sha256 over the names, shapes and bytes of all weights."""
    digest = hashlib.sha256()
    for name, weight in weights:
        digest.update(f"{name} {weight.dtype} {list(weight.shape)}\n".encode())
        digest.update(weight.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
