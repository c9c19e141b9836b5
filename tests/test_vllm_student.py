"""A real vLLM writes a student's rollouts, with the weights of now. Run by make test-server."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import PreTrainedTokenizerFast

import real_vllm
from conftest import make_batch, make_llama, make_served
from potstill.engines.sampling import Sampling
from potstill.engines.server import ModelServer
from potstill.engines.weight_sync import WeightSync
from potstill.losses.divergences import ReverseKL
from potstill.runs.config.run import Recipe
from potstill.runs.run import run
from potstill.train.callbacks import logged_lines
from potstill.train.distiller import Distiller
from potstill.train.rollout import Rollout
from potstill.train.server_writer import ServedWriter
from potstill.train.terms.logits import Logits
from potstill.train.terms.policy import PolicyGradient
from real_vllm import Served
from test_rollout import own_rows
from test_self_taught import lora
from test_served_student import must_be_written_by

pytestmark = [
    pytest.mark.server,
    pytest.mark.timeout(1800),
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated"),
]


@pytest.fixture
def lendable(vllm: Served) -> Iterator[Served]:
    """The server of all these tests, with its own weights again afterwards."""
    yield vllm
    WeightSync(ModelServer(vllm.url, "toy")).push(vllm.folder, "its own")


@pytest.fixture
def adaptable(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Iterator[Served]:
    """A server that takes adapters; of vLLM 0.32 on a CPU such a one cannot score several prompts at once."""
    make_served().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    with real_vllm.serve(tmp_path, "--enable-lora", "--max-lora-rank", "8") as served:
        yield served


def must_follow(student: Any, url: str, folder: Path, tokenizer: PreTrainedTokenizerFast, adapter: bool) -> None:
    """Steps of training, each from what the server wrote: with the weights of now, or of one step ago."""
    server = ServedWriter(ModelServer(url, "toy"), tokenizer, folder, adapter=adapter, max_staleness=1)
    rollout = Rollout(tokenizer, Sampling(max_new_tokens=12), share=1.0, prompt_tokens=3, server=server)
    distiller = Distiller(student, make_llama(seed=1), [Logits(ReverseKL()), PolicyGradient(clip=0.2)])
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    kept, texts = student, []
    for step in range(4):
        if step % 2 == 0:
            kept = copy.deepcopy(student)
        (made,) = rollout([make_batch(8)], student, step=step)
        assert own_rows(made).all() and [row.step for row in rollout.latest] == [step - step % 2] * 8
        assert all(text.text.ended == (text.ids[-1] == 0) for text in rollout.latest)
        must_be_written_by(kept, made, apart=1e-3)
        if step % 2:
            with pytest.raises(AssertionError):
                must_be_written_by(copy.deepcopy(student), made, apart=1e-3)
        texts.append(made["input_ids"].tolist())
        loss = distiller.step(made).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert texts[0] != texts[2]


def test_whole_students(lendable: Served, tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    must_follow(make_llama(hidden_size=128, seed=7), lendable.url, tmp_path, tokenizer, adapter=False)


def test_adapters(adaptable: Served, tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    must_follow(lora(make_served()), adaptable.url, tmp_path / "served", tokenizer, adapter=True)


def test_a_recipe(lendable: Served, recipe_values: dict[str, Any], tokenizer: Any, tmp_path: Path) -> None:
    make_llama(hidden_size=128, seed=7).save_pretrained(tmp_path / "student")
    tokenizer.save_pretrained(tmp_path / "student")
    server = {"url": lendable.url, "model": "toy", "max_staleness": 1}
    recipe_values |= {
        "student": {"model": str(tmp_path / "student")},
        "objective": [{"term": "logits", "divergence": "reverse_kl"}],
        "rollout": {"on_policy_fraction": 0.5, "max_new_tokens": 12, "prompt_tokens": 4, "server": server},
        "evaluate": {"continuations": 1},
    }
    recipe_values["train"] |= {"save_steps": 6}
    directory = run(Recipe.parse(recipe_values), console=Console(quiet=True)).directory
    lines = [line for line in logged_lines(directory / "metrics.jsonl") if "own_age" in line]
    assert [line["own_age"] for line in lines] == [0, 1, 0, 1, 0, 1]
    assert all(line["own_share"] == 0.5 for line in lines)
    assert not (directory / "served").exists()
