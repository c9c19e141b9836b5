"""A closer look: every number against a loop over tokens, the sentences against what they must find, and whole runs."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from conftest import make_batch, make_llama, quiet_run
from potstill.cli import app
from potstill.data.batches import encode
from potstill.data.sources import Source
from potstill.errors import DataError, RecipeError, UserError
from potstill.evaluate import diagnosis as measures
from potstill.evaluate import quality
from potstill.evaluate.diagnosis import (
    TOP_COUNTS,
    distributions,
    gradient_flow,
    gradient_stats,
    irreducible,
    label_noise,
    token_stats,
)
from potstill.evaluate.findings import conclusion, interpret, recommended_temperature
from potstill.evaluate.report.diagnosis import write_diagnosis_page
from potstill.evaluate.report.page import write_report
from potstill.losses.alignment import causal_alignment
from potstill.losses.targets import DenseTargets
from potstill.models.loading import load_tokenizer
from potstill.models.spacing import evenly_spaced
from potstill.runs.config.run import Recipe
from potstill.runs.diagnose import diagnose, teacher_temperatures


def logits_of(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return causal_alignment(batch["labels"]).select(logits)


@pytest.mark.parametrize("elements", [2**25, 2000])  # whole batches, and a few tokens at a time
def test_every_number_is_what_a_loop_gives(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality, "ELEMENTS", elements)
    teacher, student = make_llama(seed=1), make_llama(hidden_size=8, layers=1).train()
    batches = [make_batch(seed=seed) for seed in (1, 2)]
    tokens, softenings = token_stats(
        lambda batch, alignment: DenseTargets(logits_of(teacher, batch)),
        {"student": student},
        batches,
        temperatures=(1.0, 3.0),
    )
    assert student.training
    teacher_logits, student_logits = (
        torch.cat([logits_of(model, batch) for batch in batches]).double() for model in (teacher, student.eval())
    )
    labels = torch.cat([causal_alignment(batch["labels"]).labels for batch in batches]).tolist()
    assert tokens.label.tolist() == labels
    assert len(tokens) == len(labels) > 10
    p, q = teacher_logits.softmax(-1).tolist(), student_logits.softmax(-1).tolist()
    teacher_stats, student_stats = tokens.models["teacher"], tokens.models["student"]
    for i, label in enumerate(labels):
        m = [(a + b) / 2 for a, b in zip(p[i], q[i], strict=True)]
        kl = sum(a * math.log(a / b) for a, b in zip(p[i], q[i], strict=True))
        js = sum((a * math.log(a / c) + b * math.log(b / c)) / 2 for a, b, c in zip(p[i], q[i], m, strict=True))
        tops = [sorted(range(300), key=one.__getitem__)[-10:] for one in (p[i], q[i])]
        assert student_stats["kl"][i].item() == pytest.approx(kl, abs=1e-5)
        assert student_stats["js"][i].item() == pytest.approx(js, abs=1e-5)
        assert student_stats["overlap"][i].item() == pytest.approx(len({*tops[0]} & {*tops[1]}) / 10)
        assert student_stats["agreement"][i].item() == (tops[0][-1] == tops[1][-1])
        assert teacher_stats["entropy"][i].item() == pytest.approx(-sum(a * math.log(a) for a in p[i]), abs=1e-5)
        assert student_stats["label_log_prob"][i].item() == pytest.approx(math.log(q[i][label]), abs=1e-5)
        assert teacher_stats["confidence"][i].item() == pytest.approx(max(p[i]), abs=1e-6)
    for temperature, found in zip((1.0, 3.0), softenings, strict=True):
        soft = (teacher_logits / temperature).softmax(-1)
        entropy = float(-(soft * soft.log()).sum(-1).mean())
        assert found.temperature == temperature
        assert found.entropy == pytest.approx(entropy, abs=1e-5)
        assert found.support == pytest.approx(math.exp(entropy), rel=1e-4)
        assert found.counted == pytest.approx(float((soft > 1 / 300).double().sum(-1).mean()))
        for k in TOP_COUNTS:
            assert found.mass[k] == pytest.approx(float(soft.sort(-1).values[:, -k:].sum(-1).mean()), abs=1e-5)
    floor = irreducible(tokens)
    cross = float(-(teacher_logits.softmax(-1) * student_logits.log_softmax(-1)).sum(-1).mean())
    assert floor["models"]["student"]["soft_cross_entropy"] == pytest.approx(cross, abs=1e-5)
    assert floor["models"]["student"]["share"] == pytest.approx(softenings[0].entropy / cross, abs=1e-5)
    frequency = torch.arange(300)  # token i was seen i times
    found = distributions(tokens, frequency)["student"]
    for group, (least, most) in zip(
        found["by_frequency"][-3:], ((1, 10), (10, 100), (100, 1000))[-len(found["by_frequency"][-3:]) :], strict=True
    ):
        inside = [i for i, label in enumerate(labels) if least <= label < most]
        assert group["tokens"] == len(inside)
        assert group["kl"] == pytest.approx(float(tokens.models["student"]["kl"][inside].double().mean()))
    assert sum(group["share_of_excess"] for group in found["by_frequency"]) == pytest.approx(1)
    assert sum(group["tokens"] for group in found["by_frequency"]) == len(labels)


def test_tokens_that_a_teacher_rules_out_are_no_nan() -> None:
    student = make_llama()
    batch = make_batch()
    ruled_out = logits_of(make_llama(seed=1), batch)
    ruled_out[:, 100:] = -math.inf
    tokens, softenings = token_stats(lambda *_: DenseTargets(ruled_out), {"student": student}, [batch])
    assert all(
        torch.isfinite(values).all()
        for values in (*(stats["entropy"] for stats in tokens.models.values()), tokens.models["student"]["kl"])
    )
    assert all(math.isfinite(one.entropy) for one in softenings)


def test_labels_that_a_sure_teacher_contradicts_are_found() -> None:
    batch = make_batch()
    count = len(causal_alignment(batch["labels"]))
    labels = causal_alignment(batch["labels"]).labels
    sure = torch.zeros(count, 300)
    sure[torch.arange(count), labels] = 20.0
    sure[3] = 0.0
    sure[3, (labels[3] + 1) % 300] = 20.0  # sure of another
    sure[5] = 0.0
    sure[5, : int(labels[5])] = 9.0  # finds it unlikely, sure of nothing
    sure[5, int(labels[5]) + 1 :] = 9.0
    tokens, _ = token_stats(lambda *_: DenseTargets(sure), {}, [batch])
    noise = label_noise(tokens)
    assert noise["unlikely"] == pytest.approx(2 / count)
    assert noise["contradicted"] == pytest.approx(1 / count)
    assert noise["examples"] == [3]


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])
        self.head = nn.Linear(3, 1)
        self.dead = nn.Linear(2, 2)
        self.frozen = nn.Linear(2, 2).requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x).mean()


def test_gradients_are_described_by_parameter_and_stay() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    assert gradient_stats(model) == {}
    model[0](torch.randn(4, 3)).square().sum().backward()
    model[0].bias.grad[0] = math.nan
    before = model[0].weight.grad.clone()
    found = gradient_stats(model)
    assert list(found) == ["0.weight", "0.bias"]
    numbers = before.double().flatten().tolist()
    mean = sum(numbers) / 6
    std = math.sqrt(sum((x - mean) ** 2 for x in numbers) / 5)
    stats = found["0.weight"]
    assert (stats.mean, stats.std, stats.max, stats.min) == pytest.approx((mean, std, max(numbers), min(numbers)))
    assert torch.equal(model[0].weight.grad, before)
    assert (stats.has_nan, found["0.bias"].has_nan) == (False, True)
    model[1].bias.grad = torch.ones(1)
    assert math.isnan(gradient_stats(model)["1.bias"].std)


def test_gradients_are_those_of_the_losses_and_the_dead_are_named() -> None:
    student, batches = Small(), [torch.randn(4, 3) for _ in range(2)]
    found = gradient_flow(student, (student(x) for x in batches))
    assert [one.part for one in found.flow] == ["layer 0", "layer 1", "head", "dead"]
    assert found.none == ["dead.weight", "dead.bias"]
    assert found.bad == []
    assert all(parameter.grad is None for parameter in student.parameters())
    assert found.loss == pytest.approx(sum(float(student(x).detach()) for x in batches) / 2)
    sum(student(x) for x in batches).backward()
    layer = student.layers[1]
    gradients = torch.cat([layer.weight.grad.flatten(), layer.bias.grad])
    weights = torch.cat([layer.weight.detach().flatten(), layer.bias.detach()])
    assert found.flow[1].gradient == pytest.approx(float(gradients.square().mean().sqrt()))
    assert found.flow[1].ratio == pytest.approx(float(gradients.norm() / weights.norm()))
    broken = gradient_flow(student, [student(batches[0]) * math.nan])
    assert "layers.0.weight" in broken.bad


def at(temperature: float, *mass: float, support: float = 5.0) -> dict[str, Any]:
    return {
        "temperature": temperature,
        "entropy": math.log(support),
        "support": support,
        "mass": dict(zip(("1", "10", "100"), mass, strict=True)),
    }


def test_logits_of_any_shape_are_softened_alike() -> None:
    logits = torch.randn(2, 3, 50, generator=torch.Generator().manual_seed(0))
    assert measures.soften(logits, (1.0, 2.0)) == measures.soften(logits.flatten(0, 1), (1.0, 2.0))
    with pytest.raises(UserError, match="soften: expected temperatures > 0, got"):
        measures.soften(logits, (0.0, 1.0))


def test_a_sure_teacher_is_softened_and_a_broad_one_is_not() -> None:
    broad = [at(1.0, 0.55, 0.8, 0.95), at(2.0, 0.2, 0.4, 0.7)]
    assert recommended_temperature(broad)[0] == 1.0
    sure = [at(1.0, 0.98, 1.0, 1.0), at(2.0, 0.85, 0.99, 1.0), at(4.0, 0.6, 0.9, 0.97), at(8.0, 0.2, 0.4, 0.6)]
    chosen, why = recommended_temperature(sure)
    assert chosen == 4.0
    assert "leaves 2%" in why
    assert "40%" in why
    tail = [at(1.0, 0.98, 1.0, 1.0), at(2.0, 0.85, 0.95, 0.96), at(4.0, 0.3, 0.4, 0.5)]
    assert recommended_temperature(tail)[0] == 2.0  # beyond it the tail is what is taught
    assert recommended_temperature([at(1.0, 0.9, 0.91, 0.95)])[0] == 1.0


def healthy() -> dict[str, Any]:
    """A diagnosis in which nothing is wrong; tests break one thing."""
    student = {
        "kl": 0.5,
        "js": 0.1,
        "agreement": 0.7,
        "top_k_agreement": 0.7,
        "loss": 2.5,
        "entropy": 2.0,
        "by_position": {"edges": [0, 4], "kl": [0.5]},
        "by_frequency": [
            {"name": "1 to 9 times", "tokens": 5, "kl": 1.0, "loss": 3.0, "teacher_loss": 2.0, "share_of_excess": 0.1},
            {"name": "100 to 999", "tokens": 95, "kl": 0.4, "loss": 2.4, "teacher_loss": 2.0, "share_of_excess": 0.9},
        ],
    }
    return {
        "of": "run",
        "data": {"which": "held out", "rows": 4, "tokens": 100},
        "compression": 4.0,
        "losses": {"teacher": 2.0, "baseline": 2.9, "student": 2.5},
        "temperature": {
            "rows": [at(1.0, 0.5, 0.8, 0.95), at(8.0, 0.01, 0.1, 0.3, support=900.0)],
            "used": [1.0],
            "recommended": 1.0,
            "why": "It need not be softened.",
        },
        "start": None,
        "gradients": {
            "loss": 1.0,
            "flow": [{"part": f"layer {i}", "gradient": 0.1, "weight": 1.0, "ratio": 0.1} for i in range(3)],
            "none": [],
            "bad": [],
        },
        "training": {"gain_at_end": 0.001, "past_best": 0.0, "best_step": 90, "gradient_norms": None, "clipped": 0.1},
        "distributions": {"baseline": {**student, "kl": 0.9}, "student": student},
        "irreducible": {
            "teacher_entropy": 2.0,
            "teacher_loss": 2.0,
            "models": {"student": {"soft_cross_entropy": 2.5, "share": 0.8}},
        },
        "noise": {"unlikely": 0.01, "contradicted": 0.001, "examples": []},
    }


def warnings_and_conclusion(found: dict[str, Any]) -> tuple[list[str], str]:
    sentences = interpret(found)
    return [one.text for one in sentences if one.level != "note"], conclusion(found, sentences)


def test_a_healthy_run_has_no_warnings() -> None:
    warnings, last = warnings_and_conclusion(healthy())
    assert warnings == []
    assert last == (
        "The student is better than the baseline, 2.500 against 2.900 nats, and closer to the teacher (KL 0.500 "
        "against 0.900). No measurement here shows a problem."
    )
    notes = [one.text for one in interpret(healthy())]
    assert any("80% is the teacher's own entropy" in note for note in notes)
    worse = healthy()
    worse["losses"]["student"] = 3.0
    assert warnings_and_conclusion(worse)[1].endswith("and no measurement here explains it: try another seed first.")


def change(found: dict[str, Any], key: str, value: Any) -> None:
    *path, last = key.split(".")
    here: Any = found
    for name in path:
        here = here[int(name)] if isinstance(here, list) else here[name]
    here[last] = value


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("temperature.used", [8.0], "at temperature 8 the teacher is so flat .* 900 tokens instead of 5.0"),
        ("gradients.none", ["a", "b", "c", "d"], "4 of the student's weights get no gradient"),
        ("gradients.bad", ["a"], "1 of the student's weights have a NaN or infinite gradient"),
        ("gradients.flow.0.gradient", 1e-6, "hardly any gradient reaches layer 0"),
        ("losses.teacher", 2.95, "the teacher itself .2.950 nats. is no better on this text than training on labels"),
        ("compression", 40.0, "the student is 40 times smaller"),
        ("training.gain_at_end", 0.3, "still improving when training ended, by 0.300 nats"),
        ("training.past_best", 0.2, "it was better by 0.200 nats at step 90"),
        ("training.clipped", 0.97, "clipped in 97% of the logged steps"),
        ("noise.contradicted", 0.08, "contradicts 8.0% of the labels"),
        (
            "distributions.student.entropy",
            1.0,
            "it is more confident than its teacher .1.000 nats of entropy ag",
        ),
        ("distributions.student.entropy", 3.0, "it is less confident than its teacher"),
        (
            "distributions.student.by_frequency.0.share_of_excess",
            0.6,
            "60% of its loss above .* the 5% of tokens",
        ),
    ],
)
def test_what_is_wrong_is_why_the_student_is_worse(key: str, value: Any, reason: str) -> None:
    found = healthy()
    change(found, "losses.student", 3.0)
    change(found, key, value)
    warnings, last = warnings_and_conclusion(found)
    assert len(warnings) == 1
    assert not warnings[0].startswith("It ")

    assert re.search(f"^The student is worse than the baseline, 3.000 against 2.900 nats, because .*{reason}", last), (
        last
    )
    change(found, "losses.student", 2.5)
    change(found, "of", "recipe")
    if "student.entropy" not in key and "by_frequency" not in key:
        assert re.search(f"^Before this runs, check: .*{reason}", warnings_and_conclusion(found)[1])


def test_a_temperature_that_is_too_low_for_a_sure_teacher() -> None:
    found = healthy()
    found["temperature"] |= {"rows": [at(1.0, 0.99, 1.0, 1.0), at(3.0, 0.6, 0.9, 0.99)], "recommended": 3.0}
    assert "at temperature 1 the teacher gives its most likely token 99%" in warnings_and_conclusion(found)[1]


@pytest.fixture
def finished(recipe_values: dict[str, Any]) -> Path:
    recipe_values["evaluate"]["continuations"] = 0
    return quiet_run(recipe_values).directory


def test_a_finished_run_is_looked_at_and_its_report_shows_it(finished: Path, recipe_values: dict[str, Any]) -> None:
    before = (finished / "student" / "model.safetensors").read_bytes()
    done = CliRunner().invoke(app, ["diagnose", str(finished), "--rows", "12"], catch_exceptions=False)
    assert done.exit_code == 0
    found = json.loads((finished / "diagnose.json").read_text())
    assert (finished / "student" / "model.safetensors").read_bytes() == before
    assert found["data"] == {"which": "held out", "rows": 12, "tokens": 12 * 31}
    assert set(found["distributions"]) == {"baseline", "student"}
    assert set(found["losses"]) == {"teacher", "baseline", "student"}
    assert [part["part"] for part in found["gradients"]["flow"]] == ["embed_tokens", "layer 0", "norm", "lm_head"]
    assert found["training"]["clipped"] is not None
    assert found["conclusion"].startswith("The student is ")
    assert found["conclusion"] in " ".join(done.output.split())
    page = (finished / "report.html").read_text()
    assert "A closer look" in page
    assert all(f'id="{name}-' in page for name in ("temperature", "gradients", "floor", "rarity", "held-out"))
    ids = [piece.split('"')[0] for piece in page.split(' id="')[1:]]
    assert len(ids) == len(set(ids))
    write_report(finished)
    assert (finished / "report.html").read_text() == page
    assert not (finished / "diagnose.html").exists()
    (finished / "report.html").unlink()  # of a run that was killed before its report: that it is there means the end
    done = CliRunner().invoke(app, ["diagnose", str(finished), "--rows", "2"], catch_exceptions=False)
    assert done.exit_code == 0 and (finished / "diagnose.html").exists() and not (finished / "report.html").exists()


def test_what_is_measured_is_what_the_run_measured(finished: Path, recipe_values: dict[str, Any]) -> None:
    found = diagnose(Recipe.parse(recipe_values), run=finished, rows=10_000)
    rows = json.loads((finished / "summary.json").read_text())["rows"]
    for name in ("teacher", "baseline", "student"):
        assert found["losses"][name] == pytest.approx(rows[name]["loss"], rel=1e-5)
    for name in ("baseline", "student"):
        assert found["distributions"][name]["kl"] == pytest.approx(rows[name]["kl"], rel=1e-5)
        assert found["distributions"][name]["agreement"] == pytest.approx(rows[name]["agreement"])


def test_a_recipe_is_looked_at_before_it_runs(recipe_values: dict[str, Any], tmp_path: Path) -> None:
    recipe_values["objective"][0]["temperature"] = {"schedule": "linear", "start": 5.0, "end": 1.0}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe_values))
    out = tmp_path / "looked"
    done = CliRunner().invoke(
        app, ["diagnose", str(tmp_path / "recipe.yaml"), "--out", str(out), "--rows", "4"], catch_exceptions=False
    )
    assert done.exit_code == 0
    assert {path.name for path in out.iterdir()} == {"diagnose.json", "diagnose.html"}
    assert not Path(recipe_values["output"]).exists()
    found = json.loads((out / "diagnose.json").read_text())
    assert found["of"] == "recipe"
    assert found["training"] is None
    assert found["temperature"]["used"] == [5.0]
    assert 5.0 in [row["temperature"] for row in found["temperature"]["rows"]]
    assert "runs" in found["conclusion"] or "run." in found["conclusion"]


def test_gradients_of_sampled_tokens_are_those_of_own_text(recipe_values: dict[str, Any]) -> None:
    recipe_values["objective"] = [{"term": "policy"}]
    recipe_values["rollout"] = {"on_policy_fraction": 1.0, "max_new_tokens": 8, "prompt_tokens": 8}
    recipe_values["data"]["packing"] = False
    gradients = diagnose(Recipe.parse(recipe_values))["gradients"]
    assert gradients["none"] == gradients["bad"] == []  # the data alone has no token that the student drew
    assert all(part["gradient"] > 0 for part in gradients["flow"])


def test_temperatures_of_a_model_on_a_file(toys: Path) -> None:
    table = teacher_temperatures(str(toys / "teacher"), toys / "eval.jsonl", rows=4, max_length=32)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(toys / "teacher"), load_tokenizer(str(toys / "teacher"))
    examples = encode(Source(toys / "eval.jsonl"), tokenizer, max_length=32).dataset
    picked = [examples[i] for i in evenly_spaced(4, len(examples))]
    with torch.no_grad():
        logits = torch.cat([model(torch.tensor([row["input_ids"]])).logits[0, :-1].double() for row in picked])
    for row in table["rows"]:
        probs = (logits / row["temperature"]).softmax(-1).sort(-1, descending=True).values
        assert row["entropy"] == pytest.approx(float(-(probs * probs.log()).sum(-1).mean()), abs=1e-5)
        assert row["counted"] == pytest.approx(float((probs > 1 / 300).double().sum(-1).mean()))
        assert row["mass"]["5"] == pytest.approx(float(probs[:, :5].sum(-1).mean()), abs=1e-5)
    assert (table["recommended"], table["why"]) == recommended_temperature(table["rows"])
    command = ["diagnose", str(toys / "teacher"), "--data", str(toys / "eval.jsonl"), "--rows", "4"]
    shown = CliRunner().invoke(app, command, env={"COLUMNS": "80"}, catch_exceptions=False).output
    assert f"Recommended temperature: {table['recommended']:g}." in shown
    assert "top 100" in shown
    assert "…" not in shown
    with pytest.raises(UserError, match="diagnose: expected rows >= 1, got 0"):
        teacher_temperatures(str(toys / "teacher"), toys / "eval.jsonl", rows=0)
    with pytest.raises(UserError, match=r"expected --data FILE with a teacher, got .*teacher alone"):
        CliRunner().invoke(app, command[:2], catch_exceptions=False)


def test_a_student_that_is_better_than_its_teacher_is_below_it() -> None:
    found = healthy()
    del found["losses"]["baseline"]
    found["losses"]["student"] = 1.713
    assert warnings_and_conclusion(found)[1] == "The student's loss is 0.287 nats below its teacher's."


def test_a_run_that_was_stopped_is_looked_at_by_its_last_checkpoint(
    finished: Path, recipe_values: dict[str, Any]
) -> None:
    whole = diagnose(Recipe.parse(recipe_values), run=finished)
    shutil.rmtree(finished / "student")
    shutil.rmtree(finished / "baseline")
    shutil.rmtree(finished / "checkpoints" / "baseline")
    stopped = diagnose(Recipe.parse(recipe_values), run=finished)
    assert stopped["losses"]["student"] == pytest.approx(whole["losses"]["student"])
    assert "baseline" not in stopped["losses"]
    shutil.rmtree(finished / "checkpoints")
    with pytest.raises(RecipeError, match="expected a student or a checkpoint of one"):
        diagnose(Recipe.parse(recipe_values), run=finished)


def test_a_cache_of_top_k_leaves_out_what_needs_distributions(
    recipe_values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe_values["teacher"]["cache"] = str(tmp_path / "cache")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe_values))
    built = CliRunner().invoke(
        app,
        ["cache", "build", str(tmp_path / "recipe.yaml"), "--codec", "top_k", "--top-k", "8"],
        catch_exceptions=False,
    )
    assert built.exit_code == 0
    found = diagnose(Recipe.parse(recipe_values), rows=4)
    assert found["temperature"] is None
    assert found["distributions"] is None
    assert found["gradients"]["flow"]
    assert set(found["losses"]) == {"student"}
    (tmp_path / "diagnose.json").write_text(json.dumps(found))
    assert "Gradients" in write_diagnosis_page(tmp_path).read_text()


def test_mistakes(finished: Path, tmp_path: Path) -> None:
    for arguments, message in (
        (["diagnose", str(finished), "--set", "seed=1"], "expected neither --set nor --out"),
        (["diagnose", "teacher", "--data", "rows.jsonl", "--out", "x"], "nor --out with --data"),
        (["diagnose", str(tmp_path / "nowhere.yaml")], "expected a file, got"),
    ):
        with pytest.raises(UserError, match=message):
            CliRunner().invoke(app, arguments, catch_exceptions=False)
    (tmp_path / "embedding.yaml").write_text("kind: embedding\n")
    with pytest.raises(UserError, match="expected a distillation recipe, got kind embedding"):
        CliRunner().invoke(app, ["diagnose", str(tmp_path / "embedding.yaml")], catch_exceptions=False)
    (finished / "diagnose.json").write_text("{}")
    with pytest.raises(DataError, match="expected what potstill diagnose writes"):
        write_report(finished)
