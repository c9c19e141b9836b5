"""What a diagnosis means, in plain sentences: what is wrong, and why the student is where it is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from potstill.evaluate.report.words import nats, percent, times

# Rules of thumb; each is named in the sentence that uses it.
SPREAD = 0.3  # of its probability beside its likeliest token, from which on a teacher says more than a label
KEPT = 0.9  # what its hundred likeliest tokens must keep, below which the tail is what is taught
FLAT = 4.0  # times the recommended temperature's support
VANISHING = 1e-3  # the smallest layer's gradient beside the largest
NOISY = 0.02  # of labels contradicted by a teacher that is sure
MOVING = 0.02  # nats in the last sixth of a training
CLIPPED = 0.9  # of the logged steps
SURER = 0.75  # the student's entropy beside the teacher's; above 1 / SURER it is less sure
RARE = 0.25  # of what is lost to the teacher, at tokens seen fewer than 10 times
FAR_SMALLER = 20.0


@dataclass(frozen=True)
class Finding:
    """One sentence.

    Args:
        level: alarm: the run cannot go well; warning: it is worth a change; note: it is so.
        text: the sentence.
        clause: the same as a reason, to stand after "because"; None where it is none.
    """

    level: Literal["alarm", "warning", "note"]
    text: str
    clause: str | None = None


def recommended_temperature(softenings: Sequence[Mapping[str, Any]]) -> tuple[float, str]:
    """The lowest temperature at which the teacher says more than a label, and why.

    That is where it leaves `SPREAD` of its probability to others than its likeliest token, on average, and its hundred
    likeliest tokens still keep `KEPT`: what is softened beyond that teaches its noise. A rule of thumb after Hinton et
    al. 2015, arXiv 1503.02531; a sweep over objective.0.temperature decides.

    Args:
        softenings: `Softening`s as dictionaries, by rising temperature; mass by number of tokens, as text.
    """
    first = softenings[0]
    within = [one for one in softenings if one["mass"]["100"] >= KEPT] or [first]
    soft = [one for one in within if 1 - one["mass"]["1"] >= SPREAD]
    chosen = soft[0] if soft else within[-1]
    others = percent(1 - chosen["mass"]["1"])
    if chosen is first:
        return chosen["temperature"], (
            f"At temperature {first['temperature']:g} the teacher already leaves {others} of its probability to others "
            f"than its likeliest token (effective support {first['support']:.1f} tokens): it need not be softened."
        )
    if soft:
        return chosen["temperature"], (
            f"At temperature {first['temperature']:g} the teacher leaves {percent(1 - first['mass']['1'])} to others "
            f"than its likeliest token, hardly more than a label says; at {chosen['temperature']:g} it is {others}, "
            f"and its 100 likeliest tokens still keep {percent(chosen['mass']['100'])}."
        )
    return chosen["temperature"], (
        f"The highest temperature at which the teacher's 100 likeliest tokens keep {percent(KEPT)}; it leaves {others} "
        "to others than its likeliest token."
    )


def findings(found: Mapping[str, Any]) -> list[Finding]:
    """All sentences, the worst first.

    Args:
        found: the content of diagnose.json, without its findings.
    """
    order = {"alarm": 0, "warning": 1, "note": 2}
    every = [
        *_gradients(found),
        *_temperature(found),
        *_teacher(found),
        *_training(found),
        *_noise(found),
        *_student(found),
        *_floor(found),
    ]
    return sorted(every, key=lambda one: order[one.level])


def conclusion(found: Mapping[str, Any], said: Sequence[Finding]) -> str:
    """The last word: why the student is better or worse than the baseline, or what to change before a run."""
    reasons = [one.clause for one in said if one.clause and one.level != "note"]
    because = "; ".join(reasons[:4])
    if found["of"] == "recipe":
        if not reasons:
            return "Nothing that was measured speaks against this run."
        return f"Before this runs, look at this: {because}."
    models = found["distributions"] or {}
    rows = found["losses"]
    student, baseline, teacher = rows["student"], rows.get("baseline"), rows.get("teacher")
    if baseline is None:
        if teacher is None:
            return f"The student has {nats(student)} nats{f'; what may be in its way: {because}' if because else ''}."
        far = f"The student is {nats(student - teacher)} nats from its teacher"
        return f"{far}; {f'what may be in its way: {because}' if because else 'nothing measured here is in its way'}."
    pair = f"{nats(student)} against {nats(baseline)} nats"
    if student >= baseline:
        why = f"because {because}" if because else "and nothing that was measured here says why: try another seed first"
        return f"The student is worse than the baseline, {pair}, {why}."
    nearer = models.get("student", {}).get("kl"), models.get("baseline", {}).get("kl")
    also = f", and nearer to the teacher (KL {nats(nearer[0])} against {nats(nearer[1])})" if None not in nearer else ""
    rest = f"What keeps it from the teacher: {because}." if because else "Nothing that was measured here holds it back."
    return f"The student is better than the baseline, {pair}{also}. {rest}"


def _warning(clause: str, more: str = "") -> Finding:
    return Finding("warning", f"{_sentence(clause)}{more}.", clause)


def _sentence(clause: str) -> str:
    return f"The student {clause[3:]}" if clause.startswith("it ") else clause[0].upper() + clause[1:]


def _gradients(found: Mapping[str, Any]) -> Iterator[Finding]:
    gradients = found["gradients"]
    if gradients["bad"]:
        what = f"{len(gradients['bad'])} of the student's weights get a gradient that is not finite"
        yield Finding("alarm", f"{what}: {_some(gradients['bad'])}. Train in bf16 or float32, not fp16.", what)
    if gradients["none"]:
        what = f"{len(gradients['none'])} of the student's weights get no gradient at all"
        yield Finding("alarm", f"{what}: {_some(gradients['none'])}. They stay as they are.", what)
    layers = [one for one in gradients["flow"] if one["part"].startswith("layer ")]
    if len(layers) > 1 and not gradients["bad"]:
        least, most = (pick(layers, key=lambda one: one["gradient"]) for pick in (min, max))
        ratio = least["gradient"] / most["gradient"] if most["gradient"] else 0.0
        text = (
            f"Gradients reach every layer: the smallest, in {least['part']}, is {times(1 / ratio) if ratio else '∞'} "
            f"times smaller than the largest, in {most['part']}."
        )
        if ratio < VANISHING:
            what = f"hardly any gradient reaches {least['part']}"
            yield _warning(what, f": {ratio:.1g} of that of {most['part']}")
        else:
            yield Finding("note", text)


def _temperature(found: Mapping[str, Any]) -> Iterator[Finding]:
    temperature = found["temperature"]
    if temperature is None:
        return
    best = temperature["recommended"]
    yield Finding("note", f"Recommended temperature: {best:g}. {temperature['why']}")
    at = {row["temperature"]: row for row in temperature["rows"]}
    for used in temperature["used"]:
        if used > best and at[used]["support"] > FLAT * at[best]["support"]:
            clause = (
                f"at temperature {used:g} the teacher is so flat that its effective support is "
                f"{at[used]['support']:,.0f} tokens instead of {at[best]['support']:,.1f}, so that most of what is "
                f"learnt is about unlikely tokens (try {best:g})"
            )
            yield _warning(clause)
        elif used < best and 1 - at[used]["mass"]["1"] < SPREAD:
            clause = (
                f"at temperature {used:g} the teacher gives its likeliest token {percent(at[used]['mass']['1'])} and "
                f"says little more than a label (try {best:g})"
            )
            yield _warning(clause)


def _teacher(found: Mapping[str, Any]) -> Iterator[Finding]:
    teacher, baseline = (found["losses"].get(name) for name in ("teacher", "baseline"))
    if teacher is not None and baseline is not None and teacher >= baseline:
        clause = (
            f"the teacher itself ({nats(teacher)} nats) is no better on this text than training on labels alone "
            f"({nats(baseline)}), so that there is little to learn from it"
        )
        yield Finding("alarm", f"{_sentence(clause)}.", clause)
    ratio = found["compression"]
    if ratio and ratio > FAR_SMALLER:
        clause = f"the student is {times(ratio)} times smaller than its teacher, more than it can follow closely"
        yield _warning(clause, ": a teacher in between may help")


def _training(found: Mapping[str, Any]) -> Iterator[Finding]:
    training = found["training"]
    if training is None:
        return
    if training["gain_at_end"] is not None and training["gain_at_end"] > MOVING:
        clause = (
            f"it was still improving when training ended, by {nats(training['gain_at_end'])} nats in the last sixth "
            "(train longer)"
        )
        yield _warning(clause)
    if training["past_best"] is not None and training["past_best"] > MOVING:
        clause = f"it was better by {nats(training['past_best'])} nats at step {training['best_step']:,} (it overfits)"
        yield _warning(clause)
    if training["clipped"] is not None and training["clipped"] > CLIPPED:
        clause = (
            f"its gradients were clipped in {percent(training['clipped'])} of the logged steps, so that the learning "
            "rate is not what it seems"
        )
        yield _warning(clause)


def _noise(found: Mapping[str, Any]) -> Iterator[Finding]:
    noise = found["noise"]
    if noise is None:
        return
    text = (
        f"The teacher gives {percent(noise['unlikely'], 1)} of the labels less than 0.1%, and in "
        f"{percent(noise['contradicted'], 1)} of all it is sure of another token."
    )
    if noise["contradicted"] > NOISY:
        clause = f"a teacher that is sure contradicts {percent(noise['contradicted'], 1)} of the labels"
        yield Finding("warning", f"{text} The labels may be wrong there.", clause)
    else:
        yield Finding("note", text)


def _student(found: Mapping[str, Any]) -> Iterator[Finding]:
    student = (found["distributions"] or {}).get("student")
    if student is None:
        return
    teacher = found["irreducible"]["teacher_entropy"]
    ratio = student["entropy"] / teacher if teacher > 0.01 else 1.0
    pair = f"{nats(student['entropy'])} nats of entropy against {nats(teacher)}"
    if found["of"] == "run" and ratio < SURER:
        clause = f"it is surer than its teacher ({pair})"
        yield _warning(clause, ", as after reverse KL, few tokens seen often, or a temperature above 1 alone")
    elif found["of"] == "run" and ratio > 1 / SURER:
        clause = f"it is less sure than its teacher ({pair})"
        yield _warning(clause, ", as where it has learnt too little yet")
    groups = [one for one in student["by_frequency"] if one["name"] in ("never", "1 to 9 times")]
    share = sum(one["share_of_excess"] for one in groups)
    tokens = sum(one["tokens"] for one in groups)
    if found["of"] == "run" and share > RARE:
        few = percent(tokens / found["data"]["tokens"])
        clause = (
            f"{percent(share)} of what it loses to the teacher is at the {few} of tokens that the training data has "
            "fewer than 10 times (more, or other, text)"
        )
        yield _warning(clause)


def _floor(found: Mapping[str, Any]) -> Iterator[Finding]:
    floor = found["irreducible"]
    if floor is None:
        return
    told = floor["models"].get("student")
    if told is not None:
        yield Finding(
            "note",
            f"Of the student's cross-entropy with the teacher's distributions, {nats(told['soft_cross_entropy'])} "
            f"nats, {percent(told['share'])} is the teacher's own entropy ({nats(floor['teacher_entropy'])}), which no "
            "student can be without.",
        )


def _some(names: Sequence[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
