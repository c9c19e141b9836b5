"""The shapes in which data sets come: each is read whole, or refused by the name of what would be lost."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest

from hub_server import hub_of
from potstill.data.batches import encode
from potstill.data.loading import load
from potstill.data.locate import locate
from potstill.data.mixture import encode_mixture
from potstill.data.sources import Source
from potstill.runs.config.embedding import TextsPart
from potstill.runs.embedding_sources import _read
from potstill.runs.init.inspection import find_columns
from test_data import PLAIN, WITH_BOS, refused, turn
from toy_encoders import make_bert_tokenizer


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture
def write(tmp_path: Path):
    def writer(rows: list[Any], name: str = "data.jsonl") -> str:
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return str(tmp_path / name)

    return writer


def messages(source: Source) -> list[list[dict[str, Any]]]:
    return [json.loads(text) for text in load(source).dataset["messages"]]


# Keys and columns


def test_keys_are_those_of_all_rows(write):
    rows = [{"input_ids": [5, 6, 7]}, {"input_ids": [8, 9, 10], "labels": [-100, -100, 10], "weights": [0.0, 0.0, 1.0]}]
    encoded = encode(Source(write(rows)), PLAIN, max_length=9).dataset
    assert encoded["labels"][:] == [[5, 6, 7], [-100, -100, 10]]
    assert encoded["weights"][:] == [[1.0, 1.0, 1.0], [0.0, 0.0, 1.0]]
    path = write([{"id": 1}, {"id": 2, "text": "abc"}])
    refused(lambda: load(Source(path)), "column 'text'", "nothing (null) in row 1")
    assert locate(Source(path)).columns == ["id", "text"]


def test_columns_that_are_not_used_are_noted(write):
    path = write([{"text": "a cat", "id": 3, "source": "x"}])
    for _ in range(2):  # also when it is cached
        assert load(Source(path)).notes == ("data.jsonl: columns that are not used: id, source.",)
    assert load(Source(path, ignore=("id",))).notes == ("data.jsonl: columns that are not used: source.",)
    assert encode(Source(path, ignore=["id", "source"]), PLAIN, max_length=9).notes == ()
    refused(lambda: load(Source(path, ignore=("ids",))), "'ids'", "mean id")


PROMPT = {"prompt": "a", "completion": "b"}
TALK = {"messages": [turn("user", "a"), turn("assistant", "b")]}
IDS = {"input_ids": [5, 6, 7]}


@pytest.mark.parametrize(
    ("row", "source", "parts"),
    [
        (PROMPT | {"input": "c"}, {}, ["'input'", "the text 'c' in row 2", "`prompt: [prompt, input]`", "ignore"]),
        (PROMPT | {"context": "c"}, {}, ["`prompt: [prompt, context]`"]),
        (PROMPT | {"system": "c"}, {}, ["'system'", "Name it as system"]),
        (PROMPT | {"history": [["c", "d"]]}, {}, ["'history'", "Name it as history"]),
        (PROMPT | {"tools": [{"name": "f"}]}, {}, ["'tools'", "chat to true"]),
        (PROMPT | {"weights": [1.0]}, {}, ["'weights'", "input_ids"]),
        (PROMPT | {"sample_weight": 0.5}, {}, ["'sample_weight'", "`weight: sample_weight`"]),
        (PROMPT | {"completion_mask": [0, 1]}, {}, ["'completion_mask'", "input_ids"]),
        (PROMPT | {"label": False}, {}, ["'label'", "got false", "a bad completion"]),
        (PROMPT | {"images": ["a.png"]}, {}, ["'images'", "text alone"]),
        (TALK | {"system": "c"}, {"messages": "messages"}, ["'system'", "Name it as system"]),
        (TALK | {"functions": [{"name": "f"}]}, {}, ["'functions'", "tools"]),
        (TALK | {"context": "c"}, {}, ["'context'", "into a message"]),
        (TALK | {"enable_thinking": False}, {}, ["'enable_thinking'", "chat_template_kwargs"]),
        (TALK | {"weight": 2}, {}, ["'weight'", "`weight: weight`"]),
        (TALK | {"tools": "get_weather"}, {}, ["a list of objects", "'tools'", "row 2"]),
        (TALK | {"documents": ["a"]}, {}, ["a list of objects", "'documents'"]),
        (TALK | {"chat_template_kwargs": [1]}, {}, ["an object", "'chat_template_kwargs'"]),
        (IDS | {"position_ids": [0, 1, 0]}, {}, ["0, 1, 2", "'position_ids'", "row 2", "a row of its own"]),
        (IDS | {"token_type_ids": [0, 1, 1]}, {}, ["all 0", "'token_type_ids'", "row 2", "ignore"]),
        *((IDS | {name: [0, 0, 1]}, {}, [f"'{name}'", "labels"]) for name in ("completion_mask", "response_mask")),
        (IDS | {"loss_weights": [0, 0, 1]}, {}, ["'loss_weights'", "from the column weights"]),
        (IDS | {"segment_ids": [1, 1, 2]}, {}, ["'segment_ids'", "row of its own"]),
        (IDS | {"cu_seqlens": [0, 2, 3]}, {}, ["'cu_seqlens'", "row of its own"]),
        (IDS | {"pixel_values": [[0.5]]}, {}, ["'pixel_values'", "text alone"]),
        (IDS | {"seq_lengths": [1, 2]}, {}, ["'seq_lengths'", "row of its own"]),
        (IDS | {"teacher_labels": [5, 6, 7]}, {}, ["'teacher_labels'", "both"]),
    ],
)
def test_columns_that_would_change_what_a_model_reads_are_refused(row, source, parts, write):
    plain = {key: row[key] for key in row if key in (*PROMPT, *TALK, *IDS)}
    refused(lambda: load(Source(write([plain, row]), **source)), *parts)
    (extra,) = set(row) - set(plain)
    loaded = load(Source(write([plain, row]), ignore=(extra,), **source))
    assert loaded.notes == ()
    assert loaded.dataset[0] == loaded.dataset[1]
    empty: dict[str, Any] = {
        "segment_ids": [3, 3, 3],
        "label": None,
        "input": "",
        "tools": [],
        "documents": None,
        "position_ids": [0, 1, 2],
        "token_type_ids": [0, 0, 0],
    }
    if extra in empty:
        assert len(load(Source(write([plain, plain | {extra: empty[extra]}]), **source)).dataset) == 2


def test_both_texts_of_a_pair_are_read(write):
    path = write([{"premise": "a", "hypothesis": "b", "label": 0}])
    refused(lambda: load(Source(path, field="premise"), "classification"), "hypothesis", "`pair: hypothesis`")
    paired = load(Source(path, field="premise", pair="hypothesis"), "classification").dataset
    assert paired[0] == {"text": "a", "label": "0", "text_pair": "b"}
    queries = write([{"query": "a", "passage": "b", "label": 0}], "queries.jsonl")
    refused(lambda: load(Source(queries, field="query"), "classification"), "`pair: passage`")
    alone = load(Source(path, field="premise", ignore=("hypothesis",)), "classification").dataset
    assert alone[0] == {"text": "a", "label": "0"}


def test_rows_without_labels(write):
    path = write([{"text": "a cat", "text_pair": "a dog"}, {"text": "b", "text_pair": "c"}])
    refused(lambda: load(Source(path), "classification"), "'label'")
    for task, zero in (("classification", 0), ("regression", 0.0)):
        examples = encode(Source(path, label=False), make_bert_tokenizer(), max_length=9, task=task, classes={"x": 0})
        assert examples.dataset["labels"][:] == [zero, zero]
        assert examples.tokens == 2


# Conversations


def test_columns_of_conversations(write):
    tool = {"type": "function", "function": {"name": "sun", "parameters": {}}}
    kwargs = {"enable_thinking": False}
    rows = [
        TALK,
        TALK | {"tools": [tool], "documents": [{"title": "t", "text": "d"}], "chat_template_kwargs": kwargs},
        TALK | {"tools": json.dumps([tool["function"]]), "documents": "", "chat_template_kwargs": json.dumps(kwargs)},
        TALK | {"tools": [], "documents": [], "chat_template_kwargs": {}},
    ]
    columns = load(Source(write(rows))).dataset.to_dict()
    assert [text and json.loads(text) for text in columns["tools"]] == [None, [tool], [tool], None]
    assert columns["documents"] == [None, '[{"title": "t", "text": "d"}]', None, None]
    assert [text and json.loads(text) for text in columns["chat_template_kwargs"]] == [None, kwargs, kwargs, None]


def test_sharegpt(write, tmp_path):
    call = {"name": "sun", "arguments": {"city": "Oslo"}}
    talk = [
        {"from": "system", "value": "be kind"},
        {"from": "human", "value": "sun?"},
        {"from": "function_call", "value": json.dumps(call)},
        {"from": "observation", "value": "yes"},
        {"from": "gpt", "value": "It is.", "weight": 0},
    ]
    expected = [
        turn("system", "be kind"),
        turn("user", "sun?"),
        {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]},
        turn("tool", "yes"),
        {**turn("assistant", "It is."), "weight": 0},
    ]
    path = write([{"id": "x", "conversations": talk}])
    assert messages(Source(path)) == messages(Source(path, messages="conversations")) == [expected]
    pyarrow.parquet.write_table(pa.Table.from_pylist([{"conversations": talk}]), tmp_path / "data.parquet")
    assert messages(Source(tmp_path / "data.parquet")) == [expected]
    assert messages(Source(write([{"conversation": [{"role": "human", "content": "a"}]}]))) == [[turn("user", "a")]]
    for wrong in ({"from": "wizard", "value": "a"}, {"from": "gpt"}, {"from": "function_call", "value": "no JSON"}):
        refused(lambda wrong=wrong: load(Source(write([{"conversations": [wrong]}]))), "from and value", "row 1")


def test_senders_and_calls_in_other_words(write):
    call = {"name": "f", "arguments": {"a": 1}}
    calls = [{"type": "function", "function": call}]
    rows = [
        [turn("User", "a"), turn("AI", "b")],
        [turn("human", "a"), turn("function_call", json.dumps(call)), turn("ai", "b")],
        [turn("user", "a"), turn("assistant", "") | {"function_call": call}, turn("assistant", "b")],
    ]
    first, second, third = messages(Source(write([{"messages": row} for row in rows])))
    assert first == [turn("user", "a"), turn("assistant", "b")]
    assert second == third == [turn("user", "a"), turn("assistant", "") | {"tool_calls": calls}, turn("assistant", "b")]


def test_keys_and_ends_of_turns_that_a_template_does_not_expect_are_noted(write):
    talk = [turn("user", "a") | {"name": "Bob", "id": ""}, turn("assistant", "b")]
    path = write([{"messages": talk}, {"messages": [turn("user", "x<eos>y"), turn("assistant", "b")]}])
    unread, ends = encode(Source(path), PLAIN, max_length=50).notes
    assert (
        unread
        == "data.jsonl: keys of messages that the chat template does not read: name (first in row 1 of data.jsonl)."
    )
    assert "in 1 conversation a message has the end of a turn in its text (first <eos> in row 2" in ends


def test_system_prompts_in_a_column(write):
    rows = [{"system": system, "conversations": TALK["messages"]} for system in ("be kind", "", None)]
    assert messages(Source(write(rows))) == [[turn("system", "be kind"), *TALK["messages"]], *[TALK["messages"]] * 2]
    twice = {"system": "be kind", "messages": [turn("system", "be rude"), *TALK["messages"]]}
    refused(lambda: load(Source(write([twice]))), "no system prompt beside that of the messages", "row 1")


def test_conversational_prompts_and_completions(write):
    before = [turn("user", "a"), turn("assistant", "b"), turn("user", "c")]
    after = [turn("assistant", "d"), turn("user", "e"), turn("assistant", "f")]
    loaded = load(Source(write([{"prompt": before, "completion": after}, {"prompt": before, "completion": "d"}])))
    assert loaded.kind == "messages"
    assert [json.loads(text) for text in loaded.dataset["messages"]] == [
        before + after,
        [*before, turn("assistant", "d")],
    ]
    assert loaded.dataset["num_prompt_messages"][:] == [3, 3]
    refused(lambda: load(Source(write([PROMPT, {"prompt": before, "completion": after}]))), "text", "'prompt'", "row 2")
    refused(lambda: load(Source(write([{"prompt": before, "completion": 3}]))), "text in column 'completion'", "row 1")


ALPACA = [
    {"instruction": "Say it in French.", "input": "cats", "output": "chats"},
    {"instruction": "Say hi.", "input": "", "output": "hi", "system": "Be kind.", "history": [["a", "b"]]},
]


def test_alpaca_as_messages(write):
    loaded = load(Source(write(ALPACA)))
    assert [json.loads(text) for text in loaded.dataset["messages"]] == [
        [turn("user", "Say it in French.\n\ncats"), turn("assistant", "chats")],
        [
            turn("system", "Be kind."),
            *(turn("user", "a"), turn("assistant", "b")),
            *(turn("user", "Say hi."), turn("assistant", "hi")),
        ],
    ]
    assert loaded.dataset["num_prompt_messages"][:] == [1, 4]
    shown = "data.jsonl: instruction and input and the answer are read as messages of the user and the assistant."
    assert loaded.notes == (shown,)
    keys: dict[str, Any] = {"prompt": ["instruction", "input"], "completion": "output"}
    explicit = Source(write(ALPACA), **keys, system="system", history="history", chat=True)
    assert load(explicit).dataset[:] == loaded.dataset[:]


def test_alpaca_as_plain_text(write):
    examples = encode(Source(write(ALPACA)), WITH_BOS, max_length=99)
    texts = [WITH_BOS.decode(row) for row in examples.dataset["input_ids"]]
    assert texts == [
        "<bos>Say it in French.\n\ncats\n\nchats<eos>",
        "<bos>Be kind.\n\na\n\nb\n\nSay hi.\n\nhi<eos>",
    ]
    assert [sum(label != -100 for label in row) for row in examples.dataset["labels"]] == [
        len(WITH_BOS(text, add_special_tokens=False)["input_ids"]) + 1 for text in ("chats", "hi")
    ]
    assert any("read as plain text" in note for note in examples.notes)


@pytest.mark.parametrize(
    ("prompt", "answer"),
    [("question", "answer"), ("query", "response"), ("prompt", "response"), ("instruction", "response")],
)
def test_questions_and_answers(prompt, answer, write):
    assert messages(Source(write([{prompt: "a", answer: "b"}]))) == [TALK["messages"]]
    exact = load(Source(write([{prompt: "a", answer: "b"}]), prompt=prompt, completion=answer))
    assert (exact.kind, exact.dataset[:]) == ("completion", {"prompt": ["a"], "completion": ["b"]})
    both = write([{prompt: "a", answer: "b", "problem": "c", "solution": "d"}])
    refused(lambda: load(Source(both)), "columns of one kind", "problem")


def test_a_prompt_of_the_teachers_own_in_a_chat(write):
    rows = [{"question": "a", "answer": "b", "hint": "a, as in c"}]
    loaded = load(Source(write(rows), prompt="question", completion="answer", teacher_prompt="hint", chat=True))
    assert json.loads(loaded.dataset["teacher_messages"][0]) == [turn("user", "a, as in c")]
    earlier = write([{**rows[0], "history": [["x", "y"]]}])
    keys = {"prompt": "question", "completion": "answer", "teacher_prompt": "hint", "history": "history"}
    refused(lambda: load(Source(earlier, **keys, chat=True)), "beside earlier answers", "'hint'", "row 1")
    assert load(Source(earlier, **keys)).dataset["teacher_prompt"][:] == ["x\n\ny\n\na, as in c\n\n"]


def test_keys_without_a_meaning(write):
    path = write([{"text": "a", "s": "b"}])
    refused(lambda: load(Source(path, field="text", system="s")), "beside system", "got text")
    refused(lambda: load(Source(path, field="text", chat=True)), "beside chat", "Leave out chat")
    refused(lambda: load(Source(path, split="train")), "beside split", "Leave out split")


# Files


ROWS = [{"id": i, "text": f"the cat {i}; it sat, there"} for i in range(700)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


def texts(source: Source) -> list[str]:
    return load(source).dataset["text"][:]


@pytest.mark.parametrize("suffix", [".gz", ".zst", ".bz2"])
@pytest.mark.parametrize("name", ["data.jsonl", "data.json", "data.ndjson", "data.csv", "data.txt"])
def test_compressed_files(name, suffix, tmp_path):
    content = {"data.json": json.dumps(ROWS), "data.csv": csv_of(";")}.get(name, LINES)
    codec = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}[suffix]
    with pa.output_stream(str(tmp_path / (name + suffix)), compression=codec) as file:
        file.write(content.encode())
    expected = [LINES] if name == "data.txt" else [row["text"] for row in ROWS]
    assert texts(Source(tmp_path / (name + suffix))) == expected
    whole = (tmp_path / (name + suffix)).read_bytes()
    (tmp_path / ("cut." + name + suffix)).write_bytes(whole[: len(whole) // 2])
    refused(lambda: load(Source(tmp_path / ("cut." + name + suffix))), f"cut.{name}{suffix}", "Write the file again")


def csv_of(delimiter: str) -> str:
    lines = [f'{row["id"]}{delimiter}"{row["text"]}"\n' for row in ROWS]
    return f"id{delimiter}text\n" + "".join(lines)


@pytest.mark.parametrize(("name", "delimiter"), [("a.csv", ";"), ("a.csv", "\t"), ("a.tsv", "\t"), ("a.csv", ",")])
def test_what_separates_columns(name, delimiter, tmp_path):
    (tmp_path / name).write_text(csv_of(delimiter))
    assert texts(Source(tmp_path / name)) == [row["text"] for row in ROWS]


def test_quotes_in_files_with_tabs_are_text_where_they_are_around_no_cells(tmp_path):
    path = tmp_path / "rows.tsv"
    path.write_text('prompt\tcompletion\na\t"Hi" she said\nb\t"open\nc\tclose" d\n')
    assert load(Source(path)).dataset["completion"][:] == ['"Hi" she said', '"open', 'close" d']
    path.write_text('prompt\tcompletion\na\t"one\ntwo ""three"""\n')
    assert load(Source(path)).dataset["completion"][:] == ['one\ntwo "three"']
    broken = tmp_path / "rows.csv"
    broken.write_text('text\n"a \\"b\\" c"\n')
    refused(lambda: load(Source(broken)), "quotes around the whole", "in line 2")
    broken.write_bytes(b"text\rone\rtwo\r")
    assert load(Source(broken)).dataset["text"][:] == ["one", "two"]
    broken.write_bytes(b"text\nh\xe9\n")
    refused(lambda: load(Source(broken)), "UTF-8")
    broken.write_text(f'text\n"{"long " * 50_000}"\n')
    assert len(load(Source(broken)).dataset["text"][0]) == 250_000


def test_columns_of_one_name(tmp_path):
    (tmp_path / "a.csv").write_text("text,text\na,b\n")
    refused(lambda: load(Source(tmp_path / "a.csv")), "'text' twice", "Rename")


@pytest.mark.parametrize("content", [{"data": ROWS}, {"version": 1, "data": ROWS}, ROWS])
@pytest.mark.parametrize("indent", [None, 1])
def test_documents_of_rows(content, indent, tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(content, indent=indent))
    assert texts(Source(tmp_path / "a.json")) == [row["text"] for row in ROWS]
    (tmp_path / "b.json").write_text(json.dumps({"train": ROWS, "test": ROWS}, indent=indent))
    refused(lambda: load(Source(tmp_path / "b.json")), "one list of rows", "train, test", "a file of its own")
    (tmp_path / "c.json").write_text(json.dumps(TALK | {"tools": [{"name": "f"}]}, indent=indent))
    assert load(Source(tmp_path / "c.json")).kind == "messages"


def test_what_stands_beside_the_rows_of_a_document_is_not_dropped(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps({"version": 2, "system": "Be brief.", "data": [TALK]}))
    refused(lambda: load(Source(path)), "got system beside them", "into each row")
    path.write_text(json.dumps({"version": 2, "system": "", "data": [TALK]}))
    assert len(load(Source(path)).dataset) == 1


def test_template_arguments_of_other_rows_are_not_given(tmp_path):
    table = pa.table({"messages": [TALK["messages"]] * 2, "chat_template_kwargs": [{"a": True}, {"b": 1}]})
    pa.parquet.write_table(table, tmp_path / "rows.parquet")
    dataset = load(Source(tmp_path / "rows.parquet")).dataset
    assert [json.loads(text) for text in dataset["chat_template_kwargs"]] == [{"a": True}, {"b": 1}]


def test_arrow_files(tmp_path):
    table = pa.Table.from_pylist(ROWS)
    for name, new in (("stream.arrow", pa.ipc.new_stream), ("file.arrow", pa.ipc.new_file)):
        with pa.OSFile(str(tmp_path / name), "wb") as sink, new(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=100)
        assert texts(Source(tmp_path / name)) == [row["text"] for row in ROWS]


def shards(folder: Path, *names: str) -> None:
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = ROWS[number * 100 : (number + 1) * 100]
        if path.suffix == ".parquet":
            pyarrow.parquet.write_table(pa.Table.from_pylist(rows), path)
        else:
            text = "".join(json.dumps(row) + "\n" for row in rows).encode()
            path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)


def test_folders_and_globs_of_shards(tmp_path):
    shards(tmp_path / "a", "part-0.jsonl", "part-1.jsonl.gz", "deep/part-2.jsonl")
    expected = [row["text"] for row in ROWS[:300]]
    assert sorted(texts(Source(tmp_path / "a"))) == sorted(expected)
    assert texts(Source(f"{tmp_path}/a/part-*")) == expected[:200]
    assert texts(Source(f"{tmp_path}/a/**/*.jsonl")) == expected[200:] + expected[:100]
    refused(lambda: load(Source(f"{tmp_path}/a/*.csv")), "files of the pattern", "Correct the pattern")
    shards(tmp_path / "a", "part-3.parquet")
    refused(lambda: load(Source(tmp_path / "a")), "all data files", "got part-3.parquet", "by a pattern")
    shards(tmp_path / "b", "train.jsonl", "extra.jsonl")
    refused(lambda: load(Source(tmp_path / "b")), "got extra.jsonl")
    (tmp_path / "a" / "part-1.jsonl").write_text('{"id": 1, "text": "a"}\n{"id": 2}\n')
    refused(lambda: load(Source(f"{tmp_path}/a/*.jsonl")), "of part-1.jsonl", "row 2")


def test_a_folder_as_on_the_hub(tmp_path):
    shards(tmp_path, *(f"data/{name}-0000{i}-of-00002.parquet" for name in ("train", "test") for i in range(2)))
    (tmp_path / "README.md").write_text("# A data set\n")
    assert texts(Source(tmp_path, split="train")) == [row["text"] for row in ROWS[:200]]
    assert texts(Source(tmp_path, split="test", limit=150)) == [row["text"] for row in ROWS[200:350]]
    refused(lambda: load(Source(tmp_path)), "train, test", "`split: train`")
    refused(lambda: load(Source(tmp_path, split="dev")), "got dev", "train, test")
    (tmp_path / "snapshot").mkdir()  # as in a cache of the hub, whose files are links
    (tmp_path / "snapshot" / "train.parquet").symlink_to(tmp_path / "data" / "train-00000-of-00002.parquet")
    assert texts(Source(tmp_path / "snapshot")) == [row["text"] for row in ROWS[:100]]


def test_configurations_of_a_card(tmp_path):
    shards(tmp_path, "en/a.jsonl", "de/a.jsonl")
    card = (
        "---\nconfigs:\n- config_name: en\n  data_files: en/*.jsonl\n- config_name: de\n  data_files: de/*.jsonl\n---\n"
    )
    (tmp_path / "README.md").write_text(card)
    assert texts(Source(tmp_path, config="de")) == [row["text"] for row in ROWS[100:200]]
    refused(lambda: load(Source(tmp_path)), "en", "de", "config")


def test_the_first_rows_alone(write):
    path = write([{"text": "a"}, {"text": "b", "id": 1}, {"text": 3}])
    assert texts(Source(path, limit=2)) == ["a", "b"]
    refused(lambda: load(Source(path)), "the number 3 in row 3")


def test_memory_does_not_grow_with_the_file(tmp_path):
    with (tmp_path / "large.jsonl").open("w") as file:
        for i in range(20_000):
            file.write(json.dumps({"text": f"{i} " * 150, f"key{i % 7}": i}) + "\n")
    load(Source(tmp_path / "large.jsonl", limit=10))  # imports
    tracemalloc.start()
    before = pa.total_allocated_bytes()
    assert len(load(Source(tmp_path / "large.jsonl")).dataset) == 20_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (tmp_path / "large.jsonl").stat().st_size > 15e6
    assert peak < 4e6
    assert pa.total_allocated_bytes() - before < 4e6


# Several sources


def test_sources_are_mixed_by_their_shares(write):
    small = Source(write([{"text": "the cat"}] * 3, "small.jsonl"), share=1)
    large = Source(write([{"prompt": "a", "completion": "b"}] * 6, "large.jsonl"), share=3)
    mixed = encode_mixture([small, large], PLAIN, max_length=9)
    rows = [tuple(row) for row in mixed.dataset["input_ids"]]
    assert [rows.count(row) for row in dict.fromkeys(rows)] == [3, 9]
    assert mixed.tokens == 3 * encode(small, PLAIN, max_length=9).tokens // 3 + 9 * 2
    assert mixed.notes[-2:] == (
        "small.jsonl: 25% of the training rows, each of 3 1 times.",
        "large.jsonl: 75% of the training rows, each of 6 1.5 times.",
    )
    together = encode_mixture([replace(small, share=None), replace(large, share=None)], PLAIN, max_length=9)
    assert len(together.dataset) == 9
    refused(
        lambda: encode_mixture([small, replace(large, share=None)], PLAIN, max_length=9), "got none for large.jsonl"
    )
    weighed = Source(write([{"input_ids": [5, 6], "weights": [1, 2]}], "weighed.jsonl"), share=1)
    refused(lambda: encode_mixture([small, weighed], PLAIN, max_length=9), "the same columns", "weights")


def test_prompts_of_embedders(write):
    columns = {"fields": ["query", "passage"], "prompts": {"query": "query: "}}
    part = TextsPart.model_validate({"path": write([{"query": "a", "passage": "b"}]), **columns})
    texts, pairs = _read(part)
    assert [*texts] == ["query: a", "b"] and pairs is None
    with pytest.raises(ValueError, match="columns of fields, got one for title"):
        TextsPart.model_validate({"path": "a", "prompts": {"title": "t: "}})


# The hub


SCRIPT = """
import json, sys
from potstill.data.loading import load
from potstill.data.sources import Source
from potstill.errors import DataError
for keys in json.loads(sys.argv[1]):
    try:
        loaded = load(Source(**{"path": "a/b", "split": "train", **keys}))
        print(json.dumps([loaded.kind, len(loaded.dataset), loaded.dataset[0]]))
    except DataError as error:
        print(json.dumps(str(error)))
"""


def test_data_sets_on_the_hub(tmp_path):
    for split in ("train", "test"):
        path = tmp_path / f"repo/data/{split}-00000-of-00001.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = [{"question": f"{split} {i}?", "answer": "yes"} for i in range(300)]
        pyarrow.parquet.write_table(pa.Table.from_pylist(rows), path)
    (tmp_path / "repo/README.md").write_text("# A data set\n")

    def loaded(endpoint: str, *sources: dict[str, Any], **environment: str) -> list[Any]:
        environment = {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"} | environment
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, json.dumps(sources)],
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert done.stderr == "" or environment["HF_HUB_OFFLINE"] == "1"  # then `datasets` says what it reads
        return [json.loads(line) for line in done.stdout.splitlines()]

    def first(text: str) -> dict[str, Any]:
        talk = [turn("user", text), turn("assistant", "yes")]
        return {"messages": json.dumps(talk), "num_prompt_messages": 1}

    with hub_of("a/b", tmp_path / "repo") as endpoint:
        streamed, whole, tested, split, config, name = loaded(
            endpoint,
            {"streaming": True, "limit": 10},
            {},
            {"split": "test[:20]"},
            {"split": "dev"},
            {"config": "de"},
            {"path": "a/c"},
        )
    assert streamed == ["messages", 10, first("train 0?")]
    assert whole == ["messages", 300, first("train 0?")]
    assert tested == ["messages", 20, first("test 0?")]
    assert "got dev. It has train, test" in split
    assert "'de' not found" in config
    assert "'a/c' doesn't exist" in name
    (unreachable,) = loaded("http://127.0.0.1:9", {})
    assert "cannot be reached" in unreachable
    assert "HF_HUB_OFFLINE=1" in unreachable
    assert loaded("http://127.0.0.1:9", {}, HF_HUB_OFFLINE="1") == [whole]


def test_init_names_the_weights_of_rows(tmp_path):
    def found(*names):
        source = Source(tmp_path / "rows.jsonl")
        return find_columns(source, names, dict.fromkeys(names).get, "causal", {}, has_template=True)

    assert found("messages", "weight") == {"messages": "messages", "weight": "weight"}
    assert found("text", "weight") == {"field": "text"}
