"""Vocabularies that are cut: texts of kept tokens are encoded as before, any text can be encoded, logits are equal."""

from __future__ import annotations

import copy
import json
import math
import re
from collections import Counter
from dataclasses import replace
from operator import itemgetter
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    Gemma3nTextConfig,
    MobileBertConfig,
    MobileBertForMaskedLM,
    ModernBertDecoderConfig,
    ModernBertDecoderForCausalLM,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForMaskedLM,
)
from transformers.models.gemma3n import Gemma3nForCausalLM
from typer.testing import CliRunner

from conftest import make_llama, quiet_run
from potstill.cli import app
from potstill.errors import ModelError, RecipeError
from potstill.models.trimming import choose_tokens, trim_model, trim_tokenizer
from potstill.runs.build import build_run
from potstill.runs.config.run import Recipe
from potstill.runs.rehearsal import rehearse
from potstill.runs.show import show_data
from toy_encoders import make_bert_tokenizer, make_encoder, save

TEXTS = [
    "The quick brown fox jumps over the lazy dog, and the dog sleeps on.",
    "In 1969, 12 men flew; the others stayed. The men who stayed were quick.",
    "Caf\u00e9 cr\u00e8me, na\u00efve fox: the theory of the other thing.",
    "sleeping sleepers sleep, jumping jumpers jump; thinkers think things through.",
] * 3
STRANGE = [
    "\u4f60\u597d \U0001f600 \x00\t\n\n  x",
    "def f(x):\r\n\treturn x<end> <s>",
    "zzzz qqq \u1e9e \ufb01 0987654321",
]
SPECIAL = ["<s>", "<pad>", "<unk>", "<end>", "<unused0>", "<unused1>"]


def byte_level() -> Any:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=420, special_tokens=SPECIAL, initial_alphabet=alphabet)
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A <end>", special_tokens=[(name, tokenizer.token_to_id(name)) for name in ("<s>", "<end>")]
    )
    return tokenizer


def byte_fallback() -> Any:
    """As Gemma's: spaces are written as an underline, characters without a token are bytes."""
    learnt = Tokenizer(models.BPE())
    learnt.normalizer = normalizers.Replace(" ", "\u2581")
    learnt.pre_tokenizer = pre_tokenizers.Split("\u2581", "merged_with_next")
    tokens = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    learnt.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=420, special_tokens=tokens))
    content = json.loads(learnt.to_str())
    content["model"] |= {"byte_fallback": True, "unk_token": "<unk>", "fuse_unk": True}
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] in SPECIAL]
    tokenizer = Tokenizer.from_str(json.dumps(content))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


def unigram() -> Any:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=200, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.post_processor = processors.RobertaProcessing(("<end>", 3), ("<s>", 0))
    return tokenizer


def word_piece() -> Any:
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.train_from_iterator(
        TEXTS, trainers.WordPieceTrainer(vocab_size=250, special_tokens=SPECIAL, show_progress=False)
    )
    tokenizer.post_processor = processors.BertProcessing(("<end>", 3), ("<s>", 0))
    return tokenizer


def word_ends() -> Any:
    """As CLIP's and GPT's: the last part of a word has a mark."""
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace(Regex(r"\s+"), " ")
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.BPEDecoder()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=SPECIAL, end_of_word_suffix="</w>", show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


KINDS = [byte_level, byte_fallback, unigram, word_piece, word_ends]


def wrapped(tokenizer: Any) -> PreTrainedTokenizerFast:
    roles = {"bos_token": "<s>", "pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "<end>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **roles)


def counted(tokenizer: Any, texts: list[str]) -> Counter[int]:
    return Counter(token for ids in tokenizer(texts)["input_ids"] for token in ids)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_texts_of_kept_tokens_are_encoded_as_before_and_all_others_round_trip(kind: Any) -> None:
    whole = wrapped(kind())
    kept = choose_tokens(whole, counted(whole, TEXTS[:2]), "data")
    trimmed = trim_tokenizer(whole, kept)
    assert len(whole.get_vocab()) > len(trimmed.get_vocab()) == len(kept)
    assert not any("unused" in token for token in trimmed.get_vocab())
    for text in TEXTS[:2]:
        assert [kept[token] for token in trimmed(text)["input_ids"]] == whole(text)["input_ids"]
    for text in [*TEXTS[2:4], *STRANGE]:
        before, after = (one.decode(one(text)["input_ids"]) for one in (whole, trimmed))
        assert after == before
    for role in ("bos_token", "eos_token", "pad_token", "unk_token"):
        assert getattr(trimmed, role) == getattr(whole, role)
        assert kept[getattr(trimmed, f"{role}_id")] == getattr(whole, f"{role}_id")


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_number_keeps_the_most_frequent_tokens(kind: Any) -> None:
    whole = wrapped(kind())
    counts = counted(whole, TEXTS)
    least = len(choose_tokens(whole, {}, "data"))
    kept = choose_tokens(whole, counts, least + 10)
    assert len(kept) == least + 10
    assert counts.most_common(1)[0][0] in kept
    with pytest.raises(ModelError, match=f"^student.vocabulary: expected at least {least} tokens"):
        choose_tokens(whole, counts, least - 1)


def test_a_number_above_that_of_the_text_is_filled_up() -> None:
    whole = wrapped(byte_level())
    size = len(whole.get_vocab())
    assert len(choose_tokens(whole, counted(whole, TEXTS[:1]), size - 10)) == size - 10


def test_spaces_survive_a_text_without_any() -> None:
    """Bytes of the underline that stands for a space would be decoded as that underline."""
    whole = wrapped(byte_fallback())
    trimmed = trim_tokenizer(whole, choose_tokens(whole, counted(whole, ["\u4f60\u597d"]), "data"))
    assert trimmed.decode(trimmed("a fox sleeps")["input_ids"], skip_special_tokens=True) == "a fox sleeps"


def test_added_tokens_are_kept_unless_they_are_reserved() -> None:
    whole = wrapped(byte_level())
    whole.add_tokens(["<think>", "/nothink", "<reserved_7>", "<\uff5cplace\u2581holder\u2581no\u25811\uff5c>"])
    trimmed = trim_tokenizer(whole, choose_tokens(whole, {}, "data"))
    assert [*trimmed.get_added_vocab()] == ["<s>", "<pad>", "<unk>", "<end>", "<think>", "/nothink"]
    assert (
        "<reserved_7>"
        in trim_tokenizer(whole, choose_tokens(whole, counted(whole, ["<reserved_7>"]), "data")).get_vocab()
    )


def test_what_a_class_of_tokenizers_sets_is_saved_with_a_cut_one(tmp_path: Path) -> None:
    whole = make_bert_tokenizer()
    whole.padding_side = "left"
    trim_tokenizer(whole, choose_tokens(whole, {}, "data")).save_pretrained(tmp_path / "trimmed")
    trimmed = AutoTokenizer.from_pretrained(tmp_path / "trimmed")
    assert trimmed("a", "b")["token_type_ids"] == whole("a", "b")["token_type_ids"]
    assert trimmed.padding_side == "left"


def trimmed_run(values: dict[str, Any], **vocabulary: Any) -> Any:
    values["student"]["vocabulary"] = vocabulary
    return build_run(Recipe.parse(values))


def test_a_recipe_cuts_teacher_and_student_alike(recipe_values: dict[str, Any], toys: Path) -> None:
    recipe_values["data"] |= {"packing": False}
    built = trimmed_run(recipe_values, keep=270)
    teacher, whole = built.loaded.model, AutoModelForCausalLM.from_pretrained(toys / "teacher").eval()
    size = len(built.tokenizer.get_vocab())
    assert size == 270 < whole.config.vocab_size
    assert size == built.vocabulary == teacher.config.vocab_size == built.new_student().config.vocab_size
    ids = AutoTokenizer.from_pretrained(toys / "teacher").get_vocab()
    kept = torch.tensor([ids[token] for token, _ in sorted(built.tokenizer.get_vocab().items(), key=itemgetter(1))])
    row = torch.arange(size)[None, ::9]
    with torch.no_grad():
        before, after = whole(kept[row]).logits[..., kept].log_softmax(-1), teacher(row).logits.log_softmax(-1)
    torch.testing.assert_close(after, before)


def test_its_note_has_the_teachers_loss_by_byte(recipe_values: dict[str, Any], toys: Path) -> None:
    recipe_values["data"] |= {"packing": False, "max_length": 64}
    built = trimmed_run(recipe_values, keep=285)
    note = next(note for note in built.notes if note.startswith("student.vocabulary: 285 of 300 tokens."))
    cut, whole, rest = (float(number) for number in re.findall(r"\d+\.\d+", note))
    texts = [json.loads(line)["text"] for line in (toys / "eval.jsonl").read_text().splitlines()][:16]
    tokenizer, model = (
        AutoTokenizer.from_pretrained(toys / "teacher"),
        AutoModelForCausalLM.from_pretrained(toys / "teacher"),
    )

    def bits(model: Any, tokenizer: Any) -> float:
        nats, size = 0.0, 0
        for text in texts:
            row = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
            assert len(row) <= 64
            ids = torch.tensor([row])
            log_probs = model.double().eval()(ids).logits[0, :-1].log_softmax(-1)
            nats -= float(log_probs.gather(-1, ids[0, 1:, None]).sum())
            size += len(tokenizer.decode(row[1:], skip_special_tokens=True).encode())
        return nats / math.log(2) / size

    with torch.no_grad():
        assert whole == pytest.approx(bits(model, tokenizer), abs=6e-4)
        assert cut == pytest.approx(bits(built.loaded.model, built.tokenizer), abs=6e-4)
    assert 0 < rest < 100


def test_an_existing_student_is_cut_and_a_run_saves_it(recipe_values: dict[str, Any], toys: Path) -> None:
    recipe_values["student"] = {"model": str(toys / "student"), "vocabulary": {"keep": 280}}
    recipe_values["data"] |= {"packing": False, "max_length": 64}
    recipe_values["evaluate"] = {"continuations": 1}
    result = quiet_run(recipe_values)
    saved = AutoModelForCausalLM.from_pretrained(result.directory / "student")
    tokenizer = AutoTokenizer.from_pretrained(result.directory / "student")
    assert saved.config.vocab_size == len(tokenizer.get_vocab()) == 280
    assert saved.config.eos_token_id == tokenizer.eos_token_id
    rows = result.summary["rows"]
    assert rows["teacher"]["bytes"] == 4 * rows["teacher"]["parameters"]
    _check_whole_teacher(rows, tokenizer, toys)
    page = (result.directory / "report.html").read_text()
    assert re.search(r"<th[^>]*>whole teacher</th><th[^>]*>teacher</th><th[^>]*>student</th>", page)


def test_prompts_may_be_longer_than_the_rows_of_a_rehearsal(recipe_values: dict[str, Any], tmp_path: Path) -> None:
    rows = [{"prompt": "a b c d e f g h i j k l m n o p q r s t" + " u" * i, "completion": " v w"} for i in range(8)]
    for part in ("train", "eval"):
        (tmp_path / f"{part}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        recipe_values["data"][part] = {"path": str(tmp_path / f"{part}.jsonl")}
    recipe_values["data"] |= {"packing": False, "max_length": 64}
    built = trimmed_run(recipe_values, keep="data")
    rehearse(built, built.new_student())


def test_held_out_rows_may_be_the_end_token_alone(recipe_values: dict[str, Any], toys: Path, tmp_path: Path) -> None:
    text = json.loads((toys / "train.jsonl").read_text().splitlines()[0])["text"]
    length = len(AutoTokenizer.from_pretrained(toys / "teacher")(text)["input_ids"])
    (tmp_path / "eval.jsonl").write_text(json.dumps({"text": text}))
    recipe_values["data"] |= {"packing": False, "max_length": length, "eval": {"path": str(tmp_path / "eval.jsonl")}}
    built = trimmed_run(recipe_values, keep="data")
    assert built.tokenizer.eos_token_id in [
        row["input_ids"][-1] for row in built.eval.dataset if len(row["input_ids"]) < 3
    ]
    rehearse(replace(built, eval=replace(built.eval, dataset=built.eval.dataset.select([1]))), built.new_student())


def test_an_adapter_of_a_cut_model_is_merged(recipe_values: dict[str, Any], toys: Path) -> None:
    student = {"model": str(toys / "student"), "vocabulary": {"keep": 280}, "adapter": "lora"}
    recipe_values["student"] = student
    with pytest.raises(
        RecipeError, match="expected lora or ia3 with merge: true with vocabulary, got lora: the cut model"
    ):
        Recipe.parse(recipe_values)
    recipe_values["student"] = student | {"adapter": {"kind": "lora", "merge": True}}
    assert Recipe.parse(recipe_values).student.merges


def _check_whole_teacher(rows: dict[str, Any], own: Any, toys: Path) -> None:
    """Check the row of the teacher with all its tokens against a plain computation."""
    nats, size, tokens = 0.0, 0, 0
    model, tokenizer = (kind.from_pretrained(toys / "teacher") for kind in (AutoModelForCausalLM, AutoTokenizer))
    for line in (toys / "eval.jsonl").read_text().splitlines():
        text = json.loads(line)["text"]
        row = torch.tensor([[*tokenizer(text)["input_ids"], tokenizer.eos_token_id]])
        with torch.no_grad():
            nats += float(model.double().eval()(row, labels=row).loss) * (row.shape[1] - 1)
        size += len(tokenizer.decode(row[0, 1:], skip_special_tokens=True).encode())
        tokens += len(own(text)["input_ids"])
    whole, student = rows["whole_teacher"], rows["student"]
    assert whole["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-5)
    assert whole["loss"] == pytest.approx(nats / tokens, rel=1e-5)
    assert whole["parameters"] == model.num_parameters() > rows["teacher"]["parameters"]
    assert student["bits_per_byte"] == pytest.approx(student["loss"] * tokens / math.log(2) / size, rel=1e-5)


def test_a_pruned_design_of_all_widths_is_the_cut_teacher(recipe_values: dict[str, Any]) -> None:
    recipe_values["student"] = {"design": {"num_hidden_layers": 2}, "initialize": "prune"}
    built = trimmed_run(recipe_values, keep=270)
    ids = torch.arange(270)[None, ::9]
    with torch.no_grad():
        torch.testing.assert_close(built.new_student().eval()(ids).logits, built.loaded.model.eval()(ids).logits)


def test_a_budget_counts_the_kept_tokens_and_its_shares_are_of_the_whole_teacher(
    recipe_values: dict[str, Any], toys: Path
) -> None:
    whole = AutoModelForCausalLM.from_pretrained(toys / "teacher").num_parameters()
    for budget in {"params": 5900}, {"compression": whole / 5900}:
        recipe_values["student"] = {"design": budget, "initialize": "prune"}
        built = trimmed_run(recipe_values, keep=262)
        assert built.size.all == pytest.approx(5900, rel=0.05)
        assert built.new_student().config.vocab_size == 262


def test_shown_rows_are_those_that_are_trained_on(recipe_values: dict[str, Any]) -> None:
    recipe_values["student"]["vocabulary"] = {"keep": 262}
    recipe = Recipe.parse(recipe_values)
    shown, built = show_data(recipe, 1).rows[0], build_run(recipe)
    assert len(shown.tokens) == len(built.train.dataset[0]["input_ids"])


def test_a_masked_model_is_cut_too(judged_rows: Path, tmp_path: Path) -> None:
    save(make_encoder("bert", "masked", seed=1), Path("teacher"))
    values = {
        "name": "masked", "task": "masked", "teacher": {"model": "teacher"}, "output": str(tmp_path / "run"),
        "student": {"design": {"num_hidden_layers": 1}, "initialize": "copy", "vocabulary": {"keep": "data"}},
        "data": {"train": {"path": "train.jsonl"}, "eval": {"path": "eval.jsonl"}, "max_length": 32},
        "objective": [{"term": "logits"}, {"term": "labels"}], "train": {"max_steps": 1},
    }  # fmt: skip
    built = build_run(Recipe.parse(values))
    assert built.vocabulary == built.new_student().config.vocab_size == len(built.tokenizer.get_vocab())


def test_a_classifier_is_cut_too(judged_rows: Path, tmp_path: Path) -> None:
    save(make_encoder("bert", "classification", seed=1), Path("teacher"))
    Path("text.txt").write_text("more words")
    values: dict[str, Any] = {
        "name": "run", "task": "classification", "teacher": {"model": "teacher"}, "output": str(tmp_path / "run"),
        "student": {"design": {"num_hidden_layers": 1}, "initialize": "copy", "vocabulary": {"keep": "data"}},
        "data": {"train": {"path": "train.jsonl"}, "eval": {"path": "eval.jsonl"}, "max_length": 32},
        "objective": [{"term": "logits"}, {"term": "labels"}], "train": {"max_steps": 1},
    }  # fmt: skip
    for text in {}, {"text": {"path": "text.txt"}}:
        values["student"]["vocabulary"] = {"keep": "data", **text}
        built = build_run(Recipe.parse(values))
        assert built.new_student().config.vocab_size == len(built.tokenizer.get_vocab())
        assert "token_type_ids" in built.tokenizer.model_input_names


@pytest.mark.parametrize("task", ["classification", "masked"])
def test_the_size_of_an_encoder_is_compared_with_that_of_the_whole_teacher(
    judged_rows: Path, tmp_path: Path, task: str
) -> None:
    teacher = make_encoder("bert", task, seed=1)
    save(teacher, Path("teacher"))
    Path("text.txt").write_text("more words")
    vocabulary = {"keep": "data", "text": {"path": "text.txt"}}
    rows = quiet_run(
        {
            "name": "run", "task": task, "teacher": {"model": "teacher"}, "output": str(tmp_path / "run"),
            "student": {"design": {"num_hidden_layers": 1}, "initialize": "copy", "vocabulary": vocabulary},
            "data": {"train": {"path": "train.jsonl"}, "eval": {"path": "eval.jsonl"}, "max_length": 32},
            "objective": [{"term": "logits"}, {"term": "labels"}], "train": {"max_steps": 1},
        }
    ).summary["rows"]  # fmt: skip
    whole, cut = rows["whole_teacher"], rows["teacher"]
    assert whole["parameters"] == teacher.num_parameters() > cut["parameters"]
    assert whole["bytes"] == Path("teacher/model.safetensors").stat().st_size > cut["bytes"]
    page = (tmp_path / "run" / "report.html").read_text()
    ratio = whole["parameters"] / rows["student"]["parameters"]
    assert f"{ratio:.1f}" in page
    assert ">whole teacher<" in page


def test_rows_of_ids_are_those_of_all_tokens(recipe_values: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "ids.jsonl").write_text(json.dumps({"input_ids": [5, 6, 7, 8]}))
    recipe_values["data"] |= {"packing": False, "eval": {"path": str(tmp_path / "ids.jsonl")}}
    with pytest.raises(RecipeError, match=r"student\.vocabulary: expected texts.*got ids of all tokens in ids\.jsonl"):
        trimmed_run(recipe_values, keep=262)


def test_caches_keep_all_tokens(recipe_values: dict[str, Any], tmp_path: Path) -> None:
    recipe_values["student"]["vocabulary"] = {"keep": "data"}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe_values))
    done = CliRunner().invoke(app, ["cache", "build", str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "cache")])
    assert "expected a recipe without student.vocabulary" in str(done.exception)


def test_a_teacher_that_cannot_be_cut_is_refused(recipe_values: dict[str, Any], toys: Path) -> None:
    recipe_values["teacher"] = {"ensemble": [{"model": str(toys / "teacher")}, {"model": str(toys / "teacher")}]}
    with pytest.raises(RecipeError, match=r"student\.vocabulary: expected a teacher that is one model"):
        trimmed_run(recipe_values, keep="data")


@pytest.mark.parametrize("tied", [False, True])
def test_logits_are_those_of_the_kept_tokens(tied: bool) -> None:
    kept = [0, 2, 5, *range(20, 150)]
    model = make_llama(tie_word_embeddings=tied).eval()
    model.config.bos_token_id, model.config.eos_token_id = 2, 5
    model.generation_config.eos_token_id = [5, 7]
    ids = torch.tensor([[3, 9, 100, 0]])
    with torch.no_grad():
        before = model(torch.tensor(kept)[ids]).logits[..., kept]
        trim_model(model, kept)
        after = model(ids).logits
    assert torch.equal(before, after)
    assert model.config.vocab_size == len(kept)
    assert (model.config.bos_token_id, model.config.eos_token_id, model.config.pad_token_id) == (1, 2, None)
    assert model.generation_config.eos_token_id == [2]


@pytest.mark.parametrize("part", ["teacher", "student"])
def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(
    recipe_values: dict[str, Any], toys: Path, tmp_path: Path, part: str
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(toys / "teacher")
    tokenizer.add_tokens(["<|more|>", "<|still more|>"])
    make_llama(vocab_size=300).save_pretrained(tmp_path / "small")
    tokenizer.save_pretrained(tmp_path / "small")
    recipe_values["teacher"] = {"model": str(tmp_path / "small" if part == "teacher" else toys / "teacher")}
    if part == "student":
        recipe_values["objective"] = [{"term": "chunks"}, {"term": "labels"}]
        recipe_values["student"] = {"model": str(tmp_path / "small")}
    recipe_values["student"]["vocabulary"] = {"keep": "data"}
    with pytest.raises(ModelError, match=r"a row for each token of its tokenizer, got 300 rows and the token 301\."):
        build_run(Recipe.parse(recipe_values))


def test_a_text_is_counted_with_all_of_its_long_rows(recipe_values: dict[str, Any], tmp_path: Path) -> None:
    lines = Path(recipe_values["data"]["train"]["path"]).read_text().splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    row = {"prompt": " ".join(texts), "completion": "The end, zzz."}
    (tmp_path / "long.jsonl").write_text(json.dumps(row) + "\n")
    recipe_values["student"]["vocabulary"] = {"keep": "data", "text": {"path": str(tmp_path / "long.jsonl")}}
    whole = AutoTokenizer.from_pretrained(recipe_values["teacher"]["model"])
    kept = build_run(Recipe.parse(recipe_values)).tokenizer.get_vocab()
    needed = whole.convert_ids_to_tokens(whole(row["prompt"] + row["completion"])["input_ids"])
    assert {*needed} <= {*kept}


def test_a_masked_model_keeps_the_biases_of_its_head() -> None:
    config = BertConfig(
        vocab_size=100, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    model, kept = BertForMaskedLM(config).eval(), [0, *range(40, 90)]
    torch.nn.init.normal_(model.cls.predictions.bias)
    with torch.no_grad():
        before = model(torch.tensor(kept)[torch.tensor([[4, 9, 0]])]).logits[..., kept]
        trim_model(model, kept)
        after = model(torch.tensor([[4, 9, 0]])).logits
    assert torch.equal(before, after)


def test_positions_that_are_counted_from_the_padding_are_those_of_the_whole_model() -> None:
    tokenizer = wrapped(byte_level())
    tokenizer.pad_token = "<unused0>"
    config = RobertaConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=64, pad_token_id=4,
    )  # fmt: skip
    kept = choose_tokens(tokenizer, {}, "data")
    assert kept[4] == tokenizer.pad_token_id == 4
    trim_model(RobertaForMaskedLM(copy.deepcopy(config)), kept)
    with pytest.raises(ModelError, match="whose output for the kept tokens changes with their ids"):
        trim_model(RobertaForMaskedLM(config), [0, 1, *kept[4:]])


def test_models_that_read_tokens_elsewhere_are_refused() -> None:
    config = MobileBertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        embedding_size=16, intra_bottleneck_size=16, num_feedforward_networks=1, true_hidden_size=16,
    )  # fmt: skip
    with pytest.raises(ModelError, match="got MobileBertForMaskedLM, whose output for the kept tokens changes"):
        trim_model(MobileBertForMaskedLM(config), range(1, 64, 2))


def test_ids_in_configs_are_new_ones_or_those_of_no_token() -> None:
    config = ModernBertDecoderConfig(
        vocab_size=62, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        cls_token_id=9, sep_token_id=20, pad_token_id=0, bos_token_id=9, eos_token_id=20,
    )  # fmt: skip
    model = ModernBertDecoderForCausalLM(config)
    model.generation_config.bad_words_ids = [[20, 30], [20, 7]]
    model.generation_config.sequence_bias = [[[20, 30], 1.5], [[7], -2.0]]
    model.generation_config.force_words_ids = [[7]]
    trim_model(model, [0, *range(20, 62)])
    assert (config.cls_token_id, config.sep_token_id, config.bos_token_id, config.eos_token_id) == (-1, 1, -1, 1)
    assert model.generation_config.bad_words_ids == [[1, 11]]
    assert model.generation_config.sequence_bias == [[[1, 11], 1.5]]
    assert model.generation_config.force_words_ids is None  # an empty list is refused in generation


def test_other_tables_of_tokens_are_refused() -> None:
    config = Gemma3nTextConfig(
        vocab_size=64, vocab_size_per_layer_input=64, hidden_size=16, intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, hidden_size_per_layer_input=4, laurel_rank=4,
        num_kv_shared_layers=0, layer_types=["full_attention"] * 2, activation_sparsity_pattern=[0.0, 0.0],
    )  # fmt: skip
    with pytest.raises(ModelError, match="embeddings and head alone have rows for tokens"):
        trim_model(Gemma3nForCausalLM(config), range(32))
