"""A teacher behind a server gives the targets of the live model; what does not fit is an error before training."""

from __future__ import annotations

import io
import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from tokenizers import Tokenizer

from conftest import make_batch, make_llama, make_tokenizer, quiet_run
from potstill.engines import client
from potstill.engines.server import ModelServer
from potstill.errors import PotstillError, RecipeError, RefusedError, ServerError, ShapeError, VocabularyError
from potstill.losses.alignment import causal_alignment
from potstill.losses.divergences import JSD, ForwardKL
from potstill.runs import run as pipeline
from potstill.runs.cache import CacheRequest, build
from potstill.runs.check import check
from potstill.runs.config.run import Recipe
from potstill.teachers.served import ServedTeacher
from potstill.train.distiller import Distiller
from potstill.train.terms.logits import Labels, Logits
from toy_server import LiveTopK, ToyServer, logged, prepared_with_top_k


@pytest.fixture
def toy(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[ToyServer]:
    monkeypatch.setattr(client, "FIRST_WAIT_S", 0.01)
    monkeypatch.setenv("NO_PROXY", "*")
    for name in client.KEYS:
        monkeypatch.delenv(name, raising=False)
    server = ToyServer(make_llama(seed=1), tokenizer)
    yield server
    server.close()


def serve(toy: ToyServer, tokenizer: Any, top_k: int = 5) -> ServedTeacher:
    return ServedTeacher(ModelServer(toy.url, "toy", timeout_s=30.0, attempts=3), tokenizer, top_k=top_k)


@pytest.mark.parametrize("side", ["right", "left"])
def test_its_targets_are_those_of_the_live_model(toy: ToyServer, tokenizer: Any, side: str) -> None:
    batch = make_batch(5, 12)
    batch["labels"][3] = -100  # a row where nothing counts
    if side == "left":
        for row, size in enumerate(batch["attention_mask"].sum(1).tolist()):
            for name in batch:
                batch[name][row] = batch[name][row].roll(12 - size)
    alignment = causal_alignment(batch["labels"])
    teacher = serve(toy, tokenizer)
    toy.requests.clear()
    output = teacher(batch, alignment)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        expected = alignment.select(toy.model(**inputs).logits).log_softmax(-1)
    if side == "left":  # the live model runs row by row, as positions begin behind the padding
        rows = [batch["input_ids"][row][batch["attention_mask"][row].bool()] for row in range(5)]
        with torch.no_grad():
            alone = [toy.model(input_ids=row[None]).logits[0].log_softmax(-1) for row in rows]
        pads = (batch["attention_mask"] == 0).sum(1)
        places = zip((alignment.positions // 12).tolist(), alignment.column.tolist(), strict=True)
        expected = torch.stack([alone[row][column - int(pads[row])] for row, column in places])
    assert torch.equal(output.targets.ids, expected.topk(5).indices)
    torch.testing.assert_close(output.targets.log_probs, expected.topk(5).values, rtol=0, atol=2e-6)
    label_log_probs = expected.gather(1, alignment.labels[:, None])[:, 0]
    torch.testing.assert_close(output.label_log_probs, label_log_probs, rtol=0, atol=2e-6)
    assert (output.targets.kind, output.targets.temperature) == ("bucket", 1.0)
    assert len(toy.requests) == 4
    for body in toy.requests:
        assert not set(body["prompt"]) & {1}  # no padding


def test_nothing_behind_the_last_counting_token_is_sent(toy: ToyServer, tokenizer: Any) -> None:
    batch = make_batch(1, 12)
    batch = {name: torch.arange(2, 14)[None] for name in batch} | {"attention_mask": torch.ones(1, 12).long()}
    batch["labels"][:, 6:] = -100
    teacher = serve(toy, tokenizer)
    teacher(batch, causal_alignment(batch["labels"]))
    assert toy.requests[-1]["prompt"] == [2, 3, 4, 5, 6, 7]


def test_a_batch_where_nothing_counts(toy: ToyServer, tokenizer: Any) -> None:
    batch = make_batch(2, 6)
    batch["labels"][:] = -100
    output = serve(toy, tokenizer)(batch, causal_alignment(batch["labels"]))
    assert output.targets.ids.shape == (0, 5)


@pytest.mark.parametrize("divergence", [ForwardKL(), JSD(0.3)])
def test_training_from_it_equals_training_from_the_live_top_k(toy: ToyServer, tokenizer: Any, divergence: Any) -> None:
    found = []
    for teacher in (serve(toy, tokenizer), LiveTopK(toy.model, 5)):
        student = make_llama(hidden_size=8, layers=1)
        output = Distiller(student, teacher, [Logits(divergence), Labels(weight=0.5)]).step(make_batch())
        output.loss.backward()
        found.append((output.loss.detach(), [weight.grad for weight in student.parameters()]))
    (loss, gradients), (expected_loss, expected) = found
    torch.testing.assert_close(loss, expected_loss, rtol=1e-6, atol=0)
    for one, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6 * float(other.abs().max()))


def test_padding_rows_of_its_head_are_no_tokens(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "*")
    model = make_llama(vocab_size=320, seed=1)
    with torch.no_grad():
        model.lm_head.weight[300:] *= 20  # such rows are among the likeliest
    toy = ToyServer(model, tokenizer)
    try:
        batch = make_batch()
        targets = serve(toy, tokenizer)(batch, causal_alignment(batch["labels"])).targets
        assert (targets.ids >= 300).any()
        targets.slice(300)
    finally:
        toy.close()


LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"


def changed(letters: str) -> Any:
    """The toys' tokenizer, in which each of LETTERS has the id of the letter in its place here."""
    tokenizer = make_tokenizer()
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    vocab = state["model"]["vocab"]
    vocab |= {letter: vocab[other] for letter, other in zip(LETTERS, letters, strict=True)}
    return type(tokenizer)(tokenizer_object=Tokenizer.from_str(json.dumps(state)))


def test_a_server_with_other_token_ids_is_refused(toy: ToyServer) -> None:
    with pytest.raises(VocabularyError, match=r"34 is 'B' for the student and 'A' for the server"):
        serve(toy, changed(LETTERS.replace("AB", "BA")))


def test_without_detokenize_the_words_of_a_prompt_are_compared(toy: ToyServer, tokenizer: Any) -> None:
    toy.detokenizes = False
    serve(toy, tokenizer)
    with pytest.raises(VocabularyError, match=r"for the student and '.' for the server"):
        serve(toy, changed(LETTERS[1:] + LETTERS[:1]))
    toy.change = without_words
    with pytest.raises(VocabularyError, match="expected a server that decodes token ids"):
        serve(toy, tokenizer)


def without_words(answer: Any) -> Any:
    for entry in answer["choices"][0]["prompt_logprobs"][1:]:
        for one in entry.values():
            one["decoded_token"] = None
    return answer


def test_impossible_settings_are_refused_at_its_creation(toy: ToyServer, tokenizer: Any) -> None:
    with pytest.raises(RefusedError, match="max allowed: 20"):
        serve(toy, tokenizer, top_k=21)
    toy.scores_prompts = False
    with pytest.raises(RefusedError, match="enough to generate data"):
        serve(toy, tokenizer)
    toy.faults = ["500"] * 9
    with pytest.raises(ServerError, match="status 500"):
        serve(toy, tokenizer)


# Recipes.


@pytest.fixture
def served_values(recipe_values: dict[str, Any], toys: Path, toy: ToyServer) -> dict[str, Any]:
    recipe_values["teacher"] = {"server": {"url": toy.url, "model": "toy", "top_k": 20}}
    recipe_values["student"] = {"model": str(toys / "student")}
    return recipe_values


def test_a_run_from_a_server_is_a_run_from_its_top_k(
    served_values: dict[str, Any], toys: Path, toy: ToyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-not-to-be-seen")
    served = quiet_run(served_values)
    live_values = served_values | {
        "teacher": {"model": str(toys / "teacher")},
        "output": served_values["output"] + "-live",
    }
    monkeypatch.setattr(pipeline, "build_run", prepared_with_top_k)
    live = quiet_run(live_values)
    for one, other in zip(*(logged(result.directory) for result in (served, live)), strict=True):
        assert one == pytest.approx(other, rel=1e-4)
    rows, expected = served.summary["rows"], live.summary["rows"]
    assert rows["teacher"]["loss"] == pytest.approx(expected["teacher"]["loss"], rel=1e-6)
    assert rows["student"]["loss"] == pytest.approx(expected["student"]["loss"], rel=1e-4)
    assert rows["teacher"]["parameters"] is rows["student"]["agreement"] is None
    assert (served.summary["gap_closed"] is None) == (live.summary["gap_closed"] is None)
    assert "toy behind http://127.0.0.1" in (served.directory / "report.html").read_text()
    assert Recipe.load(served.directory / "recipe.yaml") == Recipe.parse(served_values)
    written = [path for path in served.directory.rglob("*") if path.is_file()]
    assert not [path for path in written if b"sk-not-to-be-seen" in path.read_bytes()]


@pytest.mark.slow
def test_what_the_page_about_servers_shows_works(
    toy: ToyServer, toys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (Path(__file__).parents[1] / "docs" / "servers.md").read_text(encoding="utf-8")
    page = page.replace("http://127.0.0.1:8000", toy.url)
    toy.name = "teacher"
    shutil.copytree(toys, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    (recipe,), (code,) = (re.findall(rf"```{language}\n(.*?)```", page, re.DOTALL) for language in ("yaml", "python"))
    assert list(quiet_run(yaml.safe_load(recipe)).summary["rows"]) == ["teacher", "baseline", "student"]
    exec(compile(code, "servers.md", "exec"), {})


def test_check_sends_requests_to_the_server(served_values: dict[str, Any], toy: ToyServer) -> None:
    found = check(Recipe.parse(served_values))
    assert found.built.loaded.model is None
    assert found.built.vocabulary == 300
    assert toy.requests


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (
            {"objective": [{"term": "logits", "temperature": 2.0}]},
            ShapeError,
            "expected the temperature 1 of the bucket targets, got 2",
        ),
        (
            {"objective": [{"term": "logits", "temperature": {"schedule": "linear", "start": 2.0, "end": 1.0}}]},
            ShapeError,
            "expected the temperature 1 of the bucket targets, got 2",
        ),
        ({"student": {"design": {"hidden_size": 8}}}, RecipeError, r"student\.design: expected a teacher with a"),
        ({"teacher": {"server": {"url": "x", "model": "toy"}}}, PotstillError, "expected a url such as"),
        ({"teacher": {"server": {"url": "http://x", "model": "toy", "topk": 1}}}, RecipeError, "Did you mean top_k?"),
        (
            {"teacher": {}},
            RecipeError,
            "teacher: expected one of adapter_off, cache, ema, ensemble, model, server, got none",
        ),
        (
            {"teacher": {"model": "x", "server": {"url": "http://x", "model": "toy"}}},
            RecipeError,
            "adapter_off, cache, ema, ensemble, model, server, got model and server",
        ),
        (
            {"teacher": {"device": "cpu", "server": {"url": "http://x", "model": "toy"}}},
            RecipeError,
            "expected device with cache or model alone, got it with server",
        ),
    ],
)
def test_recipes_that_do_not_go_with_a_server_are_refused(
    served_values: dict[str, Any], change: dict[str, Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        quiet_run(served_values | change)
    assert not Path(served_values["output"]).exists()


def test_rows_must_leave_the_server_a_place(served_values: dict[str, Any]) -> None:
    served_values["data"]["max_length"] = 64
    with pytest.raises(RecipeError, match=r"data\.max_length: expected at most 63, the teacher's number of positions"):
        quiet_run(served_values)


def test_a_cache_built_from_a_server_serves_the_same_run(served_values: dict[str, Any], tmp_path: Path) -> None:
    parsed = Recipe.parse(served_values)
    sources, top_k = [parsed.data.train, parsed.data.eval], {"k": parsed.teacher.server.top_k}
    request = CacheRequest(
        parsed.teacher, sources, 32, True, "top_k", top_k, tmp_path / "cache", 4, parsed.student.model
    )
    manifest = build(request, console=Console(file=io.StringIO()))
    assert manifest is not None and manifest.plan.teacher.startswith("toy behind http://127.0.0.1")
    live = quiet_run(served_values)
    served_values |= {"teacher": {"cache": str(tmp_path / "cache")}, "output": str(tmp_path / "cached")}
    cached = quiet_run(served_values)
    rows = [result.summary["rows"] for result in (live, cached)]
    assert rows[1]["teacher"]["loss"] == pytest.approx(rows[0]["teacher"]["loss"], rel=1e-3)
    assert rows[1]["student"]["loss"] == pytest.approx(rows[0]["student"]["loss"], rel=2e-2)
    with pytest.raises(ShapeError, match=r"sampled: expected a teacher with full distributions"):
        build(replace(request, codec="sampled", parameters={}, out=tmp_path / "s"), console=Console(file=io.StringIO()))
