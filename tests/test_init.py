"""potstill init: what it writes passes potstill check and runs, for every kind and task; mistakes are errors."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from transformers import Olmo2Config, Olmo2ForCausalLM, OPTConfig, OPTForCausalLM
from typer.testing import CliRunner

import families
from conftest import TEXT, make_llama, make_tokenizer, mostly_slow
from potstill.cli import app
from potstill.cli import init as command
from potstill.errors import DataError, ModelError, RecipeError, UserError
from potstill.runs.config.run import Recipe
from potstill.runs.init import inspection
from potstill.runs.init.draft import DraftRequest, draft
from toy_encoders import make_encoder, save, write_rows

CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
CHAT += "{% if add_generation_prompt %}<assistant>{% endif %}"
FAST = ["train.max_steps=2", "evaluate.continuations=0", "train.warmup_steps=0"]


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with teacher/, a llama of four layers, train.jsonl and eval.jsonl."""
    monkeypatch.chdir(tmp_path)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT
    for name, layers in (("teacher", 4), ("student", 1)):
        make_llama(hidden_size=32, layers=layers, seed=layers).save_pretrained(name)
        tokenizer.save_pretrained(name)
    write(train=[{"text": text} for text in TEXT[:40]], eval=[{"text": text} for text in TEXT[40:]])
    return tmp_path


@pytest.mark.parametrize(
    "tokens, budget, suggested", [(50_000, {}, "32768"), (50_000, {"params": 50_000}, "auto"), (300, {}, None)]
)
def test_a_smaller_vocabulary_is_suggested_where_embeddings_are_large(
    tokens: int, budget: dict[str, Any], suggested: str | None
) -> None:
    make_llama(hidden_size=32, layers=4, seed=4, vocab_size=tokens).save_pretrained("teacher")
    text = draft(DraftRequest("teacher", Path("train.jsonl"), Path("eval.jsonl"), budget=budget))
    line = f"  # vocabulary: {{keep: {suggested}, text: {{path: FILE}}}}\n"
    assert (line in text) == (suggested is not None)
    if suggested:
        Recipe.parse(yaml.safe_load(text.replace(line, line.replace("# ", ""))))


def test_no_smaller_vocabulary_is_suggested_for_token_ids() -> None:
    make_llama(hidden_size=32, layers=4, seed=4, vocab_size=50_000).save_pretrained("teacher")
    write(train=[{"input_ids": [5, 6, 7, 8]}] * 4, eval=[{"input_ids": [5, 6, 7]}] * 4)
    assert "vocabulary:" not in draft(DraftRequest("teacher", Path("train.jsonl"), Path("eval.jsonl")))


def write(**files: list[dict[str, Any]]) -> None:
    for name, rows in files.items():
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def output_of(*arguments: str, **options: Any) -> str:
    done = CliRunner().invoke(app, arguments, catch_exceptions=False, **options)
    assert done.exit_code == 0, done.output
    return done.output


DATA = ("--data", "train.jsonl", "--eval", "eval.jsonl")


def drafted(*flags: str) -> dict[str, Any]:
    """What `potstill init` writes; follow it by `check` or `run`, which rehearses the recipe as check does."""
    output_of("init", "--teacher", "teacher", *flags, "--force")
    return yaml.safe_load(Path("recipe.yaml").read_text())


def ran(*sets: str) -> dict[str, Any]:
    output_of("run", "recipe.yaml", *(part for each in [*FAST, *sets] for part in ("--set", each)))
    return json.loads(Path("runs/teacher-small/summary.json").read_text())


def test_texts() -> None:
    found = drafted(*DATA)
    assert found["data"]["train"] == {"path": "train.jsonl", "field": "text"}
    assert (found["data"]["max_length"], found["data"]["packing"]) == (64, True)
    assert found["student"] == {"design": {"num_hidden_layers": 2}, "initialize": "copy"}
    assert ran()["rows"]["student"]["parameters"] < ran_parameters("teacher")
    page = Path("recipe.yaml").read_text()
    assert "2 layers of width 32" in page
    assert max(map(len, page.splitlines())) <= 150


def ran_parameters(name: str) -> int:
    return json.loads(Path("runs/teacher-small/summary.json").read_text())["rows"][name]["parameters"]


def test_prompts_and_completions_into_a_budget() -> None:
    rows = [{"id": i, "question": text[:9], "answer": text[9:30]} for i, text in enumerate(TEXT)]
    write(train=rows[:40], eval=rows[40:])
    found = drafted(*DATA, "--compression", "2", "--max-length", "48")
    columns = {"prompt": "question", "completion": "answer", "chat": True}
    assert found["data"]["train"] == {"path": "train.jsonl", **columns}
    assert (found["data"]["max_length"], found["data"]["packing"]) == (48, True)
    assert found["student"] == {"design": {"compression": 2.0}, "initialize": "prune"}
    ran()
    assert ran_parameters("student") == pytest.approx(ran_parameters("teacher") / 2, rel=0.06)


def test_chats_into_an_adapter() -> None:
    chats = [[{"from": "human", "value": text[:9]}, {"from": "gpt", "value": text[9:30]}] for text in TEXT]
    write(train=[{"conversations": chat} for chat in chats[:40]], eval=[{"conversations": c} for c in chats[40:]])
    found = drafted(*DATA, "--student", "student", "--adapter", "prompt", "--output", "runs/teacher-small")
    assert found["data"]["train"] == {"path": "train.jsonl", "messages": "conversations"}
    assert found["data"]["max_length"] <= 64 - 20  # virtual tokens take positions
    assert "packing" not in found["data"]
    page = Path("recipe.yaml").read_text()
    assert "# Rows are padded, not packed: an adapter of kind prompt puts virtual tokens in front" in page
    assert found["student"] == {"model": "student", "adapter": "prompt"}
    assert ran()["adapter"]["title"] == "a prompt of 20 tokens"


def test_rows_of_a_student_that_would_mix_them_are_padded() -> None:
    config = OPTConfig(vocab_size=300, hidden_size=64, ffn_dim=128, num_hidden_layers=2, num_attention_heads=2)
    config.word_embed_proj_dim = 64
    OPTForCausalLM(config).save_pretrained("teacher")
    write(train=[{"prompt": text[:9], "completion": text[9:20]} for text in TEXT[:40]])
    write(eval=[{"prompt": text[:9], "completion": text[9:20]} for text in TEXT[40:]])
    assert "packing" not in drafted(*DATA)["data"]
    page = Path("recipe.yaml").read_text()
    assert "# Rows are padded, not packed: the student would be OPTForCausalLM, whose predictions" in page


@pytest.mark.parametrize("has_template", [True, False])
def test_columns_of_alpaca_lose_nothing(has_template: bool) -> None:
    if not has_template:
        make_tokenizer().save_pretrained("teacher")
        Path("teacher/chat_template.jinja").unlink(missing_ok=True)
    rows = [{"instruction": t[:5], "input": t[5:9], "output": t[9:20], "system": "", "id": 1} for t in TEXT]
    write(train=rows[:40], eval=rows[40:])
    found = drafted(*DATA)["data"]
    columns = {"prompt": ["instruction", "input"], "completion": "output", "system": "system"}
    assert found["train"] == {"path": "train.jsonl", **columns, **({"chat": True} if has_template else {})}
    assert "Columns that are not used: id." in Path("recipe.yaml").read_text()
    output_of("check", "recipe.yaml")
    with pytest.raises(
        DataError, match=r"column 'input' of train.jsonl, .* `prompt: \[instruction, input\]`, or name it"
    ):
        output_of("init", "--teacher", "teacher", *DATA, "--prompt", "instruction", "--completion", "output", "--force")


USER, ANSWER = {"role": "user", "content": "a b c"}, {"role": "assistant", "content": "d e f"}
ALPACA = {"prompt": ["instruction", "input"], "completion": "output"}
SHAREGPT = [{"from": "human", "value": "a b c"}, {"from": "gpt", "value": "d e f"}]


@pytest.mark.parametrize("has_template", [True, False])
@pytest.mark.parametrize(
    ("row", "chat", "plain"),
    [
        ({"instruction": "a", "input": "b", "output": "c d", "text": "### a b c d"}, ALPACA, {"field": "text"}),
        ({"messages": [USER, ANSWER], "text": "a b c d e f"}, {"messages": "messages"}, {"field": "text"}),
        ({"Text": "a b", "conversations": SHAREGPT}, {"messages": "conversations"}, {"field": "Text"}),
        ({"text": "a b", "prompt": "a", "completion": "b c"}, {"prompt": "prompt"}, {"field": "text"}),
        ({"prompt": "a", "chosen": "b c", "rejected": "d"}, {"prompt": "prompt", "completion": "chosen"}, None),
        ({"prompt": [USER], "chosen": [ANSWER], "rejected": [ANSWER]}, {"prompt": "prompt"}, {}),
        ({"prompt": "a", "chosen": [USER, ANSWER], "rejected": [USER, ANSWER]}, {"messages": "chosen"}, {}),
        ({"question": "a", "context": "b", "answer": "c d"}, {"prompt": ["question", "context"]}, None),
        ({"prompt": "a", "answer": "b c"}, {"prompt": "prompt", "completion": "answer"}, None),
    ],
)
def test_a_chat_model_reads_conversations_where_a_file_has_them_as_text_too(
    has_template: bool, row: dict[str, Any], chat: dict[str, Any], plain: dict[str, Any] | None
) -> None:
    """`plain` is what a model without a chat template reads: None for the same columns, {} for nothing."""
    if not has_template:
        make_tokenizer().save_pretrained("teacher")
        Path("teacher/chat_template.jinja").unlink(missing_ok=True)
    write(train=[row] * 20, eval=[row] * 5)
    expected = chat if has_template or plain is None else plain
    if not expected:
        with pytest.raises(DataError, match="expected a tokenizer with a chat template"):
            drafted(*DATA)
        return
    found = drafted(*DATA)["data"]["train"]
    assert all(found[key] in (columns, [columns]) for key, columns in expected.items())
    assert found.get("chat", False) is (has_template and "prompt" in expected)


@pytest.mark.parametrize(("compression", "fits"), [("1.2", True), ("20", False)])
def test_a_budget_keeps_attention_that_cannot_be_pruned(compression: str, fits: bool) -> None:
    config = Olmo2Config(vocab_size=300, hidden_size=64, intermediate_size=256, num_hidden_layers=4)
    config.num_attention_heads = config.num_key_value_heads = 4
    Olmo2ForCausalLM(config).save_pretrained("teacher")
    if fits:
        assert drafted(*DATA, "--compression", compression)["student"]["design"]["keep"] == "attention"
        output_of("check", "recipe.yaml")
    else:
        with pytest.raises(ModelError, match=r"smallest student with the teacher's attention has"):
            drafted(*DATA, "--compression", compression)


def test_prompts_alone_are_no_text() -> None:
    write(train=[{"prompt": "a b c"}] * 20, eval=[{"prompt": "a b c"}] * 5)
    with pytest.raises(DataError, match=r"got prompts alone, prompt\. Let the teacher answer them .* --field prompt\."):
        drafted(*DATA)
    assert drafted(*DATA, "--field", "prompt")["data"]["train"]["field"] == "prompt"


def test_splits_of_a_folder() -> None:
    Path("rows").mkdir()
    for name, part in (("train", TEXT[:40]), ("test", TEXT[40:])):
        Path(f"rows/{name}-0.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in part))
    found = drafted("--data", "rows", "--split", "train", "--eval", "rows", "--eval-split", "test")["data"]
    assert found["eval"] == {"path": "rows", "split": "test", "field": "text"}
    ran()


@pytest.mark.parametrize(
    ("family", "wide", "design"),
    [
        ("llama", {"intermediate_size": 200}, {"intermediate_size": 64}),
        ("gpt2", {"n_inner": None, "n_embd": 48}, {"n_inner": 64}),  # four times the width
        ("mixtral", {"intermediate_size": 200}, None),
    ],
)
def test_language_models_lose_feed_forward_units(
    family: str, wide: dict[str, Any], design: dict[str, int] | None
) -> None:
    families.model(family, vocab_size=300, **wide).save_pretrained("wide")
    make_tokenizer().save_pretrained("wide")
    output_of("init", "--teacher", "wide", *DATA, "--force")
    found = yaml.safe_load(Path("recipe.yaml").read_text())
    if design is None:
        assert found["student"] == {"design": {"num_hidden_layers": 1}, "initialize": "copy"}
    else:
        assert found["student"] == {"design": design, "initialize": "prune"}
        assert "with 64 feed-forward units" in Path("recipe.yaml").read_text()
    output_of("check", "recipe.yaml")


@pytest.mark.parametrize(("tokens", "term"), [(280, "chunks"), (299, "mapped_logits")])
def test_another_tokenizer_is_seen(tokens: int, term: str) -> None:
    make_tokenizer(tokens).save_pretrained("student")
    make_llama(vocab_size=tokens, layers=1).save_pretrained("student")
    found = drafted(*DATA, "--student", "student")
    assert [part["term"] for part in found["objective"]] == [term, "labels"]
    assert found["student"] == {"model": "student"}
    ran()


@pytest.mark.parametrize("task", mostly_slow(["masked", "classification", "regression", "encoder"], "masked"))
def test_encoders(task: str) -> None:
    save(make_encoder("distilbert" if task != "regression" else "bert", task, seed=1), Path("teacher"))
    for name, seed in (("train", 0), ("eval", 7)):
        write_rows(Path(f"{name}.jsonl"), 40, seed=seed)
    found = drafted(*DATA, *(("--label", "score") if task == "regression" else ()))
    assert found["task"] == task
    assert found["student"]["design"] == {"num_hidden_layers" if task == "regression" else "n_layers": 2}
    judged = {"pair": "text_pair", "label": "score" if task == "regression" else "label"}
    columns = {"field": "text"} | (judged if task in ("classification", "regression") else {})
    assert found["data"]["train"] == {"path": "train.jsonl", **columns}
    assert set(ran()["rows"]) == {"teacher", "student"} | ({"baseline"} if task != "encoder" else set())


def test_a_classifier_with_another_tokenizer_keeps_its_terms() -> None:
    save(make_encoder("distilbert", "classification", seed=1), Path("teacher"))
    save(make_encoder("distilbert", "classification", seed=2), Path("student"))
    words = Path("student/tokenizer.json").read_text()
    Path("student/tokenizer.json").write_text(words.replace('"the"', '"thee"'))
    for name, seed in (("train", 0), ("eval", 7)):
        write_rows(Path(f"{name}.jsonl"), 40, seed=seed)
    found = drafted(*DATA, "--student", "student")
    assert [part["term"] for part in found["objective"]] == ["logits", "labels"]


def test_vectors_and_embedders(embedder: Path) -> None:
    write(train=[{"sentence": f"{text.split('(')[0]} number {i}"} for i, text in enumerate(TEXT * 5)])
    np.save("vectors.npy", np.random.default_rng(0).standard_normal((300, 12)).astype("f4"))
    for teacher, more in (("vectors.npy", ()), (str(embedder), ("--data", "train.jsonl"))):
        output_of(
            "init",
            "--teacher",
            teacher,
            *more,
            "--dimensions",
            "4",
            "--name",
            "e",
            "--output",
            f"run{len(more)}",
            "--force",
        )
        output_of("run", "recipe.yaml", "--set", "train.epochs=1")
        assert Path(f"run{len(more)}/report.html").exists()
    found = yaml.safe_load(Path("recipe.yaml").read_text())
    assert found["data"]["train"]["fields"] == ["sentence"]
    assert found["student"] == {"encoder": {"layers": 1}, "dimensions": 4}


def test_a_teacher_that_writes() -> None:
    model = make_llama()
    model.config.max_position_embeddings = 256  # the template is longer than the toys' 64
    model.save_pretrained("teacher")
    write(questions=[{"question": f"{i} + {i}?", "answer": str(2 * i)} for i in range(3)])
    found = drafted("--kind", "generate", "--data", "questions.jsonl")
    assert found["task"]["questions"] == {"path": "questions.jsonl", "field": "question", "answer": "answer"}
    assert found["output"] == "runs/teacher-texts"
    output_of("check", "recipe.yaml")


@pytest.mark.parametrize("chat", [True, False])
def test_without_data_the_teacher_writes_it(chat: bool) -> None:
    if not chat:
        make_tokenizer().save_pretrained("teacher")
        Path("teacher/chat_template.jinja").unlink(missing_ok=True)
    output = output_of("init", "--teacher", "teacher", "--no-data")
    assert "potstill generate recipe-texts.yaml, then potstill cache build recipe.yaml --codec top_k" in output
    texts, found = (yaml.safe_load(Path(name).read_text()) for name in ("recipe-texts.yaml", "recipe.yaml"))
    assert texts["task"]["task"] == "own_text" and texts["held_out"] == 0.1
    assert texts["filter"].get("cut", True) == chat
    assert found["teacher"] == {"cache": "runs/teacher-small-cache", "model": "teacher"}
    columns = {"messages": "messages"} if chat else {"field": "text"}
    for split in ("train", "eval"):
        assert found["data"][split] == {"path": f"{texts['output']}/{split}.jsonl", **columns}
    assert found["data"]["packing"]
    output_of("check", "recipe-texts.yaml")


def test_on_a_terminal_it_asks_again_until_an_answer_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "_on_a_terminal", lambda: True)
    answers = ["teachr", "teacher", "train.json", "train.jsonl", "eval.jsonl", "hundreds", "2x", "runs/mine"]
    output = output_of("init", input="\n".join(answers) + "\n")
    for wrong in ("got teachr, which is not one. Did you mean teacher?", "Did you mean train.jsonl?", "got hundreds"):
        assert wrong in " ".join(output.split())
    found = yaml.safe_load(Path("recipe.yaml").read_text())
    assert found["student"]["design"] == {"compression": 2.0}
    assert found["output"] == "runs/mine"


def test_the_page_runs() -> None:
    page = (Path(__file__).parent.parent / "docs/init.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```console\n(.*?)```", page, flags=re.DOTALL)
    for line in block.splitlines():
        output_of(*line.split()[1:])
    assert yaml.safe_load(Path("lora.yaml").read_text())["student"] == {"model": "student", "adapter": "lora"}


@pytest.mark.parametrize(
    ("answer", "meant"),
    [
        ("4x", {"budget": {"compression": 4.0}}),
        ("0.5GB", {"budget": {"memory_gb": 0.5}}),
        ("1.5B", {"budget": {"params": "1.5B"}}),
        ("edge", {"budget": {"target": "edge"}}),
        ("student", {"student": "student"}),
        ("half", {}),
    ],
)
def test_a_size_in_one_word(answer: str, meant: dict[str, Any]) -> None:
    assert command._size(answer) == meant


def test_nothing_is_overwritten_unasked() -> None:
    Path("recipe.yaml").write_text("mine")
    with pytest.raises(UserError, match=r"init: expected a new file, got recipe\.yaml, which exists\. .*--force"):
        output_of("init", "--teacher", "teacher", *DATA)
    assert Path("recipe.yaml").read_text() == "mine"
    assert "name" in drafted(*DATA)


@pytest.mark.parametrize(
    ("flags", "error", "expected"),
    [
        ((), UserError, "got no --data"),
        (("--data", "train.jsonl"), UserError, "got no --eval"),
        ((*DATA, "--no-data"), UserError, "expected no data and no columns with --no-data"),
        (("--no-data", "--kind", "embedding"), UserError, "expected no no_data for a recipe of kind embedding"),
        (("--data", "trian.jsonl", "--eval", "eval.jsonl"), DataError, "Did you mean train.jsonl?"),
        ((*DATA, "--field", "txt"), DataError, "expected a column 'txt' in train.jsonl, got text"),
        ((*DATA, "--params", "many"), ModelError, "params: expected a number such as 100M"),
        (
            (*DATA, "--compression", "0.5", "--target", "edge"),
            RecipeError,
            "can have, got: Input should be greater than 1",
        ),
        ((*DATA, "--params", "1B"), ModelError, "expected a budget below the teacher's"),
        ((*DATA, "--keep", "width"), RecipeError, "expected at least one of params, active_params"),
        ((*DATA, "--adapter", "lora"), UserError, "expected --student with --adapter, got none"),
        ((*DATA, "--student", "student", "--params", "1M"), UserError, "expected --student or a budget, got both"),
        ((*DATA, "--max-length", "100"), UserError, "at most 64, the models' positions, got 100"),
        ((*DATA, "--dimensions", "4"), UserError, "expected no dimensions for a recipe of kind distillation"),
        ((*DATA, "--task", "masked"), ModelError, "for the task masked in teacher, got LlamaForCausalLM"),
    ],
)
def test_a_mistake_is_one_line(flags: tuple[str, ...], error: type[Exception], expected: str) -> None:
    with pytest.raises(error) as caught:
        output_of("init", "--teacher", "teacher", *flags)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not Path("recipe.yaml").exists()


def test_ambiguous_columns_are_refused() -> None:
    write(train=[{"content": "a b c", "prompt": "a", "completion": "b"}])
    with pytest.raises(
        DataError, match=r"columns of one kind in train\.jsonl, got content, prompt, completion\. Say which"
    ):
        output_of("init", "--teacher", "teacher", *DATA)


def test_columns_with_capitals_are_recognised() -> None:
    lines = ["Question,Answer,Id", *(f"What is {i}?,It is {i}.,{i}" for i in range(20))]
    Path("table.csv").write_text("\n".join(lines))
    found = drafted("--data", "table.csv", "--eval", "table.csv")
    train = found["data"]["train"]
    assert train == {"path": "table.csv", "prompt": "Question", "completion": "Answer", "chat": True}
    assert "# the rows of train" in Path("recipe.yaml").read_text()
    rows = [{"Text": "a b c d", "ID": i} for i in range(20)]
    write(train=rows, eval=rows[:5])
    assert drafted(*DATA)["data"]["train"] == {"path": "train.jsonl", "field": "Text"}
    assert "# held out" in Path("recipe.yaml").read_text()


def test_a_batch_is_that_of_all_of_a_long_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of which the first characters alone are read."""
    monkeypatch.setattr(inspection, "SAMPLE_CHARACTERS", 2000)
    text = "the quick brown fox jumps over the lazy dog. " * 40
    write(train=[{"text": text}])
    short = drafted(*DATA)["train"]["per_device_train_batch_size"]
    write(train=[{"text": text * 100}])
    assert short < drafted(*DATA)["train"]["per_device_train_batch_size"]
