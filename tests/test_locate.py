"""What is no model is an error in one line: what it is, and what to do; in seconds, with or without the Hub."""

from __future__ import annotations

import http.server
import json
import shutil
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from transformers import BertConfig, LlamaForCausalLM, LlamaForSequenceClassification

from conftest import make_llama, make_tokenizer
from potstill.embedding.encoders import load_embedder
from potstill.errors import ModelError, UserError
from potstill.models import locate as locate_module
from potstill.models.adapted import save_adapter
from potstill.models.loading import load_config, load_model, load_tokenizer, loading_notes, suppress_warnings
from potstill.models.precision import describe_precision


@pytest.fixture
def folder(toys: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(toys / "teacher", tmp_path / "teacher"))


def change_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def refused(load: Any, *arguments: Any, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        load(*arguments, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert caught.value.__class__ in (ModelError, UserError)
    return message


def lfs_pointer(folder: Path) -> None:
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def missing_shard(folder: Path) -> None:
    make_llama().save_pretrained(folder, max_shard_size="20kB")
    (folder / "model.safetensors").unlink()
    (folder / "model-00002-of-00004.safetensors").unlink()


def replaced(name: str) -> Any:
    def replace(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        (folder / name).write_bytes(b"x")

    return replace


def wider(folder: Path) -> None:
    change_config(folder, intermediate_size=64)


def emptied(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


def wrapped(folder: Path) -> None:
    shutil.copytree(folder, folder / "checkpoint-7")
    (folder / "config.json").unlink()


def without_index(folder: Path) -> None:
    make_llama().save_pretrained(folder, max_shard_size="20kB")
    for name in ("model.safetensors", "model.safetensors.index.json"):
        (folder / name).unlink()


def broken_index(folder: Path) -> None:
    without_index(folder)
    (folder / "model.safetensors.index.json").write_text("{")


def mlx(folder: Path) -> None:
    change_config(folder, quantization={"bits": 4}, quantization_config={"bits": 4})
    weights = load_file(folder / "model.safetensors")
    packed = {name: torch.zeros(2, 2) if "mlp" in name else weight for name, weight in weights.items()}
    save_file(packed, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lfs_pointer, "a pointer of Git LFS in place of model.safetensors. Run `git lfs pull` there."),
        (cut, "model.safetensors, which is cut off or damaged"),
        (missing_shard, "3 of 4 files of weights, without model-00002-of-00004.safetensors. Download"),
        (replaced("pytorch_model.bin"), 'pytorch_model.bin, a pickle.*convert it once: python -c "from transformers'),
        (replaced("pytorch_model.bin"), "import LlamaForCausalLM as M"),  # another class would lose the head
        (replaced("optimizer.pt"), "optimizer.pt, a pickle.* Load it where it was made, and save the model"),
        (replaced("consolidated.00.pth"), "a model in its maker's own format."),
        (replaced("consolidated.safetensors"), "a model in its maker's own format."),
        (replaced("zero_to_fp32.py"), "a checkpoint of DeepSpeed. Run its zero_to_fp32.py"),
        (replaced("pytorch_model_fsdp.bin"), "a checkpoint of FSDP. Run accelerate merge-weights"),
        (without_index, "weights in model-00001-of-00004.safetensors and 3 more, but neither model.safetensors nor"),
        (broken_index, "a model.safetensors.index.json that is not JSON. Download"),
        (replaced("model.onnx"), "an ONNX export. Name the model that it was made from."),
        (replaced("model.tflite"), "a TFLite export. Name the model that it was made from."),
        (replaced("tf_model.h5"), "weights of TensorFlow. Convert them with transformers 4"),
        (replaced("model-Q4.gguf"), "no safetensors, but a GGUF file. Name .*model-Q4.gguf"),
        (replaced("notes.txt"), "no file of weights. Download or copy it again"),
        (emptied, "an empty folder. Download or copy the model again."),
        (wrapped, "no config.json. Did you mean .*checkpoint-7"),
        (lambda folder: (folder / "config.json").write_text("{"), "a config.json that is not JSON."),
        (lambda folder: change_config(folder, model_type="zorg"), "zorg, which transformers .* does not know. Upgrade"),
        (
            lambda folder: change_config(folder, model_type="zorg", auto_map={"AutoConfig": "zorg.Config"}),
            "a zorg that needs code of its own, which is not run. Name a version of it",
        ),
        (wider, r"weights of other shapes than its config.json gives: .*mlp.down_proj.weight \[16, 32\] in place of"),
        (mlx, "weights .*"),
        (lambda folder: change_config(folder, quantization_config={"quant_method": "gptq", "bits": 4}), "gptqmodel"),
        (
            lambda folder: change_config(
                folder, quantization_config={"quant_method": "compressed-tensors", "config_groups": {}}
            ),
            r"quantized by compressed-tensors that need a package: .*pip install 'compressed-tensors",
        ),
    ],
)
def test_folders_without_a_usable_model(folder: Path, damage: Any, message: str) -> None:
    damage(folder)
    with pytest.raises(ModelError, match=message):
        raise ModelError(refused(load_model, str(folder), "teacher.model"))


def test_a_model_for_another_task(folder: Path) -> None:
    assert "a llama, of which there is none" in refused(load_model, str(folder), "teacher.model", task="masked")
    assert "without weights for score.weight" in refused(
        load_model, str(folder), "teacher.model", task="classification"
    )


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("teacher/model.safetensors", "a file of weights alone. Name its folder"),
        ("teacher/config.json", "a file of a model. Name its folder."),
        ("teacher/*", "the pattern .*, which matches [0-9]+. Name one, such as"),
        ("nothing*", "which is not one. Check the path."),
        ("my model", "expected a folder"),
        ("teachr", "Did you mean .*teacher?"),
        ("model.onnx", "an export for inference. Name the model that it was made from."),
        ("model.bin", "a pickle, which can run code when it is loaded."),
    ],
)
def test_paths_that_are_no_folder(folder: Path, path: str, message: str) -> None:
    for name in ("model.onnx", "model.bin"):
        (folder.parent / name).write_bytes(b"x")
    with pytest.raises(ModelError, match=message):
        raise ModelError(refused(load_model, str(folder.parent / path), "teacher.model"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("https://huggingface.co/org/name/tree/main", "Write org/name."),
        ("hf.co/org/name", "Write org/name."),
        ("hf://org/name", "Write org/name."),
        ("file:///models/name", "Write /models/name."),
        ("s3://bucket/name", "Download it, and name the folder."),
        ("org/name@v1.0", "run `hf download org/name --revision v1.0 --local-dir FOLDER`, and name that folder."),
        ("llama3:8b", "A name of Ollama is none of the Hub"),
        ("C:\\models\\llama", "Check the path."),
        ("a\nb", "got a b. Check the path."),
        ("", "got ''. Name one."),
    ],
)
def test_names_in_another_notation(name: str, message: str) -> None:
    assert message in refused(load_model, name, "teacher.model")


def test_a_folder_in_the_home_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder.parent))
    assert load_model("~/teacher", "teacher.model").num_parameters()
    assert load_tokenizer("~/teacher", "teacher.model").get_vocab()


def test_folders_without_a_usable_tokenizer(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()
    assert "no tokenizer. Save the original model's there" in refused(load_tokenizer, str(folder), "teacher.model")
    make_tokenizer().save_pretrained(folder / "checkpoint-5")
    assert "Did you mean " in refused(load_tokenizer, str(folder), "teacher.model")
    shutil.rmtree(folder / "checkpoint-5")
    (folder / "tokenizer_config.json").write_text("{}")
    assert "a tokenizer without its vocabulary" in refused(load_tokenizer, str(folder), "teacher.model")
    (folder / "tokenizer.json").write_text("{")
    assert "a tokenizer.json that is not JSON" in refused(load_tokenizer, str(folder), "teacher.model")
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(b"\n\x0a\n\x05<unk>")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    message = refused(load_tokenizer, str(folder), "teacher.model")
    assert "Install it with pip install sentencepiece tiktoken protobuf." in message


# Adapters


@pytest.fixture
def adapter(folder: Path, tmp_path: Path) -> Path:
    """An adapter as peft leaves it: without a tokenizer."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    model = LlamaForCausalLM.from_pretrained(folder)
    model.name_or_path = str(folder)
    config.base_model_name_or_path = str(folder)
    with suppress_warnings():
        peft.get_peft_model(model, config).save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    return tmp_path / "adapter"


def test_an_adapter_without_a_tokenizer_takes_its_bases(adapter: Path, folder: Path) -> None:
    assert load_tokenizer(str(adapter), "teacher.model").get_vocab() == make_tokenizer().get_vocab()
    change = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(change | {"base_model_name_or_path": "/gone/base"}))
    assert "the base of teacher.model" in refused(load_tokenizer, str(adapter), "teacher.model")


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("fault", ["missing", "renamed", "shape", "unread"])
def test_an_adapter_with_other_weights_is_refused(adapter: Path, fault: str, trainable: bool) -> None:
    assert load_model(str(adapter), "teacher.model", trainable=trainable) is not None
    path = adapter / "adapter_model.safetensors"
    weights = load_file(path)
    first = min(weights)
    if fault == "missing":
        del weights[first]
    elif fault == "renamed":
        weights = {f"module.{name}": weight for name, weight in weights.items()}
    elif fault == "shape":
        weights[first] = torch.zeros(2, weights[first].shape[1])
    else:
        weights[first.replace("layers.0", "layers.9")] = weights[first].clone()
    save_file(weights, path, metadata={"format": "pt"})
    message = refused(load_model, str(adapter), "teacher.model", trainable=trainable)
    assert message.startswith("teacher.model: expected the weights of this adapter")
    assert "correct base_model_name_or_path" in message


def plain_adapter(base: Path, folder: Path, rows: int | None = None, **options: Any) -> Any:
    """An adapter of a base as peft itself saves it, with other embeddings where they have another number of rows."""
    peft = pytest.importorskip("peft")
    model = LlamaForCausalLM.from_pretrained(base)
    if rows is not None:
        model.resize_token_embeddings(rows)
    config = peft.LoraConfig(r=4, task_type="CAUSAL_LM", init_lora_weights=False, **options)
    with warnings.catch_warnings(), suppress_warnings():
        warnings.simplefilter("ignore")  # of embeddings that are saved
        adapted = peft.get_peft_model(model, config)
        with torch.no_grad():
            for name, weight in adapted.named_parameters():
                weight.add_(0.3 * ("modules_to_save" in name))
        adapted.save_pretrained(folder)
    return adapted.eval()


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["norm"]},
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["q_proj"], "rows": 310},  # trained with more tokens than its base has
        {"target_modules": ["q_proj"], "rows": 310, "modules_to_save": ["embed_tokens", "lm_head"]},
    ],
)
def test_adapters_with_other_weights_than_their_own(
    folder: Path, tmp_path: Path, options: dict[str, Any], trainable: bool
) -> None:
    original = plain_adapter(folder, tmp_path / "adapter", **options)
    model = load_model(str(tmp_path / "adapter"), "student.model", "float32", trainable=trainable)
    ids = torch.arange(options.get("rows", 300) - 10, options.get("rows", 300))[None]
    torch.testing.assert_close(model(ids).logits, original(ids).logits)
    save_adapter(model, tmp_path / "again")
    again = load_model(str(tmp_path / "again"), "student", "float32")
    torch.testing.assert_close(again(ids).logits, original(ids).logits)


def test_a_classifier_that_peft_saved_without_its_config(folder: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = LlamaForSequenceClassification.from_pretrained(folder, num_labels=5)
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="SEQ_CLS", init_lora_weights=False)
    with suppress_warnings():
        adapted = peft.get_peft_model(model, config)
        adapted.save_pretrained(tmp_path / "adapter")
    loaded = load_model(str(tmp_path / "adapter"), "teacher.model", "float32", "classification")
    ids = torch.arange(8)[None]
    torch.testing.assert_close(loaded(ids).logits, adapted.eval()(ids).logits)


def test_adapters_of_adapters_and_beside_models(adapter: Path, folder: Path) -> None:
    shutil.copytree(adapter, adapter.parent / "second")
    config = json.loads((adapter / "adapter_config.json").read_text())
    second = adapter.parent / "second"
    (second / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(adapter)}))
    message = refused(load_model, str(second), "teacher.model")
    assert "expected a plain model, got" in message
    assert "a folder with an adapter. Merge that adapter with merge_and_unload()" in message
    shutil.copy(folder / "model.safetensors", adapter)
    (note,) = loading_notes(load_model(str(adapter), "teacher.model"))
    assert "also has a whole model, which is not read" in note
    (second / "adapter_config.json").write_text("{")
    assert "adapter_config.json that is not JSON" in refused(load_tokenizer, str(second), "student.model")
    (second / "adapter_config.json").write_text(json.dumps(config | {"peft_type": "ZORG"}))
    assert "an adapter of the kind ZORG, which peft" in refused(load_model, str(second), "teacher.model")


# Embedders


def test_an_embedder_is_no_language_model_and_the_other_way_round(embedder: Path, folder: Path) -> None:
    assert "got a sentence-transformers model" in refused(load_model, str(embedder), "teacher.model")
    assert "got a plain model without modules.json" in refused(load_embedder, str(folder), "teacher.embedder")


@pytest.mark.parametrize("prefix", [None, "module."])
def test_an_embedder_without_some_of_its_weights_is_refused(embedder: Path, tmp_path: Path, prefix: str | None) -> None:
    shutil.copytree(embedder, tmp_path / "model")
    load_embedder(str(tmp_path / "model"), "teacher.embedder")
    path = tmp_path / "model" / "model.safetensors"
    weights = {f"{prefix or ''}{name}": weight for name, weight in load_file(path).items()}
    kept = {name: weight for name, weight in weights.items() if prefix or "layer.1" not in name}
    save_file(kept, path, metadata={"format": "pt"})
    message = refused(load_embedder, str(tmp_path / "model"), "teacher.embedder")
    assert "saved within DataParallel" in message if prefix else "without weights for encoder.layer.1" in message


def rewrite(path: Path, change: Any) -> None:
    weights = load_file(path)
    save_file({name: change(name, weight) for name, weight in weights.items()}, path, metadata={"format": "pt"})


def spoil(folder: Path) -> None:
    rewrite(folder / "model.safetensors", lambda name, weight: weight * (float("nan") if "layer.1" in name else 1.0))


def forget_module(folder: Path) -> None:
    modules = json.loads((folder / "modules.json").read_text())
    (folder / "modules.json").write_text(json.dumps(modules[:1]))


def without_tokenizer(folder: Path) -> None:
    for path in [*folder.glob("tokenizer*"), *folder.glob("vocab*")]:
        path.unlink()


def other_width(folder: Path) -> None:
    from sentence_transformers.sentence_transformer.modules import Dense

    (folder / "2_Dense").mkdir()
    Dense(20, 8).save(str(folder / "2_Dense"))
    modules = json.loads((folder / "modules.json").read_text())
    kind = f"{Dense.__module__}.Dense"
    added = {"idx": len(modules), "name": str(len(modules)), "path": "2_Dense", "type": kind}
    (folder / "modules.json").write_text(json.dumps([*modules, added]))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (spoil, "expected finite weights"),
        (forget_module, "got the module 1_Pooling, which modules.json does not name"),
        (without_tokenizer, "got no tokenizer. Copy its files from the original model."),
        (other_width, "a sentence-transformers model whose modules go together"),
    ],
)
def test_embedders_that_would_give_other_vectors(embedder: Path, tmp_path: Path, damage: Any, message: str) -> None:
    folder = Path(shutil.copytree(embedder, tmp_path / "model"))
    damage(folder)
    assert message in refused(load_embedder, str(folder), "teacher.embedder")


@pytest.mark.parametrize(("kind", "differs"), [("Qwen2Tokenizer", True), ("PreTrainedTokenizerFast", False)])
def test_a_class_that_splits_text_otherwise_than_its_file_is_noted(folder: Path, kind: str, differs: bool) -> None:
    assert loading_notes(load_tokenizer(str(folder), "teacher.model")) == ()
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer_class": kind}))
    notes = loading_notes(load_tokenizer(str(folder), "teacher.model"))
    assert len(notes) == differs
    if differs:
        assert notes[0].startswith("teacher.model: the class Qwen2Tokenizer splits text otherwise than tokenizer.json")


def test_a_tokenizer_that_a_family_makes_of_nothing(tmp_path: Path) -> None:
    BertConfig(vocab_size=300).save_pretrained(tmp_path)
    assert "no tokenizer. Save the original model's there" in refused(load_tokenizer, str(tmp_path), "teacher.model")


# GGUF


def write_gguf(model: LlamaForCausalLM, path: Path) -> None:
    """Write a Llama as llama.cpp has it: the rows of queries and keys are interleaved."""
    gguf = pytest.importorskip("gguf")
    config, writer = model.config, gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    bpe = json.loads(make_tokenizer().backend_tokenizer.to_str())["model"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["<|endoftext|>", *list(bpe["vocab"])[1:]])  # which transformers adds where it is absent
    writer.add_token_types([1] * len(bpe["vocab"]))
    writer.add_token_merges([" ".join(merge) for merge in bpe["merges"]])
    for add in (writer.add_bos_token_id, writer.add_eos_token_id, writer.add_unk_token_id):
        add(0)
    writer.add_pad_token_id(1)
    names = {
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
        "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output", "model.layers.": "blk.",
    }  # fmt: skip
    for name, weight in model.state_dict().items():
        array = weight.float().numpy()
        for part, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            if part in name:
                split = array.reshape(heads, 2, len(array) // heads // 2, array.shape[1])
                array = split.swapaxes(1, 2).reshape(array.shape)
        for own, gguf_name in names.items():
            name = name.replace(own, gguf_name)
        writer.add_tensor(name, np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("by_folder", [False, True])
def test_a_gguf_file_is_a_teacher(tmp_path: Path, by_folder: bool) -> None:
    original = make_llama(seed=1)
    write_gguf(original, tmp_path / "model.gguf")
    name = str(tmp_path if by_folder else tmp_path / "model.gguf")
    model = load_model(name, "teacher.model", "float32")
    ids = torch.arange(8)[None]
    torch.testing.assert_close(model(ids).logits, original.eval()(ids).logits)
    assert loading_notes(model) == ()
    assert getattr(model.config, "quantization_config", None) is None
    assert load_config(name, "teacher").hidden_size == original.config.hidden_size
    text = "def f(a, b):"
    assert load_tokenizer(name, "teacher.model")(text)["input_ids"] == make_tokenizer()(text)["input_ids"]
    assert describe_precision(name) == "GGUF"


def test_gguf_files_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gguf")
    (tmp_path / "a.gguf").write_bytes(b"GGUF" + bytes(60))
    message = refused(load_model, str(tmp_path), "teacher.model")
    assert "a GGUF file that transformers" in message
    assert "Name the model that it was converted from, in safetensors." in message
    (tmp_path / "mmproj-a.gguf").write_bytes(b"GGUF" + bytes(60))
    assert "a.gguf" in locate_module.locate(str(tmp_path), "teacher.model").options["gguf_file"]
    (tmp_path / "b.gguf").write_bytes(b"GGUF" + bytes(60))
    assert "expected one GGUF file" in refused(load_model, str(tmp_path), "teacher.model")
    (tmp_path / "a-00001-of-00002.gguf").write_bytes(b"GGUF" + bytes(60))
    message = refused(load_model, str(tmp_path / "a-00001-of-00002.gguf"), "teacher.model")
    assert "a part of one. Merge the parts with llama-gguf-split --merge, and name" in message
    monkeypatch.setattr(locate_module, "import_module", lambda name: __import__("no_such_package"))
    message = refused(load_model, str(tmp_path / "a.gguf"), "teacher.model")
    assert "pip install 'potstill[gguf]'" in message


# The Hub


class Hub(http.server.BaseHTTPRequestHandler):
    """Answers as the Hub does, by the name of the repository."""

    def do_HEAD(self) -> None:
        code, error = next((answer for name, answer in ANSWERS.items() if name in self.path), (404, "RepoNotFound"))
        self.send_response(code)
        self.send_header("X-Error-Code", error)
        self.send_header("ETag", '"0"')
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *arguments: Any) -> None:
        pass


ANSWERS = {"maker/gated": (403, "GatedRepo"), "maker/adapter": (404, "EntryNotFound"), "maker/model": (200, "")}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    use_hub(monkeypatch, f"http://127.0.0.1:{server.server_port}")
    yield
    server.shutdown()
    server.server_close()


def use_hub(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(locate_module, "hf_hub_url", lambda name, file: f"{address}/{name}/resolve/main/{file}")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("maker/gated", "which is gated. Accept its terms at https://huggingface.co/maker/gated, and log in"),
        ("maker/typo", "which is neither, or private. Check the spelling; for a private model log in with `hf auth"),
        ("typo", "which is neither, or private. Check the spelling"),
        ("maker/adapter", "which has none. An adapter or a GGUF file is read from a folder: hf download maker/adapter"),
    ],
)
def test_names_that_the_hub_refuses(hub: None, name: str, message: str) -> None:
    assert message in refused(load_model, name, "teacher.model")


def test_a_name_on_the_hub(hub: None) -> None:
    assert locate_module.locate("maker/model", "teacher.model").path == "maker/model"


def test_without_a_connection_the_error_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    use_hub(monkeypatch, "http://127.0.0.1:9")  # nothing listens there
    message = refused(load_model, "maker/model", "teacher.model")
    assert "huggingface.co cannot be reached. Name a folder, or run `hf download maker/model`" in message
    monkeypatch.setattr(locate_module, "HUB_SECONDS", 0.2)
    answered, end = threading.Event(), threading.Event()

    def wait(*given: Any, **options: Any) -> None:
        end.wait()
        answered.set()

    monkeypatch.setattr(locate_module, "get_hf_file_metadata", wait)
    assert "cannot be reached" in refused(load_tokenizer, "maker/model", "teacher.model")
    assert not answered.is_set()
    end.set()


def test_offline_mode_takes_what_was_downloaded(toys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in refused(load_model, "maker/model", "teacher.model")
    snapshot = tmp_path / "models--maker--model" / "snapshots" / "abc"
    shutil.copytree(toys / "teacher", snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("abc")
    found = lambda name, file: str(snapshot / file)  # noqa: E731
    monkeypatch.setattr(locate_module, "try_to_load_from_cache", found)
    assert load_model("maker/model", "teacher.model").num_parameters()
    assert load_tokenizer("maker/model", "teacher.model").get_vocab()


def test_a_name_that_no_repository_can_have() -> None:
    assert "expected a folder or a model's name, got my model. Check the path." in refused(
        load_model, "my model", "teacher.model"
    )
