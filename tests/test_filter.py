"""What each filter drops, and above all what it does not."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from potstill.errors import DataError
from potstill.generation.filters import (
    Charset,
    Contamination,
    DroppedText,
    FewWords,
    FilterOptions,
    Length,
    NearDuplicates,
    Refusals,
    RepeatedResponses,
    Repetition,
    TextPair,
    apply_filters,
    words,
)

NAMES = [f"{first}{last}" for first in ("Al", "Be", "Cor", "Dan", "El") for last in ("a", "in", "o", "us")]
THINGS = ["apples", "boats", "clips", "dolls", "eggs", "forks", "games", "hats", "inks", "jars"]
ACTS = ["bakes {} for a fair", "counts {} under a tree", "paints {} in the rain", "sells {} to his friends at noon"]
TEMPLATE = "You are a careful tutor and explain each step to a pupil of ten years.\n\nProblem: {}\n\nEnd with Answer:."


def questions() -> list[str]:
    return [
        f"{name} has {i + 2} boxes and {ACTS[i % 4].format(thing)}. How many {thing} does {name} have in the end?"
        for i, (name, thing) in enumerate((name, thing) for name in NAMES for thing in THINGS)
    ]


def dropped(completion: str, one: object) -> bool:
    return bool(apply_filters([TextPair("", completion)], [one]).dropped)  # type: ignore[list-item]


def test_each_filter_sees_what_the_one_before_let_through() -> None:
    pairs = [
        TextPair("a", ""),
        TextPair("b", "I'm sorry, but I can't help with that."),
        TextPair("c", "fine"),
        TextPair("d", " "),
    ]
    result = apply_filters(pairs, [Refusals(), Length(min_characters=4, max_characters=10)])
    assert result.kept == [2]
    assert result.dropped == [
        DroppedText(0, "length", "0 characters, fewer than 4"),
        DroppedText(1, "refusal", 'begins with "I\'m sorry"'),
        DroppedText(3, "length", "0 characters, fewer than 4"),
    ]


def test_too_long() -> None:
    assert dropped("x" * 11, Length(max_characters=10))
    assert not dropped(" " + "x" * 10, Length(max_characters=10))


LONG = " ".join(questions()[i * 7] for i in range(25))


@pytest.mark.parametrize(
    ("text", "loops"),
    [
        ("the " * 200, True),
        (LONG + " and so on" * 200, True),  # at the end of a good text
        ("我喜欢" * 100, True),
        ("5 5 5 5", False),
        ("", False),
        ("\n".join(f"Step {i}: {i} + {i} = {2 * i}" for i in range(1, 30)), False),
    ],
)
def test_loops_are_repetition_and_lists_are_not(text: str, loops: bool) -> None:
    assert dropped(text, Repetition()) is loops


SHORT_LOOP = "the cat the cat the cat the cat the cat the cat the cat"


def test_loops_of_a_few_words() -> None:
    assert not dropped(SHORT_LOOP, Repetition())
    assert dropped(SHORT_LOOP, FewWords())
    assert not dropped(" ".join(SHORT_LOOP.split()[:10]), FewWords())
    assert not dropped(LONG, FewWords())
    assert dropped(f"{LONG} {SHORT_LOOP * 20}", FewWords())  # at the end of a good text
    drops = [dropped("a b c a b c a b c a b c", FewWords(share)) for share in (0.24, 0.25, 0.26)]
    assert drops == [False, False, True]


def test_one_response_to_several_prompts() -> None:
    answer = "It is a good question, and the answer depends on what you would like to do next."
    pairs = [TextPair(prompt, answer) for prompt in ("What is a tide?", "How does one sort a list?")]
    pairs.append(TextPair("What is a tide?", "The rise and fall of the sea, caused by the moon and by the sun."))
    assert apply_filters(pairs, [NearDuplicates(0.9)]).kept == [0, 1, 2]
    result = apply_filters(pairs, [RepeatedResponses(0.9)])
    assert result.kept == [0, 2]
    assert result.dropped == [DroppedText(1, "repeated-response", "1.00 like row 1")]
    names = [rule.name for rule in FilterOptions(distinct_words=0.3, repeated_responses=0.9).filters()]
    assert names[-2:] == ["few-words", "repeated-response"]


def test_other_scripts_and_broken_characters() -> None:
    latin = Charset(("latin",))
    assert not dropped("Füße, naïve: x = π? 5 × 5 → 25 😀", latin)
    assert dropped("Это ответ: 5", latin)
    assert not dropped("Это ответ: 5", Charset(("latin", "cyrillic")))
    assert not dropped("Это ответ, 答え, 5", Charset())
    for broken in ("caf\ufffd", "a\x00b", "\ud800"):
        assert dropped(broken, Charset())


@pytest.mark.parametrize(
    ("text", "refuses"),
    [
        ("I'm sorry, but I can't assist with that.", True),
        ("I cannot provide medical advice.", True),
        ("As an AI language model, I have no body.", True),
        ("Unfortunately, I am unable to answer this.", True),
        ("I’m just an AI.", True),
        ("I can't divide by zero, so x is not 0. Answer: 5", False),
        ("He said he is sorry, but 5 remain.", False),
        ("I will not count the first one. Answer: 4", False),
        ("As an aid, draw a line.", False),
    ],
)
def test_refusals(text: str, refuses: bool) -> None:
    assert dropped(text, Refusals()) is refuses


def test_a_template_makes_no_duplicates() -> None:
    """A hash of the first 100 characters would keep one."""
    prompts = [TEMPLATE.format(question) for question in questions()]
    assert len({text[:80] for text in prompts}) == 1
    for completion in ("", "Answer: 5"):
        assert not apply_filters([TextPair(text, completion) for text in prompts], [NearDuplicates()]).dropped


def test_near_duplicates_are_found_behind_a_template() -> None:
    stories = [" ".join(questions()[i : i + 3]) for i in range(150)]
    pairs = [TextPair(TEMPLATE.format(story), f"We count them. Answer: {i}") for i, story in enumerate(stories)]
    again = [pairs[i] for i in (3, 77, 140)]
    changed = [TextPair(pair.prompt.replace("the end?", "the evening?").upper(), pair.completion) for pair in again]
    result = apply_filters([*pairs, *again, *changed], [NearDuplicates(0.5)])
    assert [drop.row for drop in result.dropped] == [*range(150, 156)]
    assert [drop.reason.split()[-1] for drop in result.dropped] == 2 * ["4", "78", "141"]


def test_another_number_and_another_answer_are_no_duplicates() -> None:
    long = (
        "A train leaves the town in the morning and comes to the sea after {} hours. How long does it take to go back?"
    )
    pairs = [TextPair(long.format(5), "It takes 5 hours."), TextPair(long.format(6), "It takes 5 hours.")]
    pairs += [
        TextPair(long.format(5), "As long as before, because the way is the same: 5.")
    ]  # a second answer to the first
    assert not apply_filters(pairs, [NearDuplicates()]).dropped
    assert [drop.row for drop in apply_filters([*pairs, pairs[0]], [NearDuplicates()]).dropped] == [3]
    assert (
        len(apply_filters([TextPair("", "5"), TextPair("", "6"), TextPair("", "5")], [NearDuplicates()]).dropped) == 1
    )


def test_the_error_without_datasketch_has_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasketch", None)
    with pytest.raises(DataError, match=r"pip install 'potstill\[data\]'"):
        apply_filters([TextPair("a", "b")], [NearDuplicates()])
    assert apply_filters([], [NearDuplicates()]) == ([], [])


def test_rows_of_a_test_set_are_found_in_prompts_and_completions(tmp_path: Path) -> None:
    chat = [
        {"role": "user", "content": "Which of all the rivers of the world is the longest one that we know of today?"}
    ]
    rows = [{"question": questions()[5]}, {"chat": chat}, {"short": "Name the colours of the flag."}, {"tiny": "Why?"}]
    file = tmp_path / "all.json"
    file.write_text(json.dumps([{"question": "", "chat": [], "short": "", "tiny": "", **row} for row in rows]))
    pairs = [
        TextPair(TEMPLATE.format(questions()[5].upper()), ""),
        TextPair("x", "You ask: which of all the rivers of the world is the longest one that we know of today?"),
        TextPair("Please name the colours of the flag!", ""),
        TextPair(questions()[6], "Why? Because the rivers of the world are long."),
    ]
    result = apply_filters(pairs, [Contamination((str(file),))])
    assert result.kept == [3]
    assert [drop.reason.split(":")[0] for drop in result.dropped] == [
        "13 words of row 1 of all.json",
        "13 words of row 2 of all.json",
        "6 words of row 3 of all.json",
    ]
    with pytest.raises(DataError, match=r"expected a test file, got .*nowhere.jsonl, which does not exist"):
        apply_filters(pairs, [Contamination((str(tmp_path / "nowhere.jsonl"),))])


def test_words_of_every_script() -> None:
    assert words("It's 1,234.5 km — OK?") == ["it", "s", "1,234.5", "km", "ok"]
    assert words("我喜欢 x2") == ["我", "喜", "欢", "x", "2"]
