"""generate(recipe): recipe -> a folder of rows; read it from top to bottom."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import PreTrainedTokenizerBase

from potstill.data.files import write_text
from potstill.generation import requests as asking
from potstill.generation.requests import GenerationRequest, Bad
from potstill.generation.card import write_card, write_rows
from potstill.generation.duplicates import Contamination, NearDuplicates
from potstill.generation.filters import Charset, Filter, Length, Pair, Refusals, Repetition, sift
from potstill.generation.journal import Answer, Batch, in_turn, render, write
from potstill.generation.judge import Form, Judged, Target, judge, read_candidates, rows_of
from potstill.generation.sandbox import Limits, require_sandbox
from potstill.engines.engine import Engine
from potstill.engines.local import LocalEngine
from potstill.engines.sampling import Completion, Sampling
from potstill.engines.server import ModelServer
from potstill.errors import RecipeError
from potstill.models.loading import load_model, load_tokenizer, suppress_warnings
from potstill.runs.ray import map_rows
from potstill.runs.config.generate import ChainPart, FilterPart, GenerateRecipe, InstructionsPart, MixedPart, ProgramPart, ResponsesPart


@dataclass(frozen=True)
class Generated:
    """What came of it.

    Args:
        directory: the recipe's output.
        rows: the file of rows.
        counts: how many there were at each stage: asked, texts, dropped, rows.
        dropped: how many texts each filter dropped.
    """

    directory: Path
    rows: Path
    counts: dict[str, int]
    dropped: dict[str, int]


def generate(
    recipe: GenerateRecipe, *, resume: bool = False, engine: str = "process", console: Console | None = None
) -> Generated:
    """Have a teacher write what a recipe asks for, and keep what passes.

    The texts go to texts.jsonl as they come; reading, judging and filtering them is done anew each time, so
    that a folder can be filtered otherwise without asking the teacher again.

    Args:
        recipe: what to ask, and what to keep.
        resume: go on with the texts that are there.
        engine: "process", or "ray" for processes of Ray's that each load the teacher; this one keeps the journal.
        console: for the progress bar.

    Raises:
        UserError: something in the recipe or the data is to be corrected.
    """
    directory = Path(recipe.output).expanduser()
    journal = directory / "texts.jsonl"
    if journal.exists() and not resume:
        raise RecipeError(
            f"output: expected a folder without texts, got {directory}, which has some. Go on with --resume, or choose "
            "another."
        )
    with suppress_warnings():
        asks, bad, tokenizer, form, teacher = _begin(recipe, here=engine == "process")
        directory.mkdir(parents=True, exist_ok=True)
        write_text(directory / "recipe.yaml", recipe.dump())
        answer = _with_ray(recipe) if engine == "ray" else in_turn(teacher, _sampling(recipe))
        answered = _write(recipe, asks, tokenizer, teacher, answer, journal, console)

    limits = recipe.programs
    candidates = read_candidates(
        asks,
        answered,
        form,
        Limits(limits.cpu_seconds, limits.wall_seconds, limits.memory_mib * 2**20, limits.output_kib * 2**10),
    )
    judged = judge(candidates, getattr(recipe.task, "choose", "all"), drop_cut=recipe.filter.cut)
    return _keep(recipe, directory, asks, judged, form, bad)


@dataclass(frozen=True)
class Asked:
    """What a recipe will ask for.

    Args:
        teacher: who is asked.
        prompts: how many.
        texts: that it writes.
        bad: rows of the source that cannot be used.
        form: of the rows that are made.
    """

    teacher: str
    prompts: int
    texts: int
    bad: int
    form: Form


def check(recipe: GenerateRecipe) -> Asked:
    """Read and load all that a recipe names, and see that every prompt fits; nothing is asked or written.

    Raises:
        UserError: generate could not start.
    """
    with suppress_warnings():
        asks, bad, tokenizer, form, engine = _begin(recipe)
        if isinstance(engine, LocalEngine):
            engine.check([render(ask, tokenizer) for ask in asks], _sampling(recipe))
    _filters(recipe.filter)
    return Asked(recipe.teacher.name, len(asks), len(asks) * recipe.sampling.samples, len(bad), form)


def _begin(
    recipe: GenerateRecipe, *, here: bool = False
) -> tuple[list[GenerationRequest], list[Bad], PreTrainedTokenizerBase | None, Form, Engine]:
    """What is asked, and who answers; whether it answers here."""
    asks, bad = _asks(recipe)
    if any(ask.task == "program_of_thought" for ask in asks):
        require_sandbox()  # before hours of writing
    tokenizer = _tokenizer(recipe)
    return asks, bad, tokenizer, _form(recipe, tokenizer), _engine(recipe, tokenizer, here)


def _sampling(recipe: GenerateRecipe) -> Sampling:
    sampling = recipe.sampling.model_dump()
    return Sampling(**{**sampling, "stop": tuple(sampling["stop"])}, seed=recipe.seed)


def _asks(recipe: GenerateRecipe) -> tuple[list[GenerationRequest], list[Bad]]:
    task = recipe.task
    if isinstance(task, InstructionsPart):
        return asking.instruction_asks(task.topics, task.kinds), []
    if isinstance(task, ResponsesPart):
        prompts = task.prompts
        lacks = asking.lacks_turn(prompts.messages) if prompts.messages else asking.lacks_text(prompts.field or "")
        rows, bad = asking.read_rows(Path(prompts.path).expanduser(), [lacks], recipe.skip_bad_rows)
        return asking.response_asks(rows, prompts.field, prompts.messages), bad
    source = task.questions
    checks = [asking.lacks_text(source.field), *([asking.lacks_answer(source.answer)] if source.answer else [])]
    rows, bad = asking.read_rows(Path(source.path).expanduser(), checks, recipe.skip_bad_rows)
    return [
        ask
        for kind, name in _kinds(task)
        for ask in asking.question_asks(rows, kind, name, source.field, source.answer)
    ], bad


def _kinds(task: ChainPart | ProgramPart | MixedPart) -> list[tuple[str, str]]:
    """What each question is asked for, and under which template."""
    if isinstance(task, ChainPart):
        return [("chain_of_thought", task.template)]
    if isinstance(task, ProgramPart):
        return [("program_of_thought", task.template)]
    return [("chain_of_thought", task.template), ("program_of_thought", task.program_template)]


def _form(recipe: GenerateRecipe, tokenizer: PreTrainedTokenizerBase | None) -> Form:
    if isinstance(recipe.task, ResponsesPart) and recipe.task.prompts.messages:
        if recipe.rows == "completion":
            raise RecipeError("rows: expected messages for conversations, got completion.")
        return "messages"
    if recipe.rows == "auto":
        return "completion" if tokenizer is None or tokenizer.chat_template is None else "messages"
    return recipe.rows


def _tokenizer(recipe: GenerateRecipe) -> PreTrainedTokenizerBase | None:
    part = recipe.teacher
    if part.model is not None:
        return load_tokenizer(part.model, "teacher.model")
    return None if part.tokenizer is None else load_tokenizer(part.tokenizer, "teacher.tokenizer")


def _engine(recipe: GenerateRecipe, tokenizer: PreTrainedTokenizerBase | None, here: bool = True) -> Engine:
    """Who answers; where it does so elsewhere, a model stays out of the accelerator's memory."""
    part = recipe.teacher
    if part.server is not None:
        server = ModelServer(**part.server.model_dump())
        server.card()  # is it there, and does it serve that model?
        return server
    assert part.model is not None and tokenizer is not None
    model = load_model(part.model, "teacher.model", part.dtype)
    if here:
        device = part.device or ("cuda" if torch.cuda.is_available() else "cpu")
        model.to(device)  # type: ignore[arg-type]  # torch's own stubs do not know a name of a device here
    return LocalEngine(model, tokenizer, recipe.batch_size * recipe.sampling.samples)


def _write(
    recipe: GenerateRecipe,
    asks: list[GenerationRequest],
    tokenizer: PreTrainedTokenizerBase | None,
    engine: Engine,
    answer: Answer,
    journal: Path,
    console: Console | None,
) -> list[Any]:
    drawn = _sampling(recipe)
    prompts = [render(ask, tokenizer) for ask in asks]
    if isinstance(engine, LocalEngine):
        engine.check(prompts, drawn)  # all of them before the first is continued
    columns = (TextColumn("the teacher writes"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=console is None) as bar:
        shown = bar.add_task("", total=len(asks))
        return write(
            asks,
            prompts,
            answer,
            recipe.seed,
            journal,
            batch_size=recipe.batch_size,
            made_of=[recipe.teacher.name, recipe.teacher.dtype, recipe.sampling.model_dump(), recipe.seed],
            progress=lambda done: bar.update(shown, completed=done),
        )


def _with_ray(recipe: GenerateRecipe) -> Answer:
    """Batches answered by Ray's processes. What they say goes to the journal here, once, whatever Ray repeats."""
    gpus = 1 if recipe.teacher.model is not None and torch.cuda.is_available() else 0

    def answer(batches: Sequence[Batch]) -> Iterator[tuple[Batch, list[list[Completion]]]]:
        by_start = {batch.start: batch for batch in batches}
        rows = [{"start": batch.start, "seed": batch.seed, "prompts": json.dumps(batch.prompts)} for batch in batches]
        for row in map_rows("generate", rows, _answering, recipe, gpus=gpus):
            said = [[Completion(*text) for text in texts] for texts in json.loads(row["texts"])]
            yield by_start[row["start"]], said

    return answer


def _answering(recipe: GenerateRecipe) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """One teacher in one of Ray's processes."""
    with suppress_warnings():
        engine, sampling = _engine(recipe, _tokenizer(recipe)), _sampling(recipe)

    def answer(row: dict[str, Any]) -> dict[str, Any]:
        said = engine.complete(json.loads(row["prompts"]), replace(sampling, seed=int(row["seed"])))
        return {
            "start": row["start"],
            "texts": json.dumps([[[one.text, one.ended] for one in texts] for texts in said]),
        }

    return answer


def _filters(part: FilterPart) -> list[Filter]:
    """The cheap ones first; duplicates are looked for among what is left."""
    filters: list[Filter] = [Length(part.min_characters, part.max_characters), Charset(tuple(part.scripts))]
    filters += [Refusals()] if part.refusals else []
    filters += [Repetition(part.repetition)] if part.repetition is not None else []
    filters += [NearDuplicates(part.near_duplicates)] if part.near_duplicates is not None else []
    filters += [Contamination(tuple(part.contamination.files), part.contamination.words)] if part.contamination else []
    return filters


def _keep(
    recipe: GenerateRecipe, directory: Path, asks: list[GenerationRequest], judged: list[Judged], form: Form, bad: list[Bad]
) -> Generated:
    """Filter, and write rows, dropped rows and the card."""
    passed = [one for one in judged if one.dropped is None]
    sifted = sift([_pair(one) for one in passed], _filters(recipe.filter))
    gone = [(one, *one.dropped) for one in judged if one.dropped is not None]
    gone += [(passed[drop.row], drop.filter, drop.reason) for drop in sifted.dropped]

    sampling = recipe.sampling.model_dump()
    # The run's seed is in the card; a row has that of its batch.
    provenance = {"teacher": recipe.teacher.name, "sampling": sampling}
    target: Target = getattr(recipe.task, "target", "chain")
    weighed = getattr(recipe.task, "task_weights", None)
    weights = None if weighed is None else weighed.model_dump()
    kept = [passed[place] for place in sifted.kept]
    rows = [row for one in kept for row in rows_of(one, form, target, provenance, weights)]
    dropped = [
        {**row, "dropped": {"filter": name, "reason": why}}
        for one, name, why in gone
        for row in rows_of(one, form, "chain", provenance)
    ]
    path = directory / f"train.{recipe.format}"
    write_rows(path, rows)
    write_rows(directory / f"dropped.{recipe.format}", dropped)
    counts = {
        "asked": len(asks),
        "texts": len(judged),
        "dropped": len(gone),
        "texts kept": len(kept),
        "rows": len(rows),
    }
    write_card(
        directory / "README.md",
        name=recipe.name,
        facts={
            "teacher": recipe.teacher.name,
            "task": recipe.task.task,
            "templates": ", ".join(dict.fromkeys(ask.template for ask in asks)),
            "sampling": json.dumps(sampling),
            "seed": str(recipe.seed),
        },
        counts=counts | {"rows of the source that could not be used": len(bad)},
        dropped=[(name, why, one.candidate.completion) for one, name, why in gone],
        lengths=[len(one.candidate.completion) for one in kept],
        bad=bad,
    )
    return Generated(directory, path, counts, dict(Counter(name for _, name, _ in gone)))


def _pair(judged: Judged) -> Pair:
    """What filters see: every message but the last answer, and the answer."""
    asked = judged.candidate.ask.messages
    contents = [message.get("content") for message in asked]
    prompt = "\n".join(text if isinstance(text, str) else json.dumps(text) for text in contents if text)
    return Pair(prompt, judged.candidate.completion)
