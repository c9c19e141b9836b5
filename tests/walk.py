"""Walk a family of transformers through everything that Potstill does with a model, and write the page of families.

A result is `yes`, or the message with which the family is refused. Any other error is a fault.
"""

from __future__ import annotations

import io
import json
import re
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
)

import families
from potstill.data.sources import Source
from potstill.errors import ModelError, PotstillError
from potstill.losses.alignment import Task
from potstill.losses.divergences import ForwardKL
from potstill.models.design import ShapeSearch, design
from potstill.models.heads import max_positions
from potstill.models.integrity import padding_notes
from potstill.models.loading import load_config, load_model, vocabulary_size
from potstill.models.shapes import text_config
from potstill.models.size import build, count_parameters, language_model_class, size_of
from potstill.models.split import evaluation_mode
from potstill.runs.build import build_run
from potstill.runs.check import check
from potstill.runs.config.run import Recipe
from potstill.runs.evaluate import EvaluationOptions, evaluate
from potstill.runs.run import run
from potstill.train.distiller import Distiller
from potstill.train.terms.dense import Values
from potstill.train.terms.layers import Attention, Hidden, Relations, Similarity
from potstill.train.terms.logits import Labels, Logits
from potstill.train.terms.supervision import DeepSupervision
from potstill.train.terms.term import Term

YES = "yes"
AUTO: dict[Task, Any] = {
    "masked": AutoModelForMaskedLM,
    "classification": AutoModelForSequenceClassification,
    "regression": AutoModelForSequenceClassification,
}
TERMS = {
    "hidden": Hidden(),
    "similarity": Similarity(),
    "attention": Attention(),
    "relations": Relations(heads=2),
    "deep_supervision": DeepSupervision(layers=(0,)),
}
STARTS = ("copy", "truncate", "prune")
TOKENS_ONLY = ("deep_supervision",)
TEXTS = [
    f"Row {i}: the {word} reads {i * i} lines and writes some." for i, word in enumerate(("owl", "fox", "cat", "yak"))
]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of single characters that fits the small configs' 128 tokens."""
    special = ["<pad>", "<s>", "</s>", "<mask>", "<unk>"]
    characters = [chr(code) for code in range(32, 127)]
    vocabulary = {token: i for i, token in enumerate([*special, *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A", pair="$A $B", special_tokens=[])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", mask_token="<mask>",
        unk_token="<unk>",
    )  # fmt: skip


class Walk:
    """The steps of one family for one task, in a folder of its own."""

    def __init__(self, family: str, task: Task, folder: Path) -> None:
        self.family, self.task, self.folder = family, task, folder

    def steps(self) -> Iterator[tuple[str, Callable[[], None]]]:
        yield "loss", self.loss
        yield "positions", self.positions
        yield "check", self.check
        yield "run", self.run
        yield "evaluate", self.evaluate
        yield "design", self.design
        for start in STARTS:
            yield f"start {start}", partial(self.start, start)
        for name in TERMS:
            if self.task == "causal" or name not in TOKENS_ONLY:
                yield f"term {name}", partial(self.term, name)

    @cached_property
    def models(self) -> dict[str, str]:
        """Folders of a teacher and a student with their tokenizer, and files of data."""
        self.folder.mkdir(parents=True, exist_ok=True)
        tokenizer, folders = make_tokenizer(), {}
        for seed, name in enumerate(("teacher", "student")):
            folders[name] = str(self.folder / name)
            labels = {"classification": {"num_labels": 2}, "regression": {"num_labels": 1}}.get(self.task, {})
            auto = AUTO.get(self.task) or language_model_class(families.small(self.family))
            families.model(self.family, auto, seed, **labels).save_pretrained(folders[name])
            tokenizer.save_pretrained(folders[name])
        for name, rows in (("train", 2 * TEXTS), ("eval", [text.upper() for text in TEXTS])):
            lines = [{"text": text} | self.label(i) for i, text in enumerate(rows)]
            (self.folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return folders

    def label(self, row: int) -> dict[str, Any]:
        of_task: dict[str, Any] = {"classification": row % 2, "regression": row / 4}
        return {"label": of_task[self.task]} if self.task in of_task else {}

    def loaded(self, name: str) -> Any:
        return load_model(self.models[name], name, "float32", self.task)

    def recipe(self, **values: Any) -> Recipe:
        first = "values" if self.task == "regression" else "logits"
        objective = [{"term": first}, {"term": "labels", "weight": 0.1}]
        return Recipe.parse(
            {
                "name": self.family,
                "task": self.task,
                "teacher": {"model": self.models["teacher"]},
                "student": {"model": self.models["student"]},
                "data": {
                    "train": {"path": str(self.folder / "train.jsonl")},
                    "eval": {"path": str(self.folder / "eval.jsonl")},
                    "max_length": 48,
                },
                "objective": objective,
                "train": {"max_steps": 2, "per_device_train_batch_size": 2, "logging_steps": 1},
                "evaluate": {"baseline": False} | ({"continuations": 1} if self.task == "causal" else {}),
                "output": str(self.folder / "run"),
            }
            | values
        )

    def first(self) -> Term:
        return Values() if self.task == "regression" else Logits(ForwardKL())

    def batch(self) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(5, 100, (3, 12), generator=generator)
        mask = (torch.arange(12) < torch.tensor([[12], [9], [5]])).long()
        ids = torch.where(mask.bool(), ids, 0)
        if self.task in ("classification", "regression"):
            labels = torch.tensor([0, 1, 0]) if self.task == "classification" else torch.tensor([0.1, 0.9, 0.4])
        else:
            labels = torch.where(mask.bool() & (torch.arange(12) % (3 if self.task == "masked" else 1) == 0), ids, -100)
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    def loss(self) -> None:
        """Compare the loss of a padded batch with the sum over its rows, each by itself and without padding."""
        teacher, student, batch = self.loaded("teacher"), self.loaded("student"), self.batch()
        distiller = Distiller(student, teacher, [self.first(), Labels(weight=0.5)], task=self.task).eval()
        loss = distiller(batch).loss
        total, count = 0.0, 0
        with torch.no_grad(), evaluation_mode(teacher, student):
            for i, length in enumerate(batch["attention_mask"].sum(1).tolist()):
                ids, labels = batch["input_ids"][i : i + 1, :length], batch["labels"][i : i + 1]
                kinds = {"token_type_ids": torch.zeros_like(ids)} if "token_type_ids" in batch else {}
                p, q = (m(input_ids=ids, use_cache=False, **kinds).logits.double() for m in (teacher, student))
                if self.task in ("classification", "regression"):
                    p, q = p[:, None], q[:, None]
                    chosen = labels[:, None]
                else:
                    chosen = labels[:, :length]
                if self.task == "causal":
                    p, q, chosen = p[:, :-1], q[:, :-1], chosen[:, 1:]
                if self.task == "regression":
                    total += float(((p - q) ** 2).sum() + 0.5 * ((q[..., 0] - chosen) ** 2).sum())
                    count += 1
                    continue
                p, q, chosen = (x[chosen != -100] for x in (p, q, chosen))
                p, q = p.log_softmax(-1), q.log_softmax(-1)
                total += float((p.exp() * (p - q)).sum() - 0.5 * q.gather(-1, chosen[:, None]).sum())
                count += len(chosen)
        expected = total / count
        if reads_padding := padding_notes(student, "student"):
            raise ModelError(reads_padding[0])
        assert abs(float(loss) - expected) <= 2e-4 * max(abs(expected), 0.05), (
            f"loss {float(loss)}, expected {expected}"
        )

    def positions(self) -> None:
        """Read a row of as many tokens as the family claims to have positions for."""
        model = self.loaded("student")
        length = min(max_positions(model) or 300, 600)
        with torch.no_grad(), evaluation_mode(model):
            model(input_ids=torch.arange(length)[None] % 90 + 5, use_cache=False)

    def check(self) -> None:
        check(self.recipe())

    def run(self) -> None:
        run(self.recipe(), console=Console(file=io.StringIO()))

    def evaluate(self) -> None:
        options = EvaluationOptions(batch_sizes=(1,), lengths=(16,))
        source = Source(self.folder / "eval.jsonl")
        evaluate(self.models["student"], self.models["teacher"], source, max_length=48, options=options, task=self.task)

    def budget(self, vocabulary: int) -> int:
        """The number of parameters of the family's student that is nearest to two thirds of the teacher."""
        teacher = load_config(self.models["teacher"], "teacher")
        search = ShapeSearch(teacher, "balanced", vocabulary)
        return search.best(count_parameters(search.teacher) * 2 // 3).parameters

    def design(self) -> None:
        teacher = load_config(self.models["teacher"], "teacher")
        student = design(teacher, self.budget(teacher.get_text_config(decoder=True).vocab_size))
        model = build(student).eval()
        assert sum(p.numel() for p in model.parameters()) == count_parameters(student) < count_parameters(teacher)
        batch = self.batch()
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
        size_of(student, 16)

    def start(self, method: str) -> None:
        teacher = load_config(self.models["teacher"], "teacher")
        if method == "copy":
            text = text_config(teacher)
            name = text.attribute_map.get("num_hidden_layers", "num_hidden_layers")
            alike = len({*(getattr(text, "layer_types", None) or [""])}) == 1
            design: dict[str, Any] = {name: max(1, text.num_hidden_layers - alike)}
        else:
            design = {"params": self.budget(vocabulary_size(make_tokenizer()))}
        built = build_run(self.recipe(student={"design": design, "initialize": method}))
        batch = self.batch()
        built.new_student()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)

    def term(self, name: str) -> None:
        teacher, student, batch = self.loaded("teacher"), self.loaded("student"), self.batch()
        distiller = Distiller(student, teacher, [self.first(), TERMS[name]], task=self.task)
        loss = distiller.step(batch).loss
        assert loss.isfinite(), f"loss {loss}"
        loss.backward()


def walk(family: str, task: Task, folder: Path, skip: Collection[str] = ()) -> dict[str, str]:
    """Walk one family through all steps; a fault is `FAULT`, its type and its message."""
    results: dict[str, str] = {}
    steps = Walk(family, task, folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, step in steps.steps():
            if name not in skip:
                results[name] = outcome(step)
    return results


def outcome(step: Callable[[], None]) -> str:
    try:
        step()
    except PotstillError as error:
        return str(error)
    except Exception as error:
        return f"FAULT {type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return YES


STEPS = {
    "loss": "loss",
    "run": "run",
    "design": "design",
    "start copy": "copy",
    **{f"term {name}": name for name in TERMS},
}
INTRO = """# Families of models
Each family of transformers was walked with a small model of random weights. The steps are the loss of a padded batch
against that of one row at a time (loss), two training steps with the measurements and the report behind them (run), a
smaller design of the family that is built and run (design), a student of copied layers (copy), and each term over
layers. `yes` works. `no` is refused, before anything is trained, with one of the messages below the table. A blank was
not tried.

`truncate` and `prune` need to know each matrix of a layer: they are for Llama, Mistral, Qwen 2 and 3, Gemma 1 to 3,
GPT-2, BERT and DistilBERT. The student of a model that also reads images or sound is its text part.
"""
TITLES = {
    "causal": "Causal language models",
    "masked": "Masked language models",
}
Rows = Mapping[str, Mapping[str, str]]  # family -> step -> result


def table(rows: Rows) -> str:
    """Write the table of one task."""
    lines = [f"| family | {' | '.join(STEPS.values())} |", "|---" * (len(STEPS) + 1) + "|"]
    for family, results in sorted(rows.items()):
        marks = [mark(results[step]) if step in results else "" for step in STEPS]
        lines.append(f"| {family} | {' | '.join(marks)} |")
    return "\n".join(lines) + "\n"


def mark(result: str) -> str:
    return YES if result == YES else "no" if not result.startswith("FAULT") else "fault"


def read_table(text: str) -> dict[str, dict[str, str]]:
    """Read a table again, with marks as results."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()[2:]]
    return {family: {step: x for step, x in zip(STEPS, marks, strict=True) if x} for family, *marks in rows}


def refusals(rows: Rows) -> str:
    """List the messages of a task, each with the steps and families that it is for."""
    groups: dict[str, list[tuple[str, str]]] = {}
    for family, results in sorted(rows.items()):
        for step, result in results.items():
            if step in STEPS and mark(result) == "no":
                message = re.sub(r"\b[A-Z]\w+(?:For[A-Z]\w+|LMHead\w*|Decoder)\b", "MODEL", result)
                message = re.sub(r"(?:objective\.\d+|teacher(?:\.model)?|student): ", "", message, count=1)
                message = re.sub(r"\[[\d, ]+\]|\d+", "N", message).replace(family, "FAMILY")
                groups.setdefault(re.sub(r"got (?!MODEL).*? \(N\).*", "got others.", message), []).append(
                    (family, step)
                )
    lines = []
    for message, places in sorted(groups.items()):
        names = ", ".join(dict.fromkeys(family for family, _ in places))
        steps = ", ".join(dict.fromkeys(STEPS[step] for _, step in places))
        lines.append(f"- {steps} ({names}): `{message}`")
    return "\n".join(lines) + "\n"


def page(tasks: Mapping[str, Rows]) -> str:
    """Write the page of families from the results of each task."""
    parts = [INTRO]
    for task, rows in tasks.items():
        parts += [f"## {TITLES[task]}\n{table(rows)}", f"Messages:\n{refusals(rows)}"]
    left_out = "\n".join(f"- {family}: {reason}" for family, reason in sorted(families.NOT_SMALL.items()))
    return "\n".join([*parts, f"## Not walked\nThere is no small model of these.\n\n{left_out}\n"])
