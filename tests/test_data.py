"""From a file to batches: nothing is lost, exactly the right tokens count, and every mistake is one clear line."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from potstill.data.batches import Examples, PaddingCollator, encode, pad_token_id
from potstill.data.loading import load
from potstill.data.rows import RowEncoder, in_groups
from potstill.data.sources import Source
from potstill.errors import DataError
from potstill.losses.alignment import IGNORE, target_positions
from toy_encoders import make_bert_tokenizer

CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
PIECES = ["the cat sat\n", "grüße ", "日本語", "🙂", "\u2028", "\r\n", "\t", "  ", "def f(x):", "a", "\x00", "ﬁ"]


@pytest.fixture(autouse=True)
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the files are kept that encoding writes."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "kept")
    return tmp_path / "kept" / "potstill"


def byte_level(template: str | None = None, chat: str | None = None, **special: str) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    names = ["<eos>", "<pad>", "<bos>", "<user>", "<assistant>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        ["the cat sat on the mat\n\n"] * 20,
        trainers.BpeTrainer(vocab_size=300, special_tokens=names, initial_alphabet=alphabet, show_progress=False),
    )
    if template is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[(name, tokenizer.token_to_id(name)) for name in names]
        )
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    made.chat_template = chat
    return made


PLAIN = byte_level(eos_token="<eos>", pad_token="<pad>", chat=CHAT)
WITH_BOS = byte_level("<bos> $A", bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")
WITH_BOS_AND_EOS = byte_level("<bos> $A <eos>", bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")
BOS_IS_EOS = byte_level("<eos> $A", bos_token="<eos>", eos_token="<eos>")
WITHOUT_EOS = byte_level(pad_token="<pad>")
TOKENIZERS = {
    "plain": PLAIN,
    "bos": WITH_BOS,
    "bos and eos": WITH_BOS_AND_EOS,
    "bos is eos": BOS_IS_EOS,
    "no eos": WITHOUT_EOS,
}
every_tokenizer = pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)


def ids(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def documents(count: int = 40, seed: int = 0) -> list[str]:
    chosen = random.Random(seed)
    return ["".join(chosen.choices(PIECES, k=chosen.randint(1, 30))) for _ in range(count)]


@pytest.fixture
def write(tmp_path: Path):
    def writer(rows: list[Any], name: str = "data.jsonl") -> str:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return str(path)

    return writer


def rows_of(examples: Examples) -> list[list[int]]:
    return [row["input_ids"] for row in examples.dataset]


def joined(rows: list[list[int]]) -> list[int]:
    return [token for row in rows for token in row]


def check_tokens(examples: Examples) -> None:
    """The count is what the rule of targets gives, row by row, and every row has a part in it."""
    counts = [int(target_positions(torch.tensor([row["labels"]])).sum()) for row in examples.dataset]
    assert examples.tokens == sum(counts)
    assert all(counts)


def refused(call, *parts: str) -> None:
    """The call is refused in one line with each of these."""
    with pytest.raises(DataError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith("data: expected ")
    assert ", got " in message
    assert message.endswith(".")
    assert caught.value.__suppress_context__ or caught.value.__context__ is None
    for part in parts:
        assert part in message, message


# Text


@every_tokenizer
@pytest.mark.parametrize("max_length", [2, 3, 16, 64, 10_000])
def test_packing_loses_nothing(tokenizer, max_length, write):
    texts = documents()
    examples = encode(Source(write([{"text": text} for text in texts])), tokenizer, max_length=max_length, packing=True)
    rows = rows_of(examples)
    assert all(len(row) == max_length for row in rows[:-1])
    assert 2 <= len(rows[-1]) <= max_length
    begin = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    stream = [token for text in texts for token in (*begin, *ids(tokenizer, text), *end)]
    assert joined(rows) == (stream if len(stream) % max_length != 1 else stream[:-1])
    if len(stream) % max_length != 1:
        assert tokenizer.decode(joined(rows), skip_special_tokens=True) == "".join(texts)
    assert all(row["labels"] == row["input_ids"] for row in examples.dataset)
    assert examples.tokens == sum(len(row) - 1 for row in rows)
    check_tokens(examples)


LONG = {
    "text": [{"text": "the cat sat on the mat " * 4}, {"text": "the cat"}],
    "completion": [{"prompt": "the cat ", "completion": "sat on the mat " * 4}, {"prompt": "a ", "completion": "cat"}],
    "messages": [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "the cat sat " * n}]}
        for n in (6, 1)
    ],
    "input_ids": [{"input_ids": [*range(5, 34)], "weights": [0.5] * 29}, {"input_ids": [7, 8, 9]}],
}


@pytest.mark.parametrize("kind", LONG)
def test_rows_that_are_too_long_are_cut_left_out_or_split_and_counted(kind: str, write: Any) -> None:
    tokenizer = byte_level(chat=CHAT, eos_token="<eos>", pad_token="<pad>")
    whole = encode(Source(write(LONG[kind])), tokenizer, max_length=10_000).dataset
    assert len(whole[0]["input_ids"]) > 12 >= len(whole[1]["input_ids"])
    found: dict[Any, Any] = {}
    for way, done in (("cut", "truncated to max_length 12"), ("drop", "left out"), ("split", "split")):
        examples = encode(Source(write(LONG[kind]), long_rows=way), tokenizer, max_length=12)
        note = f"1 example {done}." if way == "cut" else f"1 example longer than max_length 12 {done}."
        assert any(note in x for x in examples.notes)
        assert all(len(row["input_ids"]) <= 12 for row in examples.dataset)
        assert examples.dataset[-1] == whole[1]
        found[way] = examples.dataset
    for name, values in whole[0].items():
        assert [found["cut"][0][name], len(found["cut"])] == [values[:12], 2]
        parts = [row[name] for row in found["split"]][:-1]
        shared = kind != "text"  # the last token of a part, for the next one's first target
        joined = [value for number, part in enumerate(parts) for value in part[shared and number > 0 :]]
        assert joined == values[: len(joined)]
        assert len(values) - len(joined) < 3  # a last part without a target is left out
    assert len(found["drop"]) == 1
    assert min(len(row["input_ids"]) for row in found["split"]) > 1


@pytest.mark.parametrize("max_length", [2, 3, 7, 8, 9, 40])
@pytest.mark.parametrize("kind", ["completion", "messages", "input_ids"])
def test_rows_that_are_split_have_each_target_once(kind: str, max_length: int, write: Any) -> None:
    tokenizer = byte_level(chat=CHAT, eos_token="<eos>", pad_token="<pad>")
    rows = [*LONG[kind], {"prompt": "12345678", "completion": "the mat"}] if kind == "completion" else LONG[kind]
    whole = encode(Source(write(rows)), tokenizer, max_length=10_000)
    split = encode(Source(write(rows), long_rows="split"), tokenizer, max_length=max_length)
    targets = [[i for row in x.dataset for i in row["labels"][1:] if i != -100] for x in (whole, split)]
    assert targets[0] == targets[1]
    assert whole.tokens == split.tokens
    assert max(len(row["input_ids"]) for row in split.dataset) <= max_length


def test_a_text_that_is_cut_does_not_end_in_packed_rows(write: Any) -> None:
    tokenizer = byte_level(eos_token="<eos>", pad_token="<pad>")
    texts = ["the cat sat on the mat", "a"]
    rows = encode(
        Source(write([{"text": text} for text in texts]), long_rows="cut"), tokenizer, max_length=4, packing=True
    )
    (long, short), eos = (tokenizer(text)["input_ids"] for text in texts), tokenizer.eos_token_id
    assert rows_of(rows) == [long[:4], [eos, *short, eos]]
    assert [row["labels"] for row in rows.dataset] == [long[:4], [IGNORE, *short, eos]]


def test_long_rows_and_what_they_cannot_go_with(write: Any) -> None:
    tokenizer = byte_level(eos_token="<eos>", pad_token="<pad>")
    long_prompt = [{"prompt": "the cat sat " * 8, "completion": "a"}, {"prompt": "the ", "completion": "cat"}]
    with pytest.raises(DataError, match="expected prompts shorter than max_length 12"):
        encode(Source(write(long_prompt), long_rows="cut"), tokenizer, max_length=12)
    assert len(encode(Source(write(long_prompt), long_rows="drop"), tokenizer, max_length=12).dataset) == 1
    own = [row | {"teacher_prompt": "so: " + str(row["prompt"])} for row in LONG["completion"]]
    source = Source(write(own), long_rows="drop", teacher_prompt="teacher_prompt")
    (kept,) = encode(source, tokenizer, max_length=12).dataset
    assert tokenizer.decode(kept["teacher_input_ids"]).startswith("so: a cat")
    with pytest.raises(DataError, match=r"expected long_rows cut or drop beside prompts .*, got split"):
        encode(Source(write(own), long_rows="split", teacher_prompt="teacher_prompt"), tokenizer, max_length=12)
    with pytest.raises(DataError, match="expected no long_rows for the task encoder, got drop"):
        encode(Source(write(LONG["text"]), long_rows="drop"), tokenizer, max_length=12, task="encoder")
    packed = encode(Source(write(LONG["text"]), long_rows="drop"), tokenizer, max_length=12, packing=True)
    assert packed.tokens < 12


@every_tokenizer
@pytest.mark.parametrize("max_length", [3, 8, 10_000])
def test_windows_lose_nothing(tokenizer, max_length, write):
    texts = [*documents(), "the cat", "a" * max_length, "a" * (max_length + 1)]
    examples = encode(Source(write([{"text": text} for text in texts])), tokenizer, max_length=max_length)
    rows = rows_of(examples)
    assert all(2 <= len(row) <= max_length for row in rows)
    whole = [ids(tokenizer, text) for text in texts]
    if tokenizer.eos_token_id is not None:
        whole = [[*row, tokenizer.eos_token_id] for row in whole]
    if tokenizer.bos_token_id is not None:
        whole = [[tokenizer.bos_token_id, *row] for row in whole]
    alone = [row for row in whole if len(row) == 1]
    assert joined(rows) == joined([row for row in whole if len(row) > 1])
    left_out = [note for note in examples.notes if "left out" in note]
    assert len(left_out) == bool(alone)
    check_tokens(examples)


def test_batches_of_the_reader_do_not_show(write):
    texts = [f"the cat sat {i}" for i in range(700)]
    examples = encode(Source(write([{"text": t} for t in texts])), PLAIN, max_length=4096, packing=True)
    assert PLAIN.decode(joined(rows_of(examples)), skip_special_tokens=True) == "".join(texts)
    check_tokens(examples)


def test_long_texts_are_tokenised_some_at_a_time():
    texts = ["a" * n for n in (3, 3, 4, 11, 2, 0, 8, 1)]
    assert [list(map(len, group)) for group in in_groups(texts, 10)] == [[3, 3, 4], [11], [2, 0, 8], [1]]


def test_eos_of_the_data_is_not_doubled(write):
    examples = encode(Source(write([{"text": "a<eos>"}, {"text": "a"}])), PLAIN, max_length=9)
    assert rows_of(examples) == [ids(PLAIN, "a<eos>")] * 2


def test_empty_rows_are_skipped_and_blank_ones_are_not(write):
    path = write([{"text": t} for t in ("", "  \n", "[]", "", "the cat")])
    examples = encode(Source(path), PLAIN, max_length=32)
    assert [PLAIN.decode(row) for row in rows_of(examples)] == ["  \n<eos>", "[]<eos>", "the cat<eos>"]
    assert examples.notes == ("data.jsonl: 2 empty rows skipped.",)
    packed = encode(Source(path), PLAIN, max_length=32, packing=True)
    assert packed.notes == examples.notes


def test_rows_that_are_all_too_long_are_an_error_of_their_length(write):
    source = Source(write([{"text": "the cat sat on the mat"}]), long_rows="drop")
    refused(lambda: encode(source, PLAIN, max_length=2), "at most max_length 2", "Raise max_length")


def test_what_cannot_be_predicted_is_left_out(write):
    gone = byte_level(pad_token="<pad>")
    gone.backend_tokenizer.normalizer = normalizers.Strip()
    examples = encode(Source(write([{"text": t} for t in ("a", "  ", "the cat")])), gone, max_length=8)
    assert rows_of(examples) == [ids(gone, "the cat")]
    assert any("2 examples without a target token left out" in note for note in examples.notes)
    assert any("expected an EOS token" in note for note in examples.notes)


@every_tokenizer
def test_no_warning_and_no_change_of_the_tokenizer(tokenizer, write, capfd):
    tokenizer.model_max_length = 4
    before = tokenizer.backend_tokenizer.to_str()
    encode(Source(write([{"text": "the cat sat " * 50}])), tokenizer, max_length=8)
    assert tokenizer.backend_tokenizer.to_str() == before
    assert capfd.readouterr() == ("", "")


# Prompt and completion


@every_tokenizer
def test_the_prompt_is_masked_exactly(tokenizer, write):
    pairs = list(zip(documents(seed=1), documents(seed=2), strict=True))
    path = write([{"prompt": prompt, "completion": completion} for prompt, completion in pairs])
    examples = encode(Source(path), tokenizer, max_length=10_000)
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    begin = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    assert len(examples.dataset) == len(pairs)
    for row, (prompt, completion) in zip(examples.dataset, pairs, strict=True):
        given, answer = begin + ids(tokenizer, prompt), ids(tokenizer, completion) + end
        assert row["input_ids"] == given + answer
        assert row["labels"] == [IGNORE] * len(given) + answer
    check_tokens(examples)


def metaspace() -> PreTrainedTokenizerFast:
    """A tokenizer that puts a space before each text."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    names = ["<unk>", "<bos>", "<eos>", *(f"<0x{i:02X}>" for i in range(256))]
    tokenizer.train_from_iterator(
        ["the cat sat on the mat 2 + 2 = 4 "] * 20, trainers.BpeTrainer(special_tokens=names, show_progress=False)
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", tokenizer.token_to_id("<bos>"))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", unk_token="<unk>")


class Slow(PreTrainedTokenizerFast):
    """A tokenizer without offsets of its tokens."""

    is_fast = False

    def __call__(self, *texts: Any, return_offsets_mapping: bool = False, **options: Any) -> Any:
        assert not return_offsets_mapping
        return super().__call__(*texts, **options)


@pytest.mark.parametrize("slow", [False, True])
@pytest.mark.parametrize(
    ("prompt", "completion"), [("2+2=", "4"), ("def f():\n", "    return 1"), ("Answer:\n", "yes"), ("é", "à 日本")]
)
def test_prompt_and_completion_are_tokenized_as_one_text(prompt, completion, slow, write):
    tokenizer = metaspace()
    if slow:
        tokenizer = Slow(tokenizer_object=tokenizer.backend_tokenizer, bos_token="<bos>", eos_token="<eos>")
    path = write([{"prompt": prompt, "completion": completion}])
    (row,) = encode(Source(path), tokenizer, max_length=99).dataset
    assert row["input_ids"] == tokenizer(prompt + completion)["input_ids"] + [tokenizer.eos_token_id]
    targets = [label for label in row["labels"] if label != IGNORE]
    assert tokenizer.decode(targets).strip() == f"{completion}<eos>".strip()
    assert row["labels"][-len(targets) :] == targets


def test_a_token_over_the_border_is_learnt_and_noted_where_it_happens_often(write):
    rows = [{"prompt": "on the ca", "completion": "t sat"}]
    examples = encode(Source(write(rows)), PLAIN, max_length=99)
    (row,) = examples.dataset
    assert row["input_ids"] == [*ids(PLAIN, "on the cat sat"), PLAIN.eos_token_id]
    assert PLAIN.decode([label for label in row["labels"] if label != IGNORE]) == " cat sat<eos>"
    (note,) = examples.notes
    assert "in 1 example a token stands on both sides" in note and "' cat' in row 1 of data.jsonl" in note
    rare = encode(Source(write(rows + [{"prompt": "a\n", "completion": "b"}] * 30)), PLAIN, max_length=99)
    assert rare.notes == ()


def test_no_second_end_behind_the_end_of_a_turn(write):
    path = write([{"prompt": "<user>a", "completion": "b<eos>"}, {"prompt": "<user>a", "completion": "b<assistant>"}])
    first, second = encode(Source(path), byte_level(eos_token="<eos>"), max_length=99).dataset
    assert (PLAIN.decode(first["input_ids"]), PLAIN.decode(second["input_ids"])) == (
        "<user>ab<eos>",
        "<user>ab<assistant><eos>",
    )
    closed = byte_level(eos_token="<eos>", chat="{% for m in messages %}{{ m.content }}<assistant>{% endfor %}")
    assert [PLAIN.decode(row) for row in rows_of(encode(Source(path), closed, max_length=99))] == [
        "<user>ab<eos>",
        "<user>ab<assistant>",
    ]


def test_text_that_the_tokenizer_changes_is_noted(write):
    lower = byte_level(eos_token="<eos>")
    lower.backend_tokenizer.normalizer = normalizers.Lowercase()
    for row in ({"text": "The Cat"}, {"prompt": "The ", "completion": "Cat"}):
        assert (
            "tokenizer: it changes text before it reads it: 'The' is read as 'the' (data.jsonl)."
            in encode(Source(write([row])), lower, max_length=99).notes
        )
    folded = byte_level(eos_token="<eos>")
    folded.backend_tokenizer.normalizer = normalizers.Replace("\n", " ")
    (note,) = encode(Source(write([{"text": "a\nb"}])), folded, max_length=99).notes
    assert "'a b' is read as" in note or "is read as 'a b'" in note


def test_eos_that_is_in_a_prompt_stays(write):
    row = {"prompt": "a<eos>", "completion": "the cat"}
    for tokenizer in (PLAIN, BOS_IS_EOS, WITH_BOS_AND_EOS):
        (encoded,) = encode(Source(write([row])), tokenizer, max_length=99).dataset
        prompt = [i for i, label in zip(encoded["input_ids"], encoded["labels"], strict=True) if label == IGNORE]
        assert tokenizer.decode(prompt).endswith("a<eos>")


def test_completions_are_cut_on_the_right(write):
    path = write([{"prompt": "abcd", "completion": "efgh"}, {"prompt": "a", "completion": "b"}])
    examples = encode(Source(path), PLAIN, max_length=6)
    assert [PLAIN.decode(row) for row in rows_of(examples)] == ["abcdef", "ab<eos>"]
    assert [row["labels"].count(IGNORE) for row in examples.dataset] == [4, 1]
    assert examples.tokens == 4
    assert examples.notes == ("data.jsonl: 1 example truncated to max_length 6.",)


def test_an_empty_prompt_and_an_empty_completion(write):
    path = write([{"prompt": "", "completion": "abc"}, {"prompt": "abc", "completion": ""}])
    examples = encode(Source(path), PLAIN, max_length=9)
    assert [PLAIN.decode(row) for row in rows_of(examples)] == ["abc<eos>"]
    assert examples.tokens == 3  # the first token is never predicted
    assert examples.notes == ("data.jsonl: 1 empty row skipped.",)


def test_a_prompt_without_room_is_refused(write, kept):
    rows = [{"prompt": "a" * n, "completion": "b"} for n in (3, 8, 7, 20)]
    path = write([{"prompt": "x", "completion": ""}, *rows])
    refused(
        lambda: encode(Source(path), PLAIN, max_length=8),
        *("max_length 8", "got 8 tokens in row 3", "2 such", "Raise max_length"),
    )
    assert not list(kept.glob("*.partial"))
    assert encode(Source(path), PLAIN, max_length=21).tokens


# Messages


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def counted(row: dict[str, list[int]]) -> list[str]:
    """The text of each run of tokens that count."""
    runs: list[list[int]] = []
    for before, label in zip([IGNORE, *row["labels"]], row["labels"], strict=False):
        if label != IGNORE:
            if before == IGNORE:
                runs.append([])
            runs[-1].append(label)
    return [PLAIN.decode(run) for run in runs]


def test_every_turn_of_the_assistant_counts_and_nothing_else(write):
    talk = [turn("user", "hi"), turn("assistant", "yes"), turn("user", "why"), turn("assistant", "the cat")]
    more = [turn("user", "a"), turn("assistant", "b"), turn("assistant", "c"), turn("user", "d")]
    examples = encode(Source(write([{"messages": talk}, {"messages": more}])), PLAIN, max_length=99)
    first, second = examples.dataset
    assert PLAIN.decode(first["input_ids"]) == PLAIN.apply_chat_template(talk, tokenize=False)
    assert counted(first) == ["yes<eos>", "the cat<eos>"]
    assert PLAIN.decode(second["input_ids"]) == PLAIN.apply_chat_template(more, tokenize=False)
    assert counted(second) == ["b<eos>", "c<eos>"]
    for row in examples.dataset:
        assert all(label in (IGNORE, i) for i, label in zip(row["input_ids"], row["labels"], strict=True))
    check_tokens(examples)


def test_a_token_over_the_border_belongs_to_the_assistant(write):
    tokenizer = byte_level(
        eos_token="<eos>",
        chat="{% for m in messages %}{{ m.role[0] }}:\n{{ m.content }}<eos>{% endfor %}"
        "{% if add_generation_prompt %}a:\n{% endif %}",
    )
    assert len(ids(tokenizer, "\n\n")) == 1
    talk = [turn("user", "hi"), turn("assistant", "\n\nyes")]
    (row,) = encode(Source(write([{"messages": talk}])), tokenizer, max_length=99).dataset
    assert counted(row) == ["\n\n\nyes<eos>"]


def test_conversations_are_cut_and_need_room(write):
    talk = [turn("user", "abcdef"), turn("assistant", "ghijkl")]
    path = write([{"messages": []}, {"messages": talk}])
    examples = encode(Source(path), PLAIN, max_length=12)
    assert counted(examples.dataset[0]) == ["gh"]
    assert examples.notes == ("data.jsonl: 1 empty row skipped.", "data.jsonl: 1 example truncated to max_length 12.")
    refused(lambda: encode(Source(path), PLAIN, max_length=10), "got 10 tokens in row 2", "Raise max_length")


def test_conversations_read_alike_from_every_format(write, tmp_path):
    """Arrow gives each message the keys of all others, as null; a template must not see them."""
    named = "{% for m in messages %}<{{ m.role }}>{{ m.keys() | list | sort }}{{ m.content }}<eos>{% endfor %}"
    named += "{% if add_generation_prompt %}<assistant>{% endif %}"
    tokenizer = byte_level(eos_token="<eos>", chat=named)
    talk = [turn("user", "hi"), {**turn("assistant", "yes"), "mood": {"good": "very"}}]
    other = [turn("user", "hi"), {**turn("assistant", "no"), "mood": {"bad": "a bit"}}]
    rows = [{"messages": talk}, {"messages": other}]
    table = pa.Table.from_pylist(rows)
    pyarrow.parquet.write_table(table, tmp_path / "data.parquet")
    datasets.Dataset(table).save_to_disk(str(tmp_path / "saved"))
    quoted = [json.dumps(row["messages"]).replace('"', '""') for row in rows]
    (tmp_path / "data.csv").write_text("messages\n" + "".join(f'"{text}"\n' for text in quoted))
    expected = encode(Source(write(rows)), tokenizer, max_length=999)
    # The list of keys opens with the assistant's turn, so the generation prompt is still a prefix.
    assert "mood" in tokenizer.decode(expected.dataset[0]["input_ids"])
    for name in ("data.parquet", "saved", "data.csv"):
        other_way = encode(Source(tmp_path / name), tokenizer, max_length=999)
        assert other_way.dataset[:] == expected.dataset[:]


@pytest.mark.parametrize(
    ("talk", "parts"),
    [
        ([turn("user", "hi")], ["a turn of the assistant", "row 2", "Remove the row"]),
        ([turn("assistant", "hi")], ["before the assistant's first turn", "row 2", "Begin"]),
        ([turn("wizard", "hi"), turn("assistant", "yes")], ["no wizards", "row 2", "Correct the row"]),
    ],
)
def test_conversations_that_cannot_be_masked(talk, parts, write):
    strict = "{% if messages[0].role == 'wizard' %}{{ raise_exception('no\nwizards') }}{% endif %}" + CHAT
    tokenizer = byte_level(eos_token="<eos>", chat=strict)
    path = write([{"messages": [turn("user", "hi"), turn("assistant", "yes")]}, {"messages": talk}])
    refused(lambda: encode(Source(path), tokenizer, max_length=99), *parts)


def test_a_template_that_rewrites_gives_an_example_for_each_turn(write):
    forgetful = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content if loop.last or m.role == 'user' else '...' }}<eos>"
        "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    tokenizer = byte_level(eos_token="<eos>", chat=forgetful)
    once, again = [[turn("user", "a"), turn("assistant", text)] for text in ("b", "c")]
    examples = encode(Source(write([{"messages": once}, {"messages": once + again}])), tokenizer, max_length=99)
    assert [tokenizer.decode(row) for row in rows_of(examples)] == [
        *["<user>a<eos><assistant>b<eos>"] * 2,
        "<user>a<eos><assistant>...<eos><user>a<eos><assistant>c<eos>",
    ]
    assert [counted(row) for row in examples.dataset] == [["b<eos>"], ["b<eos>"], ["c<eos>"]]
    (note,) = examples.notes
    assert "first in row 2 of data.jsonl" in note and note.endswith("each turn of the assistant, 2 in all.")
    short = encode(Source(write([{"messages": once + again}])), tokenizer, max_length=7)
    assert len(short.dataset) == 1 and "1 example without a target token left out" in short.notes[1]


def test_a_template_without_its_generation_prompt_is_refused(write):
    without_end = byte_level(eos_token="<eos>", chat="{% for m in messages %}{{ m.role }}{{ m.content }}{% endfor %}?")
    path = write([{"messages": [turn("user", "a"), turn("assistant", "b")]}])
    refused(
        lambda: encode(Source(path), without_end, max_length=99),
        "behind its generation prompt",
        "row 1",
        "Name another",
    )


def test_no_chat_template(write):
    path = write([{"messages": [turn("user", "a"), turn("assistant", "b")]}])
    refused(lambda: encode(Source(path), WITH_BOS, max_length=99), "chat template", "Set tokenizer.chat_template")


# Token ids


def test_ids_are_taken_as_they_are(write):
    rows = [{"input_ids": [5, 6, 7, 0]}, {"input_ids": [8] * 9}, {"input_ids": []}]
    examples = encode(Source(write(rows)), WITH_BOS, max_length=6)
    assert rows_of(examples) == [[5, 6, 7, 0], [8] * 6]
    assert examples.tokens == 3 + 5
    assert examples.notes == ("data.jsonl: 1 empty row skipped.", "data.jsonl: 1 example truncated to max_length 6.")


def test_labels_are_taken_along(write):
    rows = [{"input_ids": [5, 6, 7], "labels": [5, IGNORE, 7]}, {"input_ids": [5, 6], "labels": [5, IGNORE]}]
    examples = encode(Source(write(rows)), PLAIN, max_length=6)
    assert examples.dataset[:] == {"input_ids": [[5, 6, 7]], "labels": [[5, IGNORE, 7]]}
    assert examples.tokens == 1
    assert examples.notes == ("data.jsonl: 1 example without a target token left out.",)


@pytest.mark.parametrize(
    ("row", "parts"),
    [
        ({"input_ids": [5, 300]}, ["from 0 to 2", "got 300 in row 2", "Use the tokenizer"]),
        ({"input_ids": [5, -1]}, ["got -1 in row 2"]),
        ({"input_ids": [5, IGNORE]}, ["got -100 in row 2"]),
        ({"input_ids": [5, 2**40]}, ["got 1099511627776 in row 2"]),
        ({"input_ids": [5, 6], "labels": [5]}, ["got 1 and 2 in row 2", "Correct the row"]),
        ({"input_ids": [5, 6], "labels": [5, 999]}, ["got 999 in row 2"]),
        ({"input_ids": [5, 6], "attention_mask": [1, 0]}, ["without padding", "row 2", "Remove the padding"]),
        ({"input_ids": [5, 6], "attention_mask": [1, 2]}, ["of one text", "with 2 in row 2", "each text a row"]),
        ({"input_ids": [5, 6], "attention_mask": [1]}, ["as many mask values", "got 1 and 2 in row 2"]),
        ({"input_ids": [5, 6], "attention_mask": [True, False]}, ["without padding", "with 0 in row 2"]),
        ({"input_ids": [5, 6, 7], "labels": [6, 7, IGNORE]}, ["the next tokens in row 2", "shifted later"]),
        ({"input_ids": [5, 6, 7], "labels": [IGNORE, 7, 0]}, ["the next tokens in row 2"]),
        ({"input_ids": [5, 1.5]}, ["whole numbers", "the list [5, 1.5] in row 2"]),
        ({"input_ids": [5, True]}, ["whole numbers", "row 2"]),
        ({"input_ids": [5, None]}, ["whole numbers", "row 2"]),
        ({"input_ids": [2**70]}, ["whole numbers", "row 2"]),
        ({"input_ids": "5 6"}, ["whole numbers", "the text '5 6' in row 2"]),
        ({"input_ids": 5}, ["whole numbers", "the number 5 in row 2"]),
    ],
)
def test_ids_that_cannot_be(row, parts, write):
    first = {key: [1, 1] for key in row}
    refused(lambda: encode(Source(write([first, row])), PLAIN, max_length=6), *parts)


# Options of a source


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "a", "completion": "b"},
        {"messages": [turn("user", "a"), turn("assistant", "b")]},
        {"input_ids": [5, 6]},
    ],
)
def test_rows_that_are_packed_later_stay_as_they_are(row, write):
    source = Source(write([row]))
    options = {"max_length": 9, "packing": True}
    assert encode(source, PLAIN, **options).dataset[:] == encode(source, PLAIN, max_length=9).dataset[:]
    assert not encode(source, PLAIN, **options).joined
    refused(lambda: encode(source, make_bert_tokenizer(), **options, task="masked"), "text to pack", "Set packing")


def test_max_length_must_leave_something_to_predict(write):
    refused(lambda: encode(Source(write([{"text": "a"}])), PLAIN, max_length=1), "max_length >= 2", "got 1")


@pytest.mark.parametrize(
    "rows",
    [
        [{"text": ""}, {"text": ""}],
        [{"text": "a"}, {"text": "b"}],
        [{"input_ids": [5, 6], "labels": [IGNORE, IGNORE]}],
        [{"input_ids": [5]}],
    ],
)
def test_empty_data(rows, write):
    path = write(rows)
    for _ in range(2):  # also when it was kept
        refused(lambda: encode(Source(path), WITHOUT_EOS, max_length=9), "empty data", f"{len(rows)} row")


def test_a_file_without_columns(tmp_path: Path):
    pyarrow.parquet.write_table(pa.table({}), tmp_path / "data.parquet")
    with pytest.raises(DataError, match=r"in data\.parquet, got none\. Name the one to read"):
        encode(Source(tmp_path / "data.parquet"), WITHOUT_EOS, max_length=9)


# Sources


@pytest.mark.parametrize(
    ("source", "row", "kind"),
    [
        ({}, {"text": "a", "id": 1}, "text"),
        ({"field": "body"}, {"body": "a", "text": 1}, "text"),
        ({}, {"prompt": "a", "completion": "b"}, "completion"),
        ({"prompt": "q", "completion": "a"}, {"q": "a", "a": "b", "text": "c"}, "completion"),
        ({}, {"messages": [turn("user", "a")]}, "messages"),
        ({"messages": "talk"}, {"talk": [turn("user", "a")]}, "messages"),
        ({}, {"input_ids": [1], "attention_mask": [1], "labels": [1], "id": 0}, "input_ids"),
        ({"input_ids": "ids"}, {"ids": [1]}, "input_ids"),
    ],
)
def test_the_kind_is_found_or_named(source, row, kind, write):
    dataset, found, *_ = load(Source(write([row]), **source))
    assert found == kind
    expected = {
        "text": ["text"],
        "completion": ["prompt", "completion"],
        "messages": ["messages"],
        "input_ids": [n for n in ("input_ids", "labels", "attention_mask") if n == "input_ids" or n in row],
    }
    assert dataset.column_names == expected[kind]
    assert dataset.cache_files  # memory-mapped


def test_every_format_gives_the_same_text(write, tmp_path):
    texts = [*documents(600), "2020-01-01", "12", "NA", "null", "None", "", 'say "hi", twice']
    rows = [{"id": i, "text": text} for i, text in enumerate(texts)]
    table = pa.table({"id": list(range(len(texts))), "text": texts})
    pyarrow.parquet.write_table(table, tmp_path / "data.parquet", row_group_size=100)
    pyarrow.parquet.write_table(
        table.set_column(1, "text", table["text"].dictionary_encode()), tmp_path / "category.parquet"
    )
    datasets.Dataset(table).save_to_disk(str(tmp_path / "saved"))
    quoted = ['"' + text.replace('"', '""') + '"' for text in texts]
    (tmp_path / "data.csv").write_bytes(
        ("\ufeffid,text\r\n" + "".join(f"{i},{text}\r\n" for i, text in enumerate(quoted))).encode()
    )
    (tmp_path / "list.json").write_text(json.dumps(rows, indent=1), encoding="utf-8-sig")
    (tmp_path / "lines.json").write_text("\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    (tmp_path / "windows.jsonl").write_bytes("\r\n".join(map(json.dumps, rows)).encode("utf-8-sig"))
    write(rows, "data.JSONL")
    names = "data.JSONL windows.jsonl list.json lines.json data.csv data.parquet category.parquet saved"
    for name in names.split():
        assert load(Source(tmp_path / name))[0]["text"][:] == texts, name


def test_columns_of_dates_and_numbers_stay_text(write):
    """The reader of `datasets` makes timestamps of these."""
    path = write([{"prompt": "when?", "completion": f"2020-01-0{i}"} for i in range(1, 4)])
    assert load(Source(path))[0]["completion"][:] == ["2020-01-01", "2020-01-02", "2020-01-03"]


def test_a_text_file_is_one_document(tmp_path):
    (tmp_path / "book.txt").write_bytes("\ufeffone\r\n\r\ntwo 日本\n".encode())
    dataset, kind, *_ = load(Source(tmp_path / "book.txt"))
    assert (dataset[:], kind) == ({"text": ["one\n\ntwo 日本\n"]}, "text")


def test_the_progress_bars_are_as_before(tmp_path):
    datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(str(tmp_path / "saved"))
    for change, disabled in (
        (datasets.disable_progress_bars, True),
        (datasets.enable_progress_bars, False),
    ):
        change()
        load(Source(tmp_path / "saved"))
        assert datasets.are_progress_bars_disabled() is disabled


TEXT_ROW = b'{"text": "a"}\n'


@pytest.mark.parametrize(
    ("name", "content", "source", "parts"),
    [
        ("trian.jsonl", TEXT_ROW, {"path": "train.jsonl"}, ["not exist", "trian.jsonl?", "Correct the path"]),
        ("data.jsonl", TEXT_ROW, {"path": "missing/data.jsonl"}, ["not exist"]),
        ("data.xlsx", b"a", {}, [".jsonl", ".parquet", "data.xlsx", "Rename or convert"]),
        ("data.jsonl", b"", {}, ["at least one row", "Give a file with data"]),
        ("data.jsonl", b"\n \n", {}, ["at least one row"]),
        ("data.json", b"[]", {}, ["at least one row"]),
        ("data.csv", b"text\n", {}, ["at least one row"]),
        ("data.txt", b"", {}, ["at least one row"]),
        ("data.jsonl", TEXT_ROW + b'\n{"text": "b\n', {}, ["JSON", "line 3, column 10", "one whole object a line"]),
        ("data.json", b'{\n "text" "a"\n}', {}, ["JSON", "line 2", "one whole object a line"]),
        ("data.jsonl", b'{\n "text": "a"\n}', {}, ["JSON", "line 1", "one whole object a line"]),
        ("data.json", b'[{"text": "a"},\n{"text" 1}]', {}, ["JSON", "line 2, column 9"]),
        (
            "data.jsonl",
            TEXT_ROW + b'{"text": "a", "text": "b"}',
            {},
            ["the key 'text' twice in an object", "in line 2"],
        ),
        ("data.json", b'[{"messages": [{"role": "user", "role": "user"}]}]', {}, ["the key 'role' twice", "in line 1"]),
        ("data.jsonl", TEXT_ROW + b'"a"\n', {}, ["JSON object in row 2", "the text 'a'"]),
        ("data.jsonl", b'{"text": "\xfc"}', {}, ["UTF-8", "0xfc", "Save the file as UTF-8"]),
        ("data.txt", b"gr\xfc\xdfe", {}, ["UTF-8", "0xfc"]),
        ("data.csv", b"text\n\xfc\n", {}, ["UTF-8 in data.csv"]),
        ("data.csv", b"text,b\n1,2\n1,2,3\n", {}, ["Expected 2 columns, got 3", "Write the file again"]),
        ("data.parquet", b"PAR1 not at all", {}, ["readable as .parquet", "Write the file again"]),
        ("data.jsonl", TEXT_ROW + b'{"text": 3.5}\n', {}, ["text in column 'text'", "number 3.5 in row 2"]),
        ("data.jsonl", TEXT_ROW + b'{"text": null}\n', {}, ["null", "row 2", "Correct or remove"]),
        ("data.jsonl", TEXT_ROW + b'{"txt": "b"}\n', {}, ["null", "row 2"]),
        ("data.jsonl", TEXT_ROW * 600 + b'{"text": ["b"]}\n', {}, ["the list ['b'] in row 601"]),
        ("data.jsonl", TEXT_ROW + b'{"text": {"a": 1}}\n', {}, ["an object in row 2"]),
        ("data.jsonl", TEXT_ROW + b'{"text": true}\n', {}, ["true in row 2"]),
        ("data.jsonl", TEXT_ROW + b'{"text": "\\ud83d"}\n', {}, ["surrogate", "row 2"]),
        ("data.jsonl", b'{"messages": "a"}', {}, ["a list of messages", "the text 'a' in row 1"]),
        ("data.jsonl", b'{"messages": [{"content": "a"}]}', {}, ["messages with role", "row 1"]),
        ("data.jsonl", b'{"messages": [{"role": "user", "content": 3}]}', {}, ["role and content", "row 1"]),
        ("data.jsonl", b'{"body": "a", "id": 1}', {}, ["a column text", "got body, id", "`field: body`"]),
        ("data.jsonl", b'{"body": "a"}', {"field": "bdy"}, ["'bdy'", "got body.", "mean body", "Name one"]),
        ("data.jsonl", b'{"prompt": "a"}', {}, ["both prompt and completion", "got prompt"]),
        ("data.jsonl", b'{"prompt": "a"}', {"prompt": "prompt"}, ["got no completion", "Name its column too"]),
        ("data.jsonl", b'{"text": "a", "messages": []}', {}, ["one kind", "got text, messages", "Name those to read"]),
        ("data.jsonl", TEXT_ROW, {"field": "text", "messages": "m"}, ["got field and messages", "Name one of"]),
        ("data.txt", b"a", {"field": "body"}, ["'body'", "got text."]),
    ],
)
def test_sources_that_cannot_be_read(name, content, source, parts, tmp_path, kept):
    (tmp_path / name).write_bytes(content)
    path = tmp_path / source.get("path", name)
    refused(lambda: load(Source(**{**source, "path": str(path)})), *parts)
    assert not kept.exists() or not list(kept.glob("*.partial"))


def test_folders_that_are_no_dataset(tmp_path):
    refused(lambda: load(Source(tmp_path)), "save_to_disk", "Name a file in it")
    part = datasets.Dataset.from_dict({"text": ["a"]})
    datasets.DatasetDict({"train": part, "test": part}).save_to_disk(str(tmp_path / "parts"))
    refused(lambda: load(Source(tmp_path / "parts")), "train, test", "`split: train`")
    for source in (Source(tmp_path / "parts" / "test"), Source(tmp_path / "parts", split="test")):
        assert load(source).dataset[:] == {"text": ["a"]}


def test_types_of_parquet(tmp_path):
    pyarrow.parquet.write_table(pa.table({"text": [1, 2]}), tmp_path / "data.parquet")
    refused(lambda: load(Source(tmp_path / "data.parquet")), "the number 1 in row 1")
    pyarrow.parquet.write_table(pa.table({"text": ["a", None]}), tmp_path / "data.parquet")
    refused(lambda: load(Source(tmp_path / "data.parquet")), "null", "row 2")


# What is kept


def test_what_is_kept_is_found_again_and_never_stale(write, kept, monkeypatch):
    path = write([{"text": "the cat"}])
    stamp = Path(path).stat()

    def first() -> str:
        return PLAIN.decode(encode(Source(path), PLAIN, max_length=9).dataset[0]["input_ids"])

    assert first() == "the cat<eos>"
    files = set(kept.iterdir())
    monkeypatch.setattr(RowEncoder, "rows", lambda *_: pytest.fail("encoded again"))
    assert first() == "the cat<eos>"
    monkeypatch.undo()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", kept.parent)
    assert set(kept.iterdir()) == files

    write([{"text": "the mat"}])  # of the same name, size and time
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert first() == "the mat<eos>"
    for file in kept.glob("*.json"):  # a run that was killed before it wrote the checksum
        file.unlink()
    assert first() == "the mat<eos>"


def test_other_tokenizers_and_options_do_not_share(write):
    path = write([{"text": "the cat sat"}, {"text": "a"}])
    expected = [
        (PLAIN, 99, False, ["the cat sat<eos>", "a<eos>"]),
        (WITH_BOS, 99, False, ["<bos>the cat sat<eos>", "<bos>a<eos>"]),
        (WITH_BOS, 99, True, ["<bos>the cat sat<eos><bos>a<eos>"]),
        (PLAIN, 4, True, ["the cat s", "at<eos>a<eos>"]),
    ]
    for tokenizer, length, packing, texts in expected:
        examples = encode(Source(path), tokenizer, max_length=length, packing=packing)
        if length == 99:
            assert [tokenizer.decode(row) for row in rows_of(examples)] == texts
        assert tokenizer.decode(joined(rows_of(examples))) == "".join(texts)
    talk = write([{"messages": [turn("user", "a"), turn("assistant", "b")]}])
    texts = []
    for chat in (CHAT, CHAT.replace("<eos>", "<eos><eos>")):
        tokenizer = byte_level(eos_token="<eos>", chat=chat)
        texts.append(tokenizer.decode(encode(Source(talk), tokenizer, max_length=99).dataset[0]["input_ids"]))
    assert texts[0] != texts[1]


@pytest.mark.slow
def test_another_process_finds_what_is_kept(write, tmp_path, kept):
    PLAIN.save_pretrained(tmp_path / "tokenizer")
    path = write([{"text": "the cat"}])
    script = (
        "import sys; from transformers import AutoTokenizer; from potstill import Source, encode\n"
        "t = AutoTokenizer.from_pretrained(sys.argv[1])\n"
        "print(encode(Source(sys.argv[2]), t, max_length=9).tokens)"
    )
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    tokens, files = encode(Source(path), tokenizer, max_length=9).tokens, set(kept.iterdir())
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "tokenizer"), path],
        env={**os.environ, "HF_DATASETS_CACHE": str(kept.parent), "PYTHONHASHSEED": "1"},  # this one's is random
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(done.stdout) == tokens
    assert set(kept.iterdir()) == files


# Batches


def test_the_collator_pads_on_the_right():
    examples = [{"input_ids": [5, 6, 0], "labels": [IGNORE, 6, 0]}, {"input_ids": [7], "labels": [7]}]
    batch = PaddingCollator(0)(examples)
    assert {name: tensor.dtype for name, tensor in batch.items()} == dict.fromkeys(batch, torch.int64)
    assert batch["input_ids"].tolist() == [[5, 6, 0], [7, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[IGNORE, 6, 0], [7, IGNORE, IGNORE]]


def test_padding_with_eos_does_not_hide_eos(write):
    examples = encode(Source(write([{"text": t} for t in ("the cat", "a", "ab")])), BOS_IS_EOS, max_length=9)
    pad, note = pad_token_id(BOS_IS_EOS)
    assert pad == BOS_IS_EOS.eos_token_id
    assert note == "tokenizer: expected a pad token, got none: its EOS token <eos> is used."
    batch = PaddingCollator(pad)(list(examples.dataset))
    assert int(target_positions(batch["labels"]).sum()) == examples.tokens
    assert (batch["labels"] == pad).sum(dim=1).tolist() == [2, 2, 2]


def test_the_pad_token():
    assert pad_token_id(PLAIN) == (PLAIN.pad_token_id, None)
    with pytest.raises(DataError, match=r"^tokenizer: expected a pad or an EOS token, got neither\. .*Set tokenizer"):
        pad_token_id(byte_level())
