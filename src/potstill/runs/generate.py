"""From a recipe of kind generate to a folder of rows."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from potstill.data.sources import WRITTEN_COLUMNS
from potstill.engines.local import LocalEngine
from potstill.engines.sampling import Completion, Engine, Prompt
from potstill.engines.server import ModelServer
from potstill.errors import RecipeError
from potstill.files import lock_folder
from potstill.generation.card import write_card, write_rows
from potstill.generation.filters import TextPair, apply_filters
from potstill.generation.journal import (
    BatchCompleter,
    PromptBatch,
    RequestCompletions,
    complete_in_order,
    complete_requests,
    read_texts,
    render,
)
from potstill.generation.judge import GeneratedText, judge, parse_texts, rows_of
from potstill.generation.own_text import first_tokens, opening, select_questions
from potstill.generation.requests import GenerationRequest, UnusableRow
from potstill.generation.sandbox import require_sandbox
from potstill.generation.tasks import OwnText, Responses
from potstill.generation.turns import RowFormat, TurnReader
from potstill.models.chat import end_token_ids, set_chat_template
from potstill.models.loading import accelerator, load_model, load_tokenizer, suppress_warnings
from potstill.models.prompts import prompt_ids
from potstill.models.spacing import evenly_spaced
from potstill.runs.config.generate import GenerateRecipe
from potstill.runs.progress import PartProgress
from potstill.runs.ray import Row, RowFunction, map_rows


@dataclass(frozen=True)
class Generated:
    """The result of `generate`."""

    directory: Path
    rows: Path  # the file of them
    held_out: Path | None  # the file of those for data.eval
    counts: dict[str, int]  # at each stage: asked, texts, dropped, texts kept, rows
    dropped: dict[str, int]  # texts by the filter that dropped them
    notes: list[str]


class GenerationPlan(NamedTuple):
    """What a recipe will generate, and the engine that completes the prompts."""

    requests: list[GenerationRequest]
    unusable: list[UnusableRow]  # rows of the source that no request can be made of
    reader: TurnReader
    prompts: list[Prompt]  # without requests the openings of chats, behind which the teacher writes the questions
    engine: Engine
    tokenizer: PreTrainedTokenizerBase | None


def generate(
    recipe: GenerateRecipe, *, resume: bool = False, engine: str = "process", console: Console | None = None
) -> Generated:
    """Generate texts with a teacher, and keep those that pass checks and filters as rows.

    The texts go to texts.jsonl as they come. Parsing, judging and filtering are repeated each time, so that a folder
    can be filtered again without generating again.

    Args:
        resume: go on with the texts that are there.
        engine: "process", or "ray" for processes of Ray that each load the teacher; this one keeps the journal.

    Raises:
        UserError: something in the recipe or the data is to be corrected.
    """
    directory = Path(recipe.output)
    with lock_folder(directory, "output"):
        return _generate(recipe, directory, resume, engine, console or Console(quiet=True))


def _generate(recipe: GenerateRecipe, directory: Path, resume: bool, engine: str, console: Console) -> Generated:
    journal, questions = directory / "texts.jsonl", directory / "questions.jsonl"
    if (journal.exists() or questions.exists()) and not resume:
        raise RecipeError(
            f"output: expected a folder without texts, got {directory}, which has some. Go on with --resume, or choose "
            "another."
        )
    with suppress_warnings():
        plan = check(recipe, on_device=engine == "process")
        recipe.start(directory)
        notes = list[str]()
        if not plan.requests:
            plan, note = _own_questions(recipe, plan, questions, engine, console)
            notes.append(note)
        completions = _complete(recipe, plan, journal, engine, console, "prompts")
    texts = parse_texts(plan.requests, plan.prompts, completions, plan.reader, recipe.programs)
    judged = judge(texts, recipe.task.choose, drop_cut=recipe.filter.cut)
    return _write_files(recipe, directory, plan, judged, [*notes, *_notes(plan, completions)])


def _complete(
    recipe: GenerateRecipe, plan: GenerationPlan, journal: Path, engine: str, console: Console, unit: str
) -> list[RequestCompletions]:
    """Complete the prompts of a plan that are not in the journal."""
    complete = _with_ray(recipe) if engine == "ray" else complete_in_order(plan.engine, recipe.engine_sampling)
    settings = [recipe.teacher.name, recipe.teacher.dtype, recipe.sampling.model_dump(), recipe.seed]
    options: dict[str, Any] = {"batch_size": recipe.batch_size, "settings": settings}
    with PartProgress(console, unit).start(total=len(plan.prompts)) as progress:
        options["progress"] = progress.update
        return complete_requests(plan.prompts, complete, recipe.seed, journal, **options)


def _own_questions(
    recipe: GenerateRecipe, plan: GenerationPlan, journal: Path, engine: str, console: Console
) -> tuple[GenerationPlan, str]:
    """Let the teacher write questions behind the openings of the plan, and plan to answer those that are kept."""
    task = cast(OwnText, recipe.task)
    one_each = {"samples": 1, "max_new_tokens": task.question_tokens}
    asking = recipe.model_copy(update={"sampling": recipe.sampling.model_copy(update=one_each)})
    completions = _complete(asking, plan, journal, engine, console, "questions")
    questions, note = select_questions(text for each in completions for text in each.texts)
    if not questions:
        raise RecipeError(f"task: expected a teacher that writes questions, got none to keep. {note} See {journal}.")
    requests = [task.request(number, question) for number, question in enumerate(questions, 1)]
    if arguments := recipe.teacher.chat_template_kwargs:
        requests = [request.with_arguments(arguments) for request in requests]
    prompts = [render(request, plan.tokenizer) for request in requests]
    return plan._replace(requests=requests, prompts=prompts), note


def check(recipe: GenerateRecipe, *, on_device: bool = False) -> GenerationPlan:
    """Load everything that a recipe names, and check that every prompt fits; nothing is generated or written.

    A local model goes to its device if `on_device`.
    """
    with suppress_warnings():
        requests, unusable = recipe.task.requests(recipe.skip_bad_rows)
        if arguments := recipe.teacher.chat_template_kwargs:
            requests = [request.with_arguments(arguments) for request in requests]
        if any(request.task == "program_of_thought" for request in requests):
            require_sandbox()  # before hours of generation
        tokenizer = _tokenizer(recipe)
        reader = TurnReader(tokenizer, _row_format(recipe, tokenizer))
        engine = _engine(recipe, tokenizer, on_device)
        if isinstance(recipe.task, OwnText):
            return _own_text_plan(recipe, requests, tokenizer, reader, engine)
        prompts = [render(request, tokenizer) for request in requests]
        if isinstance(engine, ModelServer) and tokenizer is not None:  # it may put an EOS behind a text
            prompts = [prompt_ids(tokenizer, text) if isinstance(text, str) else text for text in prompts]
        if isinstance(engine, LocalEngine):
            engine.check(prompts, recipe.engine_sampling)
    return GenerationPlan(requests, unusable, reader, prompts, engine, tokenizer)


def _own_text_plan(
    recipe: GenerateRecipe,
    requests: list[GenerationRequest],
    tokenizer: PreTrainedTokenizerBase | None,
    reader: TurnReader,
    engine: Engine,
) -> GenerationPlan:
    """Plan texts that need no data: by the openings of chats, or by their first tokens."""
    task, sampling = cast(OwnText, recipe.task), recipe.engine_sampling
    if tokenizer is None:
        raise RecipeError(
            "teacher.tokenizer: expected the server's tokenizer, with which its own texts begin, got none. Name its "
            "folder."
        )
    prompts: list[Prompt] = [first_tokens(tokenizer, str(each.messages[0]["content"])) for each in requests]
    question: list[int] = []  # of the longest prompt that will be answered
    if reader.row_format == "messages":
        requests, question = [], [0] * task.question_tokens
        prompts = [opening(tokenizer, recipe.teacher.chat_template_kwargs)] * task.number
    if isinstance(engine, LocalEngine):
        engine.check([[*max(prompts, key=len), *question]], sampling)
    return GenerationPlan(requests, [], reader, prompts, engine, tokenizer)


def _row_format(recipe: GenerateRecipe, tokenizer: PreTrainedTokenizerBase | None) -> RowFormat:
    if isinstance(recipe.task, Responses) and recipe.task.prompts.messages:
        if recipe.rows == "completion":
            raise RecipeError("rows: expected messages for conversations, got completion.")
        return "messages"
    if recipe.rows == "auto":
        return "completion" if tokenizer is None or tokenizer.chat_template is None else "messages"
    return recipe.rows


def _tokenizer(recipe: GenerateRecipe) -> PreTrainedTokenizerBase | None:
    key = "tokenizer" if recipe.teacher.model is None else "model"  # a model brings its own
    name = getattr(recipe.teacher, key)
    if name is None:
        return None
    tokenizer = load_tokenizer(name, f"teacher.{key}")
    set_chat_template(tokenizer, recipe.teacher.chat_template, recipe.teacher.chat_template_kwargs, "teacher")
    return tokenizer


def _engine(recipe: GenerateRecipe, tokenizer: PreTrainedTokenizerBase | None, on_device: bool = True) -> Engine:
    """The teacher's engine; without `on_device` a model stays out of the accelerator's memory."""
    part = recipe.teacher
    if part.server is not None:
        server = part.server.connect(end_ids=end_token_ids(tokenizer))
        server.card()  # checks that the server answers and has that model
        return server
    assert part.model is not None and tokenizer is not None
    model = load_model(part.model, "teacher.model", part.dtype)
    if on_device:
        model.to(torch.device(part.device or accelerator()))  # type: ignore[arg-type]
    return LocalEngine(model, tokenizer, recipe.batch_size * recipe.sampling.samples)


def _with_ray(recipe: GenerateRecipe) -> BatchCompleter:
    """Complete batches in Ray's processes. Each goes to the journal of this process once, whatever Ray repeats."""
    gpus = int(recipe.teacher.model is not None and torch.cuda.is_available())

    def complete(batches: Sequence[PromptBatch]) -> Iterator[tuple[PromptBatch, list[list[Completion]]]]:
        rows = [{"place": i, "batch": json.dumps(batch)} for i, batch in enumerate(batches)]
        for row in map_rows("generate", rows, _ray_worker, recipe, gpus=gpus):
            yield batches[row["place"]], [read_texts(texts) for texts in json.loads(row["texts"])]

    return complete


def _ray_worker(recipe: GenerateRecipe) -> RowFunction:
    with suppress_warnings():
        engine, sampling = _engine(recipe, _tokenizer(recipe)), recipe.engine_sampling

    def complete(row: Row) -> Row:
        batch = PromptBatch(*json.loads(row["batch"]))
        completions = engine.complete(batch.prompts, replace(sampling, seed=batch.seed))
        texts = [[[text.text, text.ended, text.ids] for text in texts] for texts in completions]
        return {"place": row["place"], "texts": json.dumps(texts)}

    return complete


def _write_files(
    recipe: GenerateRecipe, directory: Path, plan: GenerationPlan, judged: list[GeneratedText], notes: list[str]
) -> Generated:
    kept, dropped = _filter(recipe, judged)
    row_format, task, sampling = plan.reader.row_format, recipe.task, recipe.sampling.model_dump()
    # The run's seed is in the card; a row has that of its batch.
    provenance = {"teacher": recipe.teacher.name, "sampling": sampling}
    rows = [row for text in kept for row in rows_of(text, row_format, task.target, provenance, task.task_weights)]
    held_out = _held_out(kept, recipe.held_out)
    path, eval_path = (directory / f"{split}.{recipe.format}" for split in ("train", "eval"))
    splits = {path: [row for row in rows if row["provenance"]["row"] not in held_out]}
    if recipe.held_out:
        splits[eval_path] = [row for row in rows if row["provenance"]["row"] in held_out]
    for file, rows_of_split in splits.items():
        write_rows(file, rows_of_split)
    dropped_rows = [
        {**row, "dropped": {"filter": name, "reason": reason}}
        for text, name, reason in dropped
        for row in rows_of(text, row_format, "chain", provenance)
    ]
    write_rows(directory / f"dropped.{recipe.format}", dropped_rows)
    by_filter = dict(Counter(name for _, name, _ in dropped))
    if by_ids := sum(WRITTEN_COLUMNS[0] in row for row in rows):
        notes.append(f"{by_ids} of {len(rows)} rows keep their token ids: their text would be encoded as others.")
    if empty := [file.name for file, rows_of_split in splits.items() if not rows_of_split]:
        reasons = ", ".join(f"{name} {count:,}" for name, count in by_filter.items()) or "nothing"
        notes.append(
            f"{' and '.join(empty)} without rows: no run can read that. Of {len(judged):,} texts were dropped: "
            f"{reasons}. dropped.{recipe.format} has each with its reason; change filter and go on with --resume, or "
            "ask for more texts."
        )
    stages = {"asked": plan.requests, "texts": judged, "dropped": dropped, "texts kept": kept, "rows": rows}
    counts = {name: len(items) for name, items in stages.items()}  # type: ignore[arg-type]  # lists of several types
    templates = ", ".join(dict.fromkeys(request.template for request in plan.requests))
    facts = {"teacher": recipe.teacher.name, "task": task.name, "templates": templates}
    write_card(
        directory / "README.md",
        name=recipe.name,
        facts={**facts, "sampling": json.dumps(sampling), "seed": str(recipe.seed)},
        counts=counts | {"rows of the source that could not be used": len(plan.unusable)},
        notes=notes,
        dropped=[(name, reason, text.completion) for text, name, reason in dropped],
        lengths=[len(text.completion) for text in kept],
        bad=plan.unusable,
    )
    return Generated(directory, path, eval_path if recipe.held_out else None, counts, by_filter, notes)


def _filter(
    recipe: GenerateRecipe, judged: list[GeneratedText]
) -> tuple[list[GeneratedText], list[tuple[GeneratedText, str, str]]]:
    """The texts that are kept, and those that are dropped, each with the filter and its reason."""
    passed = [text for text in judged if text.dropped is None]
    result = apply_filters([_pair(text) for text in passed], recipe.filter.filters())
    dropped = [(text, *text.dropped) for text in judged if text.dropped is not None]
    dropped += [(passed[drop.row], drop.filter, drop.reason) for drop in result.dropped]
    return [passed[i] for i in result.kept], dropped


def _held_out(kept: Sequence[GeneratedText], share: float) -> set[int]:
    """The numbers of the requests whose rows are held out, all of one request together."""
    numbers = sorted({text.request.number for text in kept})
    number = max(1, round(share * len(numbers))) if share and len(numbers) > 1 else 0
    return {numbers[i] for i in evenly_spaced(number, len(numbers))} if number else set()


def _notes(plan: GenerationPlan, completions: Sequence[RequestCompletions]) -> list[str]:
    """Say where rows may differ from what the teacher read and wrote."""
    tokenizer, notes = plan.reader.tokenizer, []
    is_chat = tokenizer is not None and tokenizer.chat_template is not None
    has_prompts = plan.requests[0].task != OwnText.name
    if is_chat and plan.reader.row_format == "completion" and has_prompts:
        notes.append("rows: the teacher read its chat template, and the rows have the bare prompts.")
    if isinstance(plan.engine, ModelServer) and not any(text.ids for each in completions for text in each.texts):
        notes.append("teacher.server: no token ids came back: special tokens may be missing in the texts.")
    return notes


def _pair(text: GeneratedText) -> TextPair:
    """The prompt and the completion as filters read them; the prompt is all messages before the completion."""
    contents = filter(None, (message.get("content") for message in text.request.messages))
    prompt = "\n".join(part if isinstance(part, str) else json.dumps(part) for part in contents)
    return TextPair(prompt, text.completion)
