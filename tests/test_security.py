"""What strangers' recipes, models and data may not do; docs/security.md names these tests."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import shutil
import sys
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import yaml
from pyarrow import parquet
from safetensors.torch import save_file
from typer.testing import CliRunner

from conftest import make_llama, make_tokenizer
from local_http import QuietHandler, serving
from potstill import cli
from potstill.cli import app
from potstill.data import readers
from potstill.data.batches import encode
from potstill.data.sources import Source
from potstill.embedding.vectors import open_vectors
from potstill.engines import client
from potstill.engines.client import JsonClient
from potstill.engines.server import ModelServer
from potstill.errors import DataError, ModelError, RecipeError, RefusedError, ServerError, printable, shortened
from potstill.models import template_limit
from potstill.models.chat import render_chat
from potstill.models.loading import load_config, load_model, load_tokenizer
from potstill.runs.config.document import MOST_CHARACTERS, load_yaml
from potstill.runs.config.run import Recipe
from potstill.runs.run import run
from potstill.runs.terminal import Terminal
from potstill.teachers.cache.store import manifest_text, read_manifest

BIDI_CONTROLS = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
ESCAPE = "\x1b]0;title\x07\x1b[2J\x9b1m\u202e"


class Touch:
    """A pickle that makes a file where it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


# Recipes


def fails(arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """What the command prints when it is called as a user does."""
    monkeypatch.setattr(sys, "argv", ["potstill", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    printed = capsys.readouterr()
    assert "Traceback" not in printed.err + printed.out
    return printed.err


@pytest.mark.parametrize(
    "text",
    [
        "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n"
        + "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 10)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)),
        "a: &a [*a]",
        "a: &a {x: 1, y: 2}\n"
        + "".join(
            f"b{i}: &b{i} {{<<: [{', '.join([f'*{a}'] * 40)}]}}\n" for i, a in enumerate(["a", "b0", "b1", "b2", "b3"])
        ),
        "[" * 5000,
        "!!python/object/apply:os.system [id]",
        "x: 2001-99-99",
        "x: !!timestamp y",
        "x: !!bool y",
        f"x: {'1' * 5000}",
        "{a: 1}: 1",
    ],
    ids=["aliases", "recursion", "merges", "depth", "objects", "dates", "timestamps", "truth", "digits", "keys"],
)
def test_yaml_that_is_no_recipe_is_refused_in_a_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(RecipeError, match=r"r\.yaml: expected YAML, got: ") as caught:
        Recipe.load(tmp_path / "r.yaml")
    assert "\n" not in str(caught.value)


def test_an_alias_is_what_it_stands_for() -> None:
    assert load_yaml("a: &a {x: 1}\nb: [*a, *a]") == {"a": {"x": 1}, "b": [{"x": 1}] * 2}


def test_endless_files_are_no_recipes(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").symlink_to("/dev/zero")
    with pytest.raises(RecipeError, match=f"at most {MOST_CHARACTERS} characters"):
        Recipe.load(tmp_path / "r.yaml")


def test_a_recipe_runs_no_code_and_keeps_no_token(recipe_values: dict[str, Any]) -> None:
    recipe_values["teacher"]["trust_remote_code"] = True
    recipe_values["train"] |= {"hub_token": "hf_x", 1: 2, None: 3}
    with pytest.raises(RecipeError) as caught:
        Recipe.parse(recipe_values)
    message = str(caught.value)
    assert "teacher.trust_remote_code: unknown key" in message
    assert "train.hub_token: expected it not to be set here" in message
    assert "train.1: unknown key. Keys are text." in message
    assert "hf_x" not in message


def test_messages_have_no_escapes_and_an_end(
    recipe_values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe_values |= {f"odd{ESCAPE}": 1, "seed": "x" * 20_000, "name": ESCAPE, "[bold]": 1}
    recipe_values["teacher"] = {"model": ESCAPE, "server": ESCAPE}
    (tmp_path / "r.yaml").write_text(json.dumps(recipe_values))
    printed = fails(["run", str(tmp_path / "r.yaml")], monkeypatch, capsys)
    assert not {"\x1b", "\x07", "\x9b", "\u202e"} & {*printed}
    assert "odd\\x1b]0;title" in printed
    assert "[bold]: unknown key" in printed
    assert len(printed) < 6000
    assert "mistakes" in printed


def test_long_messages_keep_their_ends() -> None:
    lines = shortened("a" * 5000 + " Do this.\n" + "b\n" * 100).splitlines()
    assert len(lines[0]) <= 1000
    assert lines[0].endswith("Do this.")
    assert lines[-1] == "  ... and 51 more lines"
    assert printable("é\n\t\x1b\x9b\ud800\u202e") == "é\n\t\\x1b\\x9b\\ud800\\u202e"


def test_nothing_that_is_printed_is_reordered() -> None:
    reordering = [chr(c) for c in range(sys.maxunicode) if unicodedata.bidirectional(chr(c)) in BIDI_CONTROLS]
    marks = ["\u061c", "\u200e", "\u200f"]
    assert len(reordering) == 9
    for character in [*reordering, *marks]:
        assert printable(f"runs/1{character}/2") == f"runs/1\\u{ord(character):04x}/2"
    kept = "שלום می\u200cخواهم \U0001f469\u200d\U0001f52c"  # joiners reorder nothing
    assert printable(kept) == kept


def test_nothing_that_is_printed_moves_the_cursor(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.table import Table

    table = Table(title=ESCAPE)
    table.add_column(f"[link=http://x]{ESCAPE}")
    table.add_row(f"[/x]{ESCAPE}")
    Terminal(width=200).print(table, f"[red]{ESCAPE} :warning:")
    printed = capsys.readouterr().out
    assert not {"\x1b", "\x07", "\x9b", "\u202e"} & {*printed}
    assert "[link=http://x]" in printed
    assert "[/x]" in printed
    assert ":warning:" in printed


# Models


@pytest.fixture
def model(tmp_path: Path) -> Path:
    make_llama().save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "adapter_model.bin", "model.safetensors", "model.pt"])
def test_no_pickle_is_loaded(name: str, model: Path, tmp_path: Path) -> None:
    (model / "model.safetensors").unlink()
    if name.startswith("adapter"):
        (model / "adapter_config.json").write_text(
            json.dumps(
                {"peft_type": "LORA", "base_model_name_or_path": str(model), "r": 1, "target_modules": ["q_proj"]}
            )
        )
    (model / name).write_bytes(pickle.dumps(Touch(tmp_path / "ran")))
    with pytest.raises(ModelError):
        load_model(str(model), "teacher.model")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("save", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))])
def test_no_pickled_vectors_are_loaded(save: Callable[..., Any], tmp_path: Path) -> None:
    save(Touch(tmp_path / "ran"), tmp_path / "v.pt")
    with pytest.raises(DataError, match="without running code"):
        open_vectors(tmp_path / "v.pt")
    assert not (tmp_path / "ran").exists()


@pytest.mark.filterwarnings("ignore")
def test_code_beside_a_model_is_not_run(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = f"from pathlib import Path\nPath({str(tmp_path / 'ran')!r}).touch()\n"
    (model / "evil.py").write_text(f"{code}class Evil: pass\n")
    names = {f"Auto{kind}": "evil.Evil" for kind in ("Config", "Model", "ModelForCausalLM")}
    change(model / "config.json", auto_map=names, model_type="evil", architectures=["Evil"])
    change(
        model / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Evil", "evil.Evil"]}, tokenizer_class="Evil"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))  # as with `python -m potstill`
    for load in (load_config, load_model):
        with pytest.raises(ModelError, match="needs code of its own, which is not run"):
            load(str(model), "teacher.model")
    with suppress(ModelError):
        load_tokenizer(str(model), "teacher.model")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("where", ["module", "activation"])
def test_code_beside_an_embedder_is_not_run(
    where: str, embedder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from potstill.embedding.encoders import load_embedder

    folder = tmp_path / "model"
    shutil.copytree(embedder, folder)
    (folder / "evil.py").write_text(
        f"from pathlib import Path\nPath({str(tmp_path / 'ran')!r}).touch()\nclass Evil: pass\n"
    )
    modules = json.loads((folder / "modules.json").read_text())
    if where == "module":
        modules[1]["type"] = "model.evil.Evil"
    else:
        modules.append({"idx": 2, "name": "2", "path": "2_Dense", "type": "sentence_transformers.models.Dense"})
        (folder / "2_Dense").mkdir()
        (folder / "2_Dense" / "config.json").write_text(
            json.dumps({"in_features": 16, "out_features": 2, "bias": True, "activation_function": "model.evil.Evil"})
        )
    (folder / "modules.json").write_text(json.dumps(modules))
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ModelError, match=r"got model\.evil\.Evil\. Code that comes with a model is not run"):
        load_embedder(str(folder), "teacher.embedder")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "a/../../outside.safetensors"])
def test_an_index_names_no_files_elsewhere(name: str, model: Path, tmp_path: Path) -> None:
    weights = make_llama().state_dict()
    save_file(
        {key: value.clone() for key, value in weights.items()}, tmp_path / "outside.safetensors", {"format": "pt"}
    )
    (model / "model.safetensors").unlink()
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(weights, name)}))
    with pytest.raises(ModelError, match=r"expected the files of weights in .*, got .* in model\.safetensors\.index"):
        load_model(str(model), "teacher.model")


@pytest.mark.parametrize("values", [{"architectures": [1]}, {"model_type": ["llama"]}, {"model_type": {}}])
def test_configs_of_other_types_are_refused_in_a_line(values: dict[str, Any], model: Path) -> None:
    change(model / "config.json", **values)
    with pytest.raises(ModelError, match=r"expected a model's config\.json") as caught:
        load_model(str(model), "teacher.model")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("identifier", [2**31, 2**32 - 1])
def test_a_tokenizer_with_ids_that_fill_the_memory_is_refused(identifier: int, model: Path) -> None:
    content = json.loads((model / "tokenizer.json").read_text())
    content["model"]["vocab"]["odd"] = identifier
    (model / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ModelError, match=f"it has the token id {identifier}"):
        load_tokenizer(str(model), "teacher.model")


def test_a_tokenizer_that_cannot_be_used_is_refused(model: Path) -> None:
    change(model / "tokenizer_config.json", model_max_length={"a": 1})
    with pytest.raises(ModelError, match="expected a tokenizer"):
        load_tokenizer(str(model), "teacher.model")


def test_a_tokenizer_of_which_rust_despairs_is_refused(model: Path) -> None:
    content = json.loads((model / "tokenizer.json").read_text())
    content["model"]["continuing_subword_prefix"] = "x" * 16
    (model / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ModelError, match="expected a tokenizer"):
        load_tokenizer(str(model), "teacher.model")


def test_settings_that_are_nested_too_deeply_are_refused(model: Path, tmp_path: Path) -> None:
    nested: Any = []
    for _ in range(300):
        nested = [nested]
    change(model / "tokenizer_config.json", odd=nested)
    (tmp_path / "d.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(DataError, match="nested too deeply"):
        encode(Source(tmp_path / "d.jsonl"), load_tokenizer(str(model), "teacher.model"), max_length=16)


def test_a_wrong_header_of_weights_is_refused(model: Path) -> None:
    content = (model / "model.safetensors").read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    name = next(name for name in header if name != "__metadata__")
    for entry in ({"shape": [10**12]}, {"data_offsets": [0, 10**15]}, {"dtype": "F1"}, {"shape": [-1]}):
        changed = json.dumps(header | {name: header[name] | entry}).encode()
        (model / "model.safetensors").write_bytes(len(changed).to_bytes(8, "little") + changed + content[8 + size :])
        with pytest.raises(ModelError, match="damaged"):
            load_model(str(model), "teacher.model")
    for length in (2**63, 10**12, 0):
        (model / "model.safetensors").write_bytes(length.to_bytes(8, "little") + content[8:])
        with pytest.raises(ModelError, match="damaged"):
            load_model(str(model), "teacher.model")


TALK = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
TEMPLATES = {
    "range": "{% for i in range(10**9) %}{% endfor %}",
    "recursion": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "blocks": "{% for i in [1] %}" * 30 + "{% endfor %}" * 30,
    "division": "{{ 1 / 0 }}",
    "globals": "{{ cycler.__init__.__globals__.os.system('id') }}",
    "classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "files": "{% include '/etc/passwd' %}",
    "format": "{{ '{0.__class__.__mro__}'.format(messages)[0] }}{{ raise_exception('safe') }}",
    "namespace": "{% set n = namespace() %}{% set n.__class__ = 1 %}",
    "changes": "{{ messages.clear() }}",
}


@pytest.mark.parametrize("template", TEMPLATES)
def test_no_template_leaves_the_sandbox(template: str) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATES[template]
    with pytest.raises(DataError, match="expected messages that the chat template takes") as caught:
        render_chat(tokenizer, TALK, "row 1")
    assert "root:" not in str(caught.value)


ENDLESS = {
    "loops": ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "seconds"),
    "words": ("{{ lipsum(n=10**9) }}", "seconds"),
    "text": ("{{ 'a' * 10**13 }}", "MiB"),
    "list": ("{{ [0] * 10**12 }}", "MiB"),
    "padding": ("{{ '%9999999999999d' % 1 }}", "MiB"),
    "doubling": ("{% set n = namespace(x='ab') %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}", "MiB"),
}


@pytest.mark.skipif(sys.platform != "linux", reason="the limits are those of Linux")
@pytest.mark.parametrize("template", ENDLESS)
def test_templates_end(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import resource

    monkeypatch.setattr(template_limit, "SECONDS", 0.2)
    tokenizer, before = make_tokenizer(), resource.getrlimit(resource.RLIMIT_AS)
    tokenizer.chat_template, bound = ENDLESS[template]
    with pytest.raises(DataError, match=f"chat_template: expected a template that renders .* within .* {bound}.*, got"):
        render_chat(tokenizer, TALK, "row 1")
    assert resource.getrlimit(resource.RLIMIT_AS) == before
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    assert render_chat(tokenizer, TALK, "row 1") == "hiyes"


@pytest.mark.skipif(sys.platform != "linux", reason="the limits are those of Linux")
def test_other_threads_have_memory_while_a_template_renders() -> None:
    taken = []
    with template_limit.limited_rendering():
        thread = Thread(target=lambda: taken.append(np.empty(template_limit.MEMORY_BYTES // 2, np.uint8).nbytes))
        thread.start()
        thread.join()
    assert taken == [template_limit.MEMORY_BYTES // 2]


# Data


@pytest.mark.parametrize("suffix", ["jsonl.gz", "csv.gz", "txt.gz", "json.gz", "parquet"])
def test_files_that_decompress_to_far_more_are_refused(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: Any
) -> None:
    monkeypatch.setattr(readers, "MOST_BYTES", 1 << 20)
    path = tmp_path / f"bomb.{suffix}"
    if suffix == "parquet":
        column = pa.DictionaryArray.from_arrays(pa.array([0] * 300_000, pa.int32()), ["a" * 100]).cast(pa.string())
        parquet.write_table(pa.table({"text": column}), path, compression="zstd")
    else:
        content = {
            "jsonl.gz": b'{"text": "a"}\n' * 300_000,
            "csv.gz": b"text\n" + b"a\n" * 2_000_000,
            "txt.gz": b"a" * 4_000_000,
            "json.gz": b'[{"text": "' + b"a" * 4_000_000 + b'"}]',
        }[suffix]
        path.write_bytes(gzip.compress(content))
    with pytest.raises(DataError, match=r"expected at most 200 times the size of bomb\..* when it is decompressed"):
        encode(Source(path), tokenizer, max_length=16)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[" * 100_000, "nested too deeply"),
        ('{"text": ' + "1" * 5000 + "}", "Exceeds the limit"),
        ('{"messages": "' + "[" * 3000 + '"}', "expected a list of messages"),
        ('{"messages": [{"role": "user", "content": "a", "tool_calls": [{"function": [1]}]}]}', "a list of messages"),
        ('{"messages": [{"role": "assistant", "tool_calls": ["a"]}]}', "a list of messages"),
        (
            '{"messages": [{"role": "assistant", "content": null, "tool_calls": [{"function": {}}]}]}',
            "list of messages",
        ),
        ('{"text": "\\ud800"}', "half of a surrogate pair"),
    ],
)
def test_rows_that_cannot_be_read_are_refused_in_a_line(
    line: str, message: str, tmp_path: Path, tokenizer: Any
) -> None:
    (tmp_path / "d.jsonl").write_text(line + "\n")
    with pytest.raises(DataError, match=message) as caught:
        encode(Source(tmp_path / "d.jsonl"), tokenizer, max_length=16)
    assert "\n" not in str(caught.value)


def test_data_is_shown_without_its_escapes(recipe_values: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text(json.dumps({"text": f"def f{ESCAPE}():"}) + "\n")
    recipe_values["data"] |= {"train": {"path": str(tmp_path / "d.jsonl")}, "packing": False}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe_values))
    for options in ([], ["--json"]):
        shown = CliRunner().invoke(app, ["data", "show", str(tmp_path / "r.yaml"), *options])
        assert shown.exit_code == 0, shown.output
        assert not {"\x1b", "\x07", "\x9b", "\u202e"} & {*shown.output}


def test_a_cache_names_no_files_elsewhere(tmp_path: Path) -> None:
    plan = {
        "format": 2, "teacher": "t", "weights": "w", "tokenizer": "t", "vocabulary": 3, "codec": {}, "alignment": "a",
        "sources": [], "shard_rows": 1, "batch_rows": 1, "versions": {}, "layers": None,
    }  # fmt: skip
    for name in ("a.arrow", "../../a.arrow", ".."):
        body = {"plan": plan, "shards": [{"name": name, "rows": 1, "tokens": 1, "sha256": ""}], "files": {}}
        (tmp_path / "manifest.json").write_text(manifest_text(body))
        if name == "a.arrow":
            assert read_manifest(tmp_path).rows == 1
            continue
        with pytest.raises(DataError, match=r"expected manifest\.json .* as it was written"):
            read_manifest(tmp_path)


# Servers


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """An HTTP server whose answer is `server.answer`: a status, headers and bytes."""
    monkeypatch.setattr(client, "FIRST_WAIT_S", 0.001)
    monkeypatch.setenv("NO_PROXY", "*")

    class Handler(QuietHandler):
        def do_POST(self) -> None:  # noqa: N802
            self.server.keys.append(self.headers.get("Authorization"))
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            status, headers, content = self.server.answer
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST  # noqa: N815

    with serving(Handler, keys=[]) as http:
        yield http


def test_a_key_follows_no_redirect(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POTSTILL_API_KEY", "sk-secret")
    server.answer = (302, {"Location": f"{server.url}/elsewhere"}, b"sk-secret")
    with pytest.raises(RefusedError, match="got status 302") as caught:
        JsonClient(server.url).request("GET", "/v1/models")
    assert server.keys == ["Bearer sk-secret"]
    assert "sk-secret" not in str(caught.value)


def test_an_answer_has_an_end(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "MOST_BYTES", 1 << 20)
    server.answer = (200, {"Content-Encoding": "gzip"}, gzip.compress(b" " * (1 << 24)))
    with pytest.raises(ServerError, match="got more than 1048576 bytes"):
        JsonClient(server.url, attempts=2).request("GET", "/v1/models")
    assert len(server.keys) == 2


@pytest.mark.parametrize(
    "choice",
    [
        {"index": 0, "text": ["a"]},
        {"index": 0, "text": "a", "token_ids": [2**70]},
        {"index": 0, "text": "a", "token_ids": [-1]},
        {"index": 0, "text": "a", "token_ids": "12"},
        {"index": 0, "text": "a", "token_ids": [1.5]},
        {"index": float("inf"), "text": "a"},
        {"index": 0, "prompt_logprobs": 1},
    ],
)
def test_answers_of_other_types_are_errors(choice: dict[str, Any], server: Any) -> None:
    from potstill.engines.sampling import Sampling

    server.answer = (200, {}, json.dumps({"choices": [choice]}).encode())
    with pytest.raises(ServerError, match="expected choices with index and text, got something else"):
        ModelServer(server.url, "m").complete([[1]], Sampling())
    server.answer = (200, {}, b"[" * 100_000)
    with pytest.raises(ServerError, match="something that is not JSON"):
        ModelServer(server.url, "m", attempts=1).complete([[1]], Sampling())


@pytest.mark.parametrize(
    "entry",
    [
        {"5": {"logprob": -0.1}, "6": {"logprob": -0.1}},
        {"5": {"logprob": float("nan")}},
        {"5": {"logprob": -1}, "-6": {"logprob": -2}},
        {"5": {"logprob": -1}, str(2**40): {"logprob": -2}},
        {"5": {"logprob": [1]}},
        {"5": {"logprob": -1}, "1" * 5000: {"logprob": -2}},
    ],
)
def test_scores_that_are_none_are_errors(entry: dict[str, Any], server: Any) -> None:
    answer = {"choices": [{"index": 0, "text": "", "prompt_logprobs": [None, entry]}]}
    server.answer = (200, {}, json.dumps(answer).encode())
    with pytest.raises(ServerError, match="expected log-probabilities of the likeliest tokens"):
        ModelServer(server.url, "m").score([[4, 5]], 2)


# Secrets


def test_secrets_of_the_environment_are_in_no_file_and_no_output(
    recipe_values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    secrets = {
        name: f"secret-{i}-of-test" for i, name in enumerate((*client.KEYS, "HF_TOKEN", "AWS_SECRET_ACCESS_KEY"))
    }
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    recipe_values |= {"export": []}
    recipe_values["train"]["max_steps"] = 2
    run(Recipe.parse(recipe_values))
    files = [
        path for path in [*tmp_path.rglob("*"), *Path(os.environ["HF_DATASETS_CACHE"]).rglob("*")] if path.is_file()
    ]
    assert len(files) > 20
    printed = capfd.readouterr()
    contents = [(printed.out + printed.err).encode(), *(path.read_bytes() for path in files)]
    assert not any(value.encode() in content for value in secrets.values() for content in contents)
