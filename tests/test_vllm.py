"""Against a real vLLM, in an environment of its own: make test-server."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import PreTrainedTokenizerFast

from conftest import make_batch, make_llama, make_served, make_tokenizer
from potstill.engines.sampling import Sampling
from potstill.engines.server import ModelServer
from potstill.errors import RefusedError, VocabularyError
from potstill.evaluate.quality import continuation
from potstill.losses.alignment import causal_alignment
from potstill.losses.divergences import ForwardKL
from potstill.runs import run as pipeline
from potstill.runs.config.run import Recipe
from potstill.runs.run import run
from potstill.teachers.model import ModelTeacher
from potstill.teachers.served import ServedTeacher
from potstill.train.distiller import Distiller
from potstill.train.terms.logits import Logits
from real_vllm import Served
from toy_server import LiveTopK, logged, prepared_with_top_k

pytestmark = [pytest.mark.server, pytest.mark.timeout(1800)]


def test_its_targets_are_those_of_the_live_model(vllm: Served, tokenizer: PreTrainedTokenizerFast) -> None:
    batch = make_batch(6, 60)
    alignment = causal_alignment(batch["labels"])
    output = ServedTeacher(ModelServer(vllm.url, "toy"), tokenizer, top_k=20)(batch, alignment)
    live = ModelTeacher(make_served())(batch, alignment).targets.dense().log_softmax(-1)
    torch.testing.assert_close(output.targets.log_probs, live.topk(20).values, rtol=0, atol=2e-5)
    torch.testing.assert_close(output.targets.log_probs, live.gather(1, output.targets.ids), rtol=0, atol=2e-5)
    labels = live.gather(1, alignment.labels[:, None])[:, 0]
    torch.testing.assert_close(output.label_log_probs, labels, rtol=0, atol=2e-5)
    print(f"largest difference {(output.targets.log_probs - live.topk(20).values).abs().max():.1e} nats")


def test_a_step_from_it_is_a_step_from_the_live_model(vllm: Served, tokenizer: PreTrainedTokenizerFast) -> None:
    found = []
    served = ServedTeacher(ModelServer(vllm.url, "toy"), tokenizer, top_k=20)
    for teacher in (served, LiveTopK(make_served(), 20)):
        student = make_llama(hidden_size=8, layers=1)
        loss = Distiller(student, teacher, [Logits(ForwardKL())]).step(make_batch(6, 60)).loss
        loss.backward()
        found.append((loss.detach(), torch.cat([weight.grad.flatten() for weight in student.parameters()])))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-5, atol=0)
    assert float((found[0][1] - found[1][1]).norm() / found[1][1].norm()) < 1e-5


def test_a_run_from_it_is_a_run_from_the_live_model(
    vllm: Served, recipe_values: dict[str, Any], toys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe_values["student"] = {"model": str(toys / "student")}
    teachers = {
        "served": {"server": {"url": vllm.url, "model": "toy", "top_k": 20}},
        "live": {"model": str(vllm.folder)},
    }
    monkeypatch.setattr(pipeline, "build_run", prepared_with_top_k)
    results = {
        name: run(
            Recipe.parse(recipe_values | {"teacher": teacher, "output": f"{recipe_values['output']}-{name}"}),
            console=Console(file=io.StringIO()),
        )
        for name, teacher in teachers.items()
    }
    for one, other in zip(*(logged(result.directory) for result in results.values()), strict=True):
        assert one == pytest.approx(other, rel=1e-4)
    losses = [result.summary["rows"]["teacher"]["loss"] for result in results.values()]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_it_writes_what_the_live_model_writes(vllm: Served, tokenizer: PreTrainedTokenizerFast) -> None:
    server = ModelServer(vllm.url, "toy")
    prompts = [[5, 6, 7], [200, 31], [9] * 20]
    model = make_served().eval()
    expected = []
    for prompt in prompts:
        expected.append(tokenizer.decode(continuation(model, prompt, 8, frozenset({0})), skip_special_tokens=True))
    greedy = server.complete(prompts, Sampling(max_new_tokens=8, sampling_temperature=0.0))
    # It holds half a character back; decoding everything at once does not.
    half = "\N{REPLACEMENT CHARACTER}"
    assert [found[0].text.rstrip(half) for found in greedy] == [text.rstrip(half) for text in expected]
    drawn = Sampling(max_new_tokens=8, sampling_temperature=0.7, top_p=0.9, top_k=50, samples=2, stop=("x",), seed=7)
    once, again = (server.complete(prompts[:1], drawn) for _ in range(2))
    assert once == again
    assert [len(found) for found in server.complete(prompts, drawn)] == [2, 2, 2]


def test_refused_requests_are_errors(vllm: Served, tokenizer: PreTrainedTokenizerFast) -> None:
    server = ModelServer(vllm.url, "toy")
    teacher = ServedTeacher(server, tokenizer)
    assert teacher.max_length == 63
    server.score([[5] * 63], 1)
    with pytest.raises(RefusedError, match="got status 400: "):
        server.score([[5] * 64], 1)
    with pytest.raises(RefusedError, match="max allowed: 20"):
        ServedTeacher(server, tokenizer, top_k=21)
    with pytest.raises(RefusedError, match="Did you mean toy"):
        ModelServer(vllm.url, "toyy").card()
    state = json.loads(make_tokenizer().backend_tokenizer.to_str())
    vocab = state["model"]["vocab"]
    vocab["A"], vocab["B"] = vocab["B"], vocab["A"]
    moved = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer.from_str(json.dumps(state)))
    with pytest.raises(VocabularyError, match="'B' for the student and 'A' for the server"):
        ServedTeacher(server, moved)
