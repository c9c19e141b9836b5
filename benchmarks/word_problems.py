"""Arithmetic word problems with known answers and worked solutions: any number of them, the same for the same seed.

    Ann has 12 plums. Then Ann buys 5. Ann doubles the plums at home. How many plums does Ann have now?

    First 12 + 5 = 17.          x = 12 + 5
    Then 17 * 2 = 34.           x = x * 2
    Answer: 34                  print(x)

A problem is easy, medium or hard: 2, 3 or 4 steps, all totals from 1 to 50. A template is a verb in a frame ("Then ...
buys ..."); a quarter of them are held out, so that every verb and every frame is known, but not together. Which split a
problem belongs to is decided by a hash of its sums: what is held out shares no worked solution with what is learnt
from.
"""

from __future__ import annotations

import random
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Literal

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

Split = Literal["train", "dev", "test"]

STEPS = {"easy": 2, "medium": 3, "hard": 4}
MAX_TOTAL = 50  # of any total; each is one token
PROMPT = "{question}\nStep by step:\n"
ANSWER_PROMPT = "{question}\nAnswer:"  # as `potstill generate` asks for the answer alone
PROGRAM_PROMPT = "{question}\nProgram:\n"
END, PAD = "<end>", "<pad>"

NAMES = ("Ann", "Ben", "Cem", "Dora", "Eli", "Fay", "Gus", "Hana")
THINGS = ("apples", "cakes", "cookies", "eggs", "nuts", "pears", "plums", "rolls")
OPENINGS = ("{name} has {object}.", "{name} starts with {object}.", "At first {name} has {object}.")
CLOSINGS = ("How many {things} does {name} have now?", "How many {things} are left in the end?")
FRAMES = (
    "{name} {verb} {object}.",
    "Then {name} {verb} {short}.",
    "After that {name} {verb} {object}.",
    "On Monday {name} {verb} {short}.",
    "{name} {verb} {object} at home.",
    "Later {name} {verb} {short} at school.",
)
VERBS = {
    **dict.fromkeys(("buys", "finds", "wins", "picks", "gets", "collects"), "+"),
    **dict.fromkeys(("sells", "loses", "eats", "drops", "breaks", "hands out"), "-"),
    **dict.fromkeys(("doubles", "triples", "quadruples"), "*"),
    "halves": "/",
}
FACTORS = {"doubles": 2, "triples": 3, "quadruples": 4, "halves": 2}
TEMPLATES = [(verb, frame) for verb in VERBS for frame in FRAMES]
HELD_OUT = [(verb, frame) for v, verb in enumerate(VERBS) for f, frame in enumerate(FRAMES) if (v + f) % 4 == 0]
KNOWN = [template for template in TEMPLATES if template not in HELD_OUT]


@dataclass(frozen=True)
class Problem:
    """A problem and its solution.

    Args:
        question: in words.
        chain: the worked solution, which ends with the answer.
        program: the same in Python, which prints the answer.
        answer: a whole number, as text.
        level: a key of STEPS.
    """

    question: str
    chain: str
    program: str
    answer: str
    level: str

    @property
    def split(self) -> Split:
        """By a hash of the sums: eight tenths are learnt from."""
        place = zlib.crc32(self.chain.encode()) % 10
        return "dev" if place == 8 else "test" if place == 9 else "train"


def problems(count: int, split: Split, seed: int, *, held_out: bool = False) -> list[Problem]:
    """Different problems of one split, all levels about alike often.

    Args:
        count: how many.
        split: which.
        seed: the same seed gives the same problems.
        held_out: every sentence of the story is in a held-out template, instead of a known one.
    """
    chance = random.Random(f"{split} {seed} {held_out}")
    found = (one for one in _endless(chance, HELD_OUT if held_out else KNOWN) if one.split == split)
    different: dict[str, Problem] = {}
    while len(different) < count:
        different |= {one.question: one for one in islice(found, count - len(different))}
    return list(different.values())


def _endless(chance: random.Random, templates: list[tuple[str, str]]) -> Iterator[Problem]:
    while True:
        for level, steps in STEPS.items():
            yield _problem(chance, templates, level, steps)


def _problem(chance: random.Random, templates: list[tuple[str, str]], level: str, steps: int) -> Problem:
    name, things = chance.choice(NAMES), chance.choice(THINGS)
    total = chance.randint(2, 20)
    story = [chance.choice(OPENINGS).format(name=name, object=f"{total} {things}")]
    chain: list[str] = []
    program: list[str] = []
    while len(chain) < steps:
        verb, frame = chance.choice(templates)
        sign, number = VERBS[verb], FACTORS.get(verb) or chance.randint(2, 9)
        after = {"+": total + number, "-": total - number, "*": total * number, "/": total // number}[sign]
        if not 1 <= after <= MAX_TOTAL or (sign == "/" and total % number):
            continue
        whole, short = (f"the {things}", "them") if verb in FACTORS else (f"{number} {things}", str(number))
        story.append(frame.format(name=name, verb=verb, object=whole, short=short))
        chain.append(f"{'Then' if chain else 'First'} {total} {sign} {number} = {after}.")
        program.append(f"x = {'x' if program else total} {sign} {number}")
        total = after
    story.append(chance.choice(CLOSINGS).format(name=name, things=things))
    return Problem(
        question=" ".join(story),
        chain="\n".join([*chain, f"Answer: {total}"]),
        program="\n".join([*program, "print(x)"]),
        answer=str(total),
        level=level,
    )


def tokenizer() -> PreTrainedTokenizerFast:
    """A token for each word with the space before it, each number to 50, each mark; what it decodes is what it read."""
    texts = [*FRAMES, *OPENINGS, *CLOSINGS, *VERBS, *NAMES, *THINGS, PROMPT, ANSWER_PROMPT, PROGRAM_PROMPT]
    texts += ["First Then the them", "print x"]
    marks = ["\n", " ", *".?:()", *(f" {sign}" for sign in "+-*/=")]
    words = {word for text in texts for word in re.findall(r"[A-Za-z]+", re.sub(r"{.*?}", "", text))}
    spaced = [
        *sorted(words),
        *(f" {word}" for word in sorted(words)),
        *(f" {number}" for number in range(MAX_TOTAL + 1)),
    ]
    known = {token: i for i, token in enumerate([END, PAD, *marks, *spaced])}
    made = Tokenizer(models.WordLevel(known, unk_token=PAD))
    made.pre_tokenizer = pre_tokenizers.Split(Regex(r" ?[A-Za-z]+| ?\d+| ?[^\w\s]|\s"), "isolated")
    made.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token=END, pad_token=PAD, model_max_length=192)
