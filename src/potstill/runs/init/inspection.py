"""What models and data files say about themselves without weights and with few rows."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from potstill.data.batches import encode
from potstill.data.columns import choose_columns, recognise
from potstill.data.conversations import read_messages
from potstill.data.locate import locate
from potstill.data.sources import Source, SourceKind
from potstill.errors import DataError, ModelError
from potstill.losses.alignment import SEQUENCE_TASKS, TOKEN_TASKS, Task
from potstill.models.design import student_config
from potstill.models.feed_forward import find_mixture
from potstill.models.heads import class_ids, max_positions
from potstill.models.loading import AUTO_CLASSES, adapter_base, load_config, load_tokenizer
from potstill.models.packing_probe import packing_mistake
from potstill.models.shapes import config_fields, design_shape, layer_kinds, text_config
from potstill.models.size import build, count_parameters
from potstill.models.structure import find_structure

PROBE_PARAMETERS, PROBE_VOCABULARY = 10**8, 64  # at most, of a small model on which packed rows are tried
VECTORS = (".npy", ".safetensors", ".pt")


class ModelInfo(NamedTuple):
    """A model's properties without its weights; the config is its base model's if it is an adapter."""

    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    task: Task
    max_length: int  # of a row, in tokens
    parameters: int
    can_initialize: bool = False  # whether a student of the same family can start from its weights
    keeps_attention: bool = False  # such a student has its heads and width, as of OLMo 2


def inspect_model(path: str, key: str, task: Task | None = None) -> ModelInfo:
    """Read the config and the tokenizer of a model, to use for a task; default: the one it was trained for."""
    base = adapter_base(path) or path
    config, tokenizer = load_config(base, key), load_tokenizer(path, f"{key}: its tokenizer")
    model = build(config, "meta")
    limits = [limit for limit in (max_positions(model), tokenizer.model_max_length) if limit and limit < 10**9]
    max_length = min(limits, default=2048)  # 10^30 means no limit
    info = ModelInfo(config, tokenizer, _task(config, path, key, task), max_length, model.num_parameters())
    with suppress(ModelError):
        structure = find_mixture(model) or find_structure(model)
        whole = getattr(structure, "whole_attention", False)
        info = info._replace(can_initialize=True, keeps_attention=whole)
    return info


def unpacked(config: PretrainedConfig, length: int, adapter: str | None) -> str | None:
    """Say why a student of a config cannot read rows packed into `length` tokens, with an adapter of this kind.

    Tried on a small model of its family with random weights. None where it can.
    """
    if adapter in ("prompt", "prefix"):
        return f"an adapter of kind {adapter} puts virtual tokens in front of a whole packed row"
    try:
        small = _small_config(config)
        if count_parameters(small) > PROBE_PARAMETERS:
            raise ModelError(f"{config.model_type} is too large")
        mistake = packing_mistake(build(small).eval(), None, length)
    except ModelError:
        return f"{config.model_type} was not tried here; set packing to true, and `potstill check` tries it"
    return None if mistake is None else f"the student would be {mistake}"


def _small_config(config: PretrainedConfig) -> PretrainedConfig:
    """A narrow model of a family with few layers, among them each kind that it has."""
    config, shape = text_config(config), design_shape(config)
    kinds = layer_kinds(config)
    shape = replace(shape, layers=min(shape.layers, max([2, *(kinds.index(kind) + 1 for kind in kinds)])))
    if shape.heads:
        kv_heads = 4 if shape.kv_heads == shape.heads else 2
        shape = replace(shape, hidden=4 * shape.head_size, heads=4, kv_heads=kv_heads, ffn=64)
    small = student_config(config, config_fields(shape, config), PROBE_VOCABULARY)
    small.pad_token_id = None  # which has no row in so few
    return small


def is_embedder(path: str) -> bool:
    """Whether a path is a file of vectors or a sentence-transformers folder."""
    return path.endswith(VECTORS) or (Path(path).expanduser() / "modules.json").exists()


def _task(config: PretrainedConfig, path: str, key: str, requested: Task | None) -> Task:
    """Find the task that the class in a config's `architectures` is for, and check it against the requested one."""
    architecture = (config.architectures or [""])[0]
    trained: Task | None = None
    for task, (auto_class, _) in AUTO_CLASSES.items():
        classes = auto_class._model_mapping.get(type(config), ())
        if architecture in [each.__name__ for each in (classes if isinstance(classes, tuple) else (classes,))]:
            trained = "regression" if task == "classification" and config.num_labels == 1 else task
            break
    if trained is None and (requested is None or architecture):
        raise ModelError(
            f"{key}: expected a causal or masked language model, a sequence classifier or an encoder in {path}, got "
            f"{architecture or 'a config without architectures'}. Name another, or give its task with --task."
        )
    if trained is not None and requested not in (None, trained, "encoder"):  # any model has hidden states
        raise ModelError(
            f"{key}: expected a model for the task {requested} in {path}, got {architecture}, which is for {trained}."
        )
    return requested or trained or "encoder"


SAMPLE_ROWS = 500
SAMPLE_TOKENIZED = 16  # whose tokens are compared with the teacher's
SAMPLE_CHARACTERS = 20_000  # of a plain text, which may be a whole book

# Usual names of columns, by preference, for each column key of a recipe.
TEXTS = ("text", "content", "document", "body", "sentence", "sentence1", "text1", "premise")
PAIRS = ("text_pair", "sentence2", "text2", "hypothesis")
PROMPTS = ("prompt", "question", "instruction", "query", "problem")
LABELS = ("label", "labels", "class", "score", "target")


class RowSample(NamedTuple):
    """The first rows of a source."""

    columns: dict[str, Any]  # the keys of a Source that say what is read: field, prompt, ...
    unused: tuple[str, ...]  # all other columns
    num_rows: int
    is_whole_file: bool
    longest: int  # most tokens in a row, after truncation to the model's limit
    num_tokens: int  # of all rows together; of long texts an estimate
    ids: tuple[list[int], ...] = ()  # token ids of some rows
    kind: SourceKind = "text"


def find_columns(
    source: Source,
    names: Sequence[str],
    first: Callable[[str], Any],
    task: Task,
    given: Mapping[str, str],
    *,
    has_template: bool,
) -> dict[str, Any]:
    """Choose what a task reads, by the names of columns, as keys of a Source.

    A `text` beside a conversation, or a question and its answer, is the same in the template of whoever wrote the file:
    a model with a chat template reads the conversation. Of preference pairs the chosen answer is read.

    Args:
        first: gives the value of a column in the first row.
        given: the columns that the user named; only sequence-level tasks add others.
    """
    if task in SEQUENCE_TASKS:
        usual = {"field": TEXTS, "pair": PAIRS, "label": LABELS}
        columns = {key: name for key, candidates in usual.items() if (name := first_of(candidates, names))} | {**given}
        missing = [f"--{key}" for key in ("field", "label") if key not in columns]
        if missing:
            raise _unclear(source, names, f"columns for the task {task}", " and ".join(missing))
        return columns
    if given:
        return dict(given)
    text, flags = first_of(TEXTS, names), "--field"
    ways: list[dict[str, Any]] = [{"field": text}] if text else []
    if task in TOKEN_TASKS:
        conversations = _conversations([name for name in names if name != text], first)
        if task == "causal" and text is not None and text.casefold() == "text" and len(conversations) == 1:
            ways = conversations if has_template else ways
        else:
            ways += [way for way in _conversations(names, first) if way not in ways]
        flags = "--field, --messages, or --prompt with --completion"
        if not ways and task == "causal" and len(names) == 1 and names[0].casefold() in PROMPTS:
            raise DataError(
                f"data: expected texts or answers in {source.title}, got prompts alone, {names[0]}. Let the teacher "
                f"answer them with a recipe of --kind generate, or read them as text with --field {names[0]}."
            )
    if not ways and len(names) == 1:
        ways = [{"field": names[0]}]
    if len(ways) != 1:
        raise _unclear(source, names, "columns of one kind", flags)
    weighted = task == "causal" and "weight" in names and "field" not in ways[0]
    return ways[0] | ({"weight": "weight"} if weighted else {})


def _conversations(names: Sequence[str], first: Callable[[str], Any]) -> list[dict[str, Any]]:
    """The ways to read columns of usual names, capitals or not; else the chosen answer of preference pairs."""
    own_names = _own_names(names)
    ways = recognise(names) or [_renamed(way, own_names) for way in recognise([*own_names])]
    if ways or not {"chosen", "rejected"} <= own_names.keys():
        return ways
    chosen, prompt = own_names["chosen"], first_of(PROMPTS, names)
    messages = first(chosen)
    if isinstance(messages, list) and messages and read_messages(messages)[0]["role"] != "assistant":
        return [{"messages": chosen}]
    return [{"prompt": (prompt,), "completion": chosen, "chat": None}] if prompt else []


def sample_rows(
    source: Source, given: Mapping[str, Any], teacher: ModelInfo, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> RowSample:
    """Read and encode the first rows of a source as a run does, with the student's tokenizer."""
    location = locate(replace(source, limit=SAMPLE_ROWS + 1))
    has_template = tokenizer.chat_template is not None
    names, first = location.columns, location.first
    columns = find_columns(source, names, first, teacher.task, given, has_template=has_template)
    if "prompt" in columns:
        columns = _as_chat(columns) if has_template and teacher.task == "causal" else _as_text(columns)
    named = replace(source, **columns)
    choice = choose_columns(named, location.columns, location.first, teacher.task, has_template)
    rows = [
        dict(zip(batch.columns, row, strict=True))
        for batch in location.batches(choice.columns)
        for row in zip(*batch.columns.values(), strict=True)
    ]
    characters = [0, 0]  # in all texts, and in what is read of them
    for row in rows[:SAMPLE_ROWS]:
        if isinstance(text := row.get(columns.get("field", "")), str):
            row[columns["field"]] = text[:SAMPLE_CHARACTERS]
            characters = [characters[0] + len(text), characters[1] + len(row[columns["field"]])]
    with tempfile.TemporaryDirectory() as folder:
        sample = Path(folder) / f"{Path(source.path).stem}.jsonl"
        lines = [json.dumps(row, default=str) + "\n" for row in rows[:SAMPLE_ROWS]]
        sample.write_text("".join(lines), encoding="utf-8")
        task, classes = teacher.task, class_ids(teacher.config)
        examples = encode(Source(sample, **columns), tokenizer, max_length=max_length, task=task, classes=classes)
    tokens = examples.dataset["input_ids"][:]
    lengths, is_whole_file = [*map(len, tokens)], len(rows) <= SAMPLE_ROWS
    num_tokens = round(sum(lengths) * max(1, characters[0]) / max(1, characters[1]))
    some = tuple(tokens[:SAMPLE_TOKENIZED])
    return RowSample(columns, choice.unused, len(lines), is_whole_file, max(lengths), num_tokens, some, choice.kind)


def _as_chat(columns: dict[str, Any]) -> dict[str, Any]:
    """Name a prompt and its completion as a chat: what an instruct model knows."""
    prompt = columns["prompt"]
    single = isinstance(prompt, tuple) and len(prompt) == 1
    return columns | {"prompt": prompt[0] if single else prompt, "chat": True}


def _as_text(columns: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in columns.items() if key != "chat"}


def first_of(candidates: Sequence[str], names: Sequence[str]) -> str | None:
    own_names = _own_names(names)
    return next((own_names[name] for name in candidates if name in own_names), None)


def _own_names(names: Sequence[str]) -> dict[str, str]:
    """The names of columns by themselves in small letters, as tables often have capitals: Question and Answer."""
    return {name.casefold(): name for name in names} | {name: name for name in names}


def _renamed(way: dict[str, Any], own_names: Mapping[str, str]) -> dict[str, Any]:
    """Give the columns of a way to read rows the names that a file has."""

    def own(value: Any) -> Any:
        return tuple(map(own, value)) if isinstance(value, tuple) else own_names.get(value, value)

    return {key: own(value) for key, value in way.items()}


def _unclear(source: Source, names: Sequence[str], expected: str, flags: str) -> DataError:
    return DataError(f"data: expected {expected} in {source.title}, got {', '.join(names)}. Say which with {flags}.")
