"""GGUF files: what llama.cpp computes from them is what transformers computes."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, set_seed
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from conftest import TEXT, make_llama, make_tokenizer
from potstill.runs.formats.gguf_families import FAMILIES
from potstill.runs.formats.gguf_file import gguf_kind, kind_notes, write_gguf
from potstill.runs.formats.gguf_tokenizer import _SPLITS
from potstill.runs.formats.llama_cpp import LlamaCpp

pytest.importorskip("gguf")
pytest.importorskip("xllamacpp", reason="llama.cpp is not installed: pip install 'potstill[export]'")

SIZES = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "initializer_range": 0.12,
    "eos_token_id": 0, "bos_token_id": None, "pad_token_id": 1,
}  # fmt: skip
GPT2 = {"vocab_size": 300, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64, "initializer_range": 0.12}
WINDOWS = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"] * 2, "query_pre_attn_scalar": 8}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "long_factor": [1.5, 2.0, 3.0, 4.0],
    "short_factor": [1.0, 1.1, 1.2, 1.3], "original_max_position_embeddings": 512, "factor": 2.0,
}  # fmt: skip
YARN: dict[str, Any] = {
    "head_dim": 64,
    "rope_parameters": {
        "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16,
    },
}  # fmt: skip


def _changed_yarn(**changes: Any) -> dict[str, Any]:
    return {**YARN, "rope_parameters": {**YARN["rope_parameters"], **changes}}


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "llama, biases": ("llama", {"attention_bias": True}),
    "llama, llama3 frequencies": ("llama", {"rope_parameters": LLAMA3}),
    "llama, linear frequencies": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
    ),
    "llama, yarn": ("llama", YARN),
    "llama, yarn with another scale": ("llama", _changed_yarn(attention_factor=1.0)),
    "qwen3, yarn of DeepSeek": ("qwen3", _changed_yarn(mscale=0.707, mscale_all_dim=1.0)),
    "llama, pruned heads": ("llama", {"num_attention_heads": 2, "num_key_value_heads": 1}),
    "mistral": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen2, pruned heads": ("qwen2", {"num_attention_heads": 2, "num_key_value_heads": 1}),
    "qwen2, heads of another width": ("qwen2", {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "qwen3, ignored fields": ("qwen3", {"partial_rotary_factor": 0.5, "final_logit_softcapping": 5.0}),
    "phi3": ("phi3", {}),
    "phi3, longrope": ("phi3", {"rope_parameters": LONGROPE, "max_position_embeddings": 1024}),
    "gemma": ("gemma", {}),
    "gemma, ignored fields": ("gemma", {"partial_rotary_factor": 0.5, "query_pre_attn_scalar": 4}),
    "gemma2": ("gemma2", WINDOWS),
    "gemma2, another scale": ("gemma2", {**WINDOWS, "query_pre_attn_scalar": 16}),
    "gemma3_text": ("gemma3_text", WINDOWS),
    "gemma3_text, full attention in each third layer": (
        "gemma3_text",
        {**WINDOWS, "layer_types": [*["sliding_attention"] * 2, "full_attention", "sliding_attention"]},
    ),
    "gemma3_text, another scale": ("gemma3_text", {**WINDOWS, "query_pre_attn_scalar": 16}),
    "gpt2": ("gpt2", {}),
    "gpt2, another width": ("gpt2", {"n_inner": 48}),
}


def make(family: str, **changes: Any) -> Any:
    """A small model of a family whose norms and biases are not those of a new one."""
    set_seed(0)
    values = GPT2 if family == "gpt2" else SIZES
    known = CONFIG_MAPPING[family]().to_dict()
    config = CONFIG_MAPPING[family](**{k: v for k, v in {**values, **changes}.items() if k in known or k in changes})
    model = AutoModelForCausalLM.from_config(config).float().eval()
    for weight in model.parameters():
        if weight.ndim == 1:
            weight.data += torch.randn_like(weight) / 5
    return model


def log_probs(path: Path, ids: list[int]) -> torch.Tensor:
    with LlamaCpp(path, 64) as loaded:
        return torch.tensor(np.concatenate([*loaded.logits(ids)])).log_softmax(-1)


@torch.no_grad()
def expected(model: Any, ids: list[int]) -> torch.Tensor:
    return model(torch.tensor([ids])).logits[0].log_softmax(-1)


IDS = torch.randint(2, 300, (24,), generator=torch.Generator().manual_seed(0)).tolist()


@pytest.mark.parametrize("case", CASES)
def test_llama_cpp_computes_what_transformers_does(case: str, tmp_path: Path) -> None:
    """Its cache of keys and values is in half precision, and its activations are read from tables."""
    model = make(CASES[case][0], **CASES[case][1])
    for kind in ("f32", "f16"):
        write_gguf(model, make_tokenizer(), tmp_path / "model.gguf", kind)
        expected_log_probs, actual = expected(model, IDS), log_probs(tmp_path / "model.gguf", IDS)
        assert (expected_log_probs.exp() * (expected_log_probs - actual)).sum(-1).max() < 1e-5, kind
        assert (expected_log_probs - actual).abs().max() < 1e-2, kind


def test_k_quants_are_those_of_llama_cpp(tmp_path: Path) -> None:
    """Blocks of 256 where they divide the rows, else of 32; more bits for the values and half of the layers."""
    from gguf import GGUFReader
    from gguf.quants import dequantize

    wide = {"hidden_size": 256, "intermediate_size": 288, "num_hidden_layers": 8, "head_dim": 64}
    model = make("llama", **wide, tie_word_embeddings=True)
    weight = model.model.layers[0].self_attn.o_proj.weight.detach().numpy()
    types = {
        "q6_k": ({"Q6_K", "Q8_0"}, 0.02),
        "q5_k_m": ({"Q5_K", "Q6_K", "Q5_1", "Q8_0"}, 0.04),
        "q4_k_m": ({"Q4_K", "Q6_K", "Q5_0", "Q8_0"}, 0.08),
    }
    for kind, (named, furthest) in types.items():
        write_gguf(model, make_tokenizer(), tmp_path / "model.gguf", kind)
        tensors = {tensor.name: tensor for tensor in GGUFReader(tmp_path / "model.gguf").tensors}
        of = {name: tensor.tensor_type.name for name, tensor in tensors.items()}
        assert {*of.values()} == named | {"F32"} and gguf_kind(tmp_path / "model.gguf") == kind
        assert of["token_embd.weight"] == "Q6_K", "tied: it is the head"
        assert (of["blk.0.ffn_down.weight"], of["blk.3.attn_v.weight"]) == ("Q8_0", "Q6_K"), "288 columns"
        tensor = tensors["blk.0.attn_output.weight"]
        error = dequantize(tensor.data, tensor.tensor_type).reshape(weight.shape) - weight
        assert np.square(error).mean() < np.square(furthest * weight).mean(), kind
        log_probs(tmp_path / "model.gguf", IDS)
    write_gguf(make("gpt2", n_embd=256, n_layer=8), make_tokenizer(), tmp_path / "model.gguf", "q4_k_m")
    of = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(tmp_path / "model.gguf").tensors}
    kinds = [of[f"blk.{layer}.attn_qkv.weight"] for layer in range(8)]
    assert kinds == ["Q6_K", "Q4_K", "Q4_K", "Q6_K", "Q4_K", "Q4_K", "Q6_K", "Q6_K"], "as the values alone"


def test_a_file_whose_weights_are_of_another_kind_has_a_note(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    for width, kind, shares in (
        (48, "q4_0", "100% f16."),
        (96, "q4_k_m", "q5_0, "),
        (256, "q4_k_m", None),
        (96, "q4_0", None),
        (48, "f16", None),
    ):
        sizes = {"hidden_size": width, "intermediate_size": width, "head_dim": width // 4, "num_hidden_layers": 8}
        write_gguf(make("llama", **sizes, num_key_value_heads=4), make_tokenizer(), path, kind)
        notes = [*kind_notes(path, kind)]
        assert len(notes) == (shares is not None)
        if shares is not None:
            assert f"are not {kind}: " in notes[0]
            assert shares in notes[0]


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2"])
def test_files_are_those_of_llama_quantize(family: str, tmp_path: Path) -> None:
    """Byte for byte, but for the head of files of 4 and 5 bits: it has 8 bits here, and 6 there."""
    from gguf import GGUFReader

    program = shutil.which("llama-quantize")
    if program is None:
        pytest.skip("no llama-quantize on PATH")
    wide = {"hidden_size": 256, "intermediate_size": 288, "num_hidden_layers": 9, "head_dim": 64}
    model = make(family, **({"n_embd": 256, "n_layer": 9} if family == "gpt2" else wide))
    write_gguf(model, make_tokenizer(), tmp_path / "f32.gguf", "f32")
    for kind in ("q4_k_m", "q5_k_m", "q6_k", "q8_0", "q4_0"):
        write_gguf(model, make_tokenizer(), tmp_path / "ours.gguf", kind)  # type: ignore[arg-type]
        command = [program, str(tmp_path / "f32.gguf"), str(tmp_path / "llama_cpp.gguf"), kind.upper(), "1"]
        subprocess.run(command, check=True, capture_output=True)
        ours, llama_cpp = (
            {t.name: (t.tensor_type.name, t.data.tobytes()) for t in GGUFReader(tmp_path / f"{name}.gguf").tensors}
            for name in ("ours", "llama_cpp")
        )
        assert ours.keys() == llama_cpp.keys()
        different = [name for name in ours if ours[name] != llama_cpp[name]]
        head = "token_embd.weight" if family == "gpt2" else "output.weight"
        assert different == ([head] if kind == "q4_0" else []), kind


def test_every_family_has_a_case() -> None:
    assert {family for family, _ in CASES.values()} == {*FAMILIES}


PIECES = [
    *("Hello", " world", "I'm", " you'LL", " don't", "'S", " 3.14", "12345", " 1,000,000", "\n\n", "\n", " \n ", "\t"),
    *(
        "def f(x):\n    return x",
        "{'a': [1, 2]}",
        "!=",
        "...",
        "-->",
        "§",
        "–",
        " naïve",
        " ÉCOLE",
        "straße",
        "ǅ",
        "  ",
    ),
    *("你好", "世界。", "こんにちは", "カタカナ", "한국어", "ไทย", "हिन्दी", "עברית", "العربية", "Привет", "Ελλάδα"),
    *("½", "²", "Ⅷ", "١٢٣", "😀", "👩‍💻", "🇫🇷", "❤️", "\u200b", "\u00a0", "\u3000", "\x00", "\x07", "\x1b[0m"),
    *("İstanbul", "\r\n", "\r", "\x7f", "\ufffd", "\U0001f9d1"),
]


def texts(special: list[str], number: int = 1000) -> list[str]:
    generator = np.random.default_rng(0)
    pieces = [*PIECES, *special]
    return ["".join(generator.choice(pieces, generator.integers(1, 12))) for _ in range(number)]


def byte_level(*steps: Any, ignore_merges: bool = False, normalizer: Any = None) -> PreTrainedTokenizerFast:
    """A byte-level BPE that splits words by `steps`, or as GPT-2."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    level = pre_tokenizers.ByteLevel(False, use_regex=not any(isinstance(s, pre_tokenizers.Split) for s in steps))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*steps, level]) if steps else level
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    options: dict[str, Any] = {
        "special_tokens": ["<end>", "<pad>"],
        "initial_alphabet": alphabet,
        "show_progress": False,
    }
    tokenizer.train_from_iterator([*TEXT, *PIECES, *texts([], 50)], trainers.BpeTrainer(vocab_size=700, **options))
    tokenizer.add_tokens([AddedToken("<think>", normalized=False)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<pad>")


def sentencepiece(prefix: bool) -> PreTrainedTokenizerFast:
    """A BPE with bytes for unknown characters, as Llama 2 has it with the prefix, and Gemma without."""
    alphabet = [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    replace = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace]) if prefix else replace
    special = ["<end>", "<pad>", "<unk>", *alphabet]
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=special, show_progress=False, limit_alphabet=100)
    tokenizer.train_from_iterator([*TEXT, *texts([], 50)], trainer)
    spec = json.loads(tokenizer.to_str())
    spec["added_tokens"] = [token for token in spec["added_tokens"] if not token["content"].startswith("<0x")]
    tokenizer = Tokenizer.from_str(json.dumps(spec))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<pad>", unk_token="<unk>")


def split(name: str) -> Any:
    (regex, ignore_merges), _ = next(item for item in _SPLITS.items() if item[1] == name)
    return byte_level(pre_tokenizers.Split(Regex(regex), "isolated"), ignore_merges=ignore_merges)


TOKENIZERS = {
    "gpt-2": lambda: byte_level(),
    "smollm": lambda: byte_level(pre_tokenizers.Digits(individual_digits=True)),
    **{name: lambda name=name: split(name) for name in _SPLITS.values()},
    "sentencepiece": lambda: sentencepiece(prefix=True),
    "sentencepiece without a prefix": lambda: sentencepiece(prefix=False),
}


def written(tokenizer: Any, path: Path) -> Path:
    write_gguf(make_llama(len(tokenizer), hidden_size=8, layers=1), tokenizer, path / "model.gguf", "f16")
    return path / "model.gguf"


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_tokenizers_agree_on_a_thousand_texts(kind: str, tmp_path: Path) -> None:
    tokenizer = TOKENIZERS[kind]()
    special = ["<end>", "<pad>", "<think>"] if kind != "sentencepiece" else ["<end>", "<pad>"]
    with LlamaCpp(written(tokenizer, tmp_path)) as loaded:
        differ = [text for text in texts(special) if loaded.tokenize(text) != tokenizer(text)["input_ids"]]
    if kind in ("tekken", "gpt-4o"):  # llama.cpp's expressions match the capitals of ASCII alone, and no marks
        assert differ
        differ = [text for text in differ if text.isascii()]
    assert differ == []


def test_the_page_lists_the_families() -> None:
    """Of all formats: test_export_onnx.py exports each of them to ONNX and OpenVINO."""
    page = (Path(__file__).parents[1] / "docs" / "export.md").read_text(encoding="utf-8")
    rows = [f"| `{name}` | `{family.arch}` | `{family.activation}` | yes |" for name, family in FAMILIES.items()]
    head = ["| Family | Architecture in GGUF | Activation there | ONNX, OpenVINO |", "|---|---|---|---|"]
    assert "\n".join([*head, *rows]) in page
