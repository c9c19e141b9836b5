"""Generated data: nothing lost, nothing twice, every row with its origin, and ready to be learnt from."""

from __future__ import annotations

import json
import os
import signal
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import pytest
from typer.testing import CliRunner

from conftest import make_tokenizer
from potstill.cli import app
from potstill.data.batches import encode
from potstill.data.sources import Source
from potstill.engines.sampling import Completion, Prompt, Sampling
from potstill.errors import DataError, RecipeError, UserError
from potstill.generation import sandbox
from potstill.generation.journal import complete_in_order, complete_requests, render
from potstill.generation.judge import code_span
from potstill.generation.own_text import opening
from potstill.generation.requests import GenerationRequest
from potstill.runs import generate as generation
from potstill.runs.config.generate import GenerateRecipe
from potstill.runs.generate import Generated, generate

try:
    sandbox.require_sandbox()
    missing = ""
except UserError as error:
    missing = str(error)
needs_sandbox = pytest.mark.skipif(bool(missing), reason=missing)

CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content or m.tool_calls }}{% endfor %}"
CHAT += "{% if tools %}<tools>{{ tools | tojson }}{% endif %}{% if add_generation_prompt %}<assistant>{% endif %}"


class Scripted:
    """An engine whose texts are a function of the prompt, the sample and the seed."""

    def __init__(self, respond: Any, dies_after: int | None = None) -> None:
        self.respond, self.left, self.prompts = respond, dies_after, []

    def complete(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[list[Completion]]:
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        self.left = None if self.left is None else self.left - 1
        self.prompts += prompts
        texts = [prompt if isinstance(prompt, str) else make_tokenizer().decode(prompt) for prompt in prompts]
        return [[self.respond(text, sample, sampling.seed) for sample in range(sampling.samples)] for text in texts]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def values(toys: Path, tmp_path: Path) -> dict[str, Any]:
    """A whole recipe over the toy teacher and ten questions; tests change it."""
    questions = [{"question": f"What is {i} plus {i}?", "answer": f"Add.\n#### {2 * i}"} for i in range(10)]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    return {
        "kind": "generate",
        "name": "sums",
        "teacher": {"model": str(toys / "teacher")},
        "task": {
            "task": "chain_of_thought",
            "questions": {"path": str(tmp_path / "questions.jsonl"), "answer": "answer"},
            "template": "Q: {question}\nA:",
        },
        "sampling": {"max_new_tokens": 8, "samples": 2},
        "filter": {"cut": False, "scripts": [], "repetition": None},
        "batch_size": 3,
        "output": str(tmp_path / "out"),
    }


def made(
    values: dict[str, Any], respond: Any, monkeypatch: pytest.MonkeyPatch, resume: bool = False, chat: bool = False
) -> Generated:
    """What comes of a recipe when the teacher writes what `respond` gives."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT if chat else None
    monkeypatch.setattr(generation, "load_tokenizer", lambda *_: tokenizer)
    monkeypatch.setattr(generation, "_engine", lambda *_: Scripted(respond))
    return generate(GenerateRecipe.parse(json.loads(json.dumps(values))), resume=resume)


def sums(prompt: Prompt, sample: int, seed: int) -> Completion:
    """A teacher that adds: right in its samples 0 and 2, wrong in 1, without an answer in 3, cut in 4."""
    number = int("".join(sign for sign in str(prompt).partition(" plus")[0] if sign.isdigit()))
    text = f" Step 1: {number} + {number}.\nAnswer: {2 * number + (sample == 1)}\n"
    return Completion("Let me see." if sample == 3 else text, sample != 4)


# The journal

PROMPTS = [f"p{i}" for i in range(11)]
SAMPLING = Sampling(samples=2, seed=7)


def echo(prompt: Prompt, sample: int, seed: int) -> Completion:
    return Completion(f"{prompt} {sample} {seed} é\ud800", True)


def written(engine: Scripted, journal: Path, settings: Any = "one") -> Any:
    complete = complete_in_order(engine, SAMPLING)
    return complete_requests(PROMPTS, complete, SAMPLING.seed, journal, batch_size=3, settings=settings)


def test_killed_anywhere_it_goes_on_without_losing_or_repeating_a_row(tmp_path: Path) -> None:
    whole = written(Scripted(echo), tmp_path / "whole")
    content = (tmp_path / "whole").read_bytes()
    assert [text for one in whole for text in (t.text for t in one.texts)][:2] == [
        f"p0 {s} {whole[0].seed} é\ud800" for s in (0, 1)
    ]
    for cut in range(0, len(content), 7):
        journal = tmp_path / "cut"
        journal.write_bytes(content[:cut])
        engine = Scripted(echo)
        assert written(engine, journal) == whole
        assert journal.read_bytes() == content
        done = max(content[:cut].count(b"\n") - 1, 0)
        assert len(engine.prompts) <= 11 - done + 2  # the rest of a batch is written again, and thrown away
    engine = Scripted(echo)
    written(engine, journal)
    assert not engine.prompts


def test_sigkill_twice(tmp_path: Path) -> None:
    whole = written(Scripted(echo), tmp_path / "whole")
    journal = tmp_path / "journal"
    for batches in (1, 2):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads, which do not write here
            child = os.fork()
        if child == 0:
            written(Scripted(echo, dies_after=batches), journal)
            os._exit(0)
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert journal.read_bytes().count(b"\n") == 1 + 3 + 6
    engine = Scripted(echo)
    assert written(engine, journal) == whole
    assert engine.prompts == PROMPTS[9:]
    assert journal.read_bytes() == (tmp_path / "whole").read_bytes()


def test_the_texts_of_another_recipe_are_not_taken(tmp_path: Path) -> None:
    written(Scripted(echo), tmp_path / "journal")
    with pytest.raises(DataError, match=r"got those of another. Its teacher, task"):
        written(Scripted(echo), tmp_path / "journal", settings="other")


@pytest.mark.parametrize("content", [b"not JSON\n", b"[1]\n", b'{"made_of": 5}\n', b"\xff\n"])
def test_a_file_that_is_no_journal(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "journal").write_bytes(content)
    with pytest.raises(DataError, match=r"expected (a journal|the texts)"):
        written(Scripted(echo), tmp_path / "journal")
    assert (tmp_path / "journal").read_bytes() == content


# Chains


def test_chains_become_rows_with_spans_verdicts_and_origin(values, monkeypatch) -> None:
    values["sampling"]["samples"] = 5
    values["filter"]["cut"] = True
    result = made(values, sums, monkeypatch)
    rows, dropped = lines(result.rows), lines(result.directory / "dropped.jsonl")
    assert result.counts == {"asked": 10, "texts": 50, "dropped": 20, "texts kept": 30, "rows": 30}
    assert result.dropped == {"answer": 10, "cut": 10}
    assert len(rows) + len(dropped) == 50
    row = rows[4]
    assert (row["prompt"], row["answer"], row["gold"]) == ("Q: What is 1 plus 1?\nA:", "3", "2")
    assert row["completion"] == " Step 1: 1 + 1.\nAnswer: 3\n"
    assert row["completion"][slice(*row["reasoning_span"])] == "Step 1: 1 + 1."
    assert row["completion"][slice(*row["answer_span"])] == "3"
    origin = row["provenance"]
    assert (origin["task"], origin["row"], origin["sample"], origin["verdict"]) == ("chain_of_thought", 2, 1, "wrong")
    assert (origin["template"], origin["teacher"]) == ("Q: {question}\nA:", values["teacher"]["model"])
    assert origin["sampling"]["samples"] == 5
    assert isinstance(origin["seed"], int)
    assert {one["provenance"]["verdict"] for one in rows} == {"right", "wrong"}
    assert {one["dropped"]["reason"] for one in dropped} == {"no answer", "max_new_tokens came before the end"}


def test_rejection_sampling_and_votes(values, monkeypatch, tmp_path) -> None:
    values["sampling"]["samples"] = 4
    values["task"]["choose"] = "verified"
    verified = lines(made(values, sums, monkeypatch).rows)
    assert {row["provenance"]["sample"] for row in verified} == {0, 2}
    values["task"] |= {"choose": "majority", "questions": {"path": values["task"]["questions"]["path"]}}
    values["output"] = str(tmp_path / "voted")
    voted = made(values, sums, monkeypatch)
    assert [row["answer"] for row in lines(voted.rows)] == [row["answer"] for row in verified]
    assert {row["provenance"]["verdict"] for row in lines(voted.rows)} == {"majority"}
    reasons = {row["dropped"]["reason"] for row in lines(voted.directory / "dropped.jsonl")}
    assert "'3', where 50% say '2'" in reasons


def test_answers_alone_and_both_as_two_tasks(values, monkeypatch, tmp_path) -> None:
    values["sampling"]["samples"] = 1
    values["task"]["target"] = "answer"
    (first, *_) = lines(made(values, sums, monkeypatch).rows)
    assert (first["prompt"], first["completion"]) == ("What is 0 plus 0?\nAnswer:", " 0")
    assert first["completion"][slice(*first["answer_span"])] == "0"
    values["task"]["target"] = "both"
    values["output"] = str(tmp_path / "both")
    chain, answer, *_ = lines(made(values, sums, monkeypatch, chat=True).rows)
    assert chain["messages"][0]["content"] != answer["messages"][0]["content"]
    assert [m["content"] for m in answer["messages"]] == ["What is 0 plus 0?", "0"]
    assert chain["messages"][1]["content"][slice(*chain["answer_span"])] == "0"
    assert [row["provenance"]["task"] for row in (chain, answer)] == ["chain_of_thought", "answer"]
    assert [row["weight"] for row in (chain, answer)] == [1.0, 1.0]
    assert "weight" not in first


def test_two_tasks_weigh_what_the_recipe_says_in_a_run(values, monkeypatch) -> None:
    values["task"] |= {"target": "both", "task_weights": {"chain": 0.5, "answer": 12}}
    rows = made(values, sums, monkeypatch).rows
    chain, answer, *_ = encode(
        Source(rows, prompt="prompt", completion="completion", weight="weight"), make_tokenizer(), max_length=64
    ).dataset
    assert (set(chain["weights"]), set(answer["weights"])) == ({0.5}, {12.0})
    values["task"]["target"] = "chain"
    with pytest.raises(RecipeError, match="expected task_weights with target: both alone, got target: chain"):
        GenerateRecipe.parse(values)


# Programs


def test_the_program_is_the_last_block() -> None:
    text = "First:\n```\nprint(1)\n```\nBetter:\n```python\nprint(2)\n```\nDone."
    assert text[slice(*code_span(text))] == "print(2)\n"
    assert code_span("print(3)") == (0, 8)


@needs_sandbox
def test_programs_are_run_and_their_output_is_the_answer(values, monkeypatch) -> None:
    def respond(prompt: Prompt, sample: int, seed: int) -> Completion:
        number = int("".join(sign for sign in str(prompt).partition(" plus")[0] if sign.isdigit()))
        lines = [f"x = {number}\nprint(x + x)", "print(1 / 0)", "x = 5", "while True: pass"]
        return Completion(f"So:\n```python\n{lines[sample]}\n```", True)

    values["task"] |= {"task": "program_of_thought"}
    values["sampling"]["samples"] = 4
    values["programs"] = {"cpu_seconds": 1, "wall_seconds": 3}
    (Path(values["task"]["questions"]["path"])).write_text('{"question": "What is 4 plus 4?", "answer": "8"}\n')
    result = made(values, respond, monkeypatch)
    (row,) = lines(result.rows)
    assert (row["answer"], row["provenance"]["verdict"]) == ("8", "right")
    assert row["completion"][slice(*row["reasoning_span"])] == "x = 4\nprint(x + x)\n"
    assert [one["dropped"]["reason"] for one in lines(result.directory / "dropped.jsonl")] == [
        "program: failed (ZeroDivisionError: division by zero)",
        "program: printed nothing",
        "program: time",
    ]


@needs_sandbox
def test_chains_and_programs_vote_together(values, monkeypatch) -> None:
    def respond(prompt: Prompt, sample: int, seed: int) -> Completion:
        return Completion("print(4)" if "Python" in str(prompt) else f"Answer: {4 + sample}", True)

    values["task"] = {"task": "mixed", "questions": {"path": values["task"]["questions"]["path"]}}
    (Path(values["task"]["questions"]["path"])).write_text('{"question": "What is 2 plus 2?"}\n')
    rows = lines(made(values, respond, monkeypatch).rows)
    assert [row["provenance"]["task"] for row in rows] == [
        "chain_of_thought",
        "program_of_thought",
        "program_of_thought",
    ]
    assert {row["answer"] for row in rows} == {"4"}


def test_without_a_sandbox_no_teacher_is_asked_for_programs(values, monkeypatch) -> None:
    def none() -> None:
        raise DataError("sandbox: expected bubblewrap, got none.")

    monkeypatch.setattr(generation, "require_sandbox", none)
    values["task"] |= {"task": "program_of_thought"}
    with pytest.raises(DataError, match="expected bubblewrap"):
        made(values, sums, monkeypatch)
    assert not Path(values["output"]).exists()


# Instructions and responses


def test_instructions_are_topics_by_kinds(values, monkeypatch) -> None:
    values["task"] = {"task": "instructions", "topics": ["tides", "{x}"], "kinds": ["explain", "Sing of {question}."]}
    rows = lines(made(values, lambda p, s, _: Completion(f"{p} {s}", True), monkeypatch).rows)
    assert [(row["topic"], row["kind"]) for row in rows[::2]] == [
        ("tides", "explain"),
        ("tides", "Sing of {question}."),
        ("{x}", "explain"),
        ("{x}", "Sing of {question}."),
    ]
    assert rows[6]["prompt"] == "Sing of {x}."
    values["task"]["kinds"] = ["analyse", "summarize"]
    british = lines(
        made(
            values | {"output": values["output"] + "3"}, lambda p, s, _: Completion(f"{p} {s}", True), monkeypatch
        ).rows
    )
    assert {row["kind"] for row in british} == {"analyze", "summarize"}
    values["task"]["kinds"] = ["explane"]
    with pytest.raises(UserError, match=r"Did you mean explain\?"):
        made(values | {"output": values["output"] + "2"}, sums, monkeypatch)


CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": [2, None]}}}
CHATS = [
    {"chat": [{"role": "user", "content": "Hi é\n"}], "kept": {"a": [1, None]}, "id": 7},
    {
        "chat": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "1 + 2?"}]},
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "content": "3", "tool_call_id": "x"},
        ],
        "tools": [{"type": "function", "function": {"name": "add", "parameters": {}}}],
    },
]


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_chats_and_tools_survive_unchanged(values, monkeypatch, tmp_path, form: str) -> None:
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in CHATS))
    values["task"] = {"task": "responses", "prompts": {"path": str(path), "messages": "chat"}}
    values |= {"format": form, "sampling": {"samples": 1}}
    seen: list[Prompt] = []

    def respond(prompt: Prompt, sample: int, seed: int) -> Completion:
        seen.append(prompt)
        return Completion(" Three. ", True)

    result = made(values, respond, monkeypatch, chat=True)
    rows = datasets.Dataset.from_parquet(str(result.rows)) if form == "parquet" else lines(result.rows)
    for row, chat in zip(rows, CHATS, strict=True):
        loads = json.loads if form == "parquet" else lambda value: value
        assert loads(row["messages"]) == [*chat["chat"], {"role": "assistant", "content": " Three. "}]
        for column in set(chat) - {"id"}:
            assert loads(row[column]) == chat[column]
    assert rows[0]["id"] == 7
    assert [row.get("num_prompt_messages") for row in rows] == [
        None,
        4,
    ]  # the answer in the prompt is not the teacher's
    assert "<tools>" in seen[1]
    assert "<tools>" not in seen[0]
    assert seen[1].endswith("<assistant>")


@pytest.mark.parametrize("words", [None, "student"])
def test_a_server_writes_too(values, monkeypatch, toys: Path, words: str | None) -> None:
    class Served(Scripted):
        def __init__(self, url: str, model: str, **options: Any) -> None:
            super().__init__(sums)
            assert (url, model) == ("http://here", "big")
            ends = frozenset({0}) if words else frozenset()
            assert options == {"concurrency": 4, "key_variable": None, "timeout_s": 120.0, "end_ids": ends}

        def card(self) -> None:
            self.respond = sums

    monkeypatch.setattr("potstill.engines.server.ModelServer", Served)
    values["teacher"] = {"server": {"url": "http://here", "model": "big", "concurrency": 4}}
    values["teacher"] |= {"tokenizer": str(toys / words)} if words else {}
    rows = lines(generate(GenerateRecipe.parse(values)).rows)
    assert len(rows) == 20
    assert rows[0]["provenance"]["teacher"] == "big"
    for wrong in ({}, {"model": "x", **values["teacher"]}, {"model": "x", "tokenizer": "y"}):
        with pytest.raises(RecipeError, match="teacher: expected"):
            GenerateRecipe.parse(values | {"teacher": wrong})


CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
CHATML += "{% if add_generation_prompt %}<|im_start|>assistant\n{% if not thinking %}<think>{% endif %}{% endif %}"


def test_arguments_of_the_template_are_read_and_kept(values, monkeypatch, tmp_path) -> None:
    (tmp_path / "chat.jinja").write_text(CHATML)
    chats = [{"chat": CHATS[0]["chat"]}, {"chat": CHATS[0]["chat"], "chat_template_kwargs": '{"thinking": false}'}]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chats))
    values["task"] = {"task": "responses", "prompts": {"path": str(tmp_path / "chats.jsonl"), "messages": "chat"}}
    values["sampling"] = {"samples": 1}
    values["teacher"] |= {"chat_template": str(tmp_path / "chat.jinja"), "chat_template_kwargs": {"thinking": True}}
    seen: list[Prompt] = []

    def respond(prompt: Prompt, sample: int, seed: int) -> Completion:
        seen.append(prompt)
        return Completion("Hi.", True)

    rows = lines(made(values, respond, monkeypatch).rows)
    assert [prompt.endswith("<think>") for prompt in seen] == [False, True]
    assert [row["chat_template_kwargs"] for row in rows] == [{"thinking": True}, {"thinking": False}]
    values["teacher"]["chat_template_kwargs"] = {"thinkin": True}
    with pytest.raises(DataError, match=r"teacher.chat_template_kwargs: expected arguments .* reads, got thinkin"):
        made(values | {"output": values["output"] + "2"}, respond, monkeypatch)
    values["teacher"] = {"server": {"url": "http://here", "model": "big"}, "chat_template": "chat.jinja"}
    with pytest.raises(RecipeError, match="expected a tokenizer for chat_template"):
        GenerateRecipe.parse(values)


@pytest.mark.parametrize(
    ("column", "problem"),
    [
        ({"tools": "{"}, "expected a list in 'tools', got '{'"),
        ({"documents": "a text"}, "expected a list in 'documents', got 'a text'"),
        ({"chat_template_kwargs": [1]}, "expected an object in 'chat_template_kwargs', got '\\[1\\]'"),
        ({"documents": [{"text": "a"}]}, "a chat template that reads documents, got one that does not, for row 1"),
        ({"tools": None, "documents": []}, None),
    ],
)
def test_columns_that_a_template_reads_are_read_or_refused(values, monkeypatch, tmp_path, column, problem) -> None:
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps({"chat": CHATS[0]["chat"], **column}) + "\n")
    values["task"] = {"task": "responses", "prompts": {"path": str(path), "messages": "chat"}}
    if problem is None:
        assert made(values, sums_of_nothing, monkeypatch, chat=True).counts["asked"] == 1
    else:
        with pytest.raises(DataError, match=problem):
            made(values, sums_of_nothing, monkeypatch, chat=True)


def sums_of_nothing(prompt: Prompt, sample: int, seed: int) -> Completion:
    return Completion("Nothing.", True)


def test_rows_of_other_tokens_are_counted(values, monkeypatch) -> None:
    def respond(prompt: Prompt, sample: int, seed: int) -> Completion:
        return Completion("Answer: 2", True, (*make_tokenizer()("Answer: 2")["input_ids"], *[0] * (1 + sample)))

    result = made(values, respond, monkeypatch)
    rows = lines(result.rows)
    assert ["completion_ids" in row for row in rows] == [False, True] * 10
    note = "10 of 20 rows keep their token ids: their text would be encoded as others."
    assert result.notes == [note]
    assert note in (result.directory / "README.md").read_text().replace("\\", "")
    result = made(values | {"rows": "completion", "output": values["output"] + "2"}, respond, monkeypatch, chat=True)
    assert result.notes == ["rows: the teacher read its chat template, and the rows have the bare prompts."]


def test_a_conversation_needs_a_chat_template() -> None:
    request = GenerationRequest(3, "responses", "none", CHATS[1]["chat"], {})
    with pytest.raises(DataError, match=r"expected a teacher with a chat template for the conversation in row 3"):
        render(request, make_tokenizer())


# Bad rows


BAD = b'{"question": "What is 1 plus 1?"}\n{"question": }\n\n{"questoin": "x"}\n[1]\n{"question": ""}\n'
BAD += b'{"question": "caf\xe9"}\n{"question": 5}\n{"question": "What is 2 plus 2?"}\n'


def test_bad_rows_are_errors_with_their_lines_or_skipped_on_request(values, monkeypatch) -> None:
    Path(values["task"]["questions"]["path"]).write_bytes(BAD)
    del values["task"]["questions"]["answer"]
    with pytest.raises(DataError) as caught:
        made(values, sums, monkeypatch)
    text = str(caught.value)
    assert "got 7 bad of 9: line 2: expected JSON" in text
    assert "line 3: expected a row, got an empty line; line 4: expected a field 'question', got questoin" in text
    assert "line 5: expected an object, got list; line 6: expected a text" in text
    assert "and 2 more" in text
    values["skip_bad_rows"] = True
    result = made(values, sums, monkeypatch)
    assert sorted({row["provenance"]["row"] for row in lines(result.rows)}) == [1, 9]
    card = (result.directory / "README.md").read_text()
    assert "- 7: expected UTF-8, got the byte 0xe9" in card
    assert "rows of the source that could not be used | 7 |" in card


@pytest.mark.parametrize("content", ["", "\n\n", '{"question": "", "answer": "1"}\n'])
def test_a_file_without_a_usable_row(values, monkeypatch, content: str) -> None:
    Path(values["task"]["questions"]["path"]).write_text(content)
    with pytest.raises(DataError, match=r"expected (at least one( usable)? row|usable rows)"):
        made(values, sums, monkeypatch)
    with pytest.raises(DataError, match=r"expected at least one( usable)? row"):
        made(values | {"skip_bad_rows": True}, sums, monkeypatch)


def test_lists_and_tables_have_row_numbers(values, monkeypatch, tmp_path) -> None:
    rows = [{"question": "What is 1 plus 1?", "answer": 2}, {"question": "What is 3 plus 3?", "answer": True}]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows))
    values["task"]["questions"]["path"] = str(path)
    with pytest.raises(DataError, match="row 2: expected an answer in 'answer', got 'True'"):
        made(values, sums, monkeypatch)


# Filters, files and the command


def test_filtered_rows_go_to_their_own_file_and_into_the_card(values, monkeypatch, tmp_path) -> None:
    (tmp_path / "test.jsonl").write_text('{"q": "What is 3 plus 3?"}\n')

    def respond(prompt: Prompt, sample: int, seed: int) -> Completion:
        if "0 plus" in str(prompt):
            return Completion("I'm sorry, but <b>I | can't</b>. Answer: 0", True)
        if "1 plus" in str(prompt):
            return Completion("Answer: 2 " + "again " * 100, True)
        return sums(prompt, 0, seed)

    values["filter"] |= {
        "repetition": 5.0,
        "near_duplicates": 0.9,
        "contamination": {"files": [str(tmp_path / "test.jsonl")], "words": 5},
    }
    result = made(values, respond, monkeypatch)
    assert result.dropped == {"refusal": 2, "repetition": 2, "near-duplicate": 8, "contamination": 1}
    card = (result.directory / "README.md").read_text()
    assert "| refusal | 2 | I'm sorry, but &lt;b&gt;I \\| can't&lt;/b&gt;. Answer: 0 | begins with" in card
    assert "| rows | 7 |" in card
    assert "| 16 to 31 | 7 | " in card
    loaded = datasets.load_dataset(str(result.directory), split="train", cache_dir=str(tmp_path))
    assert len(loaded) == 7


@pytest.mark.parametrize(("kept", "held_out", "empty"), [(0, 0.0, "train.jsonl"), (1, 0.2, "eval.jsonl")])
def test_files_without_rows_are_noted(values, monkeypatch, kept: int, held_out: float, empty: str) -> None:
    def respond(prompt: Prompt, sample: int, seed: int) -> Completion:
        return sums(prompt, 0, seed) if kept and "1 plus" in str(prompt) else Completion("I'm sorry, but no.", True)

    values["held_out"] = held_out
    result = made(values, respond, monkeypatch)
    assert (result.directory / empty).stat().st_size == 0
    assert result.notes[-1].startswith(f"{empty} without rows: no run can read that. Of 20 texts were dropped: answer ")


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
@pytest.mark.parametrize("chat", [False, True])
def test_rows_go_straight_into_a_run(values, monkeypatch, tmp_path, form: str, chat: bool) -> None:
    result = made(values | {"format": form}, sums, monkeypatch, chat=chat)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT
    examples = encode(Source(result.rows), tokenizer, max_length=200)
    assert len(examples.dataset) == 20
    loaded = datasets.load_dataset(str(result.directory), split="train", cache_dir=str(tmp_path))
    assert len(loaded) == 20
    assert loaded[0]["provenance"]["sampling"]["samples"] == 2


def test_the_command_writes_resumes_and_refuses(values, tmp_path) -> None:
    import yaml

    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        yaml.safe_dump(
            values
            | {"task": {"task": "instructions", "topics": list("abcdef"), "kinds": ["explain", "Sing of {question}."]}}
        )
    )
    done = CliRunner().invoke(
        app, ["generate", str(recipe), "--set", "filter.min_characters=0"], catch_exceptions=False
    )
    assert done.exit_code == 0, done.output
    assert "texts       24" in done.output
    rows = (tmp_path / "out/train.jsonl").read_bytes()
    with pytest.raises(RecipeError, match="expected a folder without texts"):
        CliRunner().invoke(app, ["generate", str(recipe)], catch_exceptions=False)
    journal = tmp_path / "out/texts.jsonl"
    whole = journal.read_bytes()
    journal.write_bytes(whole[: len(whole) // 2])
    again = ["generate", str(recipe), "--resume", "--set", "filter.min_characters=0"]
    assert CliRunner().invoke(app, again, catch_exceptions=False).exit_code == 0
    assert journal.read_bytes() == whole
    assert (tmp_path / "out/train.jsonl").read_bytes() == rows


def test_all_mistakes_of_a_recipe_are_reported_at_once(values) -> None:
    values["task"] |= {"chose": "all", "target": "chian"}
    values |= {"sampling": {"sampling_temperature": 0, "samples": 2}, "filter": {"near_duplicates": 2}}
    with pytest.raises(RecipeError) as caught:
        GenerateRecipe.parse(values)
    for expected in (
        "task.chose: unknown key. Did you mean choose?",
        "task.target",
        "sampling: expected",
        "filter.near",
    ):
        assert expected in str(caught.value)
    values = values | {"sampling": {}, "filter": {}, "task": {"task": "responses", "prompts": {"path": "x"}}}
    with pytest.raises(RecipeError, match="expected one of field and messages"):
        GenerateRecipe.parse(values)
    values["task"] = {"task": "chain_of_thought", "questions": {"path": "x"}, "choose": "verified"}
    with pytest.raises(RecipeError, match=r"expected questions.answer"):
        GenerateRecipe.parse(values)


# Text without any data


def own_text(values: dict[str, Any], **changes: Any) -> dict[str, Any]:
    task = {"task": "own_text", "number": 12, "beginnings": ["", "The "]}
    return values | {"task": task, "held_out": 0.25, "sampling": {"max_new_tokens": 8}} | changes


def test_a_chat_model_writes_the_questions_too(values: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    written_questions = iter(
        ["What is a tree?", "Why is water wet?", "What is a tree?", "Hm?", *(f"What is number {i}?" for i in range(8))]
    )

    def respond(prompt: str, sample: int, seed: int) -> Completion:
        if prompt.endswith("<user>"):
            return Completion(f" {next(written_questions)}\n", True)
        return Completion(f"About {prompt}", True)

    result = made(own_text(values), respond, monkeypatch, chat=True)
    rows = [*lines(result.rows), *lines(result.held_out)]
    questions = [row["messages"][0]["content"] for row in rows]
    assert len(questions) == len({*questions}) == 10 and "Why is water wet?" in questions
    assert all(
        row["messages"][1]["content"] == f"About <user>{row['messages'][0]['content']}<assistant>" for row in rows
    )
    assert len(lines(result.held_out)) == 2  # a quarter of the questions
    assert not any("chat_template_kwargs" in row for row in rows)
    assert "questions: 10 of 12 were kept, 1 length, 1 repeated." in result.notes
    # No prompt is sent again: the same rows come from the journals.
    before = result.rows.read_bytes()
    again = made(own_text(values), lambda *_: 1 / 0, monkeypatch, resume=True, chat=True)
    assert again.rows.read_bytes() == before


def test_another_model_writes_texts_from_their_first_token(
    values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Scripted(lambda prompt, *_: Completion("house of cards", False))
    monkeypatch.setattr(generation, "_engine", lambda *_: engine)
    result = generate(GenerateRecipe.parse(own_text(values, filter={"cut": False})))
    tokenizer = make_tokenizer()
    start = tokenizer.bos_token_id or tokenizer.eos_token_id
    assert engine.prompts[0] == [start] and engine.prompts[1] == [start, *tokenizer("The ")["input_ids"]]
    rows = [*lines(result.rows), *lines(result.held_out)]
    assert {row["text"] for row in rows} == {"house of cards", "The house of cards"}
    assert encode(Source(result.rows, field="text"), tokenizer, max_length=32, packing=True).tokens


def test_openings_of_chats_come_from_the_template() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% if kind %}{{ kind }}{% endif %}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    )
    assert tokenizer.decode(opening(tokenizer, {"kind": "<system>"})) == "<system><user>"
    for wrong in ("{{ messages[0].content }}", "<user>{{ messages[0].content }}{{ messages[0].content }}"):
        tokenizer.chat_template = wrong
        with pytest.raises(DataError, match="expected a chat template with an opening before a user's words"):
            opening(tokenizer, {})


def test_a_server_without_a_tokenizer_has_no_first_token(
    values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = {"server": {"url": "http://127.0.0.1:9", "model": "m"}}
    monkeypatch.setattr(generation, "_engine", lambda *_: None)
    with pytest.raises(
        RecipeError, match=r"^teacher.tokenizer: expected the server's tokenizer, .* Name its folder\.$"
    ):
        generate(GenerateRecipe.parse(own_text(values, teacher=teacher)))


def test_a_teacher_without_questions_is_an_error(values: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        RecipeError, match=r"got none to keep\. questions: 0 of 12 were kept, 12 cut\. See .*questions.jsonl"
    ):
        made(own_text(values), lambda *_: Completion("and so on", False), monkeypatch, chat=True)
