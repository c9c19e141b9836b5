"""Rollouts from a server that takes the student's weights: they are the student's own, and as old as they may be."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import PreTrainedTokenizerFast

import processes
from conftest import make_batch, make_llama, make_tokenizer
from potstill.engines import client
from potstill.engines.sampling import Sampling
from potstill.engines.server import ModelServer
from potstill.errors import PotstillError, RecipeError, RefusedError, ServerError, ShapeError, VocabularyError
from potstill.losses.alignment import SAMPLER_LOG_PROBS, STUDENT_LOG_PROBS
from potstill.losses.divergences import ReverseKL
from potstill.models.adapters import Lora, adapt
from potstill.runs.build import build_run
from potstill.runs.check import check
from potstill.runs.config.run import Recipe
from potstill.runs.run import run
from potstill.train.callbacks import logged_lines
from potstill.train.distiller import Distiller
from potstill.train.rollout import Replay, Rollout, teacher_mix
from potstill.train.server_writer import ServedWriter
from potstill.train.terms.logits import Labels, Logits
from potstill.train.terms.policy import PolicyGradient
from potstill.train.trainer import DistillationTrainer
from test_rollout import on_policy_recipe, own_rows, stopped_and_resumed, student
from test_self_taught import lora
from test_trainer import losses, trainer, weights
from toy_server import ToyServer
from toy_student_server import ToyStudentServer

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")  # which peft reads


@pytest.fixture
def toy(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[ToyStudentServer]:
    monkeypatch.setattr(client, "FIRST_WAIT_S", 0.01)
    monkeypatch.setenv("NO_PROXY", "*")
    server = ToyStudentServer(tokenizer)
    yield server
    server.close()


def writer(toy: ToyServer, folder: Path, **options: Any) -> ServedWriter:
    tokenizer = options.pop("tokenizer", None) or make_tokenizer()
    server = ModelServer(toy.url, options.pop("model", "toy"), timeout_s=30.0, attempts=3)
    return ServedWriter(server, tokenizer, folder / "served", **options)


def served(toy: ToyServer, folder: Path, share: Any = 1.0, max_staleness: int = 0, **options: Any) -> Rollout:
    sampling = Sampling(max_new_tokens=6, **options.pop("sampling", {}))
    adapter = options.pop("adapter", False)
    server = writer(toy, folder, adapter=adapter, max_staleness=max_staleness)
    return Rollout(make_tokenizer(), sampling, share=share, prompt_tokens=3, server=server, **options)


def must_be_written_by(model: Any, made: dict[str, torch.Tensor], apart: float = 1e-5) -> None:
    """The server's log-probabilities are this model's."""
    inputs = {name: made[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        log_probs = model.eval()(**inputs).logits[:, :-1].log_softmax(-1)
    expected = log_probs.gather(-1, made["input_ids"][:, 1:, None])[..., 0]
    own = ~made[STUDENT_LOG_PROBS][:, 1:].isnan()
    assert own.any()
    torch.testing.assert_close(made[STUDENT_LOG_PROBS][:, 1:][own], expected[own], atol=apart, rtol=apart)


def test_it_writes_as_the_student(toy: ToyStudentServer, tmp_path: Path) -> None:
    model, batch = student().train(), make_batch()
    one = served(toy, tmp_path)
    (made,) = one([batch], model, step=0)
    assert own_rows(made).all()
    must_be_written_by(copy.deepcopy(model), made)
    assert model.training
    own = ~made[STUDENT_LOG_PROBS].isnan()
    torch.testing.assert_close(made[SAMPLER_LOG_PROBS][own], made[STUDENT_LOG_PROBS][own])
    assert torch.equal(made["labels"][own], made["input_ids"][own])
    assert (made["labels"] != -100).sum(1).max() <= 6
    assert torch.equal(made["input_ids"][:, :2], batch["input_ids"][:, :2])
    # Seed, step and rank decide what is written; every row draws by itself.
    (again,) = served(toy, tmp_path)([batch], model, step=0)
    assert torch.equal(again["input_ids"], made["input_ids"])
    (other,) = served(toy, tmp_path, seed=1)([batch], model, step=0)
    assert other["input_ids"].tolist() != made["input_ids"].tolist()
    bodies = [body for body in toy.requests if "return_token_ids" in body][:4]
    assert len({body["seed"] for body in bodies}) == len(bodies)
    assert len({body["cache_salt"] for body in toy.requests if "return_token_ids" in body}) == 3


def test_texts_end_where_there_is_no_room(toy: ToyStudentServer, tmp_path: Path) -> None:
    (made,) = served(toy, tmp_path, limit=4)([make_batch()], student(), step=0)
    assert int(made["attention_mask"].sum(1).max()) == 4
    assert served(toy, tmp_path).limit == 64  # what the server allows
    assert served(toy, tmp_path, limit=99).limit == 64


def test_a_padded_head_never_writes_padding(tokenizer: Any, tmp_path: Path) -> None:
    wide = student(vocab_size=320)
    with torch.no_grad():
        wide.lm_head.weight[300:] *= 20  # such rows are among the likeliest
    toy = ToyStudentServer(tokenizer, copy.deepcopy(wide))
    try:
        (made,) = served(toy, tmp_path, vocabulary=300)([make_batch()], wide, step=0)
        assert int(made["input_ids"].max()) < 300
        assert set(toy.requests[-1]["logit_bias"]) == {str(token) for token in range(300, 320)}
    finally:
        toy.close()


def on_policy(toy: ToyStudentServer, folder: Path, share: float = 0.7, **changes: Any) -> DistillationTrainer:
    options = {name: changes.pop(name) for name in ("max_staleness", "adapter", "replay") if name in changes}
    one = served(toy, folder, share, **options)
    objective = [Logits(ReverseKL()), Labels(weight=0.1)]
    return trainer(folder, **{"objective": objective, "rollout": one, **changes})


def test_weights_are_as_old_as_they_may_be(toy: ToyStudentServer, tmp_path: Path) -> None:
    one = on_policy(toy, tmp_path, 1.0, max_staleness=2, max_steps=7)
    begun = weights(one)
    one.train()
    assert len(toy.received) == 3  # before steps 0, 3 and 6
    lines = [line for line in one.state.log_history if "own_age" in line]
    assert [line["own_age"] for line in lines] == [0, 1, 2, 0, 1, 2, 0]
    sent = [torch.cat([p.detach().flatten() for p in model.parameters()]) for model in toy.received]
    assert torch.equal(sent[0], begun)
    assert not torch.equal(sent[1], sent[0]) and not torch.equal(sent[2], sent[1])
    assert not (tmp_path / "served").exists()
    new = on_policy(toy, tmp_path / "new", 1.0, max_steps=4)
    toy.received.clear()
    new.train()
    assert len(toy.received) == 4
    assert all(line["own_age"] == 0 for line in new.state.log_history if "own_age" in line)


def test_without_on_policy_samples_no_weights_are_sent(toy: ToyStudentServer, tmp_path: Path) -> None:
    on_policy(toy, tmp_path, 0.0).train()
    assert not toy.received


def test_a_text_that_is_used_again_has_the_age_of_its_writer(toy: ToyStudentServer, tmp_path: Path) -> None:
    one = served(toy, tmp_path, 1.0, max_staleness=1, replay=Replay(size=8, fresh=0.5, age=1))
    model = student()
    for step in range(4):
        one([make_batch()], model, step=step)
    assert [row.step for row in one.latest] == [2, 2]  # the weights of step 2 wrote in step 3


def test_training_is_that_of_a_student_that_writes_the_same(toy: ToyStudentServer, tmp_path: Path) -> None:
    """With log-probs from the server, the policy gradient of stale text is weighed by the student of now."""
    model, teacher, batch = student(), make_llama(seed=1), make_batch()
    (made,) = served(toy, tmp_path, max_staleness=1)([batch], model, step=0)
    moved = student()
    with torch.no_grad():
        for parameter in moved.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    found = []
    for then in (made, {**made, STUDENT_LOG_PROBS: of(model, made), SAMPLER_LOG_PROBS: of(model, made)}):
        moved.zero_grad()
        Distiller(moved, teacher, [PolicyGradient(clip=0.2)]).step(then).loss.backward()
        found.append(torch.cat([p.grad.flatten() for p in moved.parameters()]))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-6)


def of(model: Any, made: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        log_probs = model(input_ids=made["input_ids"], attention_mask=made["attention_mask"]).logits.log_softmax(-1)
    of_tokens = log_probs[:, :-1].gather(-1, made["input_ids"][:, 1:, None])[..., 0]
    padded = torch.nn.functional.pad(of_tokens, (1, 0), value=torch.nan)
    return padded.where(~made[STUDENT_LOG_PROBS].isnan(), torch.nan)


def test_truncated_sampling_has_no_sampler_log_probs(toy: ToyStudentServer, tmp_path: Path) -> None:
    model = student()
    (made,) = served(toy, tmp_path, sampling={"top_p": 0.9, "sampling_temperature": 0.8})([make_batch()], model, step=0)
    must_be_written_by(model, made)
    assert made[SAMPLER_LOG_PROBS].isnan().all()
    distiller = Distiller(student(), make_llama(seed=1), [PolicyGradient()])
    with pytest.raises(ShapeError, match="policy: expected the log-probability under which each token was sampled"):
        distiller.step(made)
    assert Distiller(student(), make_llama(seed=1), [PolicyGradient(importance=False)]).step(made).loss.isfinite()


@pytest.mark.parametrize("adapter", [False, True])
def test_resumed_equals_uninterrupted(tokenizer: Any, tmp_path: Path, adapter: bool) -> None:
    base = student(seed=2)
    toy = ToyStudentServer(tokenizer, copy.deepcopy(base) if adapter else None)

    def make(folder: Path, **arguments: Any) -> DistillationTrainer:
        torch.manual_seed(0)
        of_adapter = {"student": lora(copy.deepcopy(base)), "adapter": True} if adapter else {}
        return on_policy(toy, folder, max_staleness=3, **of_adapter, **arguments)

    try:
        whole, resumed = stopped_and_resumed(tmp_path, make)
        assert torch.equal(weights(resumed), weights(whole))
        ages = [line["own_age"] for line in whole.state.log_history if "own_age" in line]
        assert ages == [0, 1, 0, 1, 0, 1, 0]  # a checkpoint, every two steps, has new weights taken
    finally:
        toy.close()


def test_of_an_adapted_student_only_the_adapter_is_sent(tokenizer: Any, tmp_path: Path) -> None:
    base = student(seed=2)
    toy = ToyStudentServer(tokenizer, copy.deepcopy(base))
    try:
        model = lora(copy.deepcopy(base))
        one = served(toy, tmp_path, adapter=True)
        (made,) = one([make_batch()], model, step=0)
        must_be_written_by(model, made)
        first = toy.requests[-1]["model"]
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.add_(1.0)
        (made,) = one([make_batch()], model, step=1)
        must_be_written_by(model, made)
        assert [*toy.adapters] == [toy.requests[-1]["model"]] != [first]  # the one before is given up
        (folder,) = (tmp_path / "served").iterdir()
        assert sum(file.stat().st_size for file in folder.glob("*.safetensors")) < 4000
    finally:
        toy.close()


def _of_two_ranks(folder: Path, url: str) -> None:
    class Where:
        def __init__(self) -> None:
            self.url = url

    one = on_policy(Where(), folder, 1.0, max_staleness=1, per_device_train_batch_size=4)  # type: ignore[arg-type]
    one.train()
    ages = [line["own_age"] for line in one.state.log_history if "own_age" in line]
    assert ages == [0, 1, 0] or not one.is_world_process_zero()


@pytest.mark.slow
def test_one_rank_sends_the_weights_and_all_sample(toy: ToyStudentServer, tmp_path: Path) -> None:
    processes.two_ranks(tmp_path, _of_two_ranks, tmp_path / "run", toy.url, NO_PROXY="*")
    assert len(toy.received) == 2
    assert len([body for body in toy.requests if "return_token_ids" in body]) == 3 * 8
    assert len({body["seed"] for body in toy.requests}) == 3 * 8


# What goes wrong.


def test_a_server_that_takes_no_weights(toy: ToyStudentServer, tmp_path: Path) -> None:
    toy.takes = False
    with pytest.raises(RefusedError, match=r"toy at http.*Start vLLM, 0\.32 or later, with VLLM_SERVER_DEV_MODE=1\."):
        served(toy, tmp_path)([make_batch()], student(), step=0)
    with pytest.raises(RefusedError, match="with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 and --enable-lora"):
        served(toy, tmp_path, adapter=True)([make_batch()], lora(student()), step=0)


def test_a_server_that_ignores_new_weights_is_an_error(toy: ToyStudentServer, tmp_path: Path) -> None:
    toy.ignores_weights = True
    with pytest.raises(ServerError, match=r"expected the student's log-probabilities, .*served, got"):
        served(toy, tmp_path)([make_batch()], student(), step=0)


def test_a_server_that_has_others_weights(toy: ToyStudentServer, tmp_path: Path) -> None:
    one = served(toy, tmp_path, max_staleness=5)
    one([make_batch()], student(), step=0)
    served(toy, tmp_path / "b")([make_batch()], student(), step=0)
    with pytest.raises(ServerError, match=r"expected the weights potstill-0-.*, got potstill-0-.* started again, or"):
        one([make_batch()], student(), step=1)


def test_another_model_another_vocabulary_another_server(toy: ToyStudentServer, tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="Did you mean toy"):
        writer(toy, tmp_path, model="toyy")
    with pytest.raises(VocabularyError, match="expected the student's token ids, got others"):
        writer(toy, tmp_path, tokenizer=make_tokenizer(eos_token="<pad>", pad_token="<end>", unk_token="<?>"))
    toy.detokenizes = False
    with pytest.raises(RefusedError, match="expected vLLM, with max_model_len and /detokenize"):
        writer(toy, tmp_path)


def test_answers_without_tokens_are_refused(toy: ToyStudentServer, tmp_path: Path) -> None:
    one, write = served(toy, tmp_path), toy.write

    def older(body: dict[str, Any]) -> tuple[int, Any]:
        status, answer = write(body)
        del answer["choices"][0]["token_ids"]
        return status, answer

    toy.write = older  # type: ignore[method-assign]
    with pytest.raises(RefusedError, match="expected token_ids and logprobs of the generated tokens"):
        one([make_batch()], student(), step=0)


def test_a_guide_with_a_server_is_refused(toy: ToyStudentServer, tmp_path: Path) -> None:
    with pytest.raises(ShapeError, match="expected a guide or a server, got both"):
        served(toy, tmp_path, guide=teacher_mix(make_llama(), 0.2))


def test_failed_requests_are_sent_again(toy: ToyStudentServer, tmp_path: Path) -> None:
    expected = on_policy(toy, tmp_path / "a")
    expected.train()
    found = on_policy(toy, tmp_path / "b")
    toy.faults += ["503", "cut"]
    found.train()
    assert losses(found) == losses(expected)


def test_a_server_that_is_gone_ends_the_run_which_goes_on(toy: ToyStudentServer, tmp_path: Path) -> None:
    saved = {"save_strategy": "steps", "save_steps": 1, "max_steps": 5}
    whole = on_policy(toy, tmp_path / "a", **saved)
    whole.train()
    gone = on_policy(toy, tmp_path / "b", **saved)
    answer, calls = toy.answer, 0

    def down(path: str, body: dict[str, Any]) -> tuple[int, Any]:
        nonlocal calls
        calls += path == "/collective_rpc"
        return answer(path, body) if calls < 4 else (503, b"")

    toy.answer = down  # type: ignore[method-assign]
    with pytest.raises(ServerError, match=r"/collective_rpc: expected an answer, got status 503.*\(3 attempts\)"):
        gone.train()
    toy.answer = answer  # type: ignore[method-assign]
    resumed = on_policy(toy, tmp_path / "b", **saved)
    resumed.train(resume_from_checkpoint=True)
    assert torch.equal(weights(resumed), weights(whole))


# Recipes.


def recipe(values: dict[str, Any], toy: ToyServer, toys: Path, **changes: Any) -> Recipe:
    made = on_policy_recipe(values, student={"model": str(toys / "student")}, **changes)
    made["rollout"] = {**made["rollout"], "server": {"url": toy.url, "model": "toy", "max_staleness": 1}} | {
        **changes.get("rollout", {})
    }
    return Recipe.parse(made)


def test_a_recipe_learns_from_what_a_server_writes(
    toy: ToyStudentServer, recipe_values: dict[str, Any], toys: Path
) -> None:
    for i, objective in enumerate(([{"term": "logits", "divergence": "reverse_kl"}], [{"term": "policy"}])):
        train = recipe_values["train"] | {"save_steps": 6}
        values = recipe_values | {"output": f"{recipe_values['output']}{i}", "train": train}
        parsed = recipe(values, toy, toys, objective=objective)
        directory = run(parsed, console=Console(quiet=True)).directory
        lines = [line for line in logged_lines(directory / "metrics.jsonl") if "own_share" in line]
        assert {line["own_age"] for line in lines if "own_age" in line} == {0.0, 1.0}
        assert logged_lines(directory / "own_texts.jsonl")
        assert not (directory / "served").exists()


def test_check_sends_weights_and_leaves_no_files(
    toy: ToyStudentServer, recipe_values: dict[str, Any], toys: Path
) -> None:
    found = check(recipe(recipe_values, toy, toys))
    assert found.seconds > 0 and toy.received
    assert not Path(recipe_values["output"], "served").exists()
    toy.takes = False
    with pytest.raises(RefusedError, match="VLLM_SERVER_DEV_MODE"):
        check(recipe(recipe_values, toy, toys))


def test_a_folder_of_ones_own(toy: ToyStudentServer, recipe_values: dict[str, Any], toys: Path, tmp_path: Path) -> None:
    server = {"url": toy.url, "model": "toy", "folder": str(tmp_path / "shared")}
    built = build_run(recipe(recipe_values, toy, toys, rollout={"server": server}))
    one = built.new_rollout()
    assert one is not None
    one([make_batch()], built.new_student(), step=0)
    assert [file.name for file in (tmp_path / "shared").glob("*/model.safetensors")] == ["model.safetensors"]
    (tmp_path / "shared" / "other").touch()
    one([make_batch()], built.new_student(), step=9)
    assert len([*(tmp_path / "shared").glob("*/model.safetensors")]) == 1  # of now alone
    one.close()
    assert [file.name for file in (tmp_path / "shared").iterdir()] == ["other"]


@pytest.mark.parametrize("kind", ["ia3", "prompt"])
def test_adapters_that_no_server_takes(
    toy: ToyStudentServer, recipe_values: dict[str, Any], toys: Path, kind: str
) -> None:
    values = on_policy_recipe(recipe_values, student={"model": str(toys / "student"), "adapter": {"kind": kind}})
    values["data"]["max_length"] = 16
    values["rollout"]["server"] = {"url": toy.url, "model": "toy"}
    with pytest.raises(RecipeError, match=r"rollout\.server: expected full weights or a LoRA adapter, got one of"):
        build_run(Recipe.parse(values))


def test_biases_that_no_server_takes(toy: ToyStudentServer, recipe_values: dict[str, Any], toys: Path) -> None:
    adapted = adapt(make_llama(), Lora(rank=2))
    adapted.active_peft_config.bias = "all"
    wanted = recipe(recipe_values, toy, toys)
    with pytest.raises(RecipeError, match=r"rollout\.server: expected an adapter without biases, got bias: all"):
        wanted.rollout.server.writer(adapted, make_tokenizer(), Path(wanted.output))


def test_impossible_rollouts_are_refused_at_once(
    toy: ToyStudentServer, recipe_values: dict[str, Any], toys: Path
) -> None:
    for wrong, objective, message in [
        ({"teacher_mix": 0.2}, None, "rollout: expected teacher_mix without server, got both"),
        ({"teacher_top_k": 3}, None, "rollout: expected teacher_top_k without server, got both"),
        ({"batch_size": 8}, None, "rollout: expected batch_size without server, got both"),
        ({"top_p": 0.9}, [{"term": "policy"}], r"objective\.0: expected sampling_temperature 1, top_p 1 and top_k 0"),
        ({"top_k": 5}, [{"term": "minillm"}], r"objective\.0: expected sampling_temperature 1, top_p 1 and top_k 0"),
        ({"server": {"url": "x", "model": "toy", "max_staleness": -1}}, None, r"rollout\.server\.max_staleness"),
        ({"server": {"url": "x", "model": "toy", "staleness": 1}}, None, "Did you mean max_staleness"),
    ]:
        changes = {} if objective is None else {"objective": objective}
        with pytest.raises(RecipeError, match=message):
            recipe(recipe_values, toy, toys, rollout=wrong, **changes)
    recipe(recipe_values, toy, toys, rollout={"top_p": 0.9}, objective=[{"term": "policy", "importance": False}])
    parsed = recipe(recipe_values, toy, toys)
    assert parsed == Recipe.parse(__import__("yaml").safe_load(parsed.dump()))


def test_every_error_is_one_line(toy: ToyStudentServer, tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    toy.takes = False
    with pytest.raises(PotstillError) as caught:
        served(toy, tmp_path)([make_batch()], student(), step=0)
    assert "\n" not in str(caught.value)
