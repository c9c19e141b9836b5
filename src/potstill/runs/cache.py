"""potstill cache build: from what was asked to a cache on disk. Read it from top to bottom."""

from __future__ import annotations

import hashlib
import importlib.metadata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from potstill.teachers.cache.codec import CODECS, Codec
from potstill.teachers.cache.store import FORMAT, Layers, Manifest, Plan
from potstill.data.batches import PaddingCollator, encode, pad_token_id
from potstill.data.sources import Source
from potstill.data.vocabulary import fingerprint
from potstill.errors import ModelError, UserError
from potstill.models.layer_map import layer_index
from potstill.models.loading import suppress_warnings
from potstill.runs.ray import map_rows
from potstill.losses.alignment import causal_alignment
from potstill.runs.config.data import SourcePart
from potstill.runs.config.teacher import TeacherPart
from potstill.runs.build_teacher import load_teacher
from potstill.models.capture import ActivationRequest
from potstill.losses.targets import HeadTargets
from potstill.teachers.model import ModelTeacher
from potstill.teachers.teacher import Teacher
from potstill.teachers.cached import COMPANIONS, keys_of
from potstill.teachers.cache.build import Capture

SHARD_TOKENS = 2**17  # what a kill costs at most, in tokens of the teacher's work
ALIGNMENT = "causal: the signal of position t is about the token at t + 1, where the label at t + 1 counts"


@dataclass(frozen=True)
class Request:
    """What to keep, of whom, about what. It can be pickled: Ray takes it to other machines.

    Args:
        teacher: who speaks.
        sources: the files of data.
        max_length: tokens in a row at most.
        packing: see `potstill.encode`.
        codec: sampled, top_k, dense or hidden.
        parameters: of the codec: draws, k, temperature.
        out: the cache's directory.
        batch_rows: rows in a batch of the teacher; as many requests go to a server at once.
        tokenizer: where the tokenizer is with which a server is asked.
        layers: whose hidden states are kept too, from 0; negative ones from the end.
    """

    teacher: TeacherPart
    sources: Sequence[SourcePart]
    max_length: int
    packing: bool
    codec: str
    parameters: dict[str, Any]
    out: Path
    batch_rows: int = 8
    tokenizer: str | None = None
    layers: Sequence[int] = ()


def build(
    request: Request, *, part: tuple[int, int] = (0, 1), engine: str = "process", console: Console
) -> Manifest | None:
    """Build a cache, or go on with one.

    Args:
        request: what to keep.
        part: (i, n): only the i-th of n parts, counted from 0; whoever writes the last shard finishes the cache.
        engine: "process", or "ray" for one teacher in each of Ray's actors.
        console: where progress is shown.

    Returns:
        The manifest, or None while other parts are missing.

    Raises:
        UserError: something in the request is to be corrected.
    """
    with suppress_warnings():
        capture = prepare(request, console)
        capture.begin()
        todo = capture.todo(part)
        with Progress(console=console) as progress:
            task = progress.add_task(f"{request.codec} of {request.teacher.title}", total=len(todo))
            for _ in _with_ray(request, todo) if engine == "ray" else map(capture.build, todo):
                progress.advance(task)
        return capture.finish()


def prepare(request: Request, console: Console) -> Capture:
    """Load the teacher and the data, and plan the cache."""
    who = request.teacher
    if who.model is None and who.server is None:
        raise UserError("cache build: expected a teacher to ask, teacher.model or teacher.server, got neither.")
    speaker = load_teacher(who.model_copy(update={"cache": None}), request.tokenizer)
    tokenizer = speaker.tokenizer
    examples = []
    for source in request.sources:
        found = encode(Source(**source.model_dump()), tokenizer, max_length=request.max_length, packing=request.packing)
        examples.append(found)
        for note in found.notes:
            console.print(note, style="dim", highlight=False, markup=False)
    on_gpu = speaker.model is not None and torch.cuda.is_available()
    device = torch.device(who.device or ("cuda" if on_gpu else "cpu"))
    collate = PaddingCollator(pad_token_id(tokenizer)[0])
    datasets = [found.dataset for found in examples]
    vocabulary = max(tokenizer.get_vocab().values()) + 1
    batch = {name: value.to(device) for name, value in collate([datasets[0][0]]).items()}
    layers = _layers(request, speaker.teacher, batch)
    codec = _codec(request, vocabulary, speaker.teacher, batch)
    tokens, rows = sum(found.tokens for found in examples), sum(map(len, datasets))
    plan = Plan(
        format=FORMAT,
        teacher=who.title,
        weights=who.title if speaker.model is None else _weights_digest(speaker.model),
        tokenizer=fingerprint(tokenizer),
        vocabulary=vocabulary,
        codec=codec.record(),
        alignment=ALIGNMENT,
        sources=[
            (source.path, len(found.dataset), found.tokens, _rows_digest(found.dataset))
            for source, found in zip(request.sources, examples, strict=True)
        ],
        shard_rows=max(1, SHARD_TOKENS * rows // tokens),
        batch_rows=request.batch_rows,
        versions={name: importlib.metadata.version(name) for name in ("potstill", "torch", "transformers")},
        layers=layers,
    )
    companions = partial(_save_companions, speaker.config, tokenizer)
    return Capture(plan, request.out, speaker.teacher, datasets, collate, device, companions)


def _layers(request: Request, teacher: Teacher, batch: dict[str, torch.Tensor]) -> Layers | None:
    """The layers that are asked for; the teacher is prepared for them."""
    if not request.layers:
        return None
    if not isinstance(teacher, ModelTeacher):
        raise ModelError(
            f"cache build: expected a teacher that is a model for --layers, got {request.teacher.title}. Leave it out."
        )
    shape = teacher.anatomy
    kept = sorted({layer_index("teacher", layer, shape.layers) for layer in request.layers})
    teacher.prepare(ActivationRequest(hidden=frozenset(kept)))
    states = teacher(batch, causal_alignment(batch["labels"])).inside.hidden[kept[0]]
    return Layers(
        kept=kept,
        depth=shape.layers,
        width=shape.width,
        heads=shape.heads,
        narrowest=shape.narrowest,
        dtype=str(states.dtype).removeprefix("torch."),
    )


def _codec(request: Request, vocabulary: int, teacher: Teacher, batch: dict[str, torch.Tensor]) -> Codec:
    parameters = dict(request.parameters)
    if request.codec == "hidden":
        said = teacher(batch, causal_alignment(batch["labels"])).targets
        if not isinstance(said, HeadTargets):
            raise ModelError(
                "cache build: expected a teacher with a plain head for the codec hidden, got "
                f"{request.teacher.title}, which gives no hidden states. Use the codec top_k or sampled."
            )
        parameters |= {"width": said.hidden.shape[-1], "dtype": str(said.hidden.dtype).removeprefix("torch.")}
    return CODECS[request.codec](vocabulary, **parameters)


def _with_ray(request: Request, todo: list[int]) -> Iterator[dict[str, Any]]:
    """The shards, built by Ray's processes: each loads one teacher."""
    gpus = 1 if torch.cuda.is_available() else 0
    return map_rows("cache build", [{"shard": number} for number in todo], _begin, request, gpus=gpus)


def _begin(request: Request) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """One teacher in one of Ray's processes."""
    with suppress_warnings():
        capture = prepare(request, Console(quiet=True))

    def build(row: dict[str, Any]) -> dict[str, Any]:
        capture.build(int(row["shard"]))
        return row

    return build


def _save_companions(config: PretrainedConfig | None, tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    if config is not None:
        config.save_pretrained(directory / COMPANIONS)
    tokenizer.save_pretrained(directory / COMPANIONS)


def _weights_digest(model: PreTrainedModel) -> str:
    """sha256 over the names, shapes and bytes of all weights."""
    found = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        found.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        found.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def _rows_digest(dataset: Any) -> str:
    found = hashlib.sha256()
    for key, _ in keys_of(dataset):
        found.update(key)
    return found.hexdigest()
