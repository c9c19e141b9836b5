"""potstill evaluate: every figure against a loop, the command, and its errors."""

from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from conftest import TEXT, make_batch, make_llama, make_tokenizer
from potstill.cli import app
from potstill.data.batches import encode
from potstill.data.sources import Source
from potstill.errors import UserError
from potstill.evaluate import generations
from potstill.evaluate.formatting import times
from potstill.evaluate.generations import continuations, text_quality
from potstill.evaluate.harness import Harness, TimeLimitError, harness_scores
from potstill.evaluate.held_out import text_bytes
from potstill.evaluate.quality import compare
from potstill.evaluate.speed import extra_bytes, speed
from potstill.evaluate.time_limit import TimeLimit
from potstill.models.adapted import save_adapter
from potstill.models.adapters import Lora, adapt
from potstill.models.loading import load_model
from potstill.runs.evaluate import EvaluationOptions
from potstill.runs.evaluate import evaluate as measure
from potstill.runs.finished_parts import fingerprint
from reference_across import byte_level


def test_agreement_divergence_and_calibration_are_what_loops_find() -> None:
    teacher, student = make_llama(seed=1), make_llama(hidden_size=8)
    batch = make_batch(5, 12, seed=3)
    found = compare(teacher, {"student": student}, [batch])["student"]
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        q = student.eval()(**inputs).logits.double().softmax(-1)
        p = teacher.eval()(**inputs).logits.double().softmax(-1)
    js, shared, bins = [], [], [[0.0, 0.0, 0] for _ in range(15)]
    for row in range(5):
        for t in range(11):
            label = int(batch["labels"][row, t + 1])
            if label == -100:
                continue
            a, b = p[row, t].tolist(), q[row, t].tolist()
            halves = [
                x * math.log(x / ((x + y) / 2)) / 2 + y * math.log(y / ((x + y) / 2)) / 2
                for x, y in zip(a, b, strict=True)
            ]
            js.append(sum(halves))
            tops = [{i for i, _ in sorted(enumerate(each), key=lambda pair: -pair[1])[:10]} for each in (a, b)]
            shared.append(len(tops[0] & tops[1]) / 10)
            confidence = max(b)
            one = bins[min(int(confidence * 15), 14)]
            one[0] += confidence
            one[1] += b.index(confidence) == label
            one[2] += 1
    assert found.js == pytest.approx(sum(js) / len(js), rel=1e-5)
    assert found.top_k_agreement == pytest.approx(sum(shared) / len(shared))
    ece = sum(count / len(js) * abs(right / count - sure / count) for sure, right, count in bins if count)
    assert found.ece == pytest.approx(ece, rel=1e-5)
    alone = compare(None, {"student": student}, [batch])["student"]
    assert alone.ece == found.ece
    assert alone.js is alone.top_k_agreement is None


def test_the_error_of_a_difference_is_that_of_a_mean_over_rows() -> None:
    models = {"student": make_llama(seed=1), "baseline": make_llama(seed=2)}
    batches = [make_batch(5, 12, seed=3), make_batch(7, 9, seed=4)]
    found = compare(None, models, batches)
    rows = []  # difference of the sums of losses, and tokens
    for batch in batches:
        for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
            labels, sums = labels[1:], []
            for model in models.values():
                with torch.no_grad():
                    logits = model.eval()(ids[None], attention_mask=mask[None]).logits[0, :-1].double()
                sums.append(float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum")))
            if tokens := int((labels != -100).sum()):
                rows.append((sums[1] - sums[0], tokens))
    total = sum(tokens for _, tokens in rows)
    mean = sum(difference for difference, _ in rows) / total
    rest = [difference - mean * tokens for difference, tokens in rows]
    expected = math.sqrt(len(rows) / (len(rows) - 1) * sum(x * x for x in rest)) / total
    assert found["baseline"].loss - found["student"].loss == pytest.approx(mean, rel=1e-4)
    assert found["baseline"].difference_errors == pytest.approx({"student": expected}, rel=1e-4)
    assert found["student"].difference_errors == pytest.approx({"baseline": expected}, rel=1e-4)
    one_row = {name: values[:1] for name, values in batches[0].items()}
    assert compare(None, models, [one_row])["student"].difference_errors == {}


def test_rouge_and_bleu_of_texts_that_are_known() -> None:
    same = text_quality(["the cat sat on the mat"], ["the cat sat on the mat"])
    assert (same.rouge1, same.rouge_l, round(same.bleu)) == (1.0, 1.0, 100)
    half = text_quality(["the cat"], ["the cat sat still"])
    assert half.rouge1 == pytest.approx(2 * (1.0 * 0.5) / 1.5)
    assert half.rouge2 == pytest.approx(2 * (1.0 * (1 / 3)) / (1 + 1 / 3))
    assert half.brevity_penalty == pytest.approx(math.exp(1 - 4 / 2))
    assert half.length_ratio == 0.5
    assert half.bleu_precisions[:2] == [100, 100]
    with pytest.raises(UserError, match="got none"):
        text_quality([], [])
    with pytest.raises(UserError, match="got none"):
        text_quality(["the cat"], [[]])
    for texts, got in (("the cat", "one text"), (["the cat", "a dog"], "2 and 1")):
        with pytest.raises(UserError, match=f"as many references, got {got}"):
            text_quality(texts, ["the cat"])


def test_of_several_references_the_nearest_counts() -> None:
    written = ["the cat sat on the mat", "a dog ran"]
    both = text_quality(written, [["no such words", "the cat sat on the mat"], "a dog ran"])
    assert both == text_quality(written, written)
    assert (both.rouge2, round(both.bleu), both.brevity_penalty) == (1.0, 100, 1.0)


def test_the_error_for_a_missing_library_has_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rouge_score", None)
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(UserError, match=r"pip install 'potstill\[generations\]'"):
        text_quality(["a"], ["a"])
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UserError, match=r"pip install 'potstill\[lm-eval\]'"):
        harness_scores(None, None, ["toy"])


def test_continuations_begin_where_the_prompt_ends(tokenizer) -> None:
    ids = tokenizer(TEXT[0])["input_ids"][:20]
    answer = [-100] * 6 + ids[6:]
    written, truths = continuations(make_llama(seed=1).eval(), tokenizer, [{"input_ids": ids, "labels": answer}], 5)
    assert truths == [tokenizer.decode(ids[6:11])]
    assert len(written) == 1
    _, halves = continuations(make_llama(seed=1).eval(), tokenizer, [{"input_ids": ids, "labels": ids}], 50)
    assert halves == [tokenizer.decode(ids[10:])]


def test_texts_keep_special_tokens_and_stop_at_the_end_of_a_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>", "<think>"]})
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
    ids = tokenizer("def f:<think>a</think>b<|im_end|>class<|im_end|>")["input_ids"]
    prompt, answer = len(tokenizer("def f:")["input_ids"]), len(tokenizer("<think>a</think>b<|im_end|>")["input_ids"])
    written = ids[prompt : prompt + answer]
    monkeypatch.setattr(generations, "continuation", lambda model, before, number, ends: written)
    for labels in (ids, [*ids[: prompt + answer], *[-100] * 5]):  # the end of the turn, or of its labels
        row = {"input_ids": ids, "labels": [*[-100] * prompt, *labels[prompt : len(ids)]]}
        texts, truths = continuations(make_llama(), tokenizer, [row], 50)
        assert texts == truths == ["<think>a</think>b"]


def test_the_bytes_of_a_text_are_its_own(toys: Path, tokenizer) -> None:
    examples = encode(Source(str(toys / "eval.jsonl")), tokenizer, max_length=200)
    first = {tokenizer.decode(row["input_ids"][:1]) for row in examples.dataset}
    assert first == {"d"} or all(len(text) >= 1 for text in first)
    heads = sum(len(tokenizer.decode(row["input_ids"][:1]).encode()) for row in examples.dataset)
    assert text_bytes(examples.dataset, tokenizer) == sum(len(text.encode()) for text in TEXT[40:]) - heads


def test_speed_of_batches() -> None:
    found = speed(make_llama(), rows=2, length=8, repeats=1)
    assert found.tokens_per_second == pytest.approx(1000 * 16 / found.latency_ms)
    assert found.first_token_ms > 0
    assert found.next_token_ms >= 0
    assert found.peak_bytes is None or found.peak_bytes >= make_llama().get_memory_footprint()


def test_memory_that_is_taken_is_seen() -> None:
    taken = extra_bytes(lambda: torch.ones(20_000_000).sum(), torch.device("cpu"))
    if taken is None:
        pytest.skip("this kernel does not count")
    assert 75e6 < taken < 120e6


@pytest.fixture
def task(tmp_path: Path) -> Path:
    """A local task of lm-eval: which of two endings is likelier?"""
    rows = [{"q": text[:20], "a": text[20:30], "b": "return"} for text in TEXT[40:46]]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "toy.yaml").write_text(
        "task: toy\ndataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {tmp_path / 'rows.jsonl'}}}}}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{q}}'\n"
        "doc_to_choice: ['{{a}}', '{{b}}']\ndoc_to_target: 0\ntarget_delimiter: ''\n"
        "metric_list:\n  - {metric: acc, aggregation: mean, higher_is_better: true}\n"
    )
    return tmp_path / "toy.yaml"


@pytest.mark.filterwarnings("ignore")  # lm-eval's own
def test_a_local_task_of_lm_eval_is_what_a_loop_finds(task: Path, tokenizer) -> None:
    model = make_llama(seed=1).eval()
    found = harness_scores(model, tokenizer, [str(task)])
    right = 0
    for line in (task.parent / "rows.jsonl").read_text().splitlines():
        row, scores = json.loads(line), []
        for ending in (row["a"], row["b"]):
            ids = tokenizer(row["q"] + ending)["input_ids"]
            start = len(tokenizer(row["q"])["input_ids"])
            with torch.no_grad():
                logs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            scores.append(sum(float(logs[t - 1, ids[t]]) for t in range(start, len(ids))))
        right += scores[0] > scores[1]
    assert found == {"toy": {"acc,none": pytest.approx(right / 6)}}
    with pytest.raises(UserError, match="which does not exist"):
        harness_scores(model, tokenizer, [str(task.with_name("other.yaml"))])
    text = task.read_text()
    for wrong in (text.replace("{{q}}", "{{question}}"), text.replace("rows.jsonl", "no-rows.jsonl")):
        task.write_text(wrong)
        with pytest.raises(UserError, match="expected a task whose first example lm-eval reads, got toy, with "):
            Harness([str(task)])


@pytest.mark.filterwarnings("ignore")
def test_lm_eval_is_silent_and_ends_with_its_time(
    task: Path, tokenizer, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    model, passes = make_llama(seed=1).eval(), list[int]()
    harness = Harness([str(task)])
    assert harness.scores(model, tokenizer, "toy", examples=2, on_pass=passes.append)["toy"]
    assert passes == [*range(4)]
    assert not caplog.records
    assert [*capfd.readouterr()] == ["", ""]
    with pytest.raises(TimeLimitError):
        harness.scores(model, tokenizer, "toy", limit=TimeLimit(0))
    assert not model._forward_pre_hooks


@pytest.mark.filterwarnings("ignore")
def test_a_time_limit_leaves_out_what_it_does_not_suffice_for(task: Path, toys: Path, tmp_path: Path) -> None:
    options = EvaluationOptions(generations=3, new_tokens=2, lm_eval=[str(task)], lengths=[8], time_limit=1e-6)
    kept, source = tmp_path / "kept.json", Source(toys / "eval.jsonl", field="text")
    teacher = str(toys / "teacher")
    found = measure(str(toys / "student"), teacher, source, max_length=16, options=options, finished=kept)
    data = found["data"]
    assert 0 < data["measured"] < data["rows"]
    notes = "\n".join(found["notes"])
    assert f"--time-limit: 0.0 s did not suffice: {data['measured']} of {data['rows']} rows were measured." in notes
    assert "1 of 3 rows were continued" in notes
    assert "lm-eval toy was not finished, and is left out. Lower --lm-eval-limit." in notes
    for figures in found["models"].values():
        assert figures["text"]["texts"] == 1
        assert "lm_eval" not in figures
    assert not kept.exists()


def test_finished_parts_are_kept_and_used_again(toys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise RuntimeError("killed")

    out, parts = tmp_path / "figures.json", tmp_path / "figures.json.parts"
    with monkeypatch.context() as patch:
        patch.setattr("potstill.runs.evaluate.speed", fail)
        assert str(evaluate(toys, out).exception) == "killed"
    quality = json.loads(parts.read_text())["parts"]["held-out rows"]
    with monkeypatch.context() as patch:
        patch.setattr("potstill.runs.evaluate.measure_rows", fail)
        assert str(evaluate(toys, out, "--max-length", "30").exception) == "killed"  # other rows: all is measured again
        done = evaluate(toys, out)
    assert done.exit_code == 0, (done.output, done.exception)
    assert json.loads(out.read_text())["models"]["student"]["quality"] == quality[0]["student"]
    assert not parts.exists()


def test_finished_parts_of_an_adapter_are_of_one_base(toys: Path, tmp_path: Path) -> None:
    shutil.copytree(toys / "student", tmp_path / "base")
    save_adapter(adapt(load_model(str(tmp_path / "base"), "student"), Lora(rank=2)), tmp_path / "adapter")
    before = fingerprint(str(tmp_path / "adapter"))
    make_llama(hidden_size=8, layers=1, seed=9).save_pretrained(tmp_path / "base")
    assert fingerprint(str(tmp_path / "adapter")) != before


def test_a_missing_library_is_found_before_anything_is_measured(
    toys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("potstill.runs.evaluate.load_model", None)  # nothing is loaded
    for module, options in (("lm_eval", ["--lm-eval", "piqa"]), ("rouge_score", ["--generations", "2"])):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(UserError, match="to be installed"):
            raise evaluate(toys, tmp_path / "figures.json", *options).exception or AssertionError


def evaluate(toys: Path, out: Path, *more: str) -> Any:
    common = [str(toys / "student"), "--data", str(toys / "eval.jsonl"), "--out", str(out), "--max-length", "32"]
    return CliRunner().invoke(app, ["evaluate", *common, "--batch-size", "1", "--length", "8", *more])


def test_the_command_measures_both(toys: Path, tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    done = evaluate(toys, out, "--teacher", str(toys / "teacher"), "--generations", "2", "--new-tokens", "4")
    assert done.exit_code == 0, (done.output, done.exception)
    found = json.loads(out.read_text())
    assert list(found["models"]) == ["teacher", "student"]
    student, data = found["models"]["student"], found["data"]
    assert found["models"]["teacher"]["quality"]["agreement"] == 1
    assert student["text"]["texts"] == 2
    expected = student["quality"]["loss"] * data["tokens"] / math.log(2) / data["bytes"]
    assert student["bits_per_byte"] == pytest.approx(expected)
    assert [(one["rows"], one["length"]) for one in student["speed"]] == [(1, 8)]
    assert "bits per byte" in done.output
    latency = [model["speed"][0]["latency_ms"] for model in found["models"].values()]
    line = next(line for line in done.output.splitlines() if "speed-up, 1 x 8" in line)
    assert line.split()[-2:] == ["1.0×", f"{times(latency[0] / latency[1])}×"]


def test_with_two_tokenizers_each_is_measured_in_its_own(toys: Path, tmp_path: Path) -> None:
    reader = byte_level(258)
    make_llama(seed=1, vocab_size=258).save_pretrained(tmp_path / "bytes")
    reader.save_pretrained(tmp_path / "bytes")
    done = evaluate(toys, tmp_path / "figures.json", "--teacher", str(tmp_path / "bytes"), "--generations", "1")
    assert done.exit_code == 0, (done.output, done.exception)
    assert "Bits per byte compare both" in " ".join(done.output.split())
    assert "agreement" not in done.output
    found = json.loads((tmp_path / "figures.json").read_text())["models"]
    assert list(found) == ["teacher", "student"]
    assert found["teacher"]["quality"]["tokens"] > found["student"]["quality"]["tokens"]
    for name, folder in (("teacher", tmp_path / "bytes"), ("student", toys / "student")):
        source, quick = Source(toys / "eval.jsonl"), EvaluationOptions(batch_sizes=[1], lengths=[8])
        alone = measure(str(folder), None, source, max_length=32, options=quick)
        assert found[name]["bits_per_byte"] == pytest.approx(alone["models"]["student"]["bits_per_byte"])
        assert found[name]["model"] == str(folder)


def test_a_student_can_be_measured_alone(toys: Path, tmp_path: Path) -> None:
    done = evaluate(toys, tmp_path / "figures.json")
    assert done.exit_code == 0, (done.output, done.exception)
    found = json.loads((tmp_path / "figures.json").read_text())
    assert found["models"]["student"]["quality"]["kl"] is None
    assert "agreement" not in done.output


def test_a_folder_for_results_that_cannot_be_written_is_known_before_they_are_measured(
    toys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: False)
    done = evaluate(toys, tmp_path / "figures.json")
    assert isinstance(done.exception, UserError)
    assert "--out: expected a file in a folder that can be written, got " in str(done.exception)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--length", "0"], "--length: expected whole numbers"),
        (["--length", "65"], "expected at most 64, the student's number of positions"),
        (["--batch-size", "a,b"], "--batch-size: expected whole numbers"),
        (
            ["--max-length", "100"],
            "--max-length: expected at most 64, the student's number of positions, got 100. Use --max-length 64.",
        ),
        (["--data", "nowhere.jsonl"], "nowhere"),
        (["--teacher", "./nowhere"], "--teacher: expected a folder"),
        (["--out", "no/such/folder/a.json"], "--out: expected a file in an existing folder"),
    ],
)
def test_mistakes_on_the_command_line(more: list[str], message: str, toys: Path, tmp_path: Path) -> None:
    done = evaluate(toys, tmp_path / "figures.json", *more)
    assert isinstance(done.exception, UserError)
    assert message in str(done.exception)
