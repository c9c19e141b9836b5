"""Toy models, tokenizers and recipes: everything offline, made here, seeded."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

# Where there is no GPU the kernels for one run all the same. Triton looks when it is imported, which others do below.
if not Path("/dev/nvidiactl").exists():
    os.environ["TRITON_INTERPRET"] = "1"

import datasets
import pytest
import torch
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

import real_vllm

TEXT = [
    f"def f{i}(a, b):\n    return a + b * {i}\n\n\nclass C{i}:\n    def g(self, x):\n        return x - {i}\n"
    for i in range(60)
]


# Toy tensors gain nothing from threads, and wait for each other where cores are shared. Child processes too.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What is encoded in tests does not go to the user's cache."""
    cache = str(tmp_path_factory.mktemp("datasets"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
        patch.setenv("HF_DATASETS_CACHE", cache)
        yield


@pytest.fixture(autouse=True)
def _seeded() -> None:
    set_seed(0)


def mostly_slow(cases: Iterable[Any], *fast: Any) -> list[Any]:
    """Cases of a parameter, of which the named ones run in every test run and the others in `make test-slow`."""
    slow = pytest.mark.slow
    return [c if c in fast else pytest.param(*(c if isinstance(c, tuple) else (c,)), marks=slow) for c in cases]


def make_tokenizer(vocab_size: int = 300, **special: str) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        TEXT,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=["<end>", "<pad>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    special = special or {"eos_token": "<end>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def make_llama(vocab_size: int = 300, hidden_size: int = 16, layers: int = 2, seed: int = 0, **changes: Any):
    set_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=1,
        **changes,
    )
    return LlamaForCausalLM(config)


def make_batch(rows: int = 4, length: int = 12, vocab_size: int = 300, seed: int = 0) -> dict[str, torch.Tensor]:
    """A batch with padding on the right and some tokens that do not count."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, vocab_size, (rows, length), generator=generator)
    lengths = torch.randint(3, length + 1, (rows, 1), generator=generator)
    mask = (torch.arange(length) < lengths).long()
    labels = torch.where(mask.bool(), ids, -100)
    labels[:, :2] = -100
    return {"input_ids": ids * mask + (1 - mask), "attention_mask": mask, "labels": labels}


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


def make_served() -> Any:
    """The model behind a real vLLM, whose attention on a CPU wants heads of 32 and more."""
    return make_llama(hidden_size=128, seed=1)


@pytest.fixture(scope="session")
def vllm(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Iterator[real_vllm.Served]:
    """A real vLLM that serves `make_served`; it is started once, and whoever gives it other weights puts these back."""
    folder = tmp_path_factory.mktemp("vllm")
    make_served().save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    with real_vllm.serve(folder) as served:
        yield served


@pytest.fixture(scope="session")
def toys(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A folder with teacher/, student/, train.jsonl and eval.jsonl."""
    folder = tmp_path_factory.mktemp("toys")
    for name, model in (("teacher", make_llama(seed=1)), ("student", make_llama(hidden_size=8, layers=1))):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    for name, texts in (("train", TEXT[:40]), ("eval", TEXT[40:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return folder


@pytest.fixture(scope="session")
def embedder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sentence-transformers folder of random weights with three layers."""
    pytest.importorskip("sentence_transformers")
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("embedder")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=300, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=64, initializer_range=0.5,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder / "bert")
    make_tokenizer().save_pretrained(folder / "bert")
    modules = [Transformer(str(folder / "bert"), max_seq_length=32), Pooling(16, pooling_mode="mean")]
    SentenceTransformer(modules=modules, device="cpu").save_pretrained(str(folder / "model"), create_model_card=False)
    return folder / "model"


@pytest.fixture
def recipe_values(toys: Path, tmp_path: Path) -> dict[str, Any]:
    """A whole recipe over the toys; tests change it."""
    return toy_recipe(toys, tmp_path / "run")


def quiet_run(values: dict[str, Any], **options: Any) -> Any:
    """Run a recipe without output."""
    from potstill.runs.config.run import Recipe
    from potstill.runs.run import run

    return run(Recipe.parse(values), console=Console(file=io.StringIO()), **options)


def toy_recipe(toys: Path, output: Path | str) -> dict[str, Any]:
    return {
        "name": "toy",
        "teacher": {"model": str(toys / "teacher")},
        "student": {"design": {"hidden_size": 8, "num_hidden_layers": 1}},
        "data": {
            "train": {"path": str(toys / "train.jsonl")},
            "eval": {"path": str(toys / "eval.jsonl")},
            "max_length": 32,
            "packing": True,
        },
        "objective": [{"term": "logits"}, {"term": "labels", "weight": 0.5}],
        "train": {
            "max_steps": 6,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-2,
            "logging_steps": 1,
        },
        "evaluate": {"baseline": True},
        "output": str(output),
    }


@pytest.fixture
def judged_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder where one is: train.jsonl and eval.jsonl for encoders, with classes and numbers."""
    from toy_encoders import write_rows

    write_rows(tmp_path / "train.jsonl", 32, seed=0)
    write_rows(tmp_path / "eval.jsonl", 16, seed=7)
    monkeypatch.chdir(tmp_path)
    return tmp_path
