"""Students that teach themselves: an average of their weights, their base, a longer prompt, their own last layer."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, TrainerCallback

from conftest import make_batch, make_llama
from potstill.data.batches import PaddingCollator
from potstill.errors import DataError, ModelError, ShapeError, UserError
from potstill.losses.alignment import causal_alignment
from potstill.losses.divergences import JSD, ForwardKL, ReverseKL
from potstill.losses.schedule import linear
from potstill.losses.targets import DenseTargets, HeadTargets
from potstill.losses.token_losses import token_divergence
from potstill.teachers.model import ModelTeacher
from potstill.teachers.privileged import PrivilegedTeacher
from potstill.teachers.self_taught import BaseModelTeacher, EMATeacher
from potstill.teachers.teacher import Teacher
from potstill.train.distiller import Distiller
from potstill.train.terms.layers import Hidden
from potstill.train.terms.logits import Labels, Logits
from potstill.train.terms.supervision import DeepSupervision
from test_trainer import dataset, losses, trainer, weights

# peft asks transformers for something by an old name.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


class Stop(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step == self.step


def lora(student: Any = None, **changes: Any) -> Any:
    torch.manual_seed(3)
    options = {"r": 2, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False, "lora_dropout": 0.3}
    return get_peft_model(student or make_llama(hidden_size=8), LoraConfig(**(options | changes)))


# The average of the student's weights.


@pytest.mark.parametrize("warmup", [0, 3])
def test_the_average_is_its_formula(tmp_path: Path, warmup: int) -> None:
    teacher = EMATeacher(0.9, warmup)
    one = trainer(tmp_path, teacher=teacher, max_steps=6)
    seen = [weights(one).double()]

    class Watch(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen.append(weights(one).double())

    one.add_callback(Watch())
    one.train()
    expected = seen[0]
    for step in range(1, 7):
        decay = min(0.9, 1 - 1 / step) if step <= warmup else 0.9
        expected = decay * expected + (1 - decay) * seen[step]
    if warmup == 3:
        assert 1 - 1 / 3 < 0.9  # the first three are a plain mean
        mean = sum(seen[1:4]) / 3
        for step in range(4, 7):
            mean = 0.9 * mean + 0.1 * seen[step]
        torch.testing.assert_close(expected, mean)
    found = torch.cat([p.flatten() for p in teacher.model.parameters()]).double()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert not torch.equal(found, weights(one).double())


def test_the_student_learns_from_its_average_and_not_the_average_from_it() -> None:
    student, batch = make_llama(hidden_size=8), make_batch()
    distiller = Distiller(student, EMATeacher(0.5), [Logits(ForwardKL()), Labels(), Hidden()])
    optimizer = torch.optim.SGD(distiller.parameters(), lr=0.5)
    first = distiller.step(batch)
    assert first.logs["logits"] == pytest.approx(0, abs=1e-6)  # it begins as the student
    first.loss.backward()
    optimizer.step()
    assert distiller.step(batch).logs["logits"] > 1e-4
    assert isinstance(distiller.teacher, EMATeacher)
    assert all(p.grad is None and not p.requires_grad for p in distiller.teacher.model.parameters())
    assert all(name.startswith(("student.", "objective.")) for name in distiller.state_dict())


def test_the_average_is_resumed_bit_for_bit(tmp_path: Path) -> None:
    def new(folder: str) -> tuple[Any, EMATeacher]:
        teacher = EMATeacher(0.8, warmup_steps=2)
        arguments: dict[str, Any] = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2}
        return trainer(tmp_path / folder, teacher=teacher, per_device_train_batch_size=4, **arguments), teacher

    straight, one = new("straight")
    straight.train()
    stopped, _ = new("stopped")
    stopped.add_callback(Stop(5))
    stopped.train()
    resumed, other = new("stopped")
    resumed.train(resume_from_checkpoint=True)
    assert torch.equal(weights(straight), weights(resumed))
    assert one.state_dict().keys() == other.state_dict().keys()
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in one.state_dict().items())
    AutoModelForCausalLM.from_pretrained(tmp_path / "stopped" / "checkpoint-6")  # the student alone
    (tmp_path / "stopped" / "checkpoint-6" / "teacher.safetensors").unlink()
    with pytest.raises(UserError, match=r"expected teacher.safetensors in .*checkpoint-6"):
        new("stopped")[0].train(resume_from_checkpoint=True)


def test_beside_an_adapter_only_the_adapter_is_there_twice(tmp_path: Path) -> None:
    student, teacher = lora(), EMATeacher(0.5)
    one = trainer(tmp_path, student=student, teacher=teacher)
    student_parameters, teacher_parameters = dict(student.named_parameters()), dict(teacher.model.named_parameters())
    for name, p in student_parameters.items():
        assert (teacher_parameters[name] is p) == (not p.requires_grad)
    assert set(teacher.state_dict()) == {name for name in student_parameters if "lora" in name}
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    one.train()
    assert any(not torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert losses(one)[0] > 0


def test_an_average_of_half_precision_keeps_small_steps() -> None:
    student, teacher = make_llama(hidden_size=8).bfloat16(), EMATeacher(0.999)
    teacher.attach(student)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    with torch.no_grad():
        for p in student.parameters():
            p.add_(0.5)
    for step in range(1, 4):
        teacher.after_step(step)
    assert all((value - before[name]).min() > 1e-3 for name, value in teacher.state_dict().items())
    assert all(p.dtype == torch.bfloat16 for p in teacher.model.parameters())


def test_accumulated_batches_are_one_step_of_schedules_and_averages() -> None:
    """In a loop of one's own, and with the gradient of one large batch."""
    ids = torch.randint(20, 300, (8, 12), generator=torch.Generator().manual_seed(0))
    whole = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    parts = [{name: value[i : i + 2] for name, value in whole.items()} for i in range(0, 8, 2)]

    def trained(batches: list[dict[str, torch.Tensor]]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        student, teacher = make_llama(hidden_size=8), EMATeacher(0.5)
        terms = [Logits(ForwardKL(), weight=linear(start=1.0, end=0.0, steps=3)), Labels(weight=0.5)]
        distiller = Distiller(student, teacher, terms).train()
        optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
        for _ in range(3):
            for batch in batches:
                last = batch is batches[-1]
                distiller.step(batch, normalizer=8 * 11, last=last).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        distiller.step(batches[0])
        return [*student.parameters()], [*teacher.state_dict().values()]

    for once, accumulated in zip(trained([whole]), trained(parts), strict=True):
        for one, other in zip(once, accumulated, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_averages_that_cannot_be() -> None:
    for wrong in (1.0, -0.1):
        with pytest.raises(ShapeError, match=r"decay: expected a number in \[0, 1\)"):
            EMATeacher(wrong)
    with pytest.raises(ShapeError, match="warmup_steps"):
        EMATeacher(warmup_steps=-1)
    with pytest.raises(ShapeError, match="decay: expected a number, got a LlamaForCausalLM"):
        EMATeacher(make_llama())
    batch = make_batch()
    for alone in (EMATeacher(), BaseModelTeacher()):
        with pytest.raises(ModelError, match="expected a student, got none yet"):
            alone(batch, causal_alignment(batch["labels"]))
    with pytest.raises(ModelError, match="weights that are trained"):
        EMATeacher().attach(make_llama().requires_grad_(False))


# The base of a student with an adapter.


def test_the_base_teaches_without_a_second_copy(tmp_path: Path) -> None:
    base, batch = make_llama(hidden_size=8), make_batch()
    student = lora(copy.deepcopy(base))
    found = Distiller(student, BaseModelTeacher(), [Logits(JSD()), Labels()])
    beside = Distiller(copy.deepcopy(student), base, [Logits(JSD()), Labels()])
    outputs = []
    for one in (found, beside):
        torch.manual_seed(0)
        outputs.append(one.step(batch))  # with dropout in the student's adapter, and none in the teacher
        outputs[-1].loss.backward()
    assert outputs[0].loss == outputs[1].loss and outputs[0].logs["logits"] > 1e-3
    for actual, expected in zip(found.student.parameters(), beside.student.parameters(), strict=True):
        assert actual.requires_grad == expected.requires_grad
        assert (actual.grad is None and expected.grad is None) or torch.equal(actual.grad, expected.grad)
    one = trainer(tmp_path, student=student, teacher=BaseModelTeacher())
    one.train()
    trained = {name for name, p in one.distiller.named_parameters() if p.requires_grad}
    assert trained and all("lora" in name for name in trained)
    for name, value in base.state_dict().items():
        kept = student.get_base_model().state_dict()
        assert torch.equal(value, kept.get(name, kept.get(name.replace(".weight", ".base_layer.weight"))))


def test_the_targets_of_the_base_model_do_not_change(tmp_path: Path) -> None:
    base, batch = make_llama(hidden_size=8), make_batch()
    alignment = causal_alignment(batch["labels"])
    for student in (
        lora(copy.deepcopy(base)),
        lora(copy.deepcopy(base), target_modules=["q_proj", "lm_head"]),
        lora(copy.deepcopy(base), modules_to_save=["lm_head"]),
        get_peft_model(copy.deepcopy(base), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)),
    ):
        teacher = BaseModelTeacher()
        teacher.attach(student.train())
        with torch.no_grad():
            for p in student.parameters():
                if p.requires_grad:
                    p.add_(0.1)
        targets = teacher(batch, alignment).targets
        assert isinstance(targets, HeadTargets | DenseTargets)
        torch.testing.assert_close(targets.dense(), ModelTeacher(base)(batch, alignment).targets.dense())
        assert student.training
    hidden = Distiller(lora(copy.deepcopy(base)), BaseModelTeacher(), [Hidden()])
    assert hidden.step(batch).logs["hidden"] > 0


def test_the_frozen_part_of_an_adapter_stays_frozen() -> None:
    student, teacher, batch = lora(), BaseModelTeacher(), make_batch()
    frozen = [name for name, p in student.named_parameters() if "lora_A" in name and not p.requires_grad_(False).grad]
    teacher.attach(student)
    teacher(batch, causal_alignment(batch["labels"]))
    assert frozen and not any(p.requires_grad for name, p in student.named_parameters() if name in frozen)


def test_a_student_without_an_adapter_has_no_base() -> None:
    with pytest.raises(ModelError, match=r"expected a student with an adapter .* got a LlamaForCausalLM"):
        Distiller(make_llama(), BaseModelTeacher(), [Logits(ForwardKL())])


# A prompt of the teacher's own.


def informed_rows() -> list[dict[str, list[int]]]:
    """The rows of `dataset`, with a longer prompt for the teacher."""
    rows = []
    for i, row in enumerate(dataset(6)):
        hint, answer = [20 + i] * (1 + i % 3), row["input_ids"][1:]
        own = {"teacher_input_ids": [*hint, *row["input_ids"]], "teacher_labels": [-100] * (len(hint) + 1) + answer}
        rows.append(row | own)
    return rows


@pytest.mark.parametrize("kind", ["model", "ema", "adapter off"])
def test_the_teacher_reads_its_own_prompt(kind: str) -> None:
    rows = informed_rows()
    batch = PaddingCollator(1)(rows)
    student = lora() if kind == "adapter off" else make_llama(hidden_size=8)
    reader: Teacher = {
        "model": lambda: ModelTeacher(make_llama(seed=1)),
        "ema": EMATeacher,
        "adapter off": BaseModelTeacher,
    }[kind]()
    distiller = Distiller(student, PrivilegedTeacher(reader), [Logits(ReverseKL())]).eval()
    found = distiller.step(batch).logs["logits"]
    model = make_llama(seed=1) if kind == "model" else student
    apart = []
    for row in rows:  # one by one, without padding
        q = student(torch.tensor([row["input_ids"]])).logits[0, :-1]
        ids = torch.tensor([row["teacher_input_ids"]])
        if kind == "adapter off":
            with student.disable_adapter():
                p = model(ids).logits[0, -len(q) - 1 : -1]
        else:
            p = model(ids).logits[0, -len(q) - 1 : -1]
        apart.append(token_divergence(q, DenseTargets(p), ReverseKL()))
    torch.testing.assert_close(found, torch.cat(apart).mean().detach())


def test_other_answers_behind_the_prompts_are_refused() -> None:
    teacher = PrivilegedTeacher(ModelTeacher(make_llama(seed=1)))
    rows = informed_rows()
    batch = PaddingCollator(1)(rows)
    alignment = causal_alignment(batch["labels"])
    for column, wrong in (("teacher_labels", 5), ("teacher_labels", -100)):
        other = batch | {column: batch[column].clone()}
        other[column][0, -1 - int((batch["teacher_labels"][0].flip(0) == -100).long().argmin())] = wrong
        with pytest.raises(DataError, match=r"expected the student's .* answer tokens"):
            teacher(other, alignment)
    plain = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
    with pytest.raises(DataError, match="Name the column of the teacher's prompts"):
        teacher(plain, alignment)
    assert teacher.covers(rows) and not teacher.covers(dataset(2))
    with pytest.raises(DataError, match="rows with a prompt for the teacher"):
        teacher.require(dataset(2))
    with pytest.raises(ModelError, match="got one with targets alone"):
        Distiller(make_llama(), teacher, [Hidden()])


# The student's own last layer.


def test_deep_supervision_is_its_formula() -> None:
    student, batch = make_llama(hidden_size=8, layers=3), make_batch()
    output = Distiller(student, None, [DeepSupervision([0, -2], JSD(), weight=0.5, temperature=2.0), Labels()]).step(
        batch
    )
    output.loss.backward()
    found = [p.grad.clone() for p in student.parameters()]
    student.zero_grad()
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    outputs = student(**inputs, output_hidden_states=True)
    alignment = causal_alignment(batch["labels"])
    final = alignment.select(outputs.logits)
    apart = [
        token_divergence(
            student.lm_head(student.model.norm(alignment.select(outputs.hidden_states[layer + 1]))),
            DenseTargets(final.detach()),
            JSD(),
            temperature=2.0,
        ).mean()
        for layer in (0, 1)
    ]
    term = 4 * (apart[0] + apart[1]) / 2
    torch.testing.assert_close(output.logs["deep_supervision"], term.detach())
    (0.5 * term + torch.nn.functional.cross_entropy(final, alignment.labels)).backward()
    for actual, p in zip(found, student.parameters(), strict=True):
        torch.testing.assert_close(actual, p.grad)


def test_deep_supervision_counts_tokens_by_their_weights() -> None:
    student, batch = make_llama(hidden_size=8, layers=2), make_batch()
    weights = torch.rand(batch["labels"].shape, generator=torch.Generator().manual_seed(3))
    output = Distiller(student, None, [DeepSupervision([0])]).step({**batch, "weights": weights})
    alignment = causal_alignment(batch["labels"])
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    outputs = student(**inputs, output_hidden_states=True)
    early = student.lm_head(student.model.norm(alignment.select(outputs.hidden_states[1])))
    apart = token_divergence(early, DenseTargets(alignment.select(outputs.logits)), ForwardKL())
    of_labels = weights[:, 1:][batch["labels"][:, 1:] != -100]
    torch.testing.assert_close(output.loss, (apart * of_labels).sum() / of_labels.sum())


def test_deep_supervision_beside_a_teacher_and_in_the_trainer(tmp_path: Path) -> None:
    terms = [Logits(ForwardKL()), DeepSupervision([0], weight=linear(0.0, 1.0, 3))]
    whole, parts = (
        trainer(
            tmp_path / name,
            terms,
            student=make_llama(hidden_size=8, layers=2),
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=8 // rows,
        )
        for name, rows in (("a", 8), ("b", 2))
    )
    whole.train()
    parts.train()
    assert losses(parts) == pytest.approx(losses(whole), rel=1e-5)
    alone = trainer(tmp_path / "c", [Labels(), DeepSupervision([0])], None, make_llama(hidden_size=8, layers=2))
    alone.train()
    assert alone.evaluate()["eval_deep_supervision"] > 0


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "neox"])
def test_other_families_are_read_through_their_own_norm(family: str) -> None:
    from transformers import (
        Gemma2Config,
        Gemma2ForCausalLM,
        GPT2Config,
        GPT2LMHeadModel,
        GPTNeoXConfig,
        GPTNeoXForCausalLM,
    )

    torch.manual_seed(0)
    small = {"vocab_size": 300, "num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 2}
    student = {
        "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=16, n_layer=2, n_head=2)),
        "gemma2": lambda: Gemma2ForCausalLM(
            Gemma2Config(**small, intermediate_size=32, head_dim=8, num_key_value_heads=1)
        ),
        "neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**small, intermediate_size=32)),
    }[family]()
    distiller = Distiller(student, None, [DeepSupervision([0])])
    name = {"gpt2": "transformer.ln_f", "gemma2": "model.norm", "neox": "gpt_neox.final_layer_norm"}[family]
    assert distiller._capture._final_norm == name
    assert distiller.step(make_batch()).loss > 0


def test_deep_supervision_that_cannot_be() -> None:
    with pytest.raises(ShapeError, match=r"DeepSupervision.layers: expected at least one"):
        DeepSupervision([])
    for layer, message in ((1, "layers before the last, got 1 too"), (2, "2 layers")):
        with pytest.raises(ShapeError, match=message):
            Distiller(make_llama(), None, [DeepSupervision([layer])])
    with pytest.raises(ModelError, match="plain head"):
        Distiller(lora(target_modules=["lm_head"]), None, [DeepSupervision([0])])
