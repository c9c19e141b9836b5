"""Load models, adapters and tokenizers from a folder or the Hugging Face Hub: safetensors only, no remote code."""

from __future__ import annotations

import json
import logging as stdlib_logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models import auto
from transformers.utils import logging

from potstill.errors import ModelError, PotstillError
from potstill.losses.alignment import MOST_TOKENS, SEQUENCE_TASKS, TOKEN_TASKS, Task
from potstill.losses.cpu import multiplies_bfloat16
from potstill.models.advice import has_tokenizer, unreadable
from potstill.models.checksums import changed_notes, check_folder
from potstill.models.integrity import check_loaded, check_values
from potstill.models.locate import ModelLocation, locate, require_package, weight_files
from potstill.models.placement import check_fits, placing, remove_with, weight_notes
from potstill.models.precision import (
    DTYPES,
    as_dtype,
    bitsandbytes_config,
    check_quantizable,
    keep_gradients,
    saved_bytes,
    saved_dtype,
    saved_weights,
)
from potstill.models.size import language_model_class
from potstill.models.tokenizer_file import SAMPLE, tokenizer_notes

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
NOTES = "_potstill_notes"  # an attribute of loaded models and tokenizers, see `loading_notes`
CLASSIFIERS = ("score.weight", "classifier.weight", "out_proj.weight")  # of a saved adapter; the last gives classes
SAVED_EMBEDDINGS = "_potstill_saved_embeddings"  # an attribute of bases whose embeddings are saved with their adapter
SPREAD_INSTEAD = "Leave --stream out, and spread the teacher: teacher.device_map with teacher.offload_folder."
QUANTIZATION = "quantization_config.json"  # of the adapter's base, beside both

# The class that loads a task's model, and its name in errors.
AUTO_CLASSES: dict[Task, tuple[Any, str]] = {
    "causal": (auto.AutoModelForCausalLM, "a causal language model"),
    "masked": (auto.AutoModelForMaskedLM, "a masked language model"),
    "classification": (auto.AutoModelForSequenceClassification, "a sequence classifier"),
    "regression": (auto.AutoModelForSequenceClassification, "a sequence classifier of one number"),
    "encoder": (auto.AutoModel, "a model of transformers"),
}

MINOR_WARNINGS = (
    ".is_gradient_checkpointing. is deprecated",  # peft reads it
    "Position ids are not supported",  # prompt tuning in generate()
    "Merge lora module to [48]-bit",
    "MatMul8bitLt",
)


@contextmanager
def suppress_warnings() -> Iterator[None]:
    """Suppress progress bars and warnings of transformers, peft and bitsandbytes that do not matter here."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    # "inputs will be cast" at every product, and "on the meta device because they were offloaded"
    others = [stdlib_logging.getLogger(name) for name in ("bitsandbytes", "accelerate.big_modeling")]
    levels = [logger.level for logger in others]
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    for logger in others:
        logger.setLevel(stdlib_logging.ERROR)
    try:
        with warnings.catch_warnings():
            for message in MINOR_WARNINGS:
                warnings.filterwarnings("ignore", message=message)
            yield
    finally:
        for logger, level in zip(others, levels, strict=True):
            logger.setLevel(level)
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def load_model(
    name: str,
    key: str,
    dtype: str = "auto",
    task: Task = "causal",
    *,
    bits: int | None = None,
    labels_of: PretrainedConfig | None = None,
    trainable: bool = False,
    may_miss: bool = False,
    placement: Mapping[str, Any] | None = None,
) -> PreTrainedModel:
    """Load a model for a task from a folder or the Hub; a PeftModel where the folder holds an adapter alone.

    Args:
        name: of the model.
        key: the recipe's key, for errors.
        dtype: float32, bfloat16, float16, or auto for that of the saved weights; auto is float32 on a CPU that has no
            instructions for theirs, which would be several times slower otherwise.
        task: the model's task.
        bits: quantize linear layers but the head to 4 (nf4 with double quantization) or 8 bits (int8).
        labels_of: take over these classes where the saved model has no classifier.
        trainable: whether a saved adapter is to be trained further.
        may_miss: whether weights that are not in the checkpoint may start at random, which `loading_notes` reports.
        placement: device_map, max_memory and offload_folder of `from_pretrained`, to spread the model.
    """
    if is_adapter(name):
        if placement:
            raise ModelError(
                f"{key}: expected a whole model with device_map, got an adapter, {name}. Merge it with its model first."
            )
        return _load_with_adapter(Path(name).expanduser(), key, dtype, task, trainable)
    dtype = _computed_dtype(name, key, dtype)
    quantization = None if bits is None else bitsandbytes_config(bits, dtype, key)
    return _load_base(name, key, dtype, task, quantization, labels_of, may_miss, placement)


def load_outline(name: str, key: str, dtype: str = "auto") -> PreTrainedModel:
    """Load a causal language model on the meta device: names and shapes are checked, and no weight is read.

    Raises:
        ModelError: it is not a plain model in safetensors on this disk; or see `load_model`.
    """
    files, config = weight_files(name), load_config(name, key)
    if is_adapter(name) or not files or any(file.suffix != ".safetensors" for file in files):
        kind = "an adapter" if is_adapter(name) else files[0].name if files else "none"
        hint = "Download it (hf download), or merge an adapter." if files == [] else "Merge an adapter with its model."
        raise ModelError(f"{key}: expected a whole model in safetensors on this disk, got {kind} for {name}. {hint}")
    if getattr(config, "quantization_config", None) is not None:
        raise ModelError(f"{key}: expected weights that are not quantized, got those of {name}. {SPREAD_INSTEAD}")
    state = {
        weight: torch.empty(shape, dtype=DTYPES.get(kind, torch.int64), device="meta")
        for _, weight, kind, shape in saved_weights(name)
    }
    options = {"config": config, "state_dict": state, "device_map": {"": "meta"}}
    return _load_base(name, key, _computed_dtype(name, key, dtype), "causal", None, None, placement=options)


def _computed_dtype(name: str, key: str, dtype: str) -> str:
    """`auto` as float32 where a CPU has no instructions for the precision of the saved weights."""
    if dtype != "auto" or torch.accelerator.is_available():
        return dtype
    config = load_config(name, key)
    in_float16 = torch.float16 in (config.dtype, config.get_text_config().dtype)
    return "float32" if in_float16 or not multiplies_bfloat16() else dtype


def loading_notes(model: Any) -> tuple[str, ...]:
    """What a user should know of a model or tokenizer that was loaded here: weights that are random, or not used."""
    notes: tuple[str, ...] = getattr(model, NOTES, ())
    return notes


def _load_base(
    name: str,
    key: str,
    dtype: str,
    task: Task,
    quantization: Any,
    labels_of: PretrainedConfig | None,
    may_miss: bool = False,
    placement: Mapping[str, Any] | None = None,
) -> PreTrainedModel:
    kind, location, saved = AUTO_CLASSES[task][1], locate(name, key), load_config(name, key)
    if task in TOKEN_TASKS and location.folder is not None and (location.folder / "modules.json").exists():
        raise ModelError(
            f"{key}: expected {kind} in {name}, got a sentence-transformers model, which turns a text into one vector. "
            "Distil it with a recipe of kind embedding (teacher.embedder), or with task: encoder."
        )
    options: dict[str, Any] = {"use_safetensors": True, "trust_remote_code": False, "dtype": dtype, **location.options}
    options["ignore_mismatched_sizes"] = True  # they are refused below, with their names
    has_head = any("SequenceClassification" in architecture for architecture in saved.architectures or ())
    if labels_of is not None and task in SEQUENCE_TASKS and not has_head:
        options |= {"id2label": labels_of.id2label, "label2id": labels_of.label2id}
    model, info = _read_weights(name, key, task, location, saved, options, quantization, placement)
    missing = [weight for weight in info["missing_keys"] if task != "encoder" or "pooler" not in weight]
    if labels_of is not None:  # the adapter has the head, or the student's starts at random
        missing = [weight for weight in missing if may_miss or not weight.startswith(tuple(sequence_head_names(model)))]
    names = {"key": key, "name": name, "kind": kind}
    notes = check_loaded(model, info | {"missing_keys": missing}, saved, task, may_miss=may_miss, **names)
    if placement and not _is_outline(placement) and model.get_input_embeddings().weight.is_meta:
        raise ModelError(
            f"{key}: expected embeddings in memory with device_map, got them on the disk in {name}. Allow more "
            "max_memory, or name a device for them in device_map."
        )
    notes += changed_notes(location.folder, key) if location.folder is not None else ()
    notes += () if _is_outline(placement) else weight_notes(model, key)
    setattr(model, NOTES, tuple(notes))
    model.config.architectures = [type(model).__name__]  # as if saved, for students designed after this model
    model.config.dtype = saved_dtype(name) or model.dtype  # the same
    if task in SEQUENCE_TASKS:
        model.config.problem_type = "regression" if task == "regression" else "single_label_classification"
    return model


def _is_outline(placement: Mapping[str, Any] | None) -> bool:
    """Whether a model is made without its weights; see `load_outline`."""
    return placement is not None and "state_dict" in placement


def _read_weights(
    name: str,
    key: str,
    task: Task,
    location: ModelLocation,
    saved: PretrainedConfig,
    options: dict[str, Any],
    quantization: Any,
    placement: Mapping[str, Any] | None,
) -> tuple[Any, dict[str, Any]]:
    """Load a model with transformers, quantized and placed as asked; return it and what it says of its weights."""
    auto_class, kind = AUTO_CLASSES[task]
    if task == "causal":
        auto_class = language_model_class(saved)
    path: str | None = location.path
    given = as_dtype(None if options["dtype"] == "auto" else options["dtype"])
    placed: Any = nullcontext({})
    if quantization is None and not placement:
        check_fits(saved_bytes(name, given), key, name)
    else:
        with torch.device("meta"):
            unloaded: Any = auto_class.from_config(saved)
        if quantization is not None:
            if "gguf_file" in options:
                raise ModelError(
                    f"{key}: expected a GGUF file without another quantization, got both. Leave dtype out."
                )
            check_quantizable(unloaded, key=key, name=name, bits=4 if quantization.load_in_4bit else 8)
            if task in SEQUENCE_TASKS:
                quantization.llm_int8_skip_modules = sequence_head_names(unloaded)
            options = options | {"quantization_config": quantization}
        if _is_outline(placement):  # its class is given no name, to find no files
            path, auto_class, options = None, type(unloaded), options | dict(placement or {})
        elif placement:
            precision = given or saved_dtype(name) or torch.float32
            itemsize = precision.itemsize if quantization is None else 0.5 if quantization.load_in_4bit else 1.0
            placed = placing(unloaded, placement, key.removesuffix(".model"), itemsize)
    try:
        with suppress_warnings(), placed as own:  # of missing weights, which are checked afterwards
            model, info = auto_class.from_pretrained(path, output_loading_info=True, **options, **own)
    except PotstillError:
        raise
    except Exception as error:
        raise unreadable(key, f"{kind} with weights in safetensors", name, location, error) from error
    remove_with(model, own)
    keep_gradients(model)
    return model, info


def _load_with_adapter(folder: Path, key: str, dtype: str, task: Task, trainable: bool) -> PreTrainedModel:
    """Load the base of an adapter, quantized as it was in training, and the adapter with the head trained beside it."""
    peft = require_package("peft", "adapters", key)
    weights = _adapter_weights(folder, key)  # before the base, which takes longer
    saved = folder / QUANTIZATION
    if saved.exists():
        require_package("bitsandbytes", "quantized", key)
    try:
        config = peft.PeftConfig.from_pretrained(str(folder))
        quantization = BitsAndBytesConfig.from_dict(json.loads(saved.read_text())) if saved.exists() else None
    except Exception as error:
        raise unreadable(key, "an adapter of peft", str(folder), ModelLocation(str(folder)), error) from error
    base = config.base_model_name_or_path
    if not base:
        raise ModelError(f"{key}: expected an adapter that names its base, got one in {folder} that does not.")
    base_key = f"the base of {key} (base_model_name_or_path in {folder / ADAPTER_CONFIG})"
    if is_adapter(base):
        raise ModelError(
            f"{base_key}: expected a plain model, got {base}, a folder with an adapter. Merge that adapter with "
            "merge_and_unload(), or save adapter and model in folders of their own."
        )
    labels_of = _labels_of_adapter(folder, base, weights, key) if task in SEQUENCE_TASKS else None
    model = _load_base(base, base_key, _computed_dtype(base, base_key, dtype), task, quantization, labels_of)
    _fit_embeddings(model, weights)
    try:
        with suppress_warnings():
            config.inference_mode = not trainable
            adapted = peft.get_peft_model(model, config)
    except Exception as error:
        raise unreadable(key, f"an adapter for {base}", str(folder), ModelLocation(str(folder)), error) from error
    load_adapter(adapted, folder, key, "Save it again with peft, or correct base_model_name_or_path in its config.")
    check_values(adapted, key=key, name=str(folder))
    if [*folder.glob("model*.safetensors")]:
        beside = f"{key}: {folder} also has a whole model, which is not read: its adapter is loaded over {base}."
        setattr(model, NOTES, (*loading_notes(model), beside))
    return (adapted if trainable else adapted.requires_grad_(False)).eval()


def _labels_of_adapter(folder: Path, base: str, weights: Mapping[str, Tensor], key: str) -> PretrainedConfig | None:
    """The classes of a classifier that was trained beside an adapter; numbered where its config was not saved."""
    rows = [len(weight) for name, weight in weights.items() if name.endswith(CLASSIFIERS)]
    if not rows:
        return None
    if (folder / "config.json").exists():
        return load_config(str(folder), key)
    config = load_config(base, key)
    config.num_labels = rows[-1]
    return config


def _fit_embeddings(model: PreTrainedModel, weights: Mapping[str, Tensor]) -> None:
    """Resize a base's embeddings as when its adapter was trained, where they are saved with it."""
    embeddings: tuple[Any, Any] = (model.get_input_embeddings(), model.get_output_embeddings())
    paths = [path for path, module in model.named_modules() if module in embeddings]
    names = [f"base_model.model.{path}.{inner}weight" for path in paths for inner in ("", "base_layer.")]
    rows = {len(weights[name]) for name in names if name in weights}
    if len(rows) == 1 and rows != {len(embeddings[0].weight)}:
        model.resize_token_embeddings(rows.pop(), mean_resizing=False)


def is_adapter(name: str) -> bool:
    return (Path(name).expanduser() / ADAPTER_CONFIG).exists()


def load_adapter(
    model: Any, folder: Path, key: str = "train", hint: str = "Resume with the recipe that they were trained with."
) -> None:
    """Load saved weights into the adapter of a model; those of another adapter, or a part of them, are refused."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    saved, own = _adapter_weights(folder, key), get_peft_model_state_dict(model, save_embedding_layers=False)
    saved = {name: weight for name, weight in saved.items() if ".modules_to_save." not in name}  # peft repeats some
    of_base = model.state_dict()  # peft saves embeddings that were resized or have an adapter
    shapes = [{(name, *weight.shape) for name, weight in state.items()} for state in (saved, own, of_base)]
    if others := (shapes[0] - shapes[1] - shapes[2]) | (shapes[1] - shapes[0]):
        raise ModelError(
            f"{key}: expected the weights of this adapter in {folder}, got others or none for {min(others)[0]}. {hint}"
        )
    setattr(model.get_base_model(), SAVED_EMBEDDINGS, bool(saved.keys() - own.keys()))
    set_peft_model_state_dict(model, saved)


def _adapter_weights(folder: Path, key: str) -> dict[str, Tensor]:
    path = folder / ADAPTER_WEIGHTS
    check_folder(folder, key)
    try:
        return load_file(path)
    except Exception as error:
        raise unreadable(
            key, f"an adapter with {ADAPTER_WEIGHTS}", str(folder), ModelLocation(str(folder)), error
        ) from None


def sequence_head_names(model: PreTrainedModel) -> list[str]:
    """Names of the modules of a sequence-level head, which may be random and is always trained in full."""
    body = model.base_model
    if model.get_output_embeddings() is not None or body is model:
        return []
    heads = [name for name, child in model.named_children() if child is not body and [*child.parameters()]]
    pooler = getattr(body, "pooler", None)
    return heads + ([f"{model.base_model_prefix}.pooler"] if heads and isinstance(pooler, nn.Module) else [])


def has_bfloat16() -> bool:
    """Whether there is hardware for bfloat16: an accelerator, or a CPU with instructions for it."""
    return torch.accelerator.is_available() or multiplies_bfloat16()


def accelerator() -> torch.device:
    """Return the accelerator of this machine (CUDA, Metal, ...), or else the CPU."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def load_tokenizer(name: str, key: str = "tokenizer", *, pad: bool = False) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model, or of an adapter's base where the adapter was saved without one.

    Args:
        name: a folder or a name on the Hub.
        key: the recipe's key, for errors.
        pad: let the EOS token pad where the tokenizer has no pad token.
    """
    base = adapter_base(name)
    if base is not None and not has_tokenizer(Path(name).expanduser()):
        name, key = base, f"the base of {key}"
    tokenizer: PreTrainedTokenizerBase = _load(auto.AutoTokenizer, "a tokenizer", name, key)
    location = locate(name, key)
    with _explained("a tokenizer", name, key):  # its files are read whatever they hold, and fail where they are used
        if not has_words(tokenizer):
            raise ValueError("it has no words")
        if (largest := vocabulary_size(tokenizer) - 1) >= MOST_TOKENS:
            raise ValueError(f"it has the token id {largest}, where less than {MOST_TOKENS} are expected")
        tokenizer.decode(tokenizer(SAMPLE, verbose=False)["input_ids"])
        if location.folder is not None:
            setattr(tokenizer, NOTES, tokenizer_notes(tokenizer, location.folder, key))
    if pad and tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def has_words(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a tokenizer has more than special tokens; some families make one without any file."""
    return not tokenizer.get_vocab().keys() <= {*tokenizer.all_special_tokens}


def adapter_base(name: str) -> str | None:
    """The base model that an adapter's folder names; None for any other model."""
    if not is_adapter(name):
        return None
    folder = Path(name).expanduser()
    try:
        base: str | None = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8")).get(
            "base_model_name_or_path"
        )
    except (ValueError, AttributeError) as error:
        raise unreadable("model", "an adapter of peft", name, ModelLocation(str(folder)), error) from error
    return base


def load_config(name: str, key: str) -> PretrainedConfig:
    """Load the config of a model, or of an adapter's base where the adapter was saved without one."""
    if is_adapter(name) and not (Path(name).expanduser() / "config.json").exists():
        name = adapter_base(name) or name
    config: PretrainedConfig = _load(auto.AutoConfig, "a model's config.json", name, key)
    if not all(isinstance(architecture, str) for architecture in config.architectures or ()):
        wrong = ValueError("architectures are no names")
        raise unreadable(key, "a model's config.json", name, locate(name, key), wrong)
    return config


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """The number of token ids of a tokenizer: one more than the largest."""
    return max(tokenizer.get_vocab().values()) + 1


def _load(auto_class: Any, kind: str, name: str, key: str) -> Any:
    location = locate(name, key)
    options = {option: value for option, value in location.options.items() if option == "gguf_file"}
    with _explained(kind, name, key), suppress_warnings():
        return auto_class.from_pretrained(location.path, trust_remote_code=False, **options)


@contextmanager
def _explained(kind: str, name: str, key: str) -> Iterator[None]:
    """Raise a ModelError of one line for whatever files raise that are no such `kind`."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":  # of Rust, in tokenizers
            raise
        raise unreadable(key, kind, name, locate(name, key), error) from error
