"""What is kept of a training while it runs."""

from __future__ import annotations

import json
from pathlib import Path

from transformers import TrainerControl, TrainerState, TrainingArguments

from potstill.train.callbacks import MetricsFile, logged_lines, seconds_of
from test_trainer import trainer


def written(path: Path, *lines: str) -> None:
    path.write_text("\n".join(lines))


def line(run: str, step: int, seconds: float) -> str:
    return json.dumps({"run": run, "step": step, "seconds": seconds, "loss": 1.0})


def test_a_line_that_a_kill_cut_off_is_left_out(tmp_path: Path) -> None:
    assert logged_lines(tmp_path / "none.jsonl") == []
    written(tmp_path / "m.jsonl", line("student", 1, 0.5), line("student", 2, 1.0)[:20])
    assert [found["step"] for found in logged_lines(tmp_path / "m.jsonl")] == [1]


def test_a_resumed_run_drops_what_is_past_its_checkpoint_and_goes_on_counting(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    written(path, line("baseline", 9, 4.0), line("student", 2, 10.0), line("student", 4, 20.0), '{"run": "stu')
    args, control = TrainingArguments(output_dir=str(tmp_path), use_cpu=True), TrainerControl()
    state = TrainerState(global_step=2, is_world_process_zero=True)
    writer = MetricsFile(path, "student")
    writer.on_train_begin(args, state, control)
    state.global_step = 3
    writer.on_log(args, state, control, {"loss": 0.9})
    lines = logged_lines(path)
    assert [(one["run"], one["step"]) for one in lines] == [("baseline", 9), ("student", 2), ("student", 3)]
    assert 10 <= seconds_of(lines, "student") < 11
    assert seconds_of(lines, "baseline") == 4.0


def test_only_the_first_rank_writes(tmp_path: Path) -> None:
    args, control = TrainingArguments(output_dir=str(tmp_path), use_cpu=True), TrainerControl()
    state = TrainerState(is_world_process_zero=False)
    writer = MetricsFile(tmp_path / "metrics.jsonl", "student")
    writer.on_train_begin(args, state, control)
    writer.on_log(args, state, control, {"loss": 0.9})
    assert not (tmp_path / "metrics.jsonl").exists()


def test_checkpoints_do_not_grow_with_the_lines_that_are_logged(tmp_path: Path) -> None:
    path, steps = tmp_path / "metrics.jsonl", {"max_steps": 4, "save_strategy": "steps", "save_steps": 1}
    best = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True}
    whole = trainer(tmp_path, **steps, **best)
    whole.train()  # its checkpoints hold the lines, as those of earlier versions do
    checkpoint, lines = tmp_path / "checkpoint-2", whole.state.log_history[:-1]
    kept = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    assert len(kept) == 4
    written(path, *(json.dumps({"run": "student", "seconds": 0.0, **one}) for one in kept), "")

    resumed = trainer(tmp_path, **steps, **best)
    resumed.add_callback(MetricsFile(path, "student"))
    resumed.train(resume_from_checkpoint=str(checkpoint))
    states = [json.loads((tmp_path / f"checkpoint-{step}" / "trainer_state.json").read_text()) for step in (3, 4)]
    assert resumed.state.log_history == [] and [state["log_history"] for state in states] == [[], []]
    assert resumed.state.best_metric == whole.state.best_metric
    without_times = [[{k: v for k, v in one.items() if k in ("step", "loss", "eval_loss")} for one in found]
                     for found in (lines, logged_lines(path))]  # fmt: skip
    assert without_times[0] == without_times[1] and len(lines) == 8
