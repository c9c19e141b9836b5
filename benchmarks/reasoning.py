"""Do the parser and the checker agree with GSM8K's gold answers?

    python benchmarks/reasoning.py [--data ../shared/data/gsm8k-train.jsonl]

Each worked solution is written in six forms (as it is; "Answer:"; "The answer is"; "Therefore"; a box; numbered steps
in Markdown). Its answer must be found and be the same as the gold one, and as the gold one in other spellings; and it
must not be the same as the gold one plus 1, minus 1, times 10 and with the other sign.

Then what the filters drop of the questions with an instruction before and behind each, and how many a hash of the
first 100 characters would leave.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from fractions import Fraction
from pathlib import Path

from potstill.generation.filters import (
    Charset,
    Length,
    NearDuplicates,
    Refusals,
    Repetition,
    TextPair,
    apply_filters,
)
from potstill.generation.reasoning import TEMPLATES, fill, parse
from potstill.generation.verify import number, same_answer


def forms(work: str, answer: str) -> dict[str, str]:
    numbered = "\n".join(f"Step {i}: {line}" for i, line in enumerate(work.splitlines(), 1))
    return {
        "as it is": f"{work}\n#### {answer}",
        "Answer:": f"{work}\nAnswer: {answer}",
        "The answer is": f"{work}\nThe answer is {answer}.",
        "Therefore": f"{work}\nTherefore, it is {answer}.",
        "box": f"{work}\n$$\\boxed{{{answer}}}$$",
        "steps in Markdown": f"{numbered}\n\n**Answer:** ${answer}$",
    }


def spellings(value: Fraction) -> list[str]:
    """The same number, written otherwise."""
    plain = f"{float(value):,.2f}"
    return [plain, f"${plain}", f"{value} clips", f"x = {value}", f"\\frac{{{value * 3}}}{{3}}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data/gsm8k-train.jsonl"))
    rows = [json.loads(line) for line in parser.parse_args().data.read_text(encoding="utf-8").splitlines()]
    agree: Counter[str] = Counter()
    matching = wrong = 0
    for row in rows:
        work, _, gold = row["answer"].rpartition("\n#### ")
        parsed = number(gold)
        assert parsed is not None, gold
        for form, text in forms(work, gold).items():
            agree[form] += same_answer(parse(text).answer, gold)
        matching += all(same_answer(text, gold) for text in spellings(parsed.value))
        others = {parsed.value + 1, parsed.value - 1, parsed.value * 10, -parsed.value} - {parsed.value}
        wrong += any(same_answer(str(other), gold) for other in others)
    for form, count in agree.items():
        print(f"{form}: {count} of {len(rows)} agree")
    print(f"in other spellings: {matching} of {len(rows)} agree")
    print(f"wrong answers accepted: for {wrong} of {len(rows)}")
    filtered(rows)


def filtered(rows: list[dict[str, str]]) -> None:
    before = (
        "You are a careful tutor. Solve the problem below. Explain every step to a pupil of ten years.\n\nProblem: "
    )
    prompts = [before + fill(TEMPLATES["structured"], row["question"]) for row in rows]
    filters = (Length(), Repetition(), Charset(("latin",)), Refusals(), NearDuplicates(0.9))
    questions = [TextPair(question, "") for question in prompts]
    solved = [TextPair(question, row["answer"]) for question, row in zip(prompts, rows, strict=True)]
    for name, found in (
        ("questions with their solutions, all filters", apply_filters(solved, filters)),
        ("questions alone, near-duplicates", apply_filters(questions, filters[-1:])),
    ):
        print(f"{name}: {len(found.dropped)} of {len(rows)} dropped")
        for drop in found.dropped:
            print(f"  {drop.filter}: {drop.reason}: {rows[drop.row]['question']}")
    print(f"a hash of the first 100 characters: {len({question[:100] for question in prompts})} of {len(rows)} kept")


if __name__ == "__main__":
    main()
