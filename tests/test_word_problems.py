"""The benchmark's word problems: right, the same each time, and what is held out is held out."""

from __future__ import annotations

import contextlib
import io
import operator
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from potstill.generation.reasoning import fill, parse
from potstill.generation.verify import same_answer

SUMS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}


@pytest.fixture(scope="module")
def made() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [str(Path(__file__).parent.parent / "benchmarks"), *sys.path])
        import word_problems

        yield word_problems


def test_every_sum_is_right_and_the_last_is_the_answer(made: Any) -> None:
    for one in made.problems(300, "train", 0):
        solution = parse(one.chain)
        assert len(solution.steps) == made.STEPS[one.level]
        totals = re.findall(r"(\d+) ([-+*/]) (\d+) = (\d+)\.", one.chain)
        for left, sign, right, total in totals:
            assert SUMS[sign](int(left), int(right)) == int(total)
        assert [left for left, *_ in totals[1:]] == [total for *_, total in totals[:-1]]
        assert one.question.split(".")[0].split()[-2] == totals[0][0]
        assert same_answer(solution.answer, one.answer) and totals[-1][-1] == one.answer


def test_every_program_prints_the_answer(made: Any) -> None:
    for one in made.problems(300, "train", 0):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(one.program, {})
        assert same_answer(printed.getvalue().strip(), one.answer)
        assert len(one.program.splitlines()) == made.STEPS[one.level] + 1


def test_the_same_seed_gives_the_same_problems_of_all_levels(made: Any) -> None:
    problems = made.problems(300, "dev", 3)
    assert problems == made.problems(300, "dev", 3) != made.problems(300, "dev", 4)
    assert min(Counter(one.level for one in problems).values()) > 70
    assert len({one.question for one in problems}) == 300


def test_splits_share_no_sums(made: Any) -> None:
    chains = {split: {one.chain for one in made.problems(500, split, 0)} for split in ("train", "dev", "test")}
    assert not chains["train"] & chains["test"] and not chains["train"] & chains["dev"]
    assert not chains["dev"] & chains["test"]


def test_held_out_templates_are_of_known_parts(made: Any) -> None:
    assert not set(made.HELD_OUT) & set(made.KNOWN) and len(made.HELD_OUT) == len(made.TEMPLATES) // 4
    for part in (0, 1):
        assert {template[part] for template in made.HELD_OUT} <= {template[part] for template in made.KNOWN}
    assert ("buys", "{name} {verb} {object} at home.") in made.HELD_OUT
    bought = re.compile(r"buys [^.]* at home")
    assert not any(bought.search(one.question) for one in made.problems(300, "train", 0))
    assert any(bought.search(one.question) for one in made.problems(300, "train", 0, held_out=True))


def test_the_tokenizer_has_every_word_and_decodes_what_it_encodes(made: Any) -> None:
    words = made.tokenizer()
    assert len(words) < 300
    for one in [*made.problems(200, "train", 0), *made.problems(200, "test", 0, held_out=True)]:
        completions = {made.PROMPT: one.chain, made.PROGRAM_PROMPT: one.program, made.ANSWER_PROMPT: f" {one.answer}"}
        for prompt, completion in completions.items():
            for text in (fill(prompt, one.question), completion):
                ids = words(text)["input_ids"]
                assert words.decode(ids) == text and words.unk_token_id not in ids
