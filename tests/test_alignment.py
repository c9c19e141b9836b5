"""One text in two tokenizers: every byte is in one chunk, whatever the text and the tokenizers."""

from __future__ import annotations

import random
from functools import cache

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from conftest import TEXT, make_tokenizer
from potstill.errors import VocabularyError
from potstill.teachers.byte_alignment import TokenizerPair, align_sizes
from potstill.teachers.pieces import TokenBytes
from reference_across import byte_level, llama_like, lower_case, normalizing, unigram, word_piece

MAKERS = {
    "bytes": lambda: byte_level(258),
    "BPE 300": lambda: byte_level(300),
    "BPE 600": lambda: byte_level(600),
    "Llama": llama_like,
    "Unigram": unigram,
}


@cache
def made(name: str) -> PreTrainedTokenizerFast:
    return MAKERS[name]()


@cache
def pair(student: str, teacher: str) -> TokenizerPair:
    return TokenizerPair(TokenBytes(made(student), "student"), TokenBytes(made(teacher), "teacher"))


def random_text(source: random.Random) -> str:
    kinds = [
        lambda: source.choice(TEXT)[: source.randint(1, 60)],
        lambda: " " * source.randint(1, 5),
        lambda: source.choice(["\n", "\r\n", "\t", "\u00a0", "\u200d", "\x00", "e\u0301"]),
        lambda: source.choice(["🎉", "👩‍👩‍👧", "🇩🇪", "𝔘𝔫𝔦", "日本", "مرحبا", "Привет", "ß", "<end>"]),
        lambda: chr(
            source.choice([source.randint(0x20, 0x7E), source.randint(0xA0, 0xD7FF), source.randint(0xE000, 0x1FFFF)])
        ),
    ]
    return "".join(source.choice(kinds)() for _ in range(source.randint(0, 12)))


@pytest.mark.parametrize("teacher", MAKERS)
@pytest.mark.parametrize("student", MAKERS)
def test_every_byte_is_in_one_chunk(student: str, teacher: str) -> None:
    both, source = pair(student, teacher), random.Random(0)
    covered = 0
    for _ in range(60):
        text = random_text(source)
        ids = made(student)(text, add_special_tokens=False)["input_ids"]
        if made(student).unk_token_id in ids:
            continue
        # Rows begin and end anywhere: within a character too.
        start = source.randint(0, len(ids) // 2)
        ids = ids[start : source.randint(start, len(ids))]
        reading = both.align(ids)
        again = both.align(ids)
        assert reading.ids == again.ids
        assert len(reading.ids) == len(reading.teacher)
        assert len(reading.student) == len(ids)
        for i in range(len(reading.sizes)):
            student_ids = [ids[t] for t in np.flatnonzero(reading.student == i)]
            teacher_ids = [reading.ids[t] for t in np.flatnonzero(reading.teacher == i)]
            assert student_ids
            assert teacher_ids
            chunks = [content(both, student_ids, "student", i), content(both, teacher_ids, "teacher", i)]
            if reading.sizes[i]:
                assert len(chunks[0]) == reading.sizes[i] or chunks[0].startswith(b" ")
                assert chunks[0].lstrip(b" ") == chunks[1].lstrip(b" ")
            else:  # a special token
                assert both.student.bytes_of[student_ids[0]] is None
        # Chunks follow one another, in both.
        for chunk in (reading.student, reading.teacher):
            assert (np.diff(chunk[chunk >= 0]) >= 0).all()
            assert set(chunk[chunk >= 0]) == set(range(len(reading.sizes)))
        covered += len(reading.sizes)
        text_bytes = sum(len(both.student.bytes_of[id] or b"") for id in ids)
        begins = [(both.student.bytes_of[id] or b"").startswith(b" ") for id in ids]
        spaces = sum(begins) if both.student.adds_space else 0
        assert text_bytes - spaces <= reading.sizes.sum() <= text_bytes
    assert covered > 200


def content(both: TokenizerPair, ids: list[int], whose: str, chunk: int) -> bytes:
    """The bytes of tokens; special tokens that were found in plain text stand for their own characters."""
    pieces = getattr(both, whose)
    return b"".join(pieces.content(id) if pieces.bytes_of[id] is None else pieces.bytes_of[id] for id in ids)


def test_a_plain_text_is_covered_to_the_last_byte() -> None:
    for student in MAKERS:
        for teacher in MAKERS:
            both = pair(student, teacher)
            text = TEXT[3] + "Zwei Räume 🎉\r\n"
            ids = made(student)(text, add_special_tokens=False)["input_ids"]
            reading = both.align(ids)
            assert reading.sizes.sum() == len(text.encode())
            assert (reading.student >= 0).all()
            opening = len(both.teacher.prefix())
            assert (reading.teacher[opening:] >= 0).all()
            assert (reading.teacher[:opening] == -1).all()


def test_equal_tokenizers_meet_in_every_token() -> None:
    for name in MAKERS:
        ids = made(name)(TEXT[0], add_special_tokens=False)["input_ids"]
        reading = pair(name, name).align(ids)
        opening = len(pair(name, name).teacher.prefix())
        assert reading.ids[opening:] == ids
        assert reading.student.tolist() == reading.teacher[opening:].tolist()
        empty = int(pair(name, name).student.spans(ids)[0].size == 0)  # the space before every text
        assert reading.student.tolist() == [0] * empty + list(range(len(ids) - empty))


def test_the_shortest_chunks() -> None:
    student_chunks, teacher_chunks, sizes = align_sizes([1, 2, 3, 4], [3, 1, 1, 5])
    assert student_chunks.tolist() == [0, 0, 1, 1]
    assert teacher_chunks.tolist() == [0, 1, 1, 1]
    assert sizes.tolist() == [3, 7]
    student_chunks, teacher_chunks, sizes = align_sizes([0, 2, 0, 2], [2, 2])
    assert student_chunks.tolist() == [0, 0, 1, 1]
    assert teacher_chunks.tolist() == [0, 1]
    assert sizes.tolist() == [2, 2]
    assert [x.tolist() for x in align_sizes([0], [])] == [[-1], [], []]


def test_special_tokens_meet_by_role_and_by_name() -> None:
    student = make_tokenizer(300, bos_token="<end>", eos_token="<end>", pad_token="<pad>")
    student.add_special_tokens({"additional_special_tokens": ["<user>", "<tool>"]})
    teacher = llama_like()
    teacher.add_special_tokens({"additional_special_tokens": ["<user>"]})
    both = TokenizerPair(TokenBytes(student, "student"), TokenBytes(teacher, "teacher"))
    user, tool, end = student.convert_tokens_to_ids(["<user>", "<tool>", "<end>"])
    word = student("return", add_special_tokens=False)["input_ids"]
    reading = both.align([user, *word, tool, *word, end])
    names = teacher.convert_ids_to_tokens(reading.ids)
    assert names[:2] == ["<s>", "<user>"]
    assert names[-1] == "</s>"
    assert reading.student[0] == 0
    assert reading.teacher[:2].tolist() == [-1, 0]
    assert reading.student[1 + len(word)] == -1  # the teacher has no <tool>
    assert reading.student[-1] == reading.teacher[-1] == len(reading.sizes) - 1
    assert reading.sizes[0] == reading.sizes[-1] == 0
    assert reading.sizes.sum() == 2 * len("return")
    assert not reading.continues[[0, -1, -2]].any()
    back = TokenizerPair(TokenBytes(teacher, "student"), TokenBytes(student, "teacher"))
    assert back.align(teacher("return")["input_ids"]).ids[0] == student.bos_token_id


def test_a_line_that_the_teacher_changes_does_not_count() -> None:
    both = TokenizerPair(TokenBytes(byte_level(258), "student"), TokenBytes(normalizing(), "teacher"))
    lines = ["return 1\n", "cafe\u0301 au lait\n", "return 2\n"]  # composed by the teacher
    reading = both.align(both.student.tokenizer("".join(lines))["input_ids"])
    first, second = len(lines[0].encode()), len(lines[1].encode())
    assert (reading.student[:first] >= 0).all()
    assert (reading.student[first : first + second] == -1).all()
    assert (reading.student[first + second :] >= 0).all()
    assert reading.sizes.sum() == first + len(lines[2])
    assert not reading.continues[reading.student[first - 1]]
    assert "é" in both.teacher.tokenizer.decode(reading.ids)


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        (word_piece, r"student's tokenizer: expected one whose tokens stand for the bytes .* \(WordPiece\)"),
        (lower_case, r"got one that reads .*Ab.* as .*ab"),
    ],
)
def test_tokenizers_that_lose_text_are_refused(tokenizer: object, message: str) -> None:
    with pytest.raises(VocabularyError, match=message) as caught:
        TokenBytes(tokenizer(), "student")  # type: ignore[operator]
    assert "\n" not in str(caught.value)


def test_longer_tokens_that_only_the_teacher_has() -> None:
    both = pair("bytes", "BPE 600")
    end = both.teacher.ids[b"r"]
    longer = both.longer_tokens(end, both.student.ids[b"r"])
    piece = both.teacher.bytes_of[end]
    assert piece is not None
    assert len(longer)
    assert all(both.teacher.bytes_of[id].startswith(piece) and both.teacher.bytes_of[id] != piece for id in longer)
    same = pair("BPE 600", "BPE 600")
    assert not any(len(same.longer_tokens(id, id)) for id in same.teacher.ids.values())


@pytest.mark.parametrize(("student", "teacher"), [("BPE 300", "Llama"), ("Llama", "BPE 600"), ("Unigram", "bytes")])
def test_tokens_begin_with_what_the_student_reads_first(student: str, teacher: str) -> None:
    both = pair(student, teacher)
    begins, student_pieces, teacher_pieces = both.first_student_token, both.student, both.teacher
    assert begins[teacher_pieces.tokenizer.eos_token_id] == student_pieces.tokenizer.eos_token_id
    assert teacher != "Llama" or begins[teacher_pieces.tokenizer.unk_token_id] == -1
    shared = len(both._counterparts)
    for id, piece in teacher_pieces.bytes_of.items():
        if piece:
            first = student_pieces.bytes_of[begins[id]]
            assert piece.startswith(first)
            read = student_pieces.tokenize(piece)
            assert student_pieces.adds_space or first == piece or read[0].id == begins[id]
            shared += first == piece and teacher_pieces.ids[piece] == id
    assert both.num_shared == shared > 50
    assert pair("bytes", "bytes").first_student_token == list(range(258))
