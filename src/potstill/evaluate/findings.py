"""Interpretation of a diagnosis in plain sentences: problems, and reasons for the student's quality."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from potstill.evaluate.formatting import nats, percent, times

# Rules of thumb; each is named in the sentence that uses it.
SOFT_MASS = 0.3  # probability outside the top token that makes a teacher more informative than a label
TOP_100_MASS = 0.9  # probability of the top 100 tokens, below which mostly the tail is taught
FLAT_RATIO = 4.0  # effective support over that at the recommended temperature
VANISHING_RATIO = 1e-3  # smallest layer gradient over the largest
NOISY_SHARE = 0.02  # of labels that a confident teacher contradicts
MOVING_NATS = 0.02  # change of loss in the last sixth of training
CLIPPED_SHARE = 0.9  # of logged steps
ENTROPY_RATIO = 0.75  # student's entropy over the teacher's, below which it is overconfident; inverse: underconfident
RARE_SHARE = 0.25  # of the loss above the teacher's at tokens seen fewer than 10 times
LARGE_COMPRESSION = 20.0


@dataclass(frozen=True)
class Finding:
    """One result of a diagnosis: alarm (the run cannot go well), warning (worth a change) or note (information)."""

    level: Literal["alarm", "warning", "note"]
    text: str  # a full sentence
    clause: str | None = None  # the same as a reason, to follow "because"; None for a note


def recommended_temperature(softenings: Sequence[Mapping[str, Any]]) -> tuple[float, str]:
    """Choose the lowest temperature at which the teacher is more informative than a label, and say why.

    There the teacher leaves `SOFT_MASS` of its probability to tokens other than its top one, on average, while its 100
    most likely tokens keep `TOP_100_MASS`: softened further it teaches its noise. A rule of thumb after Hinton et al.
    2015, arXiv 1503.02531; a sweep over objective.0.temperature decides. Softenings are dictionaries, by rising
    temperature, with `mass` by number of tokens as text.
    """
    first = softenings[0]
    usable = [row for row in softenings if row["mass"]["100"] >= TOP_100_MASS] or [first]
    soft = [row for row in usable if 1 - row["mass"]["1"] >= SOFT_MASS]
    chosen = soft[0] if soft else usable[-1]
    best, rest = chosen["temperature"], percent(1 - chosen["mass"]["1"])
    at, others = f"At temperature {first['temperature']:g} the teacher", "tokens other than the most likely one"
    if chosen is first:
        support = f"effective support {first['support']:.1f} tokens"
        return best, f"{at} already leaves {rest} of its probability to {others} ({support}), so it needs no softening."
    if soft:
        little = f"{percent(1 - first['mass']['1'])} to {others}, little more than a label contains"
        top = f"the 100 most likely tokens still have {percent(chosen['mass']['100'])}"
        return best, f"{at} leaves {little}; at {best:g} it is {rest}, and {top}."
    keep = f"the teacher's 100 most likely tokens keep {percent(TOP_100_MASS)}"
    return best, f"The highest temperature at which {keep}; it leaves {rest} to {others}."


def interpret(diagnosis: Mapping[str, Any]) -> list[Finding]:
    """List all findings from the content of diagnose.json, most severe first."""
    checks = (_start, _gradients, _temperature, _teacher, _training, _label_noise, _student)
    order = ("alarm", "warning", "note")
    return sorted((f for check in checks for f in check(diagnosis)), key=lambda finding: order.index(finding.level))


def conclusion(diagnosis: Mapping[str, Any], findings: Sequence[Finding]) -> str:
    """Say why the student is better or worse than the baseline, or what to change before a run."""
    because = "; ".join([finding.clause for finding in findings if finding.clause][:4])
    nothing = "No measurement here shows a problem"
    if diagnosis["of"] == "recipe":
        return f"Before this runs, check: {because}." if because else f"{nothing} with this run."
    student, baseline, teacher = (diagnosis["losses"].get(name) for name in ("student", "baseline", "teacher"))
    if baseline is None:
        obstacle = f"possible reasons: {because}" if because else "no measurement here explains the gap"
        if teacher is None:
            return f"The student's loss is {nats(student)} nats{f'; {obstacle}' if because else ''}."
        if student < teacher:
            return f"The student's loss is {nats(teacher - student)} nats below its teacher's."
        return f"The student is {nats(student - teacher)} nats from its teacher; {obstacle}."
    pair = f"{nats(student)} against {nats(baseline)} nats"
    if student >= baseline:
        why = f"because {because}" if because else "and no measurement here explains it: try another seed first"
        return f"The student is worse than the baseline, {pair}, {why}."
    kls = [(diagnosis["distributions"] or {}).get(name, {}).get("kl") for name in ("student", "baseline")]
    closer = "" if None in kls else f", and closer to the teacher (KL {nats(kls[0])} against {nats(kls[1])})"
    rest = f"What keeps it from the teacher: {because}." if because else f"{nothing}."
    return f"The student is better than the baseline, {pair}{closer}. {rest}"


def _problem(clause: str, more: str = "", level: Literal["alarm", "warning"] = "warning") -> Finding:
    text = f"The student {clause[3:]}" if clause.startswith("it ") else clause[0].upper() + clause[1:]
    return Finding(level, f"{text}{more}.", clause)


def _start(diagnosis: Mapping[str, Any]) -> Iterator[Finding]:
    if text := diagnosis["start"]:
        yield Finding("warning", text, "its objective has hardly any gradient at the start")


def _gradients(diagnosis: Mapping[str, Any]) -> Iterator[Finding]:
    gradients = diagnosis["gradients"]
    for key, problem, advice in (
        ("bad", "of the student's weights have a NaN or infinite gradient", "Train in bf16 or float32, not fp16"),
        ("none", "of the student's weights get no gradient", "They do not change"),
    ):
        if names := gradients[key]:
            first = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            yield _problem(f"{len(names)} {problem}", f": {first}. {advice}", "alarm")
    layers = [part for part in gradients["flow"] if part["part"].startswith("layer ")]
    if len(layers) < 2 or gradients["bad"]:
        return
    least, most = (pick(layers, key=lambda part: part["gradient"]) for pick in (min, max))
    ratio = least["gradient"] / most["gradient"] if most["gradient"] else 0.0
    if ratio < VANISHING_RATIO:
        more = f": {ratio:.1g} of the gradient in {most['part']}"
        yield _problem(f"hardly any gradient reaches {least['part']}", more)
    else:
        smaller = f"the smallest, in {least['part']}, is {times(1 / ratio)} times smaller"
        yield Finding("note", f"Gradients reach every layer: {smaller} than the largest, in {most['part']}.")


def _temperature(diagnosis: Mapping[str, Any]) -> Iterator[Finding]:
    temperature = diagnosis["temperature"]
    if temperature is None:
        return
    best, rows = temperature["recommended"], {row["temperature"]: row for row in temperature["rows"]}
    yield Finding("note", f"Recommended temperature: {best:g}. {temperature['why']}")
    for used in temperature["used"]:
        support, best_support, top = rows[used]["support"], rows[best]["support"], rows[used]["mass"]["1"]
        if used > best and support > FLAT_RATIO * best_support:
            yield _problem(
                f"at temperature {used:g} the teacher is so flat that its effective support is {support:,.0f} tokens "
                f"instead of {best_support:,.1f}, so the student learns mostly about unlikely tokens (try {best:g})"
            )
        elif used < best and 1 - top < SOFT_MASS:
            sharp = f"{percent(top)}, little more information than a label (try {best:g})"
            yield _problem(f"at temperature {used:g} the teacher gives its most likely token {sharp}")


def _teacher(diagnosis: Mapping[str, Any]) -> Iterator[Finding]:
    teacher, baseline = (diagnosis["losses"].get(name) for name in ("teacher", "baseline"))
    if teacher is not None and baseline is not None and teacher >= baseline:
        yield _problem(
            f"the teacher itself ({nats(teacher)} nats) is no better on this text than training on labels alone "
            f"({nats(baseline)}), so there is little to learn from it",
            ": train the teacher on it first",
            level="alarm",
        )
    ratio = diagnosis["compression"]
    if ratio and ratio > LARGE_COMPRESSION:
        clause = f"the student is {times(ratio)} times smaller than its teacher, too small to follow it closely"
        yield _problem(clause, ": a teacher of intermediate size may help")


def _training(diagnosis: Mapping[str, Any]) -> Iterator[Finding]:
    training = diagnosis["training"] or {}
    gain, past_best, clipped = (training.get(key) or 0.0 for key in ("gain_at_end", "past_best", "clipped"))
    if gain > MOVING_NATS:
        at_end = f"by {nats(gain)} nats in the last sixth (train longer)"
        yield _problem(f"it was still improving when training ended, {at_end}")
    if past_best > MOVING_NATS:
        yield _problem(f"it was better by {nats(past_best)} nats at step {training['best_step']:,} (it overfits)")
    if clipped > CLIPPED_SHARE:
        yield _problem(
            f"its gradients were clipped in {percent(clipped)} of the logged steps, so the effective learning rate is "
            "lower than the one set"
        )


def _label_noise(diagnosis: Mapping[str, Any]) -> Iterator[Finding]:
    noise = diagnosis["noise"]
    if noise is None:
        return
    contradicted = percent(noise["contradicted"], 1)
    unlikely = f"{percent(noise['unlikely'], 1)} of the labels less than 0.1%"
    text = f"The teacher gives {unlikely}, and for {contradicted} of all labels it is confident in another token."
    clause = f"a confident teacher contradicts {contradicted} of the labels"
    noisy = noise["contradicted"] > NOISY_SHARE
    yield Finding("warning", f"{text} These labels may be wrong.", clause) if noisy else Finding("note", text)


def _student(diagnosis: Mapping[str, Any]) -> Iterator[Finding]:
    floor, student = diagnosis["irreducible"], (diagnosis["distributions"] or {}).get("student")
    if floor is not None and (soft := floor["models"].get("student")) is not None:
        total = f"the student's cross-entropy with the teacher's distributions, {nats(soft['soft_cross_entropy'])} nats"
        own = f"the teacher's own entropy ({nats(floor['teacher_entropy'])}), which no student can remove"
        yield Finding("note", f"Of {total}, {percent(soft['share'])} is {own}.")
    if student is None or diagnosis["of"] != "run":
        return
    teacher = floor["teacher_entropy"]
    ratio = student["entropy"] / teacher if teacher > 0.01 else 1.0
    pair = f"{nats(student['entropy'])} nats of entropy against {nats(teacher)}"
    if ratio < ENTROPY_RATIO:
        more = ", which may come from reverse KL, few tokens seen often, or a temperature above 1 without labels"
        yield _problem(f"it is more confident than its teacher ({pair})", more)
    elif ratio > 1 / ENTROPY_RATIO:
        yield _problem(f"it is less confident than its teacher ({pair})", ", which suggests too little training")
    rare = [group for group in student["by_frequency"] if group["name"] in ("never", "1 to 9 times")]
    share = sum(group["share_of_excess"] for group in rare)
    tokens = sum(group["tokens"] for group in rare) / diagnosis["data"]["tokens"]
    if share > RARE_SHARE:
        where = f"the {percent(tokens)} of tokens that occur fewer than 10 times in the training data"
        yield _problem(f"{percent(share)} of its loss above the teacher's is at {where} (use more or other text)")
