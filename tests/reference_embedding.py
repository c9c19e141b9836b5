"""The losses between spaces as loops over pairs, in float64. Nothing here is shared with the package."""

from __future__ import annotations

import math

from reference import forward_kl, softmax


def cosine(a: list[float], b: list[float]) -> float:
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return dot / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))


def pairs(vectors: list[list[float]]) -> list[float]:
    n = len(vectors)
    return [cosine(vectors[i], vectors[j]) for i in range(n) for j in range(i + 1, n)]


def embedding_divergence(
    student: list[list[float]], teacher: list[list[float]], temperature: float, student_temperature: float
) -> float:
    """SEED, arXiv 2101.04731, section 3.2, over the batch."""
    total = 0.0
    for i in range(len(student)):
        others = [j for j in range(len(student)) if j != i]
        q = softmax([cosine(student[i], student[j]) for j in others], student_temperature)
        p = softmax([cosine(teacher[i], teacher[j]) for j in others], temperature)
        total += forward_kl(p, q)
    return total / len(student)


def pearson(x: list[float], y: list[float]) -> float:
    n = len(x)
    a, b = [v - sum(x) / n for v in x], [v - sum(y) / n for v in y]
    return sum(u * v for u, v in zip(a, b, strict=True)) / math.sqrt(sum(u * u for u in a) * sum(v * v for v in b))


def ranks(values: list[float]) -> list[float]:
    return [sum(w < v for w in values) + (sum(w == v for w in values) - 1) / 2 for v in values]


def spearman(x: list[float], y: list[float]) -> float:
    return pearson(ranks(x), ranks(y))
