"""The client of a model server, against a real HTTP server that fails: nothing lost, nothing doubled, a clear end."""

from __future__ import annotations

import logging
import pickle
import random
import socket
import threading
import traceback
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from conftest import make_llama
from potstill.engines import client
from potstill.engines.client import ConcurrencyLimit
from potstill.engines.sampling import Sampling
from potstill.engines.server import ModelServer
from potstill.errors import RefusedError, ServerError, ShapeError, UserError
from toy_server import FAULTS, ToyServer

SECRET = "sk-not-to-be-seen"
PROMPTS = [[2 + i, 3 + i, 5 + i] for i in range(24)]


@pytest.fixture
def toy(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[ToyServer]:
    monkeypatch.setattr(client, "FIRST_WAIT_S", 0.01)
    monkeypatch.setenv("NO_PROXY", "*")
    for name in client.KEYS:
        monkeypatch.delenv(name, raising=False)
    server = ToyServer(make_llama(seed=1), tokenizer)
    yield server
    server.close()


def connect(toy: ToyServer, **changes: Any) -> ModelServer:
    return ModelServer(toy.url, "toy", **{"timeout_s": 30.0, **changes})


def texts(server: ModelServer, prompts: Any, **sampling: Any) -> list[list[str]]:
    return [[one.text for one in found] for found in server.complete(prompts, Sampling(max_new_tokens=1, **sampling))]


def test_completions_come_in_the_order_of_prompts_and_samples(toy: ToyServer, tokenizer: Any) -> None:
    found = connect(toy).complete(PROMPTS, Sampling(max_new_tokens=3, samples=3))
    for prompt, completions in zip(PROMPTS, found, strict=True):
        assert [one.text for one in completions] == [f"{tokenizer.decode(prompt)}!{i}" for i in range(3)]
        assert [one.ended for one in completions] == [True, False, True]
    assert connect(toy).complete([], Sampling()) == []


def test_requests_hold_the_prompts_and_sampling_settings(toy: ToyServer) -> None:
    server = connect(toy)
    plain = Sampling(max_new_tokens=7, sampling_temperature=0.5, top_p=0.9)
    server.complete(["def f", torch.tensor([3, 4])], plain)
    assert sorted(toy.requests, key=lambda body: str(body["prompt"])) == [
        {"model": "toy", "prompt": prompt, "max_tokens": 7, "temperature": 0.5, "top_p": 0.9, "n": 1}
        | {"skip_special_tokens": False, "return_token_ids": True}
        for prompt in ([3, 4], "def f")
    ]
    server.complete(["def f"], Sampling(top_k=5, stop=("\n",), seed=0, max_new_tokens=2))
    assert {"top_k": 5, "stop": ["\n"], "seed": 0}.items() <= toy.requests[-1].items()


def test_special_tokens_stay_and_token_ids_come_back(toy: ToyServer) -> None:
    def change(answer: Any) -> Any:
        for choice in answer["choices"]:
            choice |= {"token_ids": [7, choice["index"]], "stop_reason": ["\n", 5, None][choice["index"]]}
        return answer

    toy.change = change
    (completions,) = connect(toy, end_ids=frozenset({5, 0})).complete([[3, 4]], Sampling(samples=3, max_new_tokens=2))
    assert [completion.ids for completion in completions] == [(), (7, 1), (7, 2)]  # a stop string cuts within tokens
    expected = {"skip_special_tokens": False, "return_token_ids": True, "stop_token_ids": [0, 5]}
    assert expected.items() <= toy.requests[-1].items()


def test_a_server_that_refuses_keys_of_vllm_gets_none_of_them(toy: ToyServer) -> None:
    expected = texts(connect(toy), PROMPTS[:2])
    toy.refused, toy.requests[:] = {"return_token_ids"}, []
    server = connect(toy, end_ids=frozenset({5}))
    assert texts(server, PROMPTS[:2]) == expected
    before = len(toy.requests)
    assert texts(server, PROMPTS[:2]) == expected
    assert len(toy.requests) == before + 2
    assert not {"skip_special_tokens", "return_token_ids", "stop_token_ids"} & {*toy.requests[-1]}
    assert server.complete([[3, 4]], Sampling(max_new_tokens=1))[0][0].ids == ()
    with pytest.raises(RefusedError, match="longer than the maximum"):
        server.complete([[3] * 70], Sampling(max_new_tokens=1))


@pytest.mark.parametrize("fault", FAULTS)
def test_requests_are_sent_again_after_faults_that_pass(toy: ToyServer, fault: str) -> None:
    expected = texts(connect(toy), PROMPTS[:6])
    before = len(toy.requests)
    toy.faults = [fault, fault]
    hang = fault == "hang"
    assert texts(connect(toy, timeout_s=0.5 if hang else 30.0), PROMPTS[:6]) == expected
    sent = len(toy.requests) - before
    assert sent >= 8 if hang else sent == 8  # a busy machine may need more than 0.5 s for an answer, too


def test_nothing_is_lost_and_nothing_doubled_among_many_faults(toy: ToyServer) -> None:
    expected = connect(toy).score(PROMPTS, 3)
    toy.requests.clear()
    faults = [fault for fault in FAULTS if fault != "hang"] * 3 + [""] * 21
    random.Random(0).shuffle(faults)
    toy.faults = list(faults)
    found = connect(toy, attempts=20, timeout_s=30.0).score(PROMPTS, 3)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.ids, other.ids)
        assert torch.equal(one.log_probs, other.log_probs)
    assert len(toy.requests) == len(PROMPTS) + 21


@pytest.mark.parametrize("fault", FAULTS)
def test_what_does_not_pass_has_a_clear_end(toy: ToyServer, fault: str) -> None:
    toy.faults = [fault] * 100
    with pytest.raises(ServerError, match=r"expected an answer, got .* \(2 attempts\)") as caught:
        texts(connect(toy, attempts=2, timeout_s=0.1), PROMPTS)
    assert "\n" not in str(caught.value)
    assert toy.url in str(caught.value)


def test_a_refused_connection_has_a_clear_end(toy: ToyServer) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(ServerError, match=r"ConnectError.*\(3 attempts\)"):
        ModelServer(url, "toy", attempts=3).card()


def test_a_refusal_is_an_error_at_once_with_the_servers_message(toy: ToyServer) -> None:
    with pytest.raises(
        RefusedError, match=r"got status 400: the prompt is longer than the maximum model length of 64\."
    ):
        connect(toy).score([[3] * 64], 3)
    assert len(toy.requests) == 1
    with pytest.raises(RefusedError, match="max allowed: 20") as caught:
        connect(toy).score([[3, 4]], 21)
    assert caught.value.status == 400


def test_one_refusal_ends_all_waiting(toy: ToyServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "FIRST_WAIT_S", 1000.0)
    monkeypatch.setattr(client, "MAX_WAIT_S", 1000.0)
    toy.faults = ["500"]  # for whichever comes first: it waits, and the other is refused
    with pytest.raises(RefusedError):
        connect(toy, concurrency=2).score([[3] * 64, [3] * 64], 3)
    for thread in threading.enumerate():
        if thread.name.startswith("potstill-server"):
            thread.join(20)
            assert not thread.is_alive()


def test_retry_after_is_honoured(toy: ToyServer, monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []

    class Stop(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            waited.append(timeout or 0.0)
            return False

    toy.faults = ["429", "date", "500"]
    body = {"model": "toy", "prompt": [3], "max_tokens": 1}
    connect(toy).client.request("POST", "/v1/completions", body, Stop())
    assert waited[:2] == [0.01, 0.0]
    assert 0.02 <= waited[2] <= 0.04  # the third wait doubles the first twice, and is random


def test_an_overloaded_server_gets_fewer_requests_at_once() -> None:
    window = ConcurrencyLimit(8)
    with window.slot() as one, window.slot() as two:
        window.shrink(one)
        window.shrink(two)
    assert window.slots == 4  # questions that were under way together halve it once
    for _ in range(3):
        with window.slot() as again:
            window.shrink(again)
    assert window.slots == 1
    for _ in range(200):
        with window.slot():
            pass
    assert window.slots == 8


def test_the_window_is_kept(toy: ToyServer) -> None:
    texts(connect(toy, concurrency=3), PROMPTS)
    assert toy.most_at_once <= 3
    slow = connect(toy, concurrency=8)
    slow.client._limit.slots = 1.0
    slow.client._limit._maximum = 1
    toy.most_at_once = 0
    texts(slow, PROMPTS)
    assert toy.most_at_once == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda answer: [], "expected choices"),
        (lambda answer: {"choices": [{"index": 0}]}, "expected choices"),
        (lambda answer: {"choices": answer["choices"] * 2}, "expected choices"),
        (lambda answer: {"choices": answer["choices"][1:]}, "expected 2 choices"),
        (lambda answer: {"choices": None}, "expected choices"),
    ],
)
def test_malformed_answers_are_errors(toy: ToyServer, change: Any, message: str) -> None:
    toy.change = change
    with pytest.raises(ServerError, match=message):
        texts(connect(toy), [[3]], samples=2)


def damaged(kind: str) -> Any:
    def change(answer: Any) -> Any:
        entries = answer["choices"][0]["prompt_logprobs"]
        last = entries[-1]
        if kind == "too few":
            del entries[-1]
        elif kind == "empty":
            entries[-1] = None
        elif kind == "not the token":
            del last[next(iter(last))]
        elif kind == "no number":
            next(iter(last.values()))["logprob"] = None
        elif kind == "NaN":
            next(iter(last.values()))["logprob"] = float("nan")
        elif kind == "a probability above 1":
            next(iter(last.values()))["logprob"] = 2.0
        return answer

    return change


@pytest.mark.parametrize("kind", ["too few", "empty", "not the token", "no number", "NaN", "a probability above 1"])
def test_damaged_log_probabilities_are_not_taken(toy: ToyServer, kind: str) -> None:
    toy.change = damaged(kind)
    with pytest.raises(ServerError, match="expected log-probabilities of the likeliest tokens"):
        connect(toy).score([[3, 4, 5]], 3)


def test_the_error_for_a_server_that_cannot_score_has_the_reason(toy: ToyServer) -> None:
    toy.scores_prompts = False
    with pytest.raises(RefusedError, match=r"of generated tokens alone.*enough to generate data"):
        connect(toy).score([[3, 4]], 3)
    assert texts(connect(toy), ["def"]) == [["def!0"]]


def test_scores_hold_the_likeliest_and_the_actual(toy: ToyServer) -> None:
    prompt = [5, 9, 200, 31]
    (scores,) = connect(toy).score([prompt], 4)
    with torch.no_grad():
        expected = toy.model(input_ids=torch.tensor([prompt])).logits[0].log_softmax(-1)[:-1]
    assert torch.equal(scores.ids, expected.topk(4).indices)
    assert torch.equal(scores.log_probs, expected.topk(4).values)
    assert torch.equal(scores.actual, expected.gather(1, torch.tensor(prompt[1:])[:, None])[:, 0])
    (single,) = connect(toy).score([[5]], 4)
    assert single.ids.shape == (0, 4)
    assert single.ids.dtype == torch.long


def test_a_token_that_cannot_be_takes_no_slot(toy: ToyServer) -> None:
    with torch.no_grad():
        toy.model.lm_head.weight[2:] = 0
    head = toy.model.forward

    def ruled_out(**inputs: Any) -> Any:
        output = head(**inputs)
        output.logits[..., 2:] = -torch.inf
        return output

    toy.model.forward = ruled_out
    (scores,) = connect(toy).score([[0, 1]], 4)
    assert (scores.log_probs > -torch.inf).tolist() == [[True, True, False, False]]


@pytest.mark.parametrize(
    ("values", "kind", "message"),
    [
        ({"url": "127.0.0.1:8000"}, UserError, "expected a url such as http://127.0.0.1:8000, got 127.0.0.1:8000"),
        ({"url": "ftp://here"}, UserError, "got ftp://here"),
        ({"url": "http://"}, UserError, "expected a url"),
        ({"url": f"http://me:{SECRET}@here"}, UserError, "without user and password"),
        ({"url": "http://here", "key_variable": "NO_SUCH_KEY"}, UserError, "environment variable NO_SUCH_KEY"),
    ],
)
def test_what_cannot_be_connected_to(values: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message) as caught:
        ModelServer(model="toy", **values)
    assert SECRET not in str(caught.value)


def test_v1_may_stand_in_the_url(toy: ToyServer) -> None:
    for url in (toy.url + "/v1", toy.url + "/v1/", toy.url + "/"):
        assert ModelServer(url, "toy").card()["max_model_len"] == 64


def test_the_error_for_a_model_that_is_not_served_has_the_nearest(toy: ToyServer) -> None:
    with pytest.raises(RefusedError, match=r"toy, other.*Did you mean toy\?"):
        ModelServer(toy.url, "toyy").card()


@pytest.mark.parametrize("variable", [*client.KEYS, "MY_KEY"])
def test_the_key_goes_to_the_server_and_nowhere_else(
    toy: ToyServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, variable: str
) -> None:
    caplog.set_level(logging.DEBUG)
    toy.key = SECRET
    monkeypatch.setenv(variable, SECRET)
    server = connect(toy, key_variable="MY_KEY" if variable == "MY_KEY" else None)
    assert texts(server, [[3]])
    toy.key = "another"
    with pytest.raises(
        RefusedError, match=r"status 401: Incorrect key: Bearer \*\*\*.*API key is taken from"
    ) as caught:
        server.card()
    toy.key, toy.faults = SECRET, ["malformed"] * 9
    with pytest.raises(ServerError) as gone:
        texts(connect(toy, attempts=2, key_variable=variable), [[3]])
    shown = [repr(server), repr(server.client), str(vars(server)), caplog.text]
    for error in (caught, gone):
        formatted = traceback.TracebackException.from_exception(error.value, capture_locals=True)
        shown.append("".join(formatted.format()))
    assert not [text for text in shown if SECRET in text]
    with pytest.raises(TypeError):
        pickle.dumps(server)


@pytest.mark.parametrize("values", [{"max_new_tokens": 0}, {"sampling_temperature": -1}, {"top_p": 0}, {"samples": 0}])
def test_sampling_within_its_range(values: dict[str, Any]) -> None:
    with pytest.raises(ShapeError, match=f"Sampling.{next(iter(values))}: expected a number"):
        Sampling(**values)
