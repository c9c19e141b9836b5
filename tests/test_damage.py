"""Files that changed since they were written are found, and failures of the machine end with advice."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from conftest import quiet_run
from potstill.data.batches import encode
from potstill.data.sources import Source
from potstill.embedding.heads import VectorHead
from potstill.embedding.teachers import TextEncoder, encode_texts
from potstill.engines.sampling import Completion, Sampling
from potstill.errors import DataError, ModelError, RecipeError, RunError, ServerError, UserError, remedy
from potstill.generation.journal import complete_in_order, complete_requests
from potstill.models.checksums import CHECKSUMS, with_checksum, without_checksum
from potstill.models.loading import load_model, load_tokenizer, loading_notes
from potstill.runs.config.run import Recipe
from potstill.runs.finished_parts import FinishedParts
from potstill.runs.search import _read
from potstill.train.arguments import DistillationConfig
from potstill.train.callbacks import logged_lines
from potstill.train.checkpoints import remove_incomplete
from potstill.train.hf_trainer import StudentTrainer
from test_embedding_training import HELD, TRAIN, distil


def flip(path: Path, place: float = 0.5) -> None:
    """Change one bit of a file."""
    content = bytearray(path.read_bytes())
    content[int(place * (len(content) - 1))] ^= 1
    path.write_bytes(content)


@pytest.fixture
def killed(recipe_values: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The recipe of a run that ended behind its fourth step, with a checkpoint of it."""
    recipe_values["train"] |= {"max_steps": 6, "save_steps": 2, "save_total_limit": 2, "eval_strategy": "no"}
    recipe_values["evaluate"] = {"baseline": False, "continuations": 0, "time_limit": 1e-6}
    step = StudentTrainer.training_step
    with monkeypatch.context() as patch:

        def failing(self: Any, *args: Any, **kwargs: Any) -> Any:
            if self.state.global_step == 4:
                raise MemoryError("Unable to allocate 64.0 GiB")
            return step(self, *args, **kwargs)

        patch.setattr(StudentTrainer, "training_step", failing)
        with pytest.raises(RunError, match=r"^train: expected memory for 4 rows in a batch, got none: .*--resume\.$"):
            quiet_run(recipe_values)
    return recipe_values


def checkpoint_of(values: dict[str, Any]) -> Path:
    return Path(values["output"]) / "checkpoints" / "student" / "checkpoint-4"


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "rng_state.pth", "trainer_state.json"])
def test_a_damaged_checkpoint_is_found(killed: dict[str, Any], name: str) -> None:
    flip(checkpoint_of(killed) / name)
    with pytest.raises(ModelError, match=rf"^checkpoint: expected {name} in .*checkpoint-4 as it was written, got"):
        quiet_run(killed, resume=True)


def test_without_a_damaged_checkpoint_resuming_goes_on_from_the_earlier_one(killed: dict[str, Any]) -> None:
    whole = quiet_run(killed | {"output": killed["output"] + "-whole"})
    newest = checkpoint_of(killed)
    flip(newest / "model.safetensors")
    for earlier in ("checkpoint-2", "step 0: there is no other"):
        with pytest.raises(ModelError, match=rf"Delete {newest}: --resume then continues from {earlier}\. If"):
            quiet_run(killed, resume=True)
        if earlier == "checkpoint-2":
            shutil.copytree(newest.parent, newest.parent.with_name("both"))
            shutil.rmtree(newest.with_name(earlier))
    shutil.rmtree(newest.parent)
    newest.parent.with_name("both").rename(newest.parent)
    shutil.rmtree(newest)
    resumed = quiet_run(killed, resume=True)
    names = [result.directory / "student" / "model.safetensors" for result in (resumed, whole)]
    assert names[0].read_bytes() == names[1].read_bytes()


def test_checksums_that_a_kill_prevented_are_written_on_resuming(killed: dict[str, Any]) -> None:
    checksums = checkpoint_of(killed) / CHECKSUMS
    written = checksums.read_bytes()
    checksums.unlink()
    remove_incomplete(checksums.parents[1])
    assert checksums.read_bytes() == written


def test_a_failed_allocation_is_followed_by_smaller_batches(killed: dict[str, Any], tmp_path: Path) -> None:
    whole = quiet_run(killed | {"output": str(tmp_path / "whole")})
    train = killed["train"] | {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    smaller = quiet_run(killed | {"train": train}, resume=True)
    found, wanted = (load_file(each.directory / "student" / "model.safetensors") for each in (smaller, whole))
    for weight, other in zip(found.values(), wanted.values(), strict=True):
        torch.testing.assert_close(weight, other, atol=1e-5, rtol=1e-4)
    with pytest.raises(RecipeError, match="got another train"):
        quiet_run(killed | {"train": train | {"per_device_train_batch_size": 4}}, resume=True)


def test_evaluation_names_its_own_batches(recipe_values: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*args: Any, **kwargs: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(StudentTrainer, "prediction_step", failing)
    with pytest.raises(RunError, match=r"^evaluation: expected memory .* Lower train\.per_device_eval_batch_size\.$"):
        quiet_run(recipe_values)


def test_batches_of_transformers_own_choice_are_refused(recipe_values: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="auto_find_batch_size: expected false, got true"):
        DistillationConfig(output_dir=str(tmp_path), auto_find_batch_size=True)
    recipe_values["train"]["auto_find_batch_size"] = True
    with pytest.raises(RecipeError, match=r"train\.auto_find_batch_size: expected it not to be set here"):
        Recipe.parse(recipe_values)


def test_a_damaged_student_is_found(recipe_values: dict[str, Any]) -> None:
    recipe_values["evaluate"] = {"baseline": False, "continuations": 0, "time_limit": 1e-6}
    folder = quiet_run(recipe_values).directory / "student"
    names = {file.name for file in folder.iterdir()}
    assert names - json.loads((folder / CHECKSUMS).read_text()).keys() == {CHECKSUMS, "README.md"}
    for name, load in (("model.safetensors", load_model), ("tokenizer.json", load_tokenizer), (CHECKSUMS, load_model)):
        sound = (folder / name).read_bytes()
        flip(folder / name, 0.9)
        with pytest.raises(ModelError, match=r"^student: expected .* as it was written, got another or none"):
            load(str(folder), "student")
        (folder / name).write_bytes(sound)
    sound = (folder / CHECKSUMS).read_bytes()
    for other in ("[]", "[[]]", "[1]", '["config.json"]', "5", "null", '{"config.json": 1}'):
        (folder / CHECKSUMS).write_text(other)
        with pytest.raises(ModelError, match=r"^student: expected .* as it was written, got another or none"):
            load_model(str(folder), "student")
    (folder / CHECKSUMS).write_bytes(sound)
    (folder / ".#config.json").symlink_to("nobody@nowhere")  # as an editor locks a file
    load_model(str(folder), "student")
    generation = folder / "generation_config.json"
    assert not [note for note in loading_notes(load_model(str(folder), "student")) if generation.name in note]
    for change, now in ((lambda: generation.write_text("{}"), "was changed"), (generation.unlink, "is gone")):
        change()
        note = f"student: {generation.name} in {folder} {now} since it was written."
        assert note in loading_notes(load_model(str(folder), "student"))
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"^student: expected tokenizer\.json in"):
        load_model(str(folder), "student")
    (folder / CHECKSUMS).unlink()  # meant
    load_model(str(folder), "student")


def test_an_interrupted_save_leaves_nothing(recipe_values: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("potstill.runs.steps.write_checksums", interrupted)
    monkeypatch.setattr("potstill.runs.run.rehearse", lambda *_, **__: [])
    with pytest.raises(KeyboardInterrupt):
        quiet_run(recipe_values)
    assert not [path for path in Path(recipe_values["output"]).iterdir() if path.name.startswith("student")]


def test_damaged_encoded_data_is_encoded_again(toys: Path, tokenizer: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path))

    def rows() -> list[Any]:
        return list(encode(Source(str(toys / "train.jsonl")), tokenizer, max_length=32).dataset)

    wanted = rows()
    files = [file for file in (tmp_path / "potstill").iterdir() if file.suffix != ".sha256"]
    assert len(files) == 3
    for file in files:
        flip(file, 0.7)
        assert rows() == wanted


class Numbered:
    """An engine whose text is the prompt."""

    def complete(self, prompts: Iterable[Any], sampling: Sampling) -> list[list[Completion]]:
        return [[Completion(f"about {prompt}", True, ())] for prompt in prompts]


def test_a_damaged_journal_is_found(tmp_path: Path) -> None:
    def completed() -> Any:
        complete = complete_in_order(Numbered(), Sampling(max_new_tokens=4))
        return complete_requests(["one", "two"], complete, 0, tmp_path / "texts", batch_size=1, settings={})

    wanted = completed()
    assert completed() == wanted
    changed = (tmp_path / "texts").read_text().replace("about two", "about tvo")
    (tmp_path / "texts").write_text(changed)
    with pytest.raises(DataError, match=r"^generate: expected a journal .* as it was written, got a line of something"):
        completed()


def test_a_damaged_log_is_found_and_a_cut_one_read(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [{"run": "student", "step": step, "loss": 1.5} for step in range(3)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"run": "stu')
    assert logged_lines(path) == lines
    for damaged in (b"\xff", b"}"):
        path.write_bytes(path.read_bytes().replace(b'"step": 1', b'"step"' + damaged + b"1"))
        with pytest.raises(RunError, match=r"^log: expected JSON in line 2 of .*metrics\.jsonl, got something else"):
            logged_lines(path)


def test_a_damaged_embedding_checkpoint_is_found(tmp_path: Path) -> None:
    plan, _ = distil(VectorHead.from_pca(TRAIN, 3), epochs=1)
    plan.fit(TRAIN, HELD, checkpoints=tmp_path)
    flip(tmp_path / "stage-1.pt")
    with pytest.raises(RunError, match=r"^checkpoints: expected .*stage-1\.pt as it was written"):
        plan.fit(TRAIN, HELD, checkpoints=tmp_path)


def test_damaged_vectors_of_a_teacher_are_computed_again(tmp_path: Path) -> None:
    encoder = TextEncoder(lambda texts: np.ones((len(texts), 4), np.float32), "toy")
    texts = ["a", "b", "c"]
    encode_texts(texts, encoder, tmp_path)
    (file,) = tmp_path.glob("*.npy")
    flip(file, 0.9)
    assert torch.equal(torch.cat([*encode_texts(texts, encoder, tmp_path).blocks()]), torch.ones(3, 4))


def test_damaged_results_are_computed_again(tmp_path: Path) -> None:
    path = tmp_path / "parts.json"
    assert FinishedParts(path, "request").get("loss", lambda: 2.5, keep=lambda _: True) == 2.5
    assert FinishedParts(path, "request").get("loss", lambda: 0.0, keep=lambda _: True) == 2.5
    path.write_text(path.read_text().replace("2.5", "3.5"))
    assert FinishedParts(path, "request").get("loss", lambda: 2.5, keep=lambda _: True) == 2.5
    record = {"request": {"name": "toy"}, "chosen": 0}
    (tmp_path / "search.json").write_text(json.dumps(with_checksum(record)))
    assert _read(tmp_path, record["request"]) == record
    (tmp_path / "search.json").write_text(json.dumps(with_checksum(record)).replace('"chosen": 0', '"chosen": 1'))
    assert _read(tmp_path, record["request"]) is None
    for damaged in ([], {}, {"sha256": 1}):
        with pytest.raises(ValueError):
            without_checksum(damaged)


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "Make room on the disk."),
        (SafetensorError("I/O error: No space left on device (os error 28)"), "Make room on the disk."),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 8384 vs 8278"), "Make room"),
        (OSError(errno.EROFS, "Read-only file system"), "Make the disk writable again"),
        (OSError(errno.EIO, "Input/output error"), "The disk fails"),
        (OSError(errno.EMFILE, "Too many open files"), "ulimit -n"),
        (MemoryError(), "Lower the batch size"),
        (torch.OutOfMemoryError("CUDA out of memory."), "Lower the batch size"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."), "Lower the batch"),
    ],
)
def test_a_failure_of_the_machine_has_advice(error: Exception, advice: str) -> None:
    assert str(remedy(error)).startswith(advice) or advice in str(remedy(error))
    with pytest.raises(ValueError, match="something else") as caught:
        try:
            raise error
        finally:
            raise ValueError("something else")
    assert remedy(caught.value) is None


class RayTaskError(RuntimeError):
    """An error of another machine, as Ray's library raises it here."""

    __module__ = "ray.exceptions"


@pytest.mark.parametrize("kind", [RayTaskError, ServerError])
@pytest.mark.parametrize("text", ["No space left on device", "CUDA out of memory.", "unexpected pos 8384 vs 8278"])
def test_a_failure_of_another_machine_has_none(kind: type[Exception], text: str) -> None:
    assert remedy(kind(text)) is None
