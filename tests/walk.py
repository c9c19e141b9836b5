"""Walk a family of transformers through everything that Potstill does with a model.

The result of a step is `yes`, or the message with which the family is refused. Any other error is a fault, and so is a
message that does not name the family or its class.
"""

from __future__ import annotations

import copy
import gc
import io
import json
import re
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any
from unittest import mock

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
from potstill.errors import ModelError, PotstillError, RunError
from potstill.losses.alignment import SEQUENCE_TASKS, Task
from potstill.losses.divergences import ForwardKL
from potstill.models.design import ShapeSearch, SizedShape, design
from potstill.models.heads import max_positions
from potstill.models.integrity import padding_notes
from potstill.models.loading import load_config, load_model
from potstill.models.shapes import config_fields, text_config
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
FIELDS: dict[Task, Any] = {
    "masked": {"is_decoder": False},
    # Default names of two labels are not saved.
    "classification": {"id2label": {0: "plain", 1: "odd"}, "label2id": {"plain": 0, "odd": 1}},
    "regression": {"id2label": {0: "score"}, "label2id": {"score": 0}},
}
TERMS = {
    "hidden": Hidden(),
    "similarity": Similarity(),
    "attention": Attention(),
    "relations": Relations(heads=2),
    "deep_supervision": DeepSupervision(layers=(0,)),
}
STARTS = ("copy", "truncate", "prune")
END = 2  # the id of </s>
SECONDS = 0.3  # for measurements: one pass of each would do
TOKENS_ONLY = ("deep_supervision",)
TEXTS = [
    f"Row {i}: the {word} reads {i * i} lines and writes some." for i, word in enumerate(("owl", "fox", "cat", "yak"))
]


def make_tokenizer(task: Task) -> PreTrainedTokenizerFast:
    """A tokenizer of single characters that fits the small configs' 128 tokens; it ends the texts of sequence heads."""
    special = ["<pad>", "<s>", "</s>", "<mask>", "<unk>"]
    characters = [chr(code) for code in range(32, 127)]
    vocabulary = {token: i for i, token in enumerate([*special, *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    if task in SEQUENCE_TASKS:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="$A </s>", pair="$A $B </s>", special_tokens=[("</s>", END)]
        )
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
        yield "check", self.check
        yield "run", self.run
        yield "evaluate", self.evaluate
        if self.task == "regression":
            return  # all else is as for classification
        yield "positions", self.positions
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
        tokenizer, folders = make_tokenizer(self.task), {}
        for seed, name in enumerate(("teacher", "student")):
            folders[name] = str(self.folder / name)
            auto = AUTO.get(self.task) or language_model_class(families.small(self.family))
            families.model(self.family, auto, seed, **FIELDS.get(self.task, {})).save_pretrained(folders[name])
            tokenizer.save_pretrained(folders[name])
        for name, rows in (("train", 2 * TEXTS), ("eval", [text.upper() for text in TEXTS])):
            lines = [{"text": text} | self.label(i) for i, text in enumerate(rows)]
            (self.folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return folders

    def label(self, row: int) -> dict[str, Any]:
        of_task: dict[str, Any] = {"classification": row % 2, "regression": row / 4}
        return {"label": of_task[self.task]} if self.task in of_task else {}

    @cache  # noqa: B019 (a walk is short)
    def _loaded(self, name: str) -> Any:
        return load_model(self.models[name], name, "float32", self.task)

    def loaded(self, name: str) -> Any:
        return copy.deepcopy(self._loaded(name))

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
                "evaluate": {"time_limit": SECONDS} | ({"continuations": 1} if self.task == "causal" else {}),
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
        if self.task in SEQUENCE_TASKS:
            ids[torch.arange(3), mask.sum(1) - 1] = END
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
                if self.task in SEQUENCE_TASKS:
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
            ids = torch.arange(length)[None] % 90 + 5
            ids[:, -1] = END
            model(input_ids=ids, use_cache=False)

    def check(self) -> None:
        check(self.recipe())

    def run(self) -> None:
        run(self.recipe(), console=Console(file=io.StringIO()))

    def evaluate(self) -> None:
        options = EvaluationOptions(lengths=(16,), time_limit=SECONDS)
        source = Source(self.folder / "eval.jsonl")
        evaluate(self.models["student"], self.models["teacher"], source, max_length=48, options=options, task=self.task)

    @cached_property
    def smaller(self) -> SizedShape:
        """The shape of the family's student that is nearest to two thirds of the teacher."""
        search = ShapeSearch(load_config(self.models["teacher"], "teacher"), "balanced", families.VOCABULARY)
        return search.best(count_parameters(search.teacher) * 2 // 3)

    def design(self) -> None:
        teacher = load_config(self.models["teacher"], "teacher")
        student = design(teacher, self.smaller.parameters)
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
            design = config_fields(self.smaller.shape, text_config(teacher))
        built = build_run(self.recipe(student={"design": design, "initialize": method}))
        batch = self.batch()
        built.new_student()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)

    def term(self, name: str) -> None:
        teacher, student, batch = self.loaded("teacher"), self.loaded("student"), self.batch()
        distiller = Distiller(student, teacher, [self.first(), TERMS[name]], task=self.task)
        loss = distiller.step(batch).loss
        assert loss.isfinite(), f"loss {loss}"
        loss.backward()


@dataclass(frozen=True)
class Result:
    """What became of one step of one family."""

    task: Task
    family: str
    step: str
    text: str
    seconds: float  # of the processor

    @property
    def mark(self) -> str:
        return YES if self.text == YES else "fault" if self.text.startswith("FAULT") else "no"


Families = dict[str, dict[str, Result]]  # family -> step -> result


class Results:
    """Results of steps, kept in a file of JSON lines: a walk that was stopped goes on where it was."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def add(self, result: Result) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(result)) + "\n")

    def of(self, task: Task) -> Families:
        """The last result of each step."""
        rows: Families = defaultdict(dict)
        if self.path.exists():
            for line in self.path.read_text(encoding="utf-8").splitlines():
                result = Result(**json.loads(line))
                if result.task == task:
                    rows[result.family][result.step] = result
        return dict(rows)


def walk(family: str, task: Task, folder: Path, results: Results) -> dict[str, Result]:
    """Walk one family through the steps that have no result yet."""
    known = results.of(task).get(family, {})
    steps = Walk(family, task, folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, step in steps.steps():
            if name not in known:
                start = time.process_time()
                gc.freeze()  # a run collects garbage a dozen times: it need not look through all that was imported
                with mock.patch("gc.unfreeze"):
                    text = outcome(step)
                if text != YES and not text.startswith("FAULT") and not names_family(text, family, task):
                    text = f"FAULT the message does not name {family}: {text}"
                known[name] = Result(task, family, name, text, round(time.process_time() - start, 2))
                results.add(known[name])
    return known


def outcome(step: Callable[[], None]) -> str:
    try:
        step()
    except PotstillError as error:
        untold = isinstance(error.__cause__, Exception) and isinstance(error, RunError)  # a fault that a rehearsal met
        return "FAULT " * untold + " ".join(str(error).split())
    except Exception as error:
        return f"FAULT {type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return YES


def names_family(message: str, family: str, task: Task) -> bool:
    """Whether a message has the family's name, as in `GptOssForCausalLM` for gpt_oss, or its class."""
    short, long = (re.sub(r"[\W_]", "", text).lower() for text in (family.removesuffix("_text"), message))
    return short in long or families.CLASSES[task][family] in message
