"""Adapters on students that write no text: masked tokens, classes, numbers, layers alone."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from conftest import quiet_run
from potstill.data.sources import Source
from potstill.errors import RecipeError
from potstill.evaluate.measures import QUALITY
from potstill.models.adapted import is_adapted, parameter_count
from potstill.models.adapters import Ia3, Lora, adapt, linear_layers
from potstill.models.loading import load_model, sequence_head_names, suppress_warnings
from potstill.models.precision import keep_gradients
from potstill.runs.config.run import Recipe
from potstill.runs.evaluate import EvaluationOptions, evaluate
from potstill.runs.run import RunResult
from toy_encoders import make_encoder, save

LOGITS, LABELS = {"term": "logits"}, {"term": "labels", "weight": 0.5}
OBJECTIVES = {
    "masked": [LOGITS, LABELS],
    "classification": [LOGITS, LABELS],
    "regression": [{"term": "values"}, LABELS],
    "encoder": [{"term": "hidden", "layers": "uniform", "distance": "cosine"}],
}
COLUMNS = {"classification": {"label": "label"}, "regression": {"label": "score", "pair": "text_pair"}}


def models(task: str, student: Any = None) -> None:
    save(make_encoder("bert", task, seed=1), Path("teacher"))
    # bitsandbytes wants multiples of 64 on some CPUs.
    small = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 64}
    save(make_encoder("bert", task, seed=2, **small) if student is None else student, Path("student"))


def values(task: str, adapter: Any, name: str = "run") -> dict[str, Any]:
    columns = COLUMNS.get(task, {})
    return {
        "name": name,
        "task": task,
        "teacher": {"model": "teacher"},
        "student": {"model": "student", "adapter": adapter},
        "data": {
            "train": {"path": "train.jsonl", "field": "text", **columns},
            "eval": {"path": "eval.jsonl", "field": "text", **columns},
            "max_length": 32,
        },
        "objective": OBJECTIVES[task],
        "train": {"max_steps": 4, "save_steps": 2, "learning_rate": 1e-2, "per_device_train_batch_size": 8},
        "evaluate": {"baseline": False},
        "output": f"runs/{name}",
    }


def done(recipe: dict[str, Any], *, resume: bool = False) -> RunResult:
    return quiet_run(recipe, resume=resume)


def answer(model: Any) -> torch.Tensor:
    ids = torch.tensor([[2, 7, 12, 9, 3], [2, 8, 14, 6, 3]])
    output = model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids))
    found: torch.Tensor = output.logits if "logits" in output else output.last_hidden_state
    return found.detach()


@pytest.mark.parametrize(
    ("task", "kind"),
    [
        ("masked", "lora"),
        ("classification", "lora"),
        pytest.param("classification", "qlora", marks=pytest.mark.slow),
        ("regression", "ia3"),
        ("encoder", "lora"),
    ],
)
def test_a_run_keeps_the_adapter_and_what_judges(task: str, kind: str, judged_rows: Path) -> None:
    models(task)
    adapter = {"kind": kind} if kind == "ia3" else {"kind": kind, "rank": 2}
    result = done(values(task, adapter))
    folder = result.directory / "student"
    assert not list(folder.glob("model*.safetensors"))
    weights = load_file(folder / "adapter_model.safetensors")
    heads = {name.split(".")[-2] for name in weights if "lora" not in name and "ia3" not in name}
    assert heads == ({"classifier", "dense"} if task in COLUMNS else set())  # the head, and the pooler's layer
    adapter_summary, row = result.summary["adapter"], result.summary["rows"]["student"]
    assert adapter_summary["trained"] == sum(x.numel() for x in weights.values())
    loaded = load_model(str(folder), "student", task=task)  # type: ignore[arg-type]  # a parameter of the test
    base = load_model("student", "student", task=task)  # type: ignore[arg-type]  # likewise
    alone = sum(x.numel() for name, x in weights.items() if "lora" in name or "ia3" in name)
    assert row["parameters"] == parameter_count(loaded).all == base.num_parameters() + alone
    assert not torch.allclose(answer(loaded), answer(base), atol=1e-3)
    assert all(row[one.key] is not None for one in QUALITY[task])  # type: ignore[index]  # likewise
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), flags=re.DOTALL)
    code, space = code.replace('"student"  #', f"{str(folder)!r}  #"), {}
    with suppress_warnings():
        exec(code, space)
        exec(code.partition("inputs =")[0], space)
    assert is_adapted(space["model"])
    keep_gradients(space["model"])  # as where it was measured: packed, its products round more
    torch.testing.assert_close(answer(space["model"]), answer(loaded), atol=1e-5, rtol=1e-5)
    found = evaluate(
        str(folder), "teacher", Source("eval.jsonl", field="text", **COLUMNS.get(task, {})), max_length=32,
        options=EvaluationOptions(batch_sizes=[1], lengths=[8]), task=task,  # type: ignore[arg-type]  # likewise
    )  # fmt: skip
    first = QUALITY[task][0].key  # type: ignore[index]  # likewise
    assert found["models"]["student"]["quality"][first] == pytest.approx(row[first], rel=1e-4)


def test_a_head_that_was_not_there_is_trained_and_comes_back(judged_rows: Path) -> None:
    models("classification", make_encoder("distilbert", "encoder", seed=2))
    whole = done(values("classification", {"kind": "lora", "rank": 2}))
    loaded = [load_model(str(whole.directory / "student"), "student", task="classification") for _ in range(2)]
    assert torch.equal(answer(loaded[0]), answer(loaded[1]))
    assert loaded[0].config.label2id == {"calm": 0, "lively": 1, "odd": 2}
    kept = load_file(whole.directory / "student" / "adapter_model.safetensors")
    assert {name.split(".")[-2] for name in kept if "lora" not in name} == {"classifier", "pre_classifier"}


@pytest.mark.slow
def test_it_goes_on_and_merges_into_the_same(judged_rows: Path) -> None:
    models("classification")
    adapter = {"kind": "lora", "rank": 2}
    whole = done(values("classification", adapter))
    weights = whole.directory / "student" / "adapter_model.safetensors"
    before = load_file(weights)
    shutil.rmtree(whole.directory / "student")  # as if it had been killed between two checkpoints
    shutil.rmtree(whole.directory / "checkpoints" / "student" / "checkpoint-4")
    done(values("classification", adapter), resume=True)
    after = load_file(weights)
    assert before.keys() == after.keys() and all(torch.equal(x, after[name]) for name, x in before.items())
    merged = done(values("classification", adapter | {"merge": True}, "merged"))
    plain = load_model(str(merged.directory / "student"), "student", task="classification")
    assert not is_adapted(plain)
    apart = load_model(str(whole.directory / "student"), "student", task="classification")
    torch.testing.assert_close(answer(plain), answer(apart), atol=1e-5, rtol=1e-5)


def test_heads_of_sequence_tasks_are_found_by_their_place() -> None:
    found = {
        (kind, task): sequence_head_names(make_encoder(kind, task))
        for kind in ("bert", "distilbert", "roberta")
        for task in ("masked", "classification", "regression", "encoder")
    }
    assert found == {
        (kind, task): heads.get(kind, []) if task in COLUMNS else []
        for kind, task in found
        for heads in [
            {
                "bert": ["classifier", "bert.pooler"],
                "distilbert": ["pre_classifier", "classifier"],
                "roberta": ["classifier"],
            }
        ]
    }
    assert not [name for name in linear_layers(make_encoder("bert", "classification")) if "pooler" in name]


def test_at_first_it_computes_what_the_model_did() -> None:
    for adapter in (Lora(rank=2), Ia3()):
        model = make_encoder("bert", "classification").eval()
        before = answer(model)
        torch.testing.assert_close(answer(adapt(model, adapter)), before)


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_tokens_in_front_are_refused(kind: str) -> None:
    with pytest.raises(RecipeError, match=f"adapter: expected lora, qlora, ia3 for the task masked, got {kind}"):
        Recipe.parse(values("masked", kind))
