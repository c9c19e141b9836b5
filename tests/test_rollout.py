"""The student's own text in place of data: counted exactly, the same by seed, and resumed to the bit."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import TrainerCallback
from typer.testing import CliRunner

from conftest import make_batch, make_llama, make_tokenizer
from potstill.cli import app
from potstill.data.batches import PaddingCollator
from potstill.engines.sampling import Sampling
from potstill.errors import RecipeError, ShapeError, UserError
from potstill.losses.alignment import SAMPLER_LOG_PROBS, STUDENT_LOG_PROBS, causal_alignment
from potstill.losses.divergences import JSD, ForwardKL, ReverseKL, SkewForwardKL, SkewReverseKL
from potstill.losses.schedule import linear
from potstill.losses.targets import DenseTargets
from potstill.losses.token_losses import token_divergence
from potstill.models.checksums import CHECKSUMS
from potstill.runs.build import build_run
from potstill.runs.check import check
from potstill.runs.config.run import Recipe
from potstill.runs.measure import collapse_notes
from potstill.runs.run import run
from potstill.teachers.cached import CachedOrLiveTeacher
from potstill.train.callbacks import logged_lines
from potstill.train.distiller import Distiller
from potstill.train.rollout import (
    Adapt,
    Replay,
    Rollout,
    RolloutConfig,
    example,
    teacher_mix,
    teacher_top_k,
    unpadded_rows,
)
from potstill.train.samples import collapse_warning, repetition
from potstill.train.terms.logits import Labels, Logits
from potstill.train.terms.policy import MiniLLM
from potstill.train.trainer import DistillationTrainer
from test_trainer import losses, trainer, weights
from toy_server import ToyServer


def rollout(share: Any = 1.0, max_new_tokens: int = 6, **options: Any) -> Rollout:
    sampling = Sampling(max_new_tokens=max_new_tokens, **options.pop("sampling", {}))
    return Rollout(make_tokenizer(), sampling, share=share, prompt_tokens=3, **options)


def student(seed: int = 0, **changes: Any) -> Any:
    return make_llama(hidden_size=8, layers=1, seed=seed, **changes)


def own_rows(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return (
        ~batch[STUDENT_LOG_PROBS].isnan().all(1)
        if STUDENT_LOG_PROBS in batch
        else torch.zeros(len(batch["labels"])).bool()
    )


def test_rows_are_prompts_with_the_students_text_behind_them() -> None:
    batch, model = make_batch(), student()
    (made,) = rollout()([batch], model, step=0)
    assert own_rows(made).all()
    for i in range(len(made["labels"])):
        length = int(made["attention_mask"][i].sum())
        assert made["attention_mask"][i, :length].all()  # padded on the right
        row, labels = made["input_ids"][i, :length], made["labels"][i, :length]
        assert row[:2].tolist() == batch["input_ids"][i, :2].tolist()  # the first two do not count
        assert labels.tolist() == [-100, -100, *row[2:].tolist()]
        assert 1 <= length - 2 <= 6
        assert length == 8 or row[-1] == 0  # the end of text is learnt too
        logits = model(input_ids=row[None]).logits[0, 1:-1].log_softmax(-1)
        expected = logits.gather(1, row[2:, None])[:, 0]
        for name in (STUDENT_LOG_PROBS, SAMPLER_LOG_PROBS):
            torch.testing.assert_close(made[name][i, 2:length], expected, atol=1e-5, rtol=1e-5)
            assert made[name][i, :2].isnan().all()
            assert made[name][i, length:].isnan().all()


def test_plain_text_is_cut_behind_its_first_tokens() -> None:
    cut = rollout().prompt
    assert cut({"input_ids": [*range(9)], "labels": [*range(9)]}) == [0, 1, 2]
    assert cut({"input_ids": [5, 6, 7], "labels": [5, 6, 7]}) == [5]  # at most half
    assert cut({"input_ids": [5], "labels": [5]}) is None
    assert cut({"input_ids": [], "labels": []}) is None
    assert cut({"input_ids": [5, 6, 7], "labels": [-100, -100, 7]}) == [5, 6]
    document = [5, 0, 0, 6, 7, 8]  # in a packed row a prompt does not end behind the end of a document
    assert cut({"input_ids": document, "labels": document}) == [5]
    assert cut({"input_ids": document[1:], "labels": document[1:]}) == [0]


def test_a_prompt_as_long_as_the_context_stays_data() -> None:
    batch = make_batch()
    batch["labels"][0, :-1] = -100
    batch["labels"][0, -1], batch["attention_mask"][0] = 7, 1
    (made,) = rollout(limit=11)([batch], student(), step=0)
    assert own_rows(made).tolist() == [False, True, True, True]
    assert made["input_ids"][0, :12].tolist() == batch["input_ids"][0].tolist()
    (short,) = rollout(limit=4)([make_batch()], student(), step=0)
    assert int(short["attention_mask"].sum(1).max()) == 4  # two of the prompt, two new


def test_the_share_is_exact_on_average_and_mixes_one_batch_at_most() -> None:
    batches = [make_batch(seed=i) for i in range(3)]
    counts = []
    for step in range(200):
        made = rollout(0.3, max_new_tokens=1)(batches, student(), step=step)
        own = torch.cat([own_rows(batch) for batch in made])
        counts.append(int(own.sum()))
        assert own[: counts[-1]].all()
    assert set(counts) == {3, 4}  # 0.3 of 12 rows
    assert sum(counts) / 200 == pytest.approx(3.6, abs=0.1)
    assert not any(own_rows(batch).any() for batch in rollout(0.0)(batches, student(), step=0))
    assert rollout(linear(0.0, 1.0, 10)).share_at(5) == 0.5


def test_seed_step_and_rank_decide_what_is_written() -> None:
    def ids(seed: int = 0, **where: int) -> list[Any]:
        (made,) = rollout(seed=seed)([make_batch()], student(), **{"step": 0, **where})
        return made["input_ids"].tolist()

    torch.manual_seed(3)
    first = ids()
    torch.manual_seed(4)
    assert ids() == first
    assert all(ids(**other) != first for other in ({"seed": 1}, {"step": 1}, {"rank": 1}))


def test_all_end_at_once_or_none_ends() -> None:
    at_once, never = student(), student()
    at_once.lm_head.bias = torch.nn.Parameter(torch.zeros(300).index_fill(0, torch.tensor(0), 99.0))
    never.lm_head.bias = torch.nn.Parameter(torch.zeros(300).index_fill(0, torch.tensor(0), -99.0))
    one = rollout()
    (made,) = one([make_batch()], at_once, step=0)
    assert (made["labels"] != -100).sum(1).tolist() == [1] * 4
    assert "ends at once" in str(collapse_warning(taken(one)))
    (made,) = one([make_batch()], never, step=0)
    assert (made["labels"] != -100).sum(1).tolist() == [6] * 4
    assert taken(one) == {**taken(one, [make_batch()], never), "own_ended": 0.0, "own_length": 6.0, "own_share": 1.0}
    (made,) = rollout(max_new_tokens=1)([make_batch()], never, step=0)
    assert (made["labels"] != -100).sum(1).tolist() == [1] * 4


def test_the_end_of_a_chat_turn_ends_a_sample_and_is_learnt() -> None:
    own = rollout()
    own.tokenizer.chat_template = "{% for m in messages %}{{ m.content }}<pad>{% endfor %}"
    model = student()
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(300).index_fill(0, torch.tensor(1), 99.0))
    (made,) = own([make_batch()], model, step=0)
    assert [row[row != -100].tolist() for row in made["labels"]] == [[1]] * 4
    assert all(sample.text.ended for sample in own.latest)


def taken(one: Rollout, batches: Any = None, model: Any = None) -> dict[str, float]:
    class Alone:
        device = "cpu"

        def reduce(self, values: torch.Tensor) -> torch.Tensor:
            return values

    if batches is not None:
        one(batches, model, step=0)
    return one.stats.take(Alone())


def test_loops_raise_the_alarm() -> None:
    assert repetition([7] * 100) > 0.98
    assert repetition([1, 2]) == 0
    assert "loops" in str(collapse_warning({"own_repetition": 0.9, "own_length": 50.0}))
    assert collapse_warning({"own_repetition": 0.3, "own_length": 50.0}) is None
    assert collapse_warning({"loss": 1.0}) is None


# Learning from it.


def test_own_and_data_rows_have_one_normaliser(tmp_path: Path) -> None:
    model, teacher = student(), make_llama(seed=1)
    (batch,) = rollout(0.5)([make_batch()], model, step=0)
    assert own_rows(batch).tolist() == [True, True, False, False]
    output = Distiller(model, teacher, [Logits(ReverseKL()), Labels(weight=0.5)]).step(batch)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    q, p = model(**inputs).logits[:, :-1], teacher(**inputs).logits[:, :-1]
    counts = batch["labels"][:, 1:] != -100
    own = own_rows(batch)[:, None].expand_as(counts)[counts]
    kl = token_divergence(q[counts], DenseTargets(p[counts]), ReverseKL())
    entropy = torch.nn.functional.cross_entropy(q[counts], batch["labels"][:, 1:][counts], reduction="none")
    expected = kl.mean() + 0.5 * (entropy * ~own).mean()  # what the student wrote is no truth
    torch.testing.assert_close(output.loss, expected)
    torch.testing.assert_close(output.logs["logits_own"] / output.logs["own_tokens"], kl[own].mean().detach())
    torch.testing.assert_close(output.logs["logits_data"] / output.logs["data_tokens"], kl[~own].mean().detach())


def test_a_term_for_each_kind_of_text_is_distillm_2() -> None:
    model, teacher = student(), make_llama(seed=1)
    (batch,) = rollout(0.5)([make_batch()], model, step=0)
    terms = [
        Logits(SkewForwardKL(0.1), weight=0.8, text="data"),
        Logits(SkewReverseKL(0.1), weight=1.2, text="own"),
    ]
    loss = Distiller(model, teacher, terms).step(batch).loss
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    q, p = model(**inputs).logits[:, :-1], teacher(**inputs).logits[:, :-1]
    counts = batch["labels"][:, 1:] != -100
    own = own_rows(batch)[:, None].expand_as(counts)[counts]
    forward, reverse = (token_divergence(q[counts], DenseTargets(p[counts]), terms[i].divergence) for i in (0, 1))
    torch.testing.assert_close(loss, (0.8 * forward * ~own + 1.2 * reverse * own).mean())
    plain = Distiller(model, teacher, terms).step(make_batch())
    assert plain.logs["logits_1"] == 0  # data alone


def test_own_text_and_data_are_two_means_where_a_weight_is_given() -> None:
    batches, model, teacher = [make_batch(seed=5), make_batch(seed=6)], student(seed=1), student(seed=9)
    made = rollout(0.4, own_weight=0.3)(batches, model, step=0)
    assert any(own_rows(batch).any() for batch in made) and not all(own_rows(batch).all() for batch in made)
    values: dict[bool, list[torch.Tensor]] = {True: [], False: []}
    for batch in made:  # JSD with beta 0.5, from whole distributions
        p, q = (
            m(batch["input_ids"], batch["attention_mask"]).logits[:, :-1].double().softmax(-1) for m in (teacher, model)
        )
        m = (p + q) / 2
        jsd = ((p * (p / m).log() + q * (q / m).log()) / 2).sum(-1)
        target, own = batch["labels"][:, 1:] != -100, ~batch[STUDENT_LOG_PROBS][:, 1:].isnan()
        for kind, found in values.items():
            found.append(jsd[target & (own == kind)])
    expected = sum(w * torch.cat(values[kind]).mean() for kind, w in ((True, 0.3), (False, 0.7)))
    distiller = Distiller(model, teacher, [Logits(JSD(0.5))])
    normalizer = sum(batch["weights"][:, 1:][batch["labels"][:, 1:] != -100].sum() for batch in made)
    outputs = [distiller.step(batch, normalizer=normalizer, last=batch is made[-1]) for batch in made]
    assert sum(output.loss.item() for output in outputs) == pytest.approx(expected.item(), rel=1e-4)
    for share in (0.0, 1.0):  # of one kind alone
        assert "weights" not in rollout(share, own_weight=0.3)(batches, model, step=0)[0]
    for wrong in (-1.0, 2.0):
        with pytest.raises(ShapeError, match=r"Rollout.own_weight: expected a number in \[0, 1\]"):
            rollout(0.4, own_weight=wrong)
    with pytest.raises(ShapeError, match="on_policy_fraction between 0 and 1 with own_weight, got samples alone"):
        RolloutConfig(on_policy_fraction=1.0, own_weight=0.3)


def on_policy(folder: Path, one: Rollout | None = None, **changes: Any) -> DistillationTrainer:
    objective = [Logits(ReverseKL()), Labels(weight=0.1)]
    return trainer(folder, **{"objective": objective, "rollout": one or rollout(0.7), **changes})


def test_accumulation_equals_one_batch(tmp_path: Path) -> None:
    whole = on_policy(tmp_path / "a")
    built = on_policy(tmp_path / "b", per_device_train_batch_size=2, gradient_accumulation_steps=4)
    whole.train()
    built.train()
    assert losses(built) == pytest.approx(losses(whole), rel=1e-4)
    torch.testing.assert_close(weights(built), weights(whole), rtol=1e-4, atol=1e-5)


def test_what_is_logged(tmp_path: Path) -> None:
    one = on_policy(tmp_path, logging_steps=3)
    one.train()
    (line,) = [line for line in one.state.log_history if "loss" in line]
    assert line["loss"] == pytest.approx(line["logits"] + 0.1 * line["labels"], rel=1e-4)
    assert 0.5 < line["own_share"] < 0.9
    assert 1 <= line["own_length"] <= 6
    assert {"own_ended", "own_repetition", "own_entropy", "own_age", "logits_own", "logits_data"} <= set(line)
    assert (
        min(line["logits_own"], line["logits_data"]) <= line["logits"] <= max(line["logits_own"], line["logits_data"])
    )
    assert "own_tokens" not in line
    assert "eval_own_length" not in one.evaluate()


def stopped_and_resumed(folder: Path, make: Any) -> tuple[DistillationTrainer, DistillationTrainer]:
    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = state.global_step == 5

    arguments = {"max_steps": 7, "save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 4}
    whole = make(folder / "a", **arguments)
    whole.train()
    stopped = make(folder / "b", **arguments)
    stopped.add_callback(Stop())
    stopped.train()
    resumed = make(folder / "b", **arguments)
    resumed.train(resume_from_checkpoint=True)
    return whole, resumed


def test_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    whole, resumed = stopped_and_resumed(tmp_path, on_policy)
    assert torch.equal(weights(resumed), weights(whole))


def test_a_checkpoint_of_other_ranks_is_refused(tmp_path: Path) -> None:
    one = on_policy(tmp_path, save_strategy="steps", save_steps=3)
    one.train()
    (tmp_path / "checkpoint-3" / "rollout-0.json").unlink()
    (tmp_path / "checkpoint-3" / CHECKSUMS).unlink()
    with pytest.raises(UserError, match=r"expected rollout-0\.json in .*checkpoint-3, got none"):
        on_policy(tmp_path).train(resume_from_checkpoint=True)


def test_replay_and_the_adapted_share_are_resumed(tmp_path: Path) -> None:
    def make(folder: Path, **arguments: Any) -> DistillationTrainer:
        adapt = Adapt(by=0.2)
        object.__setattr__(adapt, "margin", -9.0)  # so that every evaluation raises the share
        one = rollout(0.6, replay=Replay(size=9, fresh=0.5, age=3), adapt=adapt)
        return on_policy(folder, one, eval_strategy="steps", eval_steps=1, **arguments)

    whole, resumed = stopped_and_resumed(tmp_path, make)
    assert torch.equal(weights(resumed), weights(whole))
    assert whole.rollout is not None
    assert whole.rollout.share_at(0) == 1.0  # raised at each evaluation but the first
    assert any(line["own_age"] > 0 for line in whole.state.log_history if "own_age" in line)


def test_replay_bounds_size_and_age(tmp_path: Path) -> None:
    one = rollout(1.0, replay=Replay(size=6, fresh=0.5, age=1))
    for step in range(4):
        (made,) = one([make_batch()], student(), step=step)
        assert own_rows(made).all()
        assert len(one.latest) == (4 if step == 0 else 2)
    one.stats = type(one.stats)()
    one([make_batch()], student(), step=9)
    assert taken(one)["own_age"] == 0  # all that is kept is too old
    one.save(tmp_path, 0)
    assert len(json.loads((tmp_path / "rollout-0.json").read_text())["kept"]) == 6


def test_the_share_is_raised_when_held_out_text_gets_worse() -> None:
    one = rollout(0.0, adapt=Adapt(by=0.25, margin=0.1))
    seen = []
    for loss in (2.0, 1.5, 1.55, 1.7, 3.0, 4.0, 5.0, 6.0, 7.0):
        one.update(loss)
        seen.append(one.share_at(0))
    assert seen == [0, 0, 0, 0.25, 0.5, 0.75, 1, 1, 1]
    with pytest.raises(ShapeError, match="expected a number as the share that adapts"):
        rollout(linear(0.0, 1.0, 5), adapt=Adapt())


def test_a_teacher_with_its_own_prompt_reads_own_text_behind_it() -> None:
    rows = [
        {"input_ids": [5, 6, 7], "labels": [-100, -100, 7], "teacher_input_ids": [8, 9, 5, 6, 7],
         "teacher_labels": [-100, -100, -100, -100, 7]},
        {"input_ids": [5, 7], "labels": [-100, 7], "teacher_input_ids": [8, 5, 7], "teacher_labels": [-100, -100, 7]},
    ]  # fmt: skip
    one = rollout(replay=Replay(size=4, fresh=0.5))
    for step in range(3):  # texts that are used again bring their prompts
        (made,) = one([PaddingCollator(1)(rows)], student(), step=step)
        alignments = [causal_alignment(made[name]) for name in ("labels", "teacher_labels")]
        assert torch.equal(alignments[0].labels, alignments[1].labels)
        for i in range(2):
            student_targets, teacher_targets = (
                made[name][i][made[name][i] != -100] for name in ("labels", "teacher_labels")
            )
            assert torch.equal(student_targets, teacher_targets)
            short = made["input_ids"][i, 0] == 5 and made["input_ids"][i, 1] != 6
            assert made["teacher_input_ids"][i, :2].tolist() == ([8, 5] if short else [8, 9])
    (tight,) = rollout(limit=4)([PaddingCollator(1)(rows)], student(), step=0)
    assert own_rows(tight).tolist() == [False, True]  # the teacher's prompt fills it
    weighed = [{**row, "weights": [0.5] * len(row["input_ids"])} for row in rows]
    batch = PaddingCollator(1)(weighed) | {"weights": torch.full((2, 3), 0.5)}
    assert unpadded_rows(batch)[1]["weights"] == [0.5, 0.5]
    assert example(one.latest[0], unpadded_rows(batch)[0])["weights"] == [1.0] * len(one.latest[0].ids)


# Teachers that read along.


def test_a_teacher_has_its_share_of_what_is_written() -> None:
    q, p = torch.tensor([[0.7, 0.2, 0.1]]), torch.tensor([[0.1, 0.3, 0.6]])
    mixed = teacher_mix(make_llama(), 0.25).blend(q, p)
    torch.testing.assert_close(mixed, 0.75 * q + 0.25 * p)
    redrawn = teacher_top_k(make_llama(), 2).blend(q, p)
    torch.testing.assert_close(redrawn, torch.tensor([[0.07, 0.2 + 0.21, 0.1 + 0.42]]))
    torch.testing.assert_close(teacher_top_k(make_llama(), 9).blend(q, p), q)  # nothing is outside
    (made,) = rollout(guide=teacher_mix(make_llama(seed=1), 0.5))([make_batch()], student(), step=0)
    own = ~made[STUDENT_LOG_PROBS].isnan()
    assert not torch.allclose(made[STUDENT_LOG_PROBS][own], made[SAMPLER_LOG_PROBS][own])


def test_a_padded_head_never_writes_padding() -> None:
    wide = student(vocab_size=320)
    wide.lm_head.bias = torch.nn.Parameter(torch.cat([torch.zeros(300), torch.full((20,), 99.0)]))
    (made,) = rollout(vocabulary=300)([make_batch()], wide, step=0)
    assert int(made["input_ids"].max()) < 300


def test_forward_kl_on_own_text_needs_no_other_code(tmp_path: Path) -> None:
    one = on_policy(tmp_path, objective=[Logits(ForwardKL(), temperature=2.0)], max_steps=12)
    one.train()
    assert losses(one)[-1] < losses(one)[0]


# Recipes.


def on_policy_recipe(values: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {
        **values,
        "objective": [{"term": "logits", "divergence": "reverse_kl"}, {"term": "labels", "weight": 0.1}],
        "rollout": {"on_policy_fraction": 0.5, "max_new_tokens": 8, "prompt_tokens": 4},
        "evaluate": {"continuations": 1},
        **changes,
    }


def test_a_recipe_learns_from_its_students_own_text(recipe_values: dict[str, Any]) -> None:
    built = [
        {"replay": {"size": 20, "age": 4}, "teacher_mix": 0.2, "own_weight": 0.3},
        {"adapt": {}, "teacher_top_k": 5},
    ]
    for i, part in enumerate(built):
        values = on_policy_recipe(recipe_values, output=f"{recipe_values['output']}{i}")
        values["rollout"] |= part
        directory = run(Recipe.parse(values), console=Console(quiet=True)).directory
        lines = [line for line in logged_lines(directory / "metrics.jsonl") if "own_share" in line]
        assert len(lines) == 6
        texts = logged_lines(directory / "own_texts.jsonl")
        assert {text["step"] for text in texts} <= {1, 2, 3, 4, 5, 6}
        page = (directory / "report.html").read_text()
        assert "Samples during training" in page
        assert "tokens per sample" in page
        summary = json.loads((directory / "summary.json").read_text())
        assert [text["step"] for text in summary["own_texts"]] == sorted(text["step"] for text in summary["own_texts"])


def test_the_report_has_a_note_on_a_collapse() -> None:
    lines = [{"step": i, "own_share": 1.0, "own_repetition": r} for i, r in enumerate((0.1, 0.9, 0.95))]
    (note,) = collapse_notes(lines)
    assert note.startswith("From step 1 to the end: rollout: expected varied on-policy samples, got 95%")
    (note,) = collapse_notes([*lines, {"step": 3, "own_share": 1.0, "own_repetition": 0.2}])
    assert note.startswith("From step 1 to step 2:")
    assert collapse_notes(lines[:1]) == []


def test_sampled_tokens_are_enough_of_a_teacher_behind_a_server(recipe_values: dict[str, Any], toys: Path) -> None:
    server = ToyServer(make_llama(seed=1), make_tokenizer())
    try:
        values = on_policy_recipe(
            recipe_values,
            teacher={"server": {"url": server.url, "model": "toy", "top_k": 1}},
            student={"model": str(toys / "student")},
            objective=[{"term": "policy"}],
        )
        directory = run(Recipe.parse(values), console=Console(quiet=True)).directory
        assert all("policy" in line for line in logged_lines(directory / "metrics.jsonl") if "own_share" in line)
    finally:
        server.close()


def test_minillm_is_a_term_with_switches(recipe_values: dict[str, Any]) -> None:
    off = {"length_normalization": False, "whiten": False, "clip": None, "single_step": False, "importance": False}
    values = on_policy_recipe(recipe_values, objective=[{"term": "minillm"}, {"term": "minillm", **off}])
    whole, bare = build_run(Recipe.parse(values)).objective.terms
    assert whole == MiniLLM(1.0, 1.0, True, True, True, 0.2, True)
    assert bare == MiniLLM(1.0, 1.0, False, False, False, None, False)


def test_impossible_rollouts_are_refused_at_once(recipe_values: dict[str, Any]) -> None:
    values = on_policy_recipe(recipe_values, teacher={"cache": "somewhere"})
    values["rollout"] |= {"teacher_mix": 0.2}
    with pytest.raises(RecipeError) as caught:
        Recipe.parse(values)
    assert "2 mistakes" in str(caught.value)
    assert "teacher: expected a teacher that can score samples, got a cache alone" in str(caught.value)
    assert "rollout: expected a teacher that is a local model for teacher_mix" in str(caught.value)
    own = on_policy_recipe(recipe_values, objective=[{"term": "logits", "text": "own"}], rollout=None)
    with pytest.raises(RecipeError, match=r"objective\.0: expected a rollout for a term on on-policy samples"):
        Recipe.parse(own)
    for wrong, message in [
        ({"teacher_mix": 0.2, "teacher_top_k": 3}, "rollout: expected teacher_mix or teacher_top_k, got both"),
        ({"adapt": {}, "on_policy_fraction": {"schedule": "linear", "start": 0, "end": 1}}, "got a schedule"),
        ({"on_policy_fraction": 1.5}, r"rollout.on_policy_fraction: expected a number in \[0, 1\], got 1.5"),
        ({"max_new_tokens": 0}, "rollout.max_new_tokens"),
        ({"on_policy": 1}, "unknown key. Did you mean on_policy_fraction"),
    ]:
        values = on_policy_recipe(recipe_values)
        values["rollout"] |= wrong
        with pytest.raises(RecipeError, match=message):
            Recipe.parse(values)


def test_prompts_are_looked_at_before_anything_is_trained(recipe_values: dict[str, Any]) -> None:
    values = on_policy_recipe(recipe_values)
    values["rollout"]["max_new_tokens"] = 61
    assert any(
        "prompts leave less room than max_new_tokens 61 within 64" in n for n in build_run(Recipe.parse(values)).notes
    )
    assert check(Recipe.parse(values)).seconds > 0


def test_a_cache_serves_the_data_and_the_model_the_rest(recipe_values: dict[str, Any], tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    source = ["--data", recipe_values["data"]["train"]["path"], "--max-length", "32", "--packing"]
    build = ["cache", "build", "--teacher", recipe_values["teacher"]["model"], *source, "--codec", "dense"]
    done = CliRunner().invoke(app, [*build, "--out", str(cache)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    both = {"model": recipe_values["teacher"]["model"], "cache": str(cache)}
    built = build_run(Recipe.parse(on_policy_recipe(recipe_values, teacher=both)))
    teacher, one = built.teacher, built.new_rollout()
    assert isinstance(teacher, CachedOrLiveTeacher)
    assert one is not None
    batches = [PaddingCollator(1)([built.train.dataset[i] for i in range(start, start + 2)]) for start in (0, 2)]
    made = one(batches, built.new_student(), step=0)
    held = [teacher.cached.holds(batch, causal_alignment(batch["labels"])) for batch in made]
    assert held == [False, True]
    for batch in made:
        alignment = causal_alignment(batch["labels"])
        actual, live = (scorer(batch, alignment).targets.dense() for scorer in (teacher, teacher.live))
        torch.testing.assert_close(actual.float().log_softmax(-1), live.log_softmax(-1), atol=1e-2, rtol=1e-2)


TWO_RANKS = """
import os, sys, torch
from pathlib import Path
sys.path.insert(0, {tests!r})
from processes import shard_on_cpu
from test_rollout import losses, on_policy
shard_on_cpu()
sharded = {{"fsdp": True, "fsdp_config": {{"fsdp_version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}}}}
one = on_policy(Path({folder!r}), per_device_train_batch_size=4, **(sharded if {fsdp} else {{}}))
one.train()
if one.is_world_process_zero():
    lines = [line["own_length"] for line in one.state.log_history if "own_length" in line]
    torch.save({{"losses": losses(one), "lengths": lines}}, {out!r})
torch.distributed.barrier()
os._exit(0)  # gloo's threads now and then crash a process that destroys its group or ends as usual
"""


@pytest.mark.slow
def test_a_sharded_student_writes_what_a_whole_one_does(tmp_path: Path) -> None:
    found = []
    for fsdp in (False, True):
        script, out = tmp_path / f"{fsdp}.py", tmp_path / f"{fsdp}.pt"
        tests = str(Path(__file__).parent)
        script.write_text(TWO_RANKS.format(tests=tests, folder=str(tmp_path / f"{fsdp}"), out=str(out), fsdp=fsdp))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        found.append(torch.load(out, weights_only=True))
    assert found[0]["losses"] == pytest.approx(found[1]["losses"], rel=1e-4)
    assert found[0]["lengths"] == found[1]["lengths"]
