"""Malformed input: recipes, data, chat templates, weights, tokenizers and answers of servers, changed at random.

Each is read, or refused with one clear line, within a bound of time and memory.
"""

from __future__ import annotations

import copy
import csv
import gzip
import json
import random
import resource
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import datasets
import pyarrow as pa
import torch
import yaml
from pyarrow import parquet

from drill import Drill
from mutations import mutated, mutated_bytes
from potstill.cli.embedding import kind_of
from potstill.data.batches import encode
from potstill.data.sources import Source
from potstill.engines import client
from potstill.engines.sampling import Sampling
from potstill.engines.server import ModelServer
from potstill.errors import PotstillError, printable, shortened
from potstill.losses.alignment import causal_alignment
from potstill.losses.targets import SparseTargets
from potstill.models.chat import set_chat_template
from potstill.models.loading import load_model, load_tokenizer
from potstill.runs.config.document import apply, read
from potstill.runs.config.embedding import EmbeddingRecipe
from potstill.runs.config.generate import GenerateRecipe
from potstill.runs.config.run import Recipe
from potstill.runs.embedding_sources import read_texts
from potstill.runs.formats.gguf_file import write_gguf
from potstill.runs.sweep import grid, read_axes
from potstill.teachers.served import ServedTeacher

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from conftest import make_llama, make_tokenizer  # toys of the tests
from toy_server import ToyServer

SECONDS, BYTES = 20, 3 << 30  # of processor time for one case, and more memory than before


class TooLong(BaseException):
    """A case took more than its processor time."""


def attempt(call: Callable[[], Any]) -> tuple[bool, str]:
    """Whether a call returns or is refused with one clear line, within the bounds, and what it ended with."""
    try:
        with _bounded():
            call()
    except PotstillError as error:
        message = str(error)
        # Several mistakes of a recipe stand in a line each, under a heading.
        whole = "\n" not in message or " mistakes\n" in message or " mistake\n" in message
        return whole and ": " in message, printable(shortened(message))[:300]
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of Rust is no Exception
        return False, f"{type(error).__name__}: {error}"[:300]
    return True, "accepted"


@contextmanager
def _bounded() -> Iterator[None]:
    def stop(number: int, frame: FrameType | None) -> None:
        raise TooLong

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limits, before = resource.getrlimit(resource.RLIMIT_AS), signal.signal(signal.SIGPROF, stop)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + BYTES, limits[1]))
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
        resource.setrlimit(resource.RLIMIT_AS, limits)


def try_all(drill: Drill, count: int, prepare: Callable[[Path, random.Random], Callable[[], Any]]) -> None:
    """Try each case of a part: `prepare` writes its files and returns what reads them."""
    for case in drill.cases(count):
        held, result = attempt(prepare(case.folder, case.rng))
        drill.note(case.number, held, result=result)


# Recipes

RUN = {
    "name": "a", "seed": 1, "task": "causal", "teacher": {"model": "t", "dtype": "auto"},
    "student": {"design": {"hidden_size": 8, "num_hidden_layers": 1}, "initialize": {"method": "prune"}},
    "data": {
        "train": [{"path": "a.jsonl", "share": 1}, {"path": "b.csv", "prompt": ["p", "q"], "completion": "c"}],
        "eval": {"path": "e.jsonl", "field": "text"}, "max_length": 64, "chat_template_kwargs": {"thinking": False},
    },
    "objective": [
        {"term": "logits", "divergence": {"kind": "jsd", "beta": 0.5}, "weight": 0.9,
         "temperature": {"schedule": "linear", "start": 4.0, "end": 1.0}},
        {"term": "labels", "weight": {"schedule": "cosine", "start": 1.0, "end": 0.1}},
        {"term": "hidden", "weight": 0.1},
    ],
    "rollout": {"on_policy_fraction": 0.5, "max_new_tokens": 8, "sampling_temperature": 1.0},
    "train": {"max_steps": 5, "learning_rate": 1e-3, "bf16": False, "lr_scheduler_type": "cosine"},
    "evaluate": {"baseline": True, "continuations": 1}, "export": [{"to": "gguf", "quantize": "q8_0"}], "output": "out",
}  # fmt: skip
GENERATE = {
    "kind": "generate", "name": "a", "seed": 0,
    "teacher": {"server": {"url": "http://127.0.0.1:1", "model": "m", "concurrency": 2}, "tokenizer": "t"},
    "task": {"task": "chain_of_thought", "questions": {"path": "q.jsonl", "answer": "a"}, "template": "step_by_step"},
    "sampling": {"samples": 4, "sampling_temperature": 0.7, "max_new_tokens": 16, "stop": ["\n\n"]},
    "filter": {"min_characters": 3}, "programs": {"cpu_seconds": 5}, "held_out": 0.1, "output": "out",
}  # fmt: skip
EMBEDDING = {
    "kind": "embedding", "name": "a", "focus": "balanced", "teacher": {"vectors": "v.npy"},
    "student": {"head": "mlp", "dimensions": 25, "prefixes": {5: 0.7, 25: 0.3}},
    "data": {"train": {"path": "t.csv", "fields": ["a", "b"], "score": "s"}},
    "train": {"epochs": 5, "temperature": {"schedule": "linear", "start": 4.0, "end": 0.5, "stages": 5}},
    "evaluate": {"front": True}, "output": "out",
}  # fmt: skip
YAML = (
    b"&a [*a, *a]", b"<<: *a", b"!!python/object/apply:os.system [id]", b"!!timestamp x", b"!!bool x", b"2001-99-99",
    b"1" * 5000, b"[" * 400, b"\t", b"\xef\xbb\xbf", b"\xff\xfe", b"\x1b[2J", b"---\n", b"!!binary x", b"0x", b"1:2:99",
    b"{", b"? [",
)  # fmt: skip


def _recipe(folder: Path, rng: random.Random) -> Callable[[], Any]:
    kind, path = rng.choice(("run", "generate", "embedding", "sweep")), folder / "recipe.yaml"
    base = {"run": RUN, "sweep": RUN, "generate": GENERATE, "embedding": EMBEDDING}[kind]
    by_text = rng.random() < 0.3
    values = base if by_text else mutated(base, rng)
    try:
        text = yaml.safe_dump(values).encode("utf-8", "surrogatepass")
    except RecursionError:  # YAML's writer does not reach as deep as its readers
        text = json.dumps(values).encode()
    path.write_bytes(mutated_bytes(text, rng, YAML) if by_text else text)
    axes = (
        mutated(["objective.0.temperature=1,2", "student.design.hidden_size=8,16"], rng) if rng.random() < 0.5 else []
    )
    documents: dict[str, Any] = {"generate": GenerateRecipe, "embedding": EmbeddingRecipe, "run": Recipe}

    def load() -> None:
        if kind == "sweep":
            texts = [str(axis) for axis in axes] if isinstance(axes, list) and by_text else ["seed=1,2"]
            grid(apply(read(path), (), str(path)), read_axes(texts), folder / "sweep", str(path))
            return
        if kind != "generate":
            kind_of(path)
        documents[kind].load(path, ["train.max_steps=5"] if rng.random() < 0.2 else ())

    return load


def recipes(drill: Drill) -> None:
    """10,000 recipes of runs, sweeps, generation and embedding: each is parsed or refused."""
    try_all(drill, 10_000, _recipe)


# Rows of data

IDS = [5, 6, 7, 8]
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
CALL = {"type": "function", "id": "1", "function": {"name": "add", "arguments": {"a": 1}}}
CHAT = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": [{"type": "text", "text": "1 + 1?"}]},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "2", "name": "add"},
    {"role": "assistant", "content": "It is 2.", "reasoning_content": "easy", "weight": 1},
]
# A row of each kind, the source that reads it, and the task.
ROWS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "text": ({"text": "def f(a, b): return a"}, {}, "causal"),
    "answer": ({"prompt": "1 + 1 =", "completion": " 2", "weight": 0.5}, {"weight": "weight"}, "causal"),
    "chat": ({"messages": CHAT, "tools": [TOOL], "chat_template_kwargs": {"name": "x"}}, {}, "causal"),
    "sharegpt": ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}, {}, "causal"),
    "ids": ({"input_ids": IDS, "labels": IDS, "attention_mask": [1] * 4}, {}, "causal"),
    "label": ({"text": "def f(x): return x", "label": "a", "text_pair": "b"}, {"label": "label"}, "classification"),
    "number": ({"text": "def f(x): return x", "label": 0.5}, {"label": "label"}, "regression"),
    "pairs": ({"a": "one", "b": "two", "s": 0.5}, {}, "embedding"),
}
JSON = (
    *(b"\xef\xbb\xbf", b"\xff\xfe", b"\x00", b'"\\ud800"', b"1" * 5000, b"[" * 3000, b'{"a":' * 3000, b"NaN", b"\n"),
    *(b"\r", b",", b'"', b"1e999", b"{}", b"null", b"\xed\xa0\x80", b"\x1b[2J", b"/*", b"'"),
)
ROWS_IN_FILE = 10


def _data_file(path: Path, rows: list[Any], rng: random.Random) -> Path:
    """Write rows as JSON Lines, a JSON list, CSV or Parquet, whichever can hold them; bytes of some are changed."""
    form = rng.choice(("jsonl", "jsonl", "json", "csv", "parquet", "jsonl.gz"))
    names = [*dict.fromkeys(key for row in rows if isinstance(row, dict) for key in row)]
    cells = {name: [row.get(name) if isinstance(row, dict) else None for row in rows] for name in names}
    if form == "parquet":
        try:
            parquet.write_table(pa.table({str(name): values for name, values in cells.items()}), path)
        except (pa.ArrowException, ValueError, TypeError, OverflowError, RecursionError):
            form = "jsonl"
    if form == "csv":
        with path.open("w", encoding="utf-8", errors="surrogatepass", newline="") as file:
            csv.writer(file).writerows([names, *zip(*cells.values(), strict=True)])
    elif form != "parquet":
        lines = [json.dumps(row, ensure_ascii=rng.random() < 0.5) for row in rows]
        content = ("[" + ",".join(lines) + "]" if form == "json" else "\n".join(lines)).encode("utf-8", "surrogatepass")
        path.write_bytes(gzip.compress(content) if form == "jsonl.gz" else content)
    if rng.random() < 0.3:
        path.write_bytes(mutated_bytes(path.read_bytes(), rng, () if form in ("parquet", "jsonl.gz") else JSON))
    return path.rename(path.with_suffix(f".{form}"))


def _rows(tokenizer: Any) -> Callable[[Path, random.Random], Callable[[], Any]]:
    def prepare(folder: Path, rng: random.Random) -> Callable[[], Any]:
        row, source, task = ROWS[rng.choice([*ROWS])]
        changed = rng.sample(range(ROWS_IN_FILE), rng.choice((0, 1, 1, 2, ROWS_IN_FILE)))
        rows = [mutated(row, rng) if i in changed else row for i in range(ROWS_IN_FILE)]
        path = _data_file(folder / "rows", rows, rng)
        datasets.config.HF_DATASETS_CACHE = folder / "cache"
        if task == "embedding":
            part = {"path": str(path), "fields": ["a", "b"], "score": "s"}
            recipe = EmbeddingRecipe.parse(copy.deepcopy(EMBEDDING) | {"data": {"train": part}})
            return lambda: read_texts(recipe)
        options: Any = {"task": task, "classes": {"a": 0, "b": 1} if task == "classification" else None}
        return lambda: encode(Source(path, **source), tokenizer, max_length=64, **options)

    return prepare


def rows(drill: Drill) -> None:
    """100,000 rows of every kind, in 10,000 files: each file is encoded, or refused with the row that is wrong."""
    try_all(drill, 100_000 // ROWS_IN_FILE, _rows(_tokenizer()))


def _tokenizer() -> Any:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


# Chat templates

TEMPLATE = """{%- macro call(c) -%}
<call>{{ c.function.name }}({{ c.function.arguments | tojson }})</call>{%- endmacro -%}
{%- set ns = namespace(first=true) -%}
{%- if tools %}tools: {% for tool in tools %}{{ tool | tojson }}{% endfor %}<end>{% endif -%}
{%- for message in messages -%}
{%- if message.role == 'system' and not loop.first %}{{ raise_exception('system is not first') }}{% endif -%}
{{ '<' + message.role + '>' }}{% if message.content is string %}{{ message.content | trim }}{% endif -%}
{%- for c in message.tool_calls or [] %}{{ call(c) }}{% endfor -%}{{ '<end>' }}{%- set ns.first = false -%}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<assistant>' }}{% endif -%}
"""
JINJA = tuple(
    text.encode()
    for text in (
        *("{% for i in range(10**9) %}x{% endfor %}", "{{ 'a' * 10**11 }}", "{{ [0] * 10**10 }}", "{% break %}", "{{ "),
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        *("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "{{ ''.__class__.__mro__ }}", "{{ lipsum(n=10**7) }}"),
        *(
            "{{ cycler.__init__.__globals__.os.system('id') }}",
            "{{ messages.__class__ }}",
            "{% include '/etc/passwd' %}",
        ),
        *("{% import 'os' as os %}", "{{ '%99999999999d' % 1 }}", "{{ 'a' | center(10**11) }}", "{{ self.__init__ }}"),
        "{% set ns2 = namespace(x='ab') %}{% for i in range(99) %}{% set ns2.x = ns2.x ~ ns2.x %}{% endfor %}",
        *("{{ messages | map(attribute='__class__') | list }}", "{{ namespace.__init__ }}", "{{ 1 / 0 }}", "|", "{#"),
        *("{% generation %}", "{% endgeneration %}", "{{ strftime_now('%' * 10) }}", "{{ messages[99].role }}", "{% "),
        *(
            "{{ raise_exception(messages) }}",
            "{% for i in [1] %}" * 25,
            "{{ " + "(" * 300,
            "%}",
            "\x1b[2J",
            "{% raw %}",
        ),
        *("{% do messages.append(1) %}", "{{ messages.clear() }}", "{{ none.x.y }}", "{{ 10 ** 10 ** 8 }}"),
    )
)


def _template(folder: Path, rng: random.Random) -> Callable[[], Any]:
    tokenizer, path, data = _tokenizer(), folder / "template.jinja", folder / "rows.jsonl"
    path.write_bytes(mutated_bytes(TEMPLATE.encode(), rng, JINJA))
    data.write_text("".join(json.dumps({"messages": CHAT, "tools": [TOOL]}) + "\n" for _ in range(2)))
    datasets.config.HF_DATASETS_CACHE = folder / "cache"
    arguments = {"first": 1} if rng.random() < 0.2 else None

    def read() -> None:
        set_chat_template(tokenizer, path, arguments)
        encode(Source(data), tokenizer, max_length=200)

    return read


def templates(drill: Drill) -> None:
    """1,000 chat templates: each renders a conversation, or is refused."""
    try_all(drill, 1000, _template)


# Weights and tokenizers

LENGTHS = (0, 1, 2**31, 2**32, 2**62, 2**63 - 1, 2**64 - 1, 10**12)


def _safetensors(content: bytes, rng: random.Random) -> bytes:
    """A file whose header names other shapes, offsets or types, or is as long as it is not."""
    size = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + size]), content[8 + size :]
    if rng.random() < 0.3:
        name = rng.choice([name for name in header if name != "__metadata__"])
        entry = header[name]
        entry["shape"] = rng.choice([[10**12], [2**62, 4], [-1], [], [1, *entry["shape"]], entry["shape"][::-1]])
        entry["data_offsets"] = rng.choice([entry["data_offsets"], [0, 10**15], [0, 0], [8, 4], [2**63, 2**64 - 1]])
    else:
        header = mutated(header, rng)
    text = json.dumps(header).encode()
    length = rng.choice((*LENGTHS, len(text) + 1)) if rng.random() < 0.2 else len(text)
    return length.to_bytes(8, "little") + text + data


def _gguf(content: bytes, rng: random.Random) -> bytes:
    """A file with numbers of its header, such as lengths and shapes, in place of others."""
    changed = bytearray(content)
    for _ in range(rng.randint(1, 3)):
        place = rng.choice((8, 16, rng.randrange(24, min(len(content), 8000) - 8)))
        changed[place : place + 8] = rng.choice(LENGTHS).to_bytes(8, "little")
    return bytes(changed)


def _json_file(content: bytes, rng: random.Random) -> bytes:
    return json.dumps(mutated(json.loads(content), rng)).encode()


def weights(drill: Drill) -> None:
    """1,000 models whose weights, header or config are changed: each is loaded or refused."""
    model, sound = make_llama(), drill.folder / "sound"
    model.save_pretrained(sound)
    _tokenizer().save_pretrained(sound)
    write_gguf(model, _tokenizer(), sound / "model.gguf", "f16")
    changes = {"model.safetensors": _safetensors, "model.gguf": _gguf, "config.json": _json_file}

    def prepare(folder: Path, rng: random.Random) -> Callable[[], Any]:
        name = rng.choice([*changes])
        content = (sound / name).read_bytes()
        changed = mutated_bytes(content, rng) if rng.random() < 0.2 else changes[name](content, rng)
        if name == "model.gguf":
            (folder / name).write_bytes(changed)
            return lambda: load_model(str(folder / name), "teacher.model")
        shutil.copytree(sound, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.gguf"))
        (folder / name).write_bytes(changed)
        return lambda: load_model(str(folder), "teacher.model")

    try_all(drill, 1000, prepare)


def tokenizers(drill: Drill) -> None:
    """1,000 tokenizers with other vocabularies, merges and settings: each encodes and decodes, or is refused."""
    sound = drill.folder / "sound"
    _tokenizer().save_pretrained(sound)

    def prepare(folder: Path, rng: random.Random) -> Callable[[], Any]:
        shutil.copytree(sound, folder, dirs_exist_ok=True)
        path = folder / rng.choice(("tokenizer.json", "tokenizer.json", "tokenizer_config.json"))
        content = json.loads(path.read_bytes())
        if path.name == "tokenizer.json" and rng.random() < 0.5:
            part = rng.choice(("vocab", "merges"))
            content["model"][part] = mutated(content["model"][part], rng)
            if part == "vocab" and isinstance(content["model"][part], dict):
                content["model"][part] |= {f"odd{i}": rng.choice((*LENGTHS, -1, 5)) for i in range(rng.randrange(3))}
        else:
            content = mutated(content, rng)
        path.write_text(json.dumps(content))
        data = folder / "rows.jsonl"
        data.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("def f(a):", "é\U0001f600", "<end>")))
        datasets.config.HF_DATASETS_CACHE = folder / "cache"
        return lambda: encode(Source(data), load_tokenizer(str(folder), "teacher.model"), max_length=64)

    try_all(drill, 1000, prepare)


# Answers of servers


def answers(drill: Drill) -> None:
    """1,000 answers of a server, cut, of other types, with huge numbers or other ids: each is read or refused."""
    client.FIRST_WAIT_S = 0.001
    toy = ToyServer(make_llama(), tokenizer := _tokenizer())
    prompt, sampling = [5, 6, 7, 8, 9], Sampling(max_new_tokens=4, samples=2)

    def prepare(folder: Path, rng: random.Random) -> Callable[[], Any]:
        def change(answer: Any) -> Any:
            if rng.random() < 0.7:
                return json.dumps(mutated(answer, rng)).encode()  # NaN and Infinity as Python writes them
            return mutated_bytes(json.dumps(answer).encode(), rng, JSON)

        served = ModelServer(toy.url, "toy", timeout_s=2.0, attempts=2)

        def ask() -> None:
            toy.change = change
            if rng.random() < 0.5:
                for completion in served.complete([prompt], sampling)[0]:
                    json.dumps(completion.text)
                    tokenizer.decode(completion.ids)
                return
            teacher = ServedTeacher(served, tokenizer, top_k=3)
            ids = torch.tensor([prompt])
            batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            targets = teacher(batch, causal_alignment(ids)).targets
            assert isinstance(targets, SparseTargets)
            assert not targets.events(1.0).isnan().any()

        return ask

    try:
        try_all(drill, 1000, prepare)
    finally:
        toy.close()


PARTS = {
    "fuzz-recipes": recipes,
    "fuzz-rows": rows,
    "fuzz-templates": templates,
    "fuzz-weights": weights,
    "fuzz-tokenizers": tokenizers,
    "fuzz-answers": answers,
}
