"""The papers' formulas for what goes on inside a model, as loops in float64: nothing is shared with the package.

Vectors are lists of numbers, maps lists of rows.
"""

from __future__ import annotations

import math
from itertools import permutations

from reference import forward_kl, softmax

Vector = list[float]
Matrix = list[Vector]


def dot(a: Vector, b: Vector) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def norm(a: Vector) -> float:
    return math.sqrt(dot(a, a))


def mse(s: Vector, t: Vector) -> float:
    """FitNets, arXiv 1412.6550, equation 3, over the dimensions."""
    return sum((x - y) ** 2 for x, y in zip(s, t, strict=True)) / len(s)


def l1(s: Vector, t: Vector) -> float:
    return sum(abs(x - y) for x, y in zip(s, t, strict=True)) / len(s)


def cosine(s: Vector, t: Vector) -> float:
    return 1 - dot(s, t) / (norm(s) * norm(t))


def cka(s: Matrix, t: Matrix) -> float:
    """Kornblith et al., arXiv 1905.00414, equation 3 with linear kernels: by the Gram matrices, as written."""

    def centred_gram(x: Matrix) -> Matrix:
        n = len(x)
        gram = [[dot(a, b) for b in x] for a in x]
        rows = [sum(row) / n for row in gram]
        whole = sum(rows) / n
        return [[gram[i][j] - rows[i] - rows[j] + whole for j in range(n)] for i in range(n)]

    def hsic(k: Matrix, other: Matrix) -> float:
        return sum(dot(a, b) for a, b in zip(k, other, strict=True))

    k, m = centred_gram(s), centred_gram(t)
    return hsic(k, m) / math.sqrt(hsic(k, k) * hsic(m, m))


def attention_mse(s: Matrix, t: Matrix) -> float:
    """Zagoruyko and Komodakis, arXiv 1612.03928, equation 2 with p = 2, of one row in each head; heads averaged."""
    total = 0.0
    for student, teacher in zip(s, t, strict=True):
        total += sum((x / norm(student) - y / norm(teacher)) ** 2 for x, y in zip(student, teacher, strict=True))
    return total / len(s)


def attention_kl(s: Matrix, t: Matrix) -> float:
    """MiniLM, arXiv 2002.10957, equation 3, of one row in each head; heads averaged."""
    return sum(forward_kl(teacher, student) for student, teacher in zip(s, t, strict=True)) / len(s)


def relations(x: Matrix, heads: int, row: int, there: list[bool]) -> Matrix:
    """MiniLMv2, arXiv 2012.15828, equation 7: one token's relations to those that are there, by relation head."""
    size, more = divmod(len(x[0]), heads)
    found, start = [], 0
    for head in range(heads):
        stop = start + size + (head < more)
        scores = [
            dot(x[row][start:stop], other[start:stop]) / math.sqrt(stop - start)
            for other, counts in zip(x, there, strict=True)
            if counts
        ]
        found.append(softmax(scores))
        start = stop
    return found


def relation_kl(s: Matrix, t: Matrix, heads: int, row: int, there: list[bool]) -> float:
    pairs = zip(relations(s, heads, row, there), relations(t, heads, row, there), strict=True)
    return sum(forward_kl(teacher, student) for student, teacher in pairs) / heads


def huber(x: float) -> float:
    return x * x / 2 if abs(x) <= 1 else abs(x) - 0.5


def rkd_distance(s: Matrix, t: Matrix) -> float:
    """RKD, arXiv 1904.05068, equations 5 to 8."""

    def distances(x: Matrix) -> list[float]:
        found = [norm([a - b for a, b in zip(x[i], x[j], strict=True)]) for i, j in permutations(range(len(x)), 2)]
        mean = sum(found) / len(found)
        return [each / mean for each in found]

    pairs = list(zip(distances(s), distances(t), strict=True))
    return sum(huber(student - teacher) for student, teacher in pairs) / len(pairs)


def rkd_angle(s: Matrix, t: Matrix) -> float:
    """RKD, arXiv 1904.05068, equations 9 to 11."""

    def angle(x: Matrix, i: int, j: int, k: int) -> float:
        a = [p - q for p, q in zip(x[i], x[j], strict=True)]
        b = [p - q for p, q in zip(x[k], x[j], strict=True)]
        return dot(a, b) / (norm(a) * norm(b))

    triples = list(permutations(range(len(s)), 3))
    return sum(huber(angle(s, *triple) - angle(t, *triple)) for triple in triples) / len(triples)


def similarity_kl(s: Matrix, t: Matrix, temperature: float) -> float:
    """SEED, arXiv 2101.04731, equation 3 within the batch: each example's similarities to the others."""

    def distribution(x: Matrix, i: int) -> Vector:
        others = [j for j in range(len(x)) if j != i]
        return softmax([dot(x[i], x[j]) / (norm(x[i]) * norm(x[j])) for j in others], temperature)

    return sum(forward_kl(distribution(t, i), distribution(s, i)) for i in range(len(s))) / len(s)


def bild(s: Vector, t: Vector, top_k: int, temperature: float) -> float:
    """BiLD, arXiv 2406.13555, equations 3 to 7."""
    total = 0.0
    for leader in (t, s):
        ranked = sorted(range(len(leader)), key=lambda v: -leader[v])[:top_k]
        pairs = [(a, b) for i, a in enumerate(ranked) for b in ranked[i + 1 :]]
        teacher, student = (softmax([z[a] - z[b] for a, b in pairs], temperature) for z in (t, s))
        total += forward_kl(teacher, student)
    return total


def adaptive_kl(s: Vector, t: Vector, head_mass: float, temperature: float) -> float:
    """AKL, arXiv 2404.02657, section 4."""
    q, p = softmax(s, temperature), softmax(t, temperature)
    head: set[int] = set()
    for v in sorted(range(len(p)), key=lambda v: -p[v]):
        if sum(p[u] for u in head) >= head_mass:
            break
        head.add(v)
    gaps = [sum(abs(p[v] - q[v]) for v in range(len(p)) if (v in head) == inside) for inside in (True, False)]
    return (gaps[0] * forward_kl(p, q) + gaps[1] * forward_kl(q, p)) / sum(gaps)
