"""Models and tokenizers from a folder or the Hugging Face hub: weights as safetensors only, no remote code."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from potstill.errors import ModelError, UserError, one_line
from potstill.losses.alignment import SEQUENCE_TASKS, Task
from potstill.losses.fused_linear import multiplies_bfloat16
from potstill.models.adapted import (
    QUANTIZATION,
    adapter_weights,
    is_adapter,
    judging,
    load_adapter,
    require_peft,
    suppress_peft_warnings,
)

# What a task's model is: how transformers loads it, and what it is called.
KINDS: dict[Task, tuple[Any, str]] = {
    "causal": (AutoModelForCausalLM, "a causal language model"),
    "masked": (AutoModelForMaskedLM, "a masked language model"),
    "classification": (AutoModelForSequenceClassification, "a sequence classifier"),
    "regression": (AutoModelForSequenceClassification, "a sequence classifier of one number"),
    "encoder": (AutoModel, "a model of transformers"),
}


@contextmanager
def suppress_warnings() -> Iterator[None]:
    """Transformers' own bars and remarks would tear the progress bar apart; errors stay."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with suppress_peft_warnings():
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def load_model(
    where: str,
    key: str,
    dtype: str = "auto",
    task: Task = "causal",
    *,
    bits: int | None = None,
    labels_of: PretrainedConfig | None = None,
    trainable: bool = False,
) -> PreTrainedModel:
    """A model for a task; a PeftModel, where the folder holds an adapter alone.

    Args:
        where: a folder, or the name of a model on the hub.
        key: how the recipe calls it, for errors.
        dtype: float32, bfloat16, float16, or auto for the precision in which it is saved: float32 where only a CPU is
            there that has no instructions for less, because it would be several times slower.
        task: what it is asked for.
        bits: 4 (nf4, its scales quantised too) or 8 (int8) for linear layers that are rounded when they are loaded;
            the head and the embeddings stay whole. They cannot be trained, and need bitsandbytes.
        labels_of: a model whose classes it takes over where it has no classifier of its own yet. Without this, weights
            that are not there are an error.
        trainable: an adapter is to be trained further.

    Raises:
        ModelError: there is no such model, or it is not one for the task in safetensors.
        UserError: a package is missing.
    """
    _must_exist(where, key)
    if dtype == "auto" and not has_bfloat16():
        dtype = "float32"
    if is_adapter(where):
        return _load_with_adapter(Path(where).expanduser(), key, dtype, task, trainable)
    quantization = None if bits is None else _rounded(bits, dtype, key)
    return _load_whole(where, key, dtype, task, quantization, labels_of)


def _load_whole(
    where: str, key: str, dtype: str, task: Task, quantization: Any, labels_of: PretrainedConfig | None
) -> PreTrainedModel:
    chosen = dtype if dtype == "auto" else getattr(torch, dtype)
    auto, called = KINDS[task]
    options: dict[str, Any] = {"dtype": chosen, "use_safetensors": True, "trust_remote_code": False}
    if labels_of is not None and task in SEQUENCE_TASKS:
        saved = load_config(where, key)
        if not any("SequenceClassification" in name for name in saved.architectures or ()):
            options |= {"id2label": labels_of.id2label, "label2id": labels_of.label2id}
    if quantization is not None:
        if task in SEQUENCE_TASKS:
            with torch.device("meta"):
                quantization.llm_int8_skip_modules = judging(auto.from_config(load_config(where, key)))
        options["quantization_config"] = quantization
    try:
        model, found = auto.from_pretrained(where, output_loading_info=True, **options)
    except Exception as error:
        raise _unreadable(key, f"{called} with weights in safetensors", where, error) from error
    missing = sorted(name for name in found["missing_keys"] if task != "encoder" or "pooler" not in name)
    if missing and labels_of is None and task != "causal":
        raise ModelError(
            f"{key}: expected {called} in {where}, got a model without weights for {', '.join(missing[:3])}"
            f"{' and others' if len(missing) > 3 else ''}. They would be random. Name a model that was trained for it."
        )
    model.config.architectures = [type(model).__name__]  # as it would be saved, for students that are made like it
    if task in SEQUENCE_TASKS:
        model.config.problem_type = "regression" if task == "regression" else "single_label_classification"
    loaded: PreTrainedModel = model
    return loaded


def _rounded(bits: int, dtype: str, key: str) -> BitsAndBytesConfig:
    """How linear layers are rounded to so many bits; products are computed in the model's precision."""
    _require_bitsandbytes(key)
    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    compute = torch.bfloat16 if dtype == "auto" else getattr(torch, dtype)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=compute
    )


def _require_bitsandbytes(key: str) -> None:
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        raise UserError(
            f"{key}: expected the package bitsandbytes for a model in 4 or 8 bits, got none. "
            "Install it with pip install 'potstill[quantized]'."
        ) from None


def _load_with_adapter(folder: Path, key: str, dtype: str, task: Task, trainable: bool) -> PreTrainedModel:
    """The base that an adapter names, rounded as it was when the adapter was trained, with the adapter on it. A head
    that was trained with it replaces the base's, whatever that has.
    """
    peft = require_peft(key)
    adapter_weights(folder, key)  # peft would also read pickles
    kept = folder / QUANTIZATION
    if kept.exists():
        _require_bitsandbytes(key)
    try:
        config = peft.PeftConfig.from_pretrained(str(folder))
        quantization = BitsAndBytesConfig.from_dict(json.loads(kept.read_text())) if kept.exists() else None
    except Exception as error:
        raise _unreadable(key, "an adapter of peft", str(folder), error) from error
    base = config.base_model_name_or_path
    if not base:
        raise ModelError(f"{key}: expected an adapter that names its base, got one in {folder} that does not.")
    _must_exist(base, f"the base of {key}")
    classes = load_config(str(folder), key) if config.modules_to_save else None
    model = _load_whole(base, f"the base of {key}", dtype, task, quantization, classes)
    try:
        with suppress_peft_warnings():
            if trainable:
                config.inference_mode = False
                adapted = peft.get_peft_model(model, config)
                load_adapter(adapted, folder)
            else:
                adapted = peft.PeftModel.from_pretrained(model, folder).requires_grad_(False)
    except Exception as error:
        raise _unreadable(key, f"an adapter for {base}", str(folder), error) from error
    return adapted.eval()


def has_bfloat16() -> bool:
    """Whether models run in bfloat16 without a detour: on an accelerator, or a CPU with instructions for it."""
    return torch.accelerator.is_available() or multiplies_bfloat16()


def load_tokenizer(where: str, key: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model; arguments and errors as `load_model`."""
    _must_exist(where, key)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(where, trust_remote_code=False)
    except Exception as error:
        raise _unreadable(key, "a tokenizer", where, error) from error
    return tokenizer


def load_config(where: str, key: str) -> PretrainedConfig:
    """The config of a model, whose weights need not be there; arguments and errors as `load_model`."""
    _must_exist(where, key)
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(where, trust_remote_code=False)
    except Exception as error:
        raise _unreadable(key, "a model's config.json", where, error) from error
    return config


def _must_exist(where: str, key: str) -> None:
    """A path that is meant as one must be there: else transformers would ask the hub for it, for a long time."""
    path = Path(where).expanduser()
    if path.is_dir():
        return
    folders = [p.name for p in path.parent.iterdir() if p.is_dir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, folders, n=1, cutoff=0.8)
    may_be_on_the_hub = where.count("/") <= 1 and not where.startswith((".", "/", "~")) and not path.exists()
    if may_be_on_the_hub and not near and not ("/" in where and path.parent.is_dir()):
        return
    hint = f"Did you mean {path.parent / near[0]}?" if near else "Check the path."
    raise ModelError(f"{key}: expected a folder with a model, got {where}, which is not one. {hint}")


def _unreadable(key: str, wanted: str, where: str, error: Exception) -> ModelError:
    reason = one_line(error)
    reason = reason if len(reason) <= 300 else reason[:300] + "..."
    return ModelError(f"{key}: expected {wanted} in {where}, got {type(error).__name__}: {reason}")
