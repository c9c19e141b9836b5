"""Write the page of families from the results of a walk, and read its tables."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import families
from potstill.losses.alignment import Task
from walk import STARTS, TERMS, Families, Results, Walk

STEPS = {
    **{step: step for step in ("loss", "check", "run", "evaluate", "positions", "design")},
    **{f"start {start}": start for start in STARTS},
    **{f"term {term}": term for term in TERMS},
}
INTRO = """# Families of models
Each family of transformers was walked with a small model of random weights:

- `loss`: the loss of a padded batch is that of its rows, each by itself and without padding;
- `positions`: a row of as many tokens as the family claims to have positions for;
- `check`, `run`, `evaluate`: the commands; two training steps, with the measurements and the report behind them;
- `design`: a smaller student of the family is designed, built and run, and has as many parameters as were counted;
- `copy`, `truncate`, `prune`: a student begins with the teacher's weights (`student.initialize`);
- `hidden` and the columns behind it: one training step with the term over layers.

`yes` works. `no` is refused, before anything is trained, with one of the messages below the table; that of `loss` is a
note. The student of a model that also reads images or sound is its text part.
"""
COST = "The walk takes {minutes} minutes of one processor core; `make test-slow` repeats it and writes this page.\n"
MISSING = "Not walked yet: "
TITLES: dict[Task, str] = {
    "causal": "Causal language models",
    "masked": "Masked language models",
    "classification": "Sequence classification",
    "regression": "Sequence regression",
}
REMARKS = {
    "convbert": "Its convolutions reach into the padding behind a row.",
    "cpmant": "transformers marks all of a row as context, so that each token attends to later ones too, and takes "
    "padding to be on the left, whatever the mask is. Its loss of padded rows was off by 8% for both reasons.",
    "fnet": "It mixes all tokens of a row by a Fourier transform, those of the padding too.",
    "funnel": "It pools neighbouring tokens, the last ones with the padding: with random weights, the loss of a padded "
    "batch is half of that of its rows. It cannot read a row of less than 5 tokens.",
    "prophetnet": "It reads the relative positions of heads and tokens in another order than they are in, so that the "
    "length of a row changes its logits.",
}
Marks = Mapping[str, Mapping[str, str]]  # family -> step -> yes or no


def steps_of(task: Task) -> list[str]:
    """List the steps of a task in the order of the columns."""
    walked = [name for name, _ in Walk("", task, Path()).steps()]
    return [step for step in STEPS if step in walked]


def page(results: Results) -> str:
    """Write the whole page."""
    tasks = {task: results.of(task) for task in TITLES}
    seconds = sum(result.seconds for rows in tasks.values() for row in rows.values() for result in row.values())
    parts = [INTRO + "\n" + COST.format(minutes=round(seconds / 60))]
    for task, results_of_task in tasks.items():
        rows = {family: row for family, row in results_of_task.items() if {*steps_of(task)} <= {*row}}
        marks = {family: {step: row[step].mark for step in steps_of(task)} for family, row in rows.items()}
        parts += [f"## {TITLES[task]}\n{table(task, marks)}", f"Messages:\n\n{messages(task, rows)}"]
        if missing := sorted({*families.walked(task)} - {*rows}):
            parts.append(f"{MISSING}{', '.join(missing)}.\n")
    left_out = "".join(f"- {family}: {reason}\n" for family, reason in sorted(families.NOT_SMALL.items()))
    remarks = "".join(f"- {family}: {remark}\n" for family, remark in REMARKS.items())
    parts.append(f"## Why\nWhat is behind some of the messages.\n\n{remarks}")
    why = "These cannot be built from a config alone, generate no text, or do not read tokens."
    return "\n".join([*parts, f"## Not walked\n{why}\n\n{left_out}"])


def table(task: Task, rows: Marks) -> str:
    """Write the table of one task."""
    steps = steps_of(task)
    lines = [f"| family | {' | '.join(STEPS[step] for step in steps)} |", "|---" * (len(steps) + 1) + "|"]
    lines += [f"| {family} | {' | '.join(row[step] for step in steps)} |" for family, row in sorted(rows.items())]
    return "\n".join(lines) + "\n"


def read_table(text: str) -> dict[str, dict[str, str]]:
    """Read a table again."""
    head, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines())
    of_title = {title: step for step, title in STEPS.items()}
    steps = [of_title[title] for title in head[1:]]
    return {family: dict(zip(steps, marks, strict=True)) for family, *marks in rows}


def messages(task: Task, rows: Families) -> str:
    """List the messages of a task, each with its steps and the families that it refuses."""
    places: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))  # message -> step -> families
    for family, row in sorted(rows.items()):
        for step, title in STEPS.items():
            if step in row and row[step].mark == "no":
                places[general(row[step].text, family, task)][title].add(family)
    lines = []
    for message, steps in sorted(places.items()):
        alike: dict[tuple[str, ...], list[str]] = defaultdict(list)  # families -> steps
        for step, names in steps.items():
            alike[tuple(sorted(names))].append(step)
        where = "; ".join(f"{', '.join(steps)} ({several(names, rows)})" for names, steps in alike.items())
        lines.append(f"- {where}: `{message}`\n")
    return "".join(lines)


def general(message: str, family: str, task: Task) -> str:
    """A message without what differs between families."""
    message = re.sub(r"\b[A-Z]\w+(?:For[A-Z]\w+|LMHead\w*|Decoder|HeadModel)\b", "MODEL", message)
    message = message.replace(families.CLASSES[task][family], "MODEL")
    message = re.sub(r"(?:objective\.\d+|(?:--)?teacher(?:\.model)?|student): ", "", message, count=1)
    message = re.sub(rf"\b{re.escape(family.removesuffix('_text'))}(_text)?\b", "FAMILY", message)
    return re.sub(r"\[[\d, ]+\]|\d+", "N", message)


def several(names: tuple[str, ...], rows: Families) -> str:
    """Name families, or those that are left where that is shorter."""
    others = sorted({*rows} - {*names})
    if len(others) >= len(names):
        return ", ".join(names)
    return f"all but {', '.join(others)}" if others else "all"
