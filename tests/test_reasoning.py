"""What is reasoning and what is the answer, in the forms in which people and models write."""

from __future__ import annotations

import pytest

from potstill.errors import DataError
from potstill.generation.reasoning import TEMPLATES, fill, parse, template

ANSWERS = [
    ("Step 1: add 3.5 and 2.\nStep 2: so 5.5\n\nAnswer: 5.5", "5.5"),
    ("1. a\nmore\n2) b\nTherefore, x is 7.", "7"),
    (r"We get $\boxed{\frac{1}{2}}$.", r"\frac{1}{2}"),
    (r"Answer: $\boxed{\{1, 2\}}$", r"\{1, 2\}"),
    (r"First \boxed{3}, no: \boxed{4}", "4"),
    (r"\boxed{\text{a {nested} word}}", r"\text{a {nested} word}"),
    ("The answer is 3.5 dollars. Good.", "3.5 dollars"),
    ("**Answer:** 42", "42"),
    ("**Final answer: 42**", "42"),
    ("Final answer:\n42", "42"),
    ("It adds up.\n## Answer\n5 apples", "5 apples"),
    ("Two and two.\n\nConclusion:\nfour", "four"),
    ("Half is 24. #### 72", "72"),
    ("a\n#### 72\n\nQuestion: and then?", "72"),
    ("#### Step 2\nThen 5.\nAnswer: 6", "6"),  # a heading of Markdown is no answer
    ("The answer is 5. Let me check: no.\nAnswer: 6", "6"),
    ("So the total is $1,200.50.", "$1,200.50"),
    ("Hence it is 1/2.", "1/2"),
    ("Thus the capital is Paris.", "the capital is Paris"),
    ("Answer: Paris is the capital. It has been since 987.", "Paris is the capital. It has been since 987"),
]


@pytest.mark.parametrize(("text", "answer"), ANSWERS, ids=[answer for _, answer in ANSWERS])
def test_the_answer_is_found_and_its_span_is_it(text: str, answer: str) -> None:
    solution = parse(text)
    assert solution.answer == answer
    assert solution.answer_span is not None
    assert text[slice(*solution.answer_span)] == answer
    start, end = solution.reasoning_span
    assert end <= solution.answer_span[0]
    assert text[start:end] == text[start:end].strip()


@pytest.mark.parametrize("text", ["", "   ", "He has 3 and then 4.", r"\boxed{5", "Answer:", "We answer nothing."])
def test_a_text_that_names_no_answer_has_none(text: str) -> None:
    solution = parse(text)
    assert solution.answer is None
    assert solution.answer_span is None
    assert text[slice(*solution.reasoning_span)] == text.strip()


STEPS = [
    ("Step 1: add 3.5 and 2.\nStep 2: so 5.5\n\nAnswer: 5.5", ["add 3.5 and 2.", "so 5.5"]),
    ("**Step 1:** a\n**Step 2** - b\n#### 1", ["a", "b"]),
    ("1. a\nmore of a\n2) b\n(3) c\n#### 1", ["a\nmore of a", "b", "c"]),
    ("- a - b\n* c\n• d\n#### 1", ["a - b", "c", "d"]),
    ("3.5 apples\n48/2 more\n#### 1", ["3.5 apples", "48/2 more"]),  # what a number begins is no mark
    ("He eats 32. He then eats 16. So 48 in all.", ["He eats 32.", "He then eats 16."]),
    ("To begin:\n1. a\n2. b\nAnswer: c", ["To begin:", "a", "b"]),
    ("", []),
]


@pytest.mark.parametrize(("text", "steps"), STEPS)
def test_the_steps_lose_their_marks_and_nothing_else(text: str, steps: list[str]) -> None:
    assert list(parse(text).steps) == steps


def test_templates_hold_any_question() -> None:
    question = "What does {x: {}} print? \\boxed{question}"
    for text in (*TEMPLATES.values(), "Q: {question} {not_a_field}"):
        filled = fill(template(text), question)
        assert question in filled
    assert template("socratic") == TEMPLATES["socratic"]
    with pytest.raises(DataError, match=r"got 'step_by_stp'. Did you mean step_by_step\?"):
        template("step_by_stp")
