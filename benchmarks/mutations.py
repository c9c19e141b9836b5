"""Wrong values for `faults_fuzz.py`: what a seeded generator puts into a structure of JSON or YAML, a text or bytes."""

from __future__ import annotations

import copy
import random
from typing import Any

ESCAPE = "\x1b]0;title\x07\x1b[2J"
TEXTS = [
    *(
        "",
        " ",
        "é" * 50,
        "x" * 20_000,
        "\x00",
        "\ud800",
        ESCAPE,
        "\u202egnp",
        "../../etc/passwd",
        "1e999",
        "NaN",
        "[]",
        "{}",
    ),
]
NUMBERS = [0, -1, 1, 2**31, 2**63, -(2**63), 2**64, 10**400, 0.1, -0.0, 1e308, float("inf"), float("nan")]
OTHERS = [None, True, False, [], {}, [[]], [None], {"": None}, [{"a": 1}]]


def deep(levels: int) -> Any:
    """A list in a list in a list."""
    value: Any = []
    for _ in range(levels):
        value = [value]
    return value


def odd_value(rng: random.Random) -> Any:
    kind = rng.randrange(10)
    if kind == 0:
        return deep(rng.choice((3, 50, 200)))
    if kind == 1:
        return [odd_value(rng) for _ in range(rng.randrange(5))]
    if kind == 2:
        return {rng.choice(TEXTS): odd_value(rng) for _ in range(rng.randrange(4))}
    return copy.deepcopy(rng.choice((TEXTS, NUMBERS, OTHERS)[kind % 3]))


def odd_key(rng: random.Random, name: Any) -> Any:
    """A key with a letter too many, or one that is no text."""
    return rng.choice([f"{name}x", f"{name}"[:-1], f"{name}".upper(), 1, 1.5, None, True, ESCAPE, "", "x" * 5000])


def places(value: Any) -> list[tuple[Any, Any]]:
    """All pairs of a holder and a key or index within a structure."""
    found: list[tuple[Any, Any]] = []
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in entries:
        found += [(value, key), *places(inner)]
    return found


def mutated(value: Any, rng: random.Random, most: int = 3) -> Any:
    """A copy with a few changes: a value replaced, removed, doubled, wrapped or moved, a key renamed or added."""
    value = copy.deepcopy(value)
    for _ in range(rng.randint(1, most)):
        if not (found := places(value)):
            return odd_value(rng)
        holder, key = rng.choice(found)
        change = rng.randrange(8)
        if change == 0:
            del holder[key]
        elif change == 1:
            holder[key] = [holder[key]]
        elif change == 2:
            other, place = rng.choice(found)
            if place in other if isinstance(other, dict) else place < len(other):
                holder[key] = copy.deepcopy(other[place])
        elif change == 3 and isinstance(holder, dict):
            holder[odd_key(rng, key)] = holder.pop(key)
        elif change == 4 and isinstance(holder, dict):
            holder[odd_key(rng, key)] = odd_value(rng)
        elif change == 5 and isinstance(holder, list):
            holder.extend(copy.deepcopy(holder))
        else:
            holder[key] = odd_value(rng)
    return value


def mutated_bytes(content: bytes, rng: random.Random, inserted: tuple[bytes, ...] = ()) -> bytes:
    """Bytes of which some are flipped, cut out, doubled, or have one of `inserted` among them."""
    changed = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        start = rng.randrange(len(changed) + 1)
        end = min(start + rng.choice((1, 2, 8, 64)), len(changed))
        change = rng.randrange(5)
        if change == 0:
            changed[start:end] = bytes(rng.randrange(256) for _ in range(end - start))
        elif change == 1:
            del changed[start:end]
        elif change == 2:
            changed[start:start] = changed[start:end]
        elif change == 3:
            del changed[start:]
        elif inserted:
            changed[start:start] = rng.choice(inserted)
    return bytes(changed)
