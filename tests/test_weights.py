"""Weights of tokens: from the spans of the data to the loss, whose mean divides by their sum."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from conftest import TEXT, make_batch, make_llama, make_tokenizer
from potstill.data.batches import PaddingCollator, encode
from potstill.data.sources import Source
from potstill.errors import DataError, RecipeError
from potstill.generation.reasoning import parse
from potstill.losses.divergences import JSD, ForwardKL
from potstill.losses.targets import DenseTargets
from potstill.models.layer_map import LayerMap
from potstill.runs.config.run import Recipe
from potstill.teachers.crosstok import CrossTokenizerTeacher
from potstill.teachers.model import ModelTeacher
from potstill.train.arguments import DistillationConfig
from potstill.train.distiller import Distiller
from potstill.train.terms.across import ULD, Chunks, MappedLogits
from potstill.train.terms.dense import AdaptiveKL
from potstill.train.terms.layers import Similarity
from potstill.train.terms.logits import Labels, Logits
from potstill.train.trainer import DistillationTrainer
from reference import token_divergence

WEIGHTS: dict[str, Any] = {"reasoning": 0.25, "answer": 0.75}
SOLUTIONS = [
    "Step 1: 3 + 4 = 7.\nStep 2: 7 * 2 = 14.\n\nAnswer: 14",
    " The cafés — naïve ones 😀 — hold 5 people.\nTherefore, the answer is 5 people.",
    "We have $\\frac{1}{2}$ of 三十 apples. $\\boxed{\\frac{15}{1}}$ 😀",
]
CHAT = (
    "{% for m in messages %}<{{ m.role }}>\n{{ m.content | trim }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>\n{% endif %}"
)


def byte_level(prefix_space: bool = False, special: str | None = None) -> PreTrainedTokenizerFast:
    """Merges that reach over spaces, digits and half of a character."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space, trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["<end>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*TEXT[:20], *SOLUTIONS * 4], trainer)
    if special:
        tokenizer.post_processor = processors.TemplateProcessing(single=special, special_tokens=[("<pad>", 1)])
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<pad>")
    made.chat_template = CHAT
    return made


TOKENIZERS = {
    "bytes": byte_level(),
    "prefix space": byte_level(prefix_space=True),
    "begins with a special token": byte_level(special="<pad> $A"),
}


def held_bytes(tokenizer: PreTrainedTokenizerFast, ids: list[int], text: str) -> list[range]:
    """Which bytes of the text each token holds: a character of a byte-level token is a byte.

    Between the ends of turns a space may have been put in front, which is at none of the text's places.
    """
    found: list[range] = []
    pieces, start = text.split("<end>"), 0
    tokens = " ".join(tokenizer.convert_ids_to_tokens(ids)).split("<end>")
    for piece, piece_tokens in zip(pieces, tokens, strict=False):
        sizes = [len(token) for token in piece_tokens.split()]
        at = start - (sum(sizes) - len(piece.encode()))
        assert at in (start, start - 1)
        for size in sizes:
            found.append(range(at, at + size))
            at += size
        start = at + len("<end>")
        found.append(range(at, start) if len(pieces) > 1 else range(0))
    return found[: len(ids)]


def expected(held: list[range], text: str, reasoning: tuple[int, int], answer: tuple[int, int] | None) -> list[float]:
    def holds(one: range, span: tuple[int, int] | None) -> bool:
        if span is None:
            return False
        start, end = (len(text[:place].encode()) for place in span)
        return any(start <= byte < end for byte in one)

    return [0.25 if holds(one, reasoning) and not holds(one, answer) else 0.75 for one in held]


@pytest.fixture
def write(tmp_path: Path) -> Callable[[list[dict[str, Any]]], Path]:
    def written(rows: list[dict[str, Any]]) -> Path:
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return written


def spans(text: str) -> dict[str, Any]:
    found = parse(text)
    return {"reasoning_span": list(found.reasoning_span), "answer_span": list(found.answer_span or ()) or None}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_each_token_of_a_completion_has_the_weight_of_its_span(name: str, write: Any) -> None:
    tokenizer = TOKENIZERS[name]
    source = Source(write([{"prompt": "1 + 1?\n", "completion": text, **spans(text)} for text in SOLUTIONS]))
    plain = encode(source, tokenizer, max_length=200).dataset
    assert "weights" not in plain.column_names
    rows = encode(Source(source.path, span_weights=WEIGHTS), tokenizer, max_length=200).dataset
    for row, before, text in zip(rows, plain, SOLUTIONS, strict=True):
        assert (row["input_ids"], row["labels"]) == (before["input_ids"], before["labels"])
        first = sum(label == -100 for label in row["labels"])
        solution, held = parse(text), held_bytes(tokenizer, row["input_ids"][first:], text)
        assert row["weights"][first:] == expected(held, text, solution.reasoning_span, solution.answer_span)
        assert {0.25, 0.75} == set(row["weights"][first:])
    cut = encode(Source(source.path, span_weights=WEIGHTS), tokenizer, max_length=20).dataset
    assert [row["weights"] for row in cut] == [row["weights"][:20] for row in rows]


@pytest.mark.parametrize("other", [None, 0.5])
def test_weights_per_span_are_those_of_means(other: float | None, write: Any) -> None:
    tokenizer = TOKENIZERS["bytes"]
    path = write([{"prompt": "1 + 1?\n", "completion": text, **spans(text)} for text in SOLUTIONS])
    by_token, by_span = (
        encode(Source(path, span_weights={**WEIGHTS, "other": other, "per": per}), tokenizer, max_length=200).dataset
        for per in ("token", "span")
    )
    for row, names in zip(by_span, by_token, strict=True):
        targets = [i for i, label in enumerate(row["labels"]) if label != -100]
        losses = {i: float(i * i % 7) for i in targets}
        means = 0.0
        for weight in {names["weights"][i] for i in targets}:  # which identifies the span of a token
            within = [losses[i] for i in targets if names["weights"][i] == weight]
            means += weight * sum(within) / len(within)
        found = sum(row["weights"][i] * losses[i] for i in targets)
        assert found == pytest.approx(len(targets) * means, rel=1e-5)


@pytest.mark.parametrize("name", ["bytes", "prefix space"])
def test_each_token_of_a_chat_has_the_weight_of_its_span(name: str, write: Any) -> None:
    """The spans are places in the last message, wherever the template puts it and without the space it trims."""
    tokenizer = TOKENIZERS[name]
    talks = [
        [
            {"role": "user", "content": "Really?"},
            {"role": "assistant", "content": "Yes. Answer: 14"},
            {"role": "user", "content": text},
            {"role": "assistant", "content": text},
        ]
        for text in SOLUTIONS
    ]
    path = write([{"messages": talk, **spans(text)} for talk, text in zip(talks, SOLUTIONS, strict=True)])
    rows = encode(Source(path, span_weights=WEIGHTS), tokenizer, max_length=999).dataset
    for row, talk, text in zip(rows, talks, SOLUTIONS, strict=True):
        whole = tokenizer.apply_chat_template(talk, tokenize=False)
        shift = whole.rindex(text.strip()) - (len(text) - len(text.lstrip()))
        solution, held = parse(text), held_bytes(tokenizer, row["input_ids"], whole)
        moved = [tuple(place + shift for place in span) for span in (solution.reasoning_span, solution.answer_span)]
        assert row["weights"] == expected(held, whole, *moved)
        counted = [weight for weight, label in zip(row["weights"], row["labels"], strict=True) if label != -100]
        assert {0.25, 0.75} == set(counted)


def test_rows_and_single_tokens_have_weights_and_what_counts_nothing_has_no_label(write: Any) -> None:
    tokenizer = TOKENIZERS["bytes"]
    row = {"prompt": "1 + 1?\n", "completion": SOLUTIONS[0], **spans(SOLUTIONS[0])}
    alone = {"prompt": "1 + 1?\nAnswer:", "completion": " 14", "reasoning_span": None, "answer_span": [1, 3]}
    path = write([row | {"share": 2}, alone | {"share": 0.5}])
    both = encode(Source(path, weight="share", span_weights=WEIGHTS), tokenizer, max_length=200).dataset
    assert [set(one["weights"]) for one in both] == [{0.5, 1.5}, {0.375}]
    rows = encode(Source(path, weight="share"), tokenizer, max_length=200).dataset
    assert [set(one["weights"]) for one in rows] == [{2.0}, {0.5}]

    none = encode(Source(path, span_weights={"reasoning": 0, "answer": 1}), tokenizer, max_length=200)
    for one, before in zip(none.dataset, rows, strict=True):
        labels = [label if weight else -100 for label, weight in zip(before["labels"], one["weights"], strict=True)]
        assert one["labels"] == labels
    other = encode(Source(path, span_weights={"reasoning": 0, "answer": 0, "other": 1}), tokenizer, max_length=200)
    target_tokens = tokenizer.convert_ids_to_tokens([i for i in other.dataset[0]["labels"] if i != -100])
    assert "".join(target_tokens) == "ĊĊAnswer:<end>"
    assert none.tokens + other.tokens < encode(Source(path), tokenizer, max_length=200).tokens

    ids = [{"input_ids": [5, 6, 7], "weights": [1, 0, 0.5], "share": 2}]
    (given,) = encode(Source(write(ids), weight="share"), tokenizer, max_length=9).dataset
    assert given == {"input_ids": [5, 6, 7], "labels": [5, -100, 7], "weights": [2.0, 0.0, 1.0]}


GOOD = {"prompt": "a", "completion": "bc", "reasoning_span": [0, 1], "answer_span": None}


@pytest.mark.parametrize(
    ("row", "options", "words"),
    [
        ({"text": "a"}, {"span_weights": WEIGHTS}, "expected prompt and completion, or messages, for span_weights"),
        ({"text": "a"}, {"weight": "text"}, "expected rows that are no plain text"),
        ({"prompt": "a", "completion": "b"}, {"span_weights": WEIGHTS}, "expected a column 'reasoning_span'"),
        (GOOD, {"weight": "wieght"}, "expected a column 'wieght'"),
        (GOOD | {"reasoning_span": [0, 3]}, {"span_weights": WEIGHTS}, "within the 2 characters.*got 0 to 3 in row 1"),
        (GOOD | {"reasoning_span": [2, 1]}, {"span_weights": WEIGHTS}, "start and end of a span.*in row 1"),
        (GOOD | {"reasoning_span": [0.5, 1]}, {"span_weights": WEIGHTS}, "start and end of a span.*in row 1"),
        (GOOD | {"w": -1}, {"weight": "w"}, "expected a number >= 0 in column 'w'.*got the number -1 in row 1"),
        (GOOD | {"w": None}, {"weight": "w"}, "expected a number >= 0.*null.*in row 1"),
        ({"input_ids": [4, 5], "weights": [1]}, {}, "as many weights as input_ids, got 1 and 2 in row 1"),
        ({"input_ids": [4, 5], "weights": [1, "a"]}, {}, "expected a list of numbers >= 0"),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}] * 2}
            | {"reasoning_span": [0, 1], "answer_span": None},
            {"span_weights": WEIGHTS},
            None,
        ),
        (
            {"messages": [{"role": r, "content": "a"} for r in ("user", "assistant", "user")]}
            | {"reasoning_span": [0, 1], "answer_span": None},
            {"span_weights": WEIGHTS},
            "expected a last message of the assistant.*in row 1",
        ),
    ],
)
def test_bad_weights_are_one_clear_line(row: Any, options: Any, words: str | None, write: Any) -> None:
    def encoded() -> Any:
        return encode(Source(write([row]), **options), TOKENIZERS["bytes"], max_length=99)

    if words is None:
        assert encoded().tokens
        return
    with pytest.raises(DataError, match=words) as error:
        encoded()
    assert "\n" not in str(error.value)


def test_recipes_accept_weights_and_refuse_mistakes(recipe_values: dict[str, Any]) -> None:
    recipe_values["data"]["train"] |= {"weight": "share", "span_weights": WEIGHTS}
    assert Recipe.parse(recipe_values).data.train.span_weights.answer == 0.75
    for wrong, words in (
        ({"reasoning": -1, "answer": 1}, "span_weights.reasoning"),
        ({"reasoning": 0, "answer": 0}, "above 0"),
    ):
        recipe_values["data"]["train"]["span_weights"] = wrong
        with pytest.raises(RecipeError, match=words):
            Recipe.parse(recipe_values)


# The loss.


def weighted(batch: dict[str, Tensor], seed: int = 3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return batch | {"weights": 0.1 + torch.rand(batch["labels"].shape, generator=generator)}


def distiller(*terms: Any, whole: bool = False) -> Distiller:
    made = Distiller(make_llama(hidden_size=8), make_llama(seed=1), list(terms))
    if whole:
        made.split = None
    return made


TERMS = {
    "both": [Logits(JSD(), weight=0.7, temperature=2.0), Labels(weight=0.3)],
    "labels": [Labels()],
    "by entropy": [Logits(ForwardKL(), tokens="entropy"), Labels(weight=0.3)],
    "by confidence": [Logits(ForwardKL(), tokens="confidence")],
    "dense": [AdaptiveKL()],
    "batches": [Similarity(LayerMap.last_k(1)), Labels()],
}


def test_a_weighted_step_is_the_formula() -> None:
    batch, one = weighted(make_batch()), distiller(Logits(JSD(), weight=0.7, temperature=2.0), Labels(weight=0.3))
    output = one.step(batch)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    q, p = (model(**inputs).logits[:, :-1] for model in (one.student, one.teacher.model))
    counts = batch["labels"][:, 1:] != -100
    w, labels = batch["weights"][:, 1:][counts], batch["labels"][:, 1:][counts]
    apart = token_divergence(q[counts].double(), p[counts].double(), JSD(), 2.0)
    entropy = torch.nn.functional.cross_entropy(q[counts], labels, reduction="none")
    logits, hard = 4 * (w * apart).sum() / w.sum(), (w * entropy).sum() / w.sum()
    torch.testing.assert_close(output.loss.double(), 0.7 * logits + 0.3 * hard.double(), rtol=1e-5, atol=0)
    torch.testing.assert_close(output.logs["logits"].double(), logits, rtol=1e-5, atol=0)
    torch.testing.assert_close(output.logs["labels"], hard.detach())


def gradients(one: Distiller, *batches: dict[str, Tensor], **options: Any) -> Tensor:
    one.zero_grad()
    for batch in batches:
        one(batch, **options).loss.backward()
    return torch.cat([p.grad.flatten() for p in one.student.parameters() if p.grad is not None])


@pytest.mark.parametrize("name", TERMS)
def test_only_the_ratio_of_weights_matters_and_weights_of_one_are_none(name: str) -> None:
    one, batch = distiller(*TERMS[name]), make_batch()
    plain = gradients(one, batch)
    ones = torch.ones_like(batch["labels"], dtype=torch.float32)
    torch.testing.assert_close(gradients(one, batch | {"weights": ones}), plain)
    torch.testing.assert_close(gradients(one, batch | {"weights": 0.01 * ones}), plain, rtol=1e-4, atol=1e-6)
    if name != "batches":
        assert not torch.allclose(gradients(one, weighted(batch)), plain, rtol=1e-2)


@pytest.mark.parametrize("name", TERMS)
def test_fused_equals_whole_logits(name: str) -> None:
    batch = weighted(make_batch())
    fused, whole = (distiller(*TERMS[name], whole=which) for which in (False, True))
    torch.testing.assert_close(fused.step(batch).loss, whole.step(batch).loss)
    torch.testing.assert_close(gradients(fused, batch), gradients(whole, batch), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["both", "by confidence", "dense"])
def test_a_weight_of_zero_is_a_label_that_does_not_count(name: str) -> None:
    one, batch = distiller(*TERMS[name]), weighted(make_batch())
    gone = torch.rand(batch["labels"].shape, generator=torch.Generator().manual_seed(5)) < 0.4
    by_weight = batch | {"weights": batch["weights"].masked_fill(gone, 0)}
    by_label = batch | {"labels": batch["labels"].masked_fill(gone, -100)}
    torch.testing.assert_close(gradients(one, by_weight), gradients(one, by_label))
    nothing = batch | {"weights": torch.zeros_like(batch["weights"])}
    assert one.step(nothing).loss == 0 and not gradients(one, nothing).any()


def test_a_selection_and_weights_multiply() -> None:
    """The selected tokens, each by its weight, over the weight of all tokens."""
    batch = weighted(make_batch())
    one = distiller(Logits(ForwardKL(), tokens="entropy", share=0.3))
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    q, p = (model(**inputs).logits[:, :-1] for model in (one.student, one.teacher.model))
    counts = batch["labels"][:, 1:] != -100
    w, p = batch["weights"][:, 1:][counts], DenseTargets(p[counts]).dense().log_softmax(-1)
    entropy = -(p.exp() * p).sum(-1)
    kept = entropy >= entropy.sort(descending=True).values[-(-3 * len(w) // 10) - 1]
    apart = (p.exp() * (p - q[counts].log_softmax(-1))).sum(-1)
    torch.testing.assert_close(one.step(batch).loss, (w * kept * apart).sum() / w.sum())


# The trainer.


def rows(count: int = 16) -> Dataset:
    generator = torch.Generator().manual_seed(7)
    lengths = torch.randint(4, 14, (count,), generator=generator).tolist()
    examples = []
    for length in lengths:
        ids = torch.randint(2, 300, (length,), generator=generator).tolist()
        weights = torch.rand(length, generator=generator).tolist()
        examples.append({"input_ids": ids, "labels": [-100, *ids[1:]], "weights": weights})
    return Dataset.from_list(examples)


def trained(folder: Path, **changes: Any) -> DistillationTrainer:
    arguments = {"output_dir": str(folder), "max_steps": 2, "per_device_train_batch_size": 8, "logging_steps": 1}
    arguments |= {"learning_rate": 1e-2, "save_strategy": "no", "disable_tqdm": True, "use_cpu": True}
    made = DistillationTrainer(
        student=make_llama(hidden_size=8, layers=1),
        teacher=make_llama(seed=1),
        objective=[Logits(ForwardKL(), temperature=2.0), Labels(weight=0.5)],
        args=DistillationConfig(**(arguments | changes)),
        train_dataset=rows(),
        eval_dataset=rows(6),
        data_collator=PaddingCollator(1),
    )
    made.train()
    return made


def test_accumulation_equals_one_batch_and_evaluation_is_a_weighted_mean(tmp_path: Path) -> None:
    whole = trained(tmp_path, per_device_eval_batch_size=6)
    parts = trained(
        tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4, per_device_eval_batch_size=2
    )
    for one, other in zip(whole.distiller.parameters(), parts.distiller.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    seen = [[line["loss"] for line in one.state.log_history if "loss" in line] for one in (whole, parts)]
    assert seen[0] == pytest.approx(seen[1], rel=1e-5)
    measured = [one.evaluate() for one in (whole, parts)]
    assert measured[0]["eval_loss"] == pytest.approx(measured[1]["eval_loss"], rel=1e-4)
    whole.distiller.eval()
    expected = whole.distiller.step(PaddingCollator(1)(list(rows(6))))
    assert measured[0]["eval_loss"] == pytest.approx(expected.loss.item(), rel=1e-4)
    assert measured[0]["eval_cross_entropy"] == pytest.approx(expected.logs["cross_entropy"].item(), rel=1e-4)


def test_weights_are_for_causal_models(write: Any) -> None:
    path = write([{"input_ids": [5, 6, 7], "weights": [1, 0, 0.5]}])
    with pytest.raises(DataError, match="no token weights for the task masked"):
        encode(Source(path), TOKENIZERS["bytes"], max_length=9, task="masked")


def test_terms_across_tokenizers_weigh_too() -> None:
    """With one tokenizer on both sides, the mapped logits are the logits and every chunk is a token."""
    tokenizer, made = make_tokenizer(), make_llama(seed=1)
    text = tokenizer(TEXT[0], return_tensors="pt")["input_ids"][:, :30]
    batch = weighted({"input_ids": text, "attention_mask": torch.ones_like(text), "labels": text})
    across = CrossTokenizerTeacher(ModelTeacher(made), tokenizer, tokenizer)

    def loss(teacher: Any, term: Any, batch: dict[str, Tensor]) -> Tensor:
        return Distiller(make_llama(hidden_size=8), teacher, [term]).step(batch).loss

    mapped = loss(across, MappedLogits(top_k=300), batch)
    torch.testing.assert_close(mapped, loss(made, Logits(ForwardKL()), batch), rtol=1e-4, atol=1e-5)
    for term in (Chunks(), ULD()):
        plain = loss(across, term, {name: x for name, x in batch.items() if name != "weights"})
        ones = loss(across, term, batch | {"weights": torch.ones_like(batch["weights"])})
        torch.testing.assert_close(ones, plain)
        assert not torch.allclose(loss(across, term, batch), plain, rtol=1e-3)
