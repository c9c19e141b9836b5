"""Students that read text: sentence-transformers models, made from a tokenizer or from a model's layers."""

from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, nn

from potstill.embedding.heads import VectorHead
from potstill.errors import ModelError
from potstill.models.advice import unreadable
from potstill.models.integrity import check_values, check_weights
from potstill.models.loading import has_words, suppress_warnings
from potstill.models.locate import locate, require_package
from potstill.models.structure import layer_lists
from potstill.models.trimming import choose_tokens, trim_model, trim_tokenizer

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

KIND = "a sentence-transformers model"
# Files that name classes, the field that does, and the package that they must be of.
CLASSES = (("modules.json", "type", "sentence_transformers"), ("config.json", "activation_function", "torch.nn"))


def load_embedder(name: str, key: str, *, pooled: bool = True) -> SentenceTransformer:
    """Load a sentence-transformers model, from a folder or the hub: safetensors only, no remote code.

    `pooled` refuses a plain transformer, for which the pooling would be a guess.
    """
    require_package("sentence_transformers", "embeddings", key)
    from sentence_transformers import SentenceTransformer

    location = locate(name, key)
    if location.folder is not None:
        _check_classes(location.folder, key, name)
    try:
        model = SentenceTransformer(location.path, trust_remote_code=False, model_kwargs={"use_safetensors": True})
    except Exception as error:
        raise unreadable(key, KIND, name, location, error) from None
    folder = location.folder
    if pooled and folder is not None and not (folder / "modules.json").exists():
        raise ModelError(
            f"{key}: expected a sentence-transformers model in {name}, got a plain model without modules.json: how its "
            "vectors are pooled is not known. Save it once with SentenceTransformer(...).save(FOLDER), and name that."
        )
    if folder is not None:
        _check_modules(model, folder, key, name)
        _check_body(model, folder, key, name)
    check_values(model, key=key, name=name)
    try:
        model.encode(["a text"], show_progress_bar=False)
    except Exception as error:  # of modules that do not go together
        raise unreadable(key, f"{KIND} whose modules go together", name, location, error) from None
    return model


def _check_classes(folder: Path, key: str, name: str) -> None:
    """Refuse modules and activations of other packages: earlier versions of sentence-transformers import them."""
    for file, field, package in CLASSES:
        for path in folder.rglob(file):
            try:
                content = json.loads(path.read_text(encoding="utf-8"))
            except (OSError, ValueError, RecursionError) as error:
                raise unreadable(key, KIND, name, locate(name, key), error) from None
            entries = content if isinstance(content, list) else [content]
            for named in (str(entry[field]) for entry in entries if isinstance(entry, dict) and field in entry):
                if "." in named and not named.startswith(f"{package}."):
                    raise ModelError(
                        f"{key}: expected classes of {package} in {path}, got {named}. Code that comes with a model "
                        "is not run: name another model."
                    )


def _check_modules(model: SentenceTransformer, folder: Path, key: str, name: str) -> None:
    """Check that modules.json names all modules that are there, and that the first has the words of its tokenizer."""
    paths = module_paths(folder)
    there = sorted(path.name for path in folder.glob("[0-9]_*") if path.is_dir())
    unnamed = [path for path in there if paths and path not in paths]
    if unnamed:
        raise ModelError(
            f"{key}: expected {KIND} in {name}, got the module {unnamed[0]}, which modules.json does not name. Name it "
            "there, or remove it."
        )
    tokenizer: Any = getattr(model[0], "tokenizer", None)
    if hasattr(tokenizer, "all_special_tokens") and not has_words(tokenizer):
        raise ModelError(f"{key}: expected {KIND} in {name}, got no tokenizer. Copy its files from the original model.")


def module_paths(folder: Path) -> list[str]:
    """The folders of the modules that modules.json names, within that of the model; "" is that folder itself."""
    modules = folder / "modules.json"
    return [module.get("path", "") for module in json.loads(modules.read_text("utf-8"))] if modules.exists() else []


def _check_body(model: SentenceTransformer, folder: Path, key: str, name: str) -> None:
    """Check that no weight of the transformer is random: load the names of its weights again, without the weights."""
    body = getattr(model[0], "auto_model", None)
    if body is None or (folder / "adapter_config.json").exists():
        return
    path = next(iter(module_paths(folder)), "")
    with suppress_warnings():
        _, info = type(body).from_pretrained(folder / path, device_map="meta", output_loading_info=True)
    missing = [weight for weight in info["missing_keys"] if "pooler" not in weight]
    check_weights(body, missing, info["unexpected_keys"], key=key, name=name, kind=KIND, may_miss=False)


class TextStudent(nn.Module):
    """A sentence-transformers model as a student: texts to vectors [N, d], with a gradient."""

    def __init__(self, model: SentenceTransformer, saved_dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.model, self.saved_dtype = model, saved_dtype  # that of the checkpoint of its layers
        self.dimensions = int(model.get_embedding_dimension() or 0)

    def forward(self, texts: Sequence[str]) -> Tensor:
        features = self.model.preprocess(list(texts))
        features = {k: v.to(self.model.device) if isinstance(v, Tensor) else v for k, v in features.items()}
        vectors: Tensor = self.model(features)["sentence_embedding"]
        return vectors

    def save(self, folder: str | Path) -> None:
        self.model.save_pretrained(str(folder), create_model_card=False)


EmbeddingModel = VectorHead | TextStudent


def encoder_student(
    model: SentenceTransformer,
    layers: int,
    texts: Sequence[str],
    start: Tensor,
    *,
    keep: Literal["data"] | int | None = None,
) -> TextStudent:
    """Make a student of some layers, mean pooling, and a linear map: ridge regression to `start` [N, d], of N texts.

    `keep` is how many tokens it keeps by their frequency in the texts, see `choose_tokens`; None for all.
    """
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Dense, Pooling

    saved_dtype = next(model.parameters()).dtype
    transformer: Any = copy.deepcopy(model[0]).float()
    _keep_layers(getattr(transformer, "auto_model", transformer), layers)
    if keep is not None:
        _keep_tokens(transformer, texts, keep)
    pooling = Pooling(transformer.auto_model.config.hidden_size, pooling_mode="mean")
    pooled = SentenceTransformer(modules=[transformer, pooling], device="cpu")
    hidden = torch.from_numpy(pooled.encode(list(texts), batch_size=64, show_progress_bar=False)).double()
    target = start.double()
    hidden_mean, target_mean = hidden.mean(0), target.mean(0)
    x = hidden - hidden_mean
    ridge = 1e-3 * x.square().sum() / x.shape[1] * torch.eye(x.shape[1], dtype=x.dtype)
    weight = torch.linalg.solve(x.T @ x + ridge, x.T @ (target - target_mean))
    bias = (target_mean - hidden_mean @ weight).float()
    width, dimensions = weight.shape
    dense = Dense(width, dimensions, activation_function=nn.Identity(), init_weight=weight.T.float(), init_bias=bias)
    return TextStudent(SentenceTransformer(modules=[transformer, pooling, dense], device="cpu"), saved_dtype)


@torch.no_grad()
def embedder_with_head(model: SentenceTransformer, head: VectorHead) -> SentenceTransformer:
    """Append a head to a model, in float32: texts to what `VectorHead.transform` makes of the model's vectors.

    The linear map passes the activation of the MLP beside it in two units for each dimension: gelu(y) - gelu(-y) = y.
    """
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Dense, Normalize

    def dense(weight: Tensor, bias: Tensor, activation: nn.Module) -> Dense:
        outputs, inputs = weight.shape
        return Dense(
            inputs, outputs, activation_function=activation, init_weight=weight.clone(), init_bias=bias.clone()
        )

    head = copy.deepcopy(head).cpu()
    weight, bias = head.map.weight, head.map.bias
    if head.beside is None:
        layers = [dense(weight, bias, nn.Identity())]
    else:
        first, _, last = cast(Any, head.beside)
        identity = torch.eye(head.dimensions)
        layers = [
            dense(torch.cat([weight, -weight, first.weight]), torch.cat([bias, -bias, first.bias]), nn.GELU()),
            dense(torch.cat([identity, -identity, last.weight], 1), last.bias, nn.Identity()),
        ]
    if any(values.dtype != torch.float32 for values in model.parameters()):
        model = copy.deepcopy(model).float()
    return SentenceTransformer(
        modules=[*model, Normalize(), *layers, Normalize()],
        device="cpu",
        prompts={name: prompt for name, prompt in model.prompts.items() if prompt is not None},
        default_prompt_name=model.default_prompt_name,
        similarity_fn_name=model.similarity_fn_name,
    )


def _keep_layers(body: Any, number: int) -> None:
    """Keep evenly spaced layers of a transformer, in place."""
    total = getattr(getattr(body, "config", None), "num_hidden_layers", 0)
    lists = layer_lists(body)
    if len(lists) != 1 or not 1 <= number <= total:
        hint = "Start from a sentence-transformers model whose first module is a transformer."
        raise ModelError(f"student.encoder.layers: expected 1 to {total} layers of a transformer, got {number}. {hint}")
    ((path, layers),) = lists
    kept = torch.linspace(0, total - 1, number).round().long().tolist() if number > 1 else [0]
    parent, _, name = path.rpartition(".")
    setattr(body.get_submodule(parent), name, nn.ModuleList(layers[i] for i in kept))
    body.config.num_hidden_layers = number


def _keep_tokens(transformer: Any, texts: Sequence[str], keep: Literal["data"] | int) -> None:
    """Cut a transformer and its tokenizer to the most frequent tokens of the texts, in place."""
    whole: Any = transformer.tokenizer
    if whole is None or transformer.processor is not whole:
        raise ModelError(
            "student.encoder.vocabulary: expected a model of text alone, got one that reads other data. Leave it out."
        )
    counts = Counter(chain.from_iterable(whole(list(texts))["input_ids"]))
    key = "student.encoder.vocabulary"
    kept = choose_tokens(whole, counts, keep, key=key)
    transformer.processor = trim_tokenizer(whole, kept, key)  # that of a model of text alone is its tokenizer
    trim_model(transformer.auto_model, kept, key)
