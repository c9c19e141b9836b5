"""What DistillationTrainer takes as data, and what it answers: rows of any shape, metrics and predictions."""

from __future__ import annotations

import copy
import dataclasses
import logging
import pickle
import re
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict, IterableDataset
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DataCollatorForLanguageModeling,
    DataCollatorWithFlattening,
    Seq2SeqTrainingArguments,
    TrainingArguments,
)

from conftest import make_llama, make_tokenizer, mostly_slow
from potstill.data.batches import encode
from potstill.data.sources import Source
from potstill.engines.sampling import Sampling
from potstill.errors import DataError, ModelError, UserError, VocabularyError
from potstill.losses.divergences import ForwardKL
from potstill.models.layer_map import LayerMap
from potstill.train.arguments import DistillationConfig
from potstill.train.distiller import Distiller
from potstill.train.rollout import Rollout
from potstill.train.terms.layers import Hidden
from potstill.train.terms.logits import Labels, Logits
from potstill.train.trainer import DistillationTrainer

TEXTS = [{"text": f"def f(a):\n    return a + {i}\n"} for i in range(5)]
PAIRS = [{"prompt": f"def f{i}(a):", "completion": f" return a + {i}"} for i in range(5)]
CHATS = [
    {"messages": [{"role": "user", "content": f"add {i}"}, {"role": "assistant", "content": f"a + {i}"}]}
    for i in range(5)
]
SHAPES = {"text": TEXTS, "prompt and completion": PAIRS, "messages": CHATS}
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    made = make_tokenizer()
    made.chat_template = TEMPLATE
    return made


class Rows(torch.utils.data.Dataset[Any]):
    """A data set with a length and places, and no iterator of its own."""

    def __init__(self, rows: list[Any]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> Any:
        return self.rows[i]


class Stream(torch.utils.data.IterableDataset[Any]):
    def __init__(self, rows: list[Any]) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[Any]:
        return iter(self.rows)


CONTAINERS = {
    "list": list,
    "datasets": Dataset.from_list,
    "torch": Rows,
    "stream": Stream,
    "datasets stream": lambda rows: Dataset.from_list(rows).to_iterable_dataset(),
    "generator": lambda rows: IterableDataset.from_generator(lambda: iter(rows)),
}


def trainer(folder: Path, train: Any = None, tokenizer: Any = None, eval_dataset: Any = None, **changes: Any) -> Any:
    names = ("data_collator", "compute_metrics", "task", "rollout")
    options = {name: changes.pop(name) for name in names if name in changes}
    options |= {name: changes.pop(name) for name in ("student", "teacher", "objective") if name in changes}
    arguments: dict[str, Any] = {"output_dir": str(folder), "max_steps": 1, "disable_tqdm": True, "use_cpu": True}
    defaults = {
        "student": make_llama(hidden_size=8, layers=1),
        "teacher": make_llama(seed=1),
        "objective": [Logits(ForwardKL()), Labels()],
    }
    return DistillationTrainer(
        **(defaults | options),
        args=DistillationConfig(**arguments | {"save_strategy": "no", "report_to": "none"} | changes),
        train_dataset=train,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
    )


def of_file(folder: Path, rows: list[Any], tokenizer: Any, **options: Any) -> list[Any]:
    Dataset.from_list(rows).save_to_disk(folder / "rows")
    return list(encode(Source(folder / "rows"), tokenizer, **{"max_length": 1024} | options).dataset)


@pytest.mark.parametrize(
    ("shape", "container"),
    mostly_slow(product(SHAPES, CONTAINERS), *product(SHAPES, ["list"]), *product(["messages"], CONTAINERS)),
)
def test_rows_are_encoded_as_those_of_a_file(shape: str, container: str, tmp_path: Path, tokenizer: Any) -> None:
    rows = SHAPES[shape]
    made = trainer(tmp_path, CONTAINERS[container](rows), tokenizer)
    assert list(made.train_dataset) == of_file(tmp_path, rows, tokenizer)
    made.train()
    assert made.state.global_step == 1


def test_no_row_is_lost_of_what_is_read_once(tmp_path: Path, tokenizer: Any) -> None:
    once = (row for row in TEXTS)
    assert list(trainer(tmp_path, once, tokenizer).train_dataset) == of_file(tmp_path, TEXTS, tokenizer)
    frame = pytest.importorskip("pandas").DataFrame(TEXTS)
    assert list(trainer(tmp_path, frame, tokenizer).train_dataset) == of_file(tmp_path, TEXTS, tokenizer)


@pytest.mark.parametrize(("rows", "got"), [(["a", "b"], "str as the first"), ([], "no rows"), ("rows.jsonl", "str as")])
def test_what_is_no_data_set(rows: Any, got: str, tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(DataError, match=f"rows that are dicts, .* in train_dataset, got {got}"):
        trainer(tmp_path, rows, tokenizer)


def test_held_out_sets_by_name(tmp_path: Path, tokenizer: Any) -> None:
    held_out = DatasetDict({"one": Dataset.from_list(TEXTS[:2]), "two": Dataset.from_list(PAIRS)})
    made = trainer(tmp_path, TEXTS, tokenizer, held_out)
    logged = made.evaluate()
    alone = made.evaluate(PAIRS)
    assert logged["eval_two_loss"] == pytest.approx(alone["eval_loss"])
    assert logged["eval_one_loss"] == pytest.approx(made.evaluate(TEXTS[:2])["eval_loss"])
    with pytest.raises(DataError, match=r"one data set as train_dataset, got one, two.*train_dataset=data\['one'\]"):
        trainer(tmp_path, held_out, tokenizer)


def test_nothing_is_cut_in_silence(tmp_path: Path, tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        made = trainer(tmp_path, CHATS, tokenizer, max_length=23)
    assert re.search("train_dataset.jsonl: . examples? truncated to max_length 23", caplog.text)
    assert max(len(row["input_ids"]) for row in made.train_dataset) == 23
    long = [{"text": TEXTS[0]["text"] * 9}]
    windows = list(trainer(tmp_path, long, tokenizer, max_length=16).train_dataset)
    assert len(windows) > 4
    assert [i for row in windows for i in row["input_ids"]] == of_file(tmp_path, long, tokenizer)[0]["input_ids"]


def test_labels_of_token_ids(tmp_path: Path, tokenizer: Any) -> None:
    ids = [tokenizer(row["text"])["input_ids"] for row in TEXTS[:3]]
    bare, labelled = [{"input_ids": x} for x in ids], [{"input_ids": x, "labels": x} for x in ids]
    losses = [trainer(tmp_path, None, tokenizer, rows).evaluate()["eval_loss"] for rows in (bare, labelled)]
    assert losses[0] == losses[1]
    short = [max(map(len, ids)) - len(x) for x in ids]
    padded = [
        {"input_ids": [1] * n + x, "attention_mask": [0] * n + [1] * len(x)} for n, x in zip(short, ids, strict=True)
    ]
    assert trainer(tmp_path, None, tokenizer, padded).evaluate()["eval_loss"] == pytest.approx(losses[0])
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    made = trainer(tmp_path, bare, tokenizer, bare, data_collator=collator)
    assert made.evaluate()["eval_loss"] == pytest.approx(losses[0])
    made.train()


def test_collators_of_the_users_own(tmp_path: Path, tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    with pytest.raises(DataError, match="input_ids in train_dataset for DataCollatorForLanguageModeling, got text"):
        trainer(tmp_path, TEXTS, tokenizer, data_collator=collator)

    def tokenize(rows: list[Any]) -> dict[str, torch.Tensor]:
        return dict(tokenizer([row["text"] for row in rows], padding=True, return_tensors="pt"))

    trainer(tmp_path, TEXTS, tokenizer, data_collator=tokenize).train()
    ended = make_tokenizer(eos_token="<end>", pad_token="<end>")
    collator = DataCollatorForLanguageModeling(ended, mlm=False)
    with caplog.at_level(logging.WARNING):
        trainer(tmp_path, [{"input_ids": [5, 6]}], ended, data_collator=collator)
    assert "the student does not learn to stop" in caplog.text
    flat = DataCollatorWithFlattening(return_position_ids=False)
    with pytest.raises(UserError, match="says where sequences begin"):
        trainer(tmp_path, [{"input_ids": [5, 6]}], tokenizer, data_collator=flat)


def test_columns_that_are_not_read(tmp_path: Path, tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    row = {"input_ids": [5, 6, 7], "labels": [5, 6, 7]}
    with caplog.at_level(logging.WARNING):
        trainer(tmp_path, [row | {"source": "a", "id": 3}], tokenizer)
    assert "train_dataset: columns that are not used: id, source" in caplog.text
    for name, value in (("response_mask", [0, 1, 1]), ("sample_weight", 2.0), ("inputs_embeds", [[0.0]] * 3)):
        with pytest.raises(DataError, match=f"the column {name}, which is not read"):
            trainer(tmp_path, [row, row | {name: value}], tokenizer)
    prompts = {"prompt_input_ids": [5], "prompt_attention_mask": [1]}  # as llm_distil has them
    with pytest.raises(DataError, match=r"column prompt_attention_mask, .* is the first prompt_tokens of a Rollout"):
        trainer(tmp_path, [row | prompts], tokenizer)
    with pytest.raises(DataError, match="the next tokens in train_dataset"):
        trainer(tmp_path, [row | {"labels": [6, 7, -100]}], tokenizer)
    with pytest.raises(DataError, match="or a processing_class that makes them, got text"):
        trainer(tmp_path, TEXTS)


def test_classes_from_texts(tmp_path: Path, tokenizer: Any) -> None:
    sizes: dict[str, Any] = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8, "num_hidden_layers": 1}
    config = BertConfig(vocab_size=300, label2id={"no": 0, "yes": 1}, id2label={0: "no", 1: "yes"}, **sizes)
    student, teacher = BertForSequenceClassification(config), BertForSequenceClassification(config)
    rows = [{"text": "a", "label": "yes"}, {"text": "def b", "label": "no"}]
    options = {"student": student, "teacher": teacher, "task": "classification"}

    def accuracy(predicted: Any) -> dict[str, float]:
        return {"accuracy": float((predicted.predictions.argmax(-1) == predicted.label_ids).mean())}

    made = trainer(tmp_path, rows, tokenizer, rows, compute_metrics=accuracy, **options)
    assert [row["labels"] for row in made.train_dataset] == [1, 0]
    made.train()
    assert made.evaluate()["eval_accuracy"] in (0.0, 0.5, 1.0)


def test_metrics_and_predictions(tmp_path: Path, tokenizer: Any) -> None:
    seen: list[Any] = []

    def compute(predicted: Any) -> dict[str, float]:
        seen.append(predicted)
        return {"mine": 1.0}

    made = trainer(tmp_path, TEXTS, tokenizer, TEXTS, compute_metrics=compute, per_device_eval_batch_size=2)
    assert made.evaluate()["eval_mine"] == 1.0
    predicted = made.predict(TEXTS)
    rows = made.eval_dataset
    assert predicted.metrics["test_mine"] == 1.0
    for i, row in enumerate(rows):
        length = len(row["input_ids"])
        with torch.no_grad():
            logits = made.distiller.student(torch.tensor([row["input_ids"]])).logits[0]
        for result in (predicted, seen[0]):
            np.testing.assert_allclose(result.predictions[i, :length], logits, rtol=1e-4, atol=1e-5)
            assert result.label_ids[i, :length].tolist() == row["labels"]
            assert (result.label_ids[i, length:] == -100).all()
    assert "eval_mine" not in trainer(tmp_path, TEXTS, tokenizer, TEXTS).evaluate()


def test_logits_are_prepared_for_metrics(tmp_path: Path, tokenizer: Any) -> None:
    made = DistillationTrainer(
        student=make_llama(hidden_size=8, layers=1),
        teacher=None,
        objective=[Labels()],
        args=DistillationConfig(output_dir=str(tmp_path), use_cpu=True, disable_tqdm=True),
        eval_dataset=TEXTS,
        processing_class=tokenizer,
        preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1),
        compute_metrics=lambda predicted: {"width": predicted.predictions.ndim},
    )
    assert made.evaluate()["eval_width"] == 2


def test_a_metric_of_ones_own_needs_a_direction(tmp_path: Path, tokenizer: Any) -> None:
    def make(**changes: Any) -> Any:
        return trainer(tmp_path, TEXTS, tokenizer, TEXTS, compute_metrics=lambda _: {"mine": 1.0}, **changes)

    with pytest.raises(UserError, match="greater_is_better beside metric_for_best_model mine"):
        make(metric_for_best_model="eval_mine")
    make(metric_for_best_model="eval_mine", greater_is_better=True)
    make(metric_for_best_model="eval_loss")


def test_plain_training_arguments_are_taken_over(tmp_path: Path, tokenizer: Any) -> None:
    options: Any = {"student": make_llama(), "teacher": None, "objective": [Labels()], "train_dataset": TEXTS}
    values: Any = {"output_dir": str(tmp_path), "use_cpu": True, "max_steps": 1, "save_strategy": "no"}
    values |= {"learning_rate": 3e-4, "warmup_steps": 0.1, "lr_scheduler_type": "cosine", "disable_tqdm": True}
    plain: Any = TrainingArguments(**values)
    made = DistillationTrainer(args=plain, processing_class=tokenizer, **options)
    changed = {"remove_unused_columns", "greater_is_better", "ddp_find_unused_parameters"}
    for name in {field.name for field in dataclasses.fields(plain)} - changed:
        assert getattr(made.args, name) == getattr(plain, name), name
    assert not made.args.remove_unused_columns
    made.train()
    with pytest.raises(UserError, match="or TrainingArguments, got Seq2SeqTrainingArguments"):
        DistillationTrainer(args=Seq2SeqTrainingArguments(**values), processing_class=tokenizer, **options)
    best: Any = TrainingArguments(**values, metric_for_best_model="eval_labels")  # which sets greater_is_better
    with pytest.raises(UserError, match="greater_is_better false for metric_for_best_model labels, a loss, got true"):
        DistillationTrainer(args=best, processing_class=tokenizer, **options)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        *((name, f"expected no {name}") for name in ("compute_loss_func", "model_init", "model")),
        ("train_dataloader", "Give its data set as train_dataset.* per_device_train_batch_size"),
        ("eval_dataloader", "Give its data set as eval_dataset.* per_device_eval_batch_size"),
        ("tokenizer", "Give it as processing_class"),
        ("teacher_model", "unknown argument teacher_model. Did you mean teacher?"),
    ],
)
def test_arguments_without_a_meaning_are_refused(name: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        DistillationTrainer(
            student=make_llama(),
            teacher=None,
            objective=[Labels()],
            args=DistillationConfig(output_dir=str(tmp_path), use_cpu=True),
            **{name: make_llama},
        )


def test_a_name_is_no_tokenizer() -> None:
    with pytest.raises(UserError, match="expected a tokenizer as processing_class, got 'gpt2'"):
        DistillationTrainer(student=make_llama(), teacher=None, objective=[Labels()], processing_class="gpt2")


def test_a_step_without_targets_is_noted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"input_ids": [5, 6, 7], "labels": [-100] * 3}] * 2
    args = DistillationConfig(output_dir=str(tmp_path), use_cpu=True, max_steps=2, save_strategy="no")
    DistillationTrainer(student=make_llama(), teacher=None, objective=[Labels()], args=args, train_dataset=rows).train()
    assert caplog.text.count("no token of the batches of step 1 is a target") == 1
    assert "step 2" not in caplog.text


def test_arguments_by_the_names_of_others(tmp_path: Path) -> None:
    for name, hint in (
        ("epochs", "mean num_train_epochs?"),
        ("lr", "mean learning_rate?"),
        ("alpha", "a term"),
        ("lora_r", "Lora("),
        ("use_peft", "Lora("),
        ("lambda_gkd", "a Rollout"),
        ("teacher_model_name", "as teacher"),
    ):
        with pytest.raises(UserError, match=f"DistillationConfig: unknown argument {name}. .*{re.escape(hint)}"):
            DistillationConfig(output_dir=str(tmp_path), **{name: 1})
    config = DistillationConfig(output_dir=str(tmp_path), use_cpu=True, learning_rate=3.0)
    assert copy.deepcopy(config).learning_rate == pickle.loads(pickle.dumps(config)).learning_rate == 3.0


def test_padded_heads_are_cut_to_the_tokenizer(tmp_path: Path, tokenizer: Any) -> None:
    teacher, padded = make_llama(seed=1), make_llama(seed=1, vocab_size=320)
    with torch.no_grad():
        for key, value in teacher.state_dict().items():
            padded.state_dict()[key][: value.shape[0]] = value
    losses = [trainer(tmp_path, None, tokenizer, PAIRS, teacher=t).evaluate()["eval_loss"] for t in (teacher, padded)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    rollout = Rollout(tokenizer, Sampling(max_new_tokens=2))
    trainer(tmp_path, PAIRS, tokenizer, teacher=padded, rollout=rollout)
    assert rollout.vocabulary == 300
    with pytest.raises(VocabularyError, match="a Distiller does it with vocabulary=n"):
        trainer(tmp_path, None, None, [{"input_ids": [5, 6, 7]}], teacher=padded).evaluate()
    with pytest.raises(VocabularyError, match="a student head with a row for each of 300 tokens, got 280"):
        trainer(tmp_path, PAIRS, tokenizer, student=make_llama(vocab_size=280))


@pytest.mark.parametrize("special", [{}, {"eos_token": "<end>", "pad_token": "<end>"}, {"eos_token": "<end>"}])
@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_that_are_padded_to_max_length(special: dict[str, str], side: str, tmp_path: Path) -> None:
    """The data set of llm_distil: rows as long as `max_length`, and no labels."""
    tokenizer: Any = make_tokenizer(**special)
    tokenizer.pad_token, tokenizer.padding_side = tokenizer.pad_token or tokenizer.eos_token, side
    rows = Dataset.from_list(TEXTS).map(
        lambda row: tokenizer(row["text"], truncation=True, padding="max_length", max_length=48), remove_columns="text"
    )
    bare = [{"input_ids": tokenizer(row["text"])["input_ids"]} for row in TEXTS]
    expected = trainer(tmp_path, None, tokenizer, bare).evaluate()["eval_loss"]
    for given in (tokenizer, None):
        assert trainer(tmp_path, None, given, rows).evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-6)
    pad = tokenizer.pad_token_id
    labelled = rows.map(lambda row: {"labels": row["input_ids"]})
    student = make_llama()
    student.config.pad_token_id = None if special else pad  # GPT-2's names no pad token
    distiller = Distiller(student, None, [Labels()])
    for wrong, message in (
        (labelled, "labels of -100 where attention_mask is 0"),
        (labelled.remove_columns("attention_mask"), rf"several pad tokens \({pad}\) stand at an end"),
        (rows.remove_columns("attention_mask"), rf"several pad tokens \({pad}\) stand at an end"),
    ):
        for given in (tokenizer, None):
            with pytest.raises(DataError, match=message):
                trainer(tmp_path, None, given, wrong, student=student)
        with pytest.raises(DataError, match=message):
            distiller.step(dict(wrong.with_format("torch")[:]))


def test_a_student_is_loaded_into_a_trainer(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first, second = (trainer(tmp_path, student=make_llama(hidden_size=8, seed=seed)) for seed in (5, 6))
    first.save_model(str(tmp_path / "exported"))
    second.load_checkpoint(tmp_path / "exported")
    weights = first.distiller.student.state_dict()
    assert all(torch.equal(value, weights[key]) for key, value in second.distiller.student.state_dict().items())
    assert not caplog.records
    with pytest.raises(ModelError, match=r"this student's weights in .*exported, got others: .*"):
        trainer(tmp_path).load_checkpoint(tmp_path / "exported")
    with pytest.raises(ModelError, match=r"expected a folder, got .*none, which is not one"):
        second.load_checkpoint(tmp_path / "none")
    projected = [Hidden(LayerMap.explicit([(0, 0)]))]
    trained = trainer(tmp_path, [{"input_ids": [5, 6]}], objective=projected, save_strategy="steps", save_steps=1)
    trained.train()
    again = trainer(tmp_path, objective=projected)
    again.load_checkpoint(tmp_path / "checkpoint-1")
    state = trained.distiller.objective.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in again.distiller.objective.state_dict().items())
    trained.save_model(str(tmp_path / "student"))
    with caplog.at_level(logging.WARNING):
        again.load_checkpoint(tmp_path / "student")
    assert "has a student alone: what the objective trains stays as it is" in caplog.text


def test_a_model_without_a_head_has_no_metrics(tmp_path: Path) -> None:
    models = {"student": make_llama().model, "teacher": make_llama(seed=1).model, "objective": [Hidden()]}
    with pytest.raises(UserError, match="no compute_metrics for the task encoder"):
        trainer(tmp_path, task="encoder", compute_metrics=lambda _: {}, **models)
