"""Cut the vocabulary of a model and its tokenizer to the tokens that a text needs."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub.errors import StrictDataclassFieldValidationError
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from potstill.errors import ModelError
from potstill.models.shapes import text_config
from potstill.models.spacing import evenly_spaced
from potstill.models.split import undisturbed

KEY = "student.vocabulary"  # of the recipe
TOKEN_FIELDS = (  # of configs, beside those whose names end in _token_id or _token_index
    *("suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "force_words_ids", "sequence_bias"),
    *("pad_index", "bos_index", "eos_index", "unk_index", "mask_index"),
)
OPTIONAL_FIELDS = ("bos_token_id", "eos_token_id", "pad_token_id")  # of most configs; others need a number
NO_TOKEN = -1
FREE = ("unused", "reserved", "place\u2581holder")  # in the names of added tokens that stand for nothing yet
BYTES = {f"<0x{byte:02X}>" for byte in range(256)}
SPACE = "\u2581"  # stands for a space in tokens
OFFSET = 16  # RoBERTa counts positions from the id of its padding, which is below this and keeps its place
PROBE = 16  # tokens of lowest id, and as many others, on which a cut model is compared with the whole one
SAME = 1e-3  # difference that is rounding, of the largest output in float32
ROUNDING_ULPS = 8  # the same in other precisions, in units in the last place
TOKEN_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")  # of a trimmed tokenizer
CLASS_SETTINGS = ("model_input_names", "padding_side", "truncation_side")  # by default those of a tokenizer's class


def choose_tokens(
    tokenizer: PreTrainedTokenizerBase,
    counts: Mapping[int, int],
    keep: Literal["data"] | int,
    always: Sequence[int] = (),
    key: str = KEY,
) -> list[int]:
    """Choose the ids of the tokens to keep, in their order.

    Kept in any case: added tokens, unless they are reserved, the alphabet (bytes, or single characters where the
    tokenizer knows no bytes), so that every text can be encoded as before or in more tokens, and the tokens that a kept
    one is merged from, so that a text of kept tokens is encoded as before.

    Args:
        counts: token id -> how often the text has it.
        keep: data, all tokens of the text; or a number of tokens: the most frequent ones, then those of lowest id.
        always: more ids of tokens that are kept in any case.
        key: of the recipe, for errors.
    """
    vocabulary = _Vocabulary.of(tokenizer, key)
    kept = vocabulary.needed().union(*(vocabulary.with_parts(token) for token in always))
    frequent = sorted((token for token in counts if counts[token]), key=lambda token: (-counts[token], token))
    if keep == "data":
        return sorted(kept.union(*(vocabulary.with_parts(token) for token in frequent)))
    if len(kept) > keep:
        raise ModelError(
            f"{key}: expected at least {len(kept)} tokens, the added ones and the alphabet"
            f"{' and words of your own' if always else ''}, got {keep}. Keep more."
        )
    rest = (token for token in sorted(vocabulary.names) if token not in counts and not vocabulary.is_free(token))
    for token in (*frequent, *rest):
        if token not in kept and len(kept) + len(more := vocabulary.with_parts(token) - kept) <= keep:
            kept |= more
        if len(kept) == keep:
            break
    return sorted(kept)


def trim_tokenizer(tokenizer: PreTrainedTokenizerBase, kept: Sequence[int], key: str = KEY) -> PreTrainedTokenizerBase:
    """Make a tokenizer of the kept tokens alone, with ids 0, 1, 2 and so on in the order of `kept`."""
    names = {number: token for token, number in tokenizer.get_vocab().items()}
    ids = {names[old]: new for new, old in enumerate(kept)}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer.save_pretrained(folder)
        for file in folder.iterdir():
            if file.is_file() and file.name not in TOKEN_FILES:  # a second list of the tokens
                file.unlink()
        path = folder / "tokenizer.json"
        content = _trimmed(json.loads(path.read_text(encoding="utf-8")), ids)
        path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
        settings = folder / "tokenizer_config.json"
        values = json.loads(settings.read_text(encoding="utf-8"))
        values.pop("added_tokens_decoder", None)  # by id; they stand in tokenizer.json
        values |= {name: getattr(tokenizer, name) for name in CLASS_SETTINGS}
        settings.write_text(json.dumps(values | {"tokenizer_class": "PreTrainedTokenizerFast"}), encoding="utf-8")
        trimmed = PreTrainedTokenizerFast.from_pretrained(folder)
    if trimmed.get_vocab() != ids:
        raise ModelError(f"{key}: expected a tokenizer of {len(ids)} tokens, got one of {len(trimmed.get_vocab())}.")
    return trimmed


def trim_model(model: PreTrainedModel, kept: Sequence[int], key: str = KEY) -> None:
    """Cut a model's embeddings, head and token ids to the kept tokens, in place.

    Raises:
        ModelError: its output for kept tokens is another than before, since it reads ids or tables of tokens elsewhere.
    """
    check_rows(model, kept, key)
    embeddings: Any = model.get_input_embeddings()
    ids = {old: new for new, old in enumerate(kept)}
    _check_tables(model, len(embeddings.weight), key)
    order = torch.tensor([*kept])
    probe = torch.tensor([[*range(len(kept))][:PROBE] + evenly_spaced(PROBE, len(kept))])
    before = _output(model, order[probe])
    with torch.no_grad():
        for weight in {id(w): w for w in _by_token(model)}.values():
            weight[: len(order)] = weight[order.to(weight.device)]
    _renumber(model, ids)
    model.resize_token_embeddings(len(order))
    if model.get_output_embeddings() is not None:
        before = before[..., order.to(before.device)]
    try:
        same = _is_same(before, _output(model, probe))
    except IndexError:  # rows of its embeddings are more than the tokens
        same = False
    if not same:
        raise ModelError(
            f"{key}: expected a model that reads the embeddings of its tokens alone, got {type(model).__name__}, whose "
            "output for the kept tokens changes with their ids. Keep all tokens."
        )


def check_rows(model: PreTrainedModel, kept: Sequence[int], key: str = KEY) -> None:
    """Check that embeddings and head have a row for each kept token."""
    for weight in _by_token(model):
        if len(weight) <= max(kept):
            raise ModelError(
                f"{key}: expected a {type(model).__name__} with a row for each token of its tokenizer, got "
                f"{len(weight)} rows and the token {max(kept)}. Resize it with resize_token_embeddings, or use the "
                "tokenizer it was trained with."
            )


def names_tokens(field: str) -> bool:
    """Whether a field of a config has ids of tokens."""
    return field.endswith(("_token_id", "_token_index")) or field in TOKEN_FIELDS


def _output(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """Compute what a model makes of a row of tokens: logits, or hidden states where it has no head."""
    ids = ids.to(model.device)
    with undisturbed(model):
        output: torch.Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids))[0]
    return output


def _is_same(before: torch.Tensor, after: torch.Tensor) -> bool:
    if before.shape != after.shape:
        return False
    tolerance = max(SAME, ROUNDING_ULPS * torch.finfo(before.dtype).eps)
    before, after = (values[before.isfinite() & after.isfinite()].float() for values in (before, after))
    return bool(((before - after).abs() <= tolerance * before.abs().max()).all()) if len(before) else True


def _by_token(model: PreTrainedModel) -> Iterator[torch.Tensor]:
    """Yield the weights with a row for each token."""
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        for name in ("weight", "bias"):
            if module is not None and getattr(module, name, None) is not None:
                yield getattr(module, name)


def _check_tables(model: PreTrainedModel, rows: int, key: str) -> None:
    """Check that no other weights have a row for each token."""
    own = {weight.data_ptr() for weight in _by_token(model)}
    for name, weight in (*model.named_parameters(), *model.named_buffers()):
        if weight.shape[:1] == (rows,) and weight.data_ptr() not in own:
            raise ModelError(
                f"{key}: expected a model whose embeddings and head alone have rows for tokens, got "
                f"{type(model).__name__}, where {name} has too. Keep all tokens."
            )


def _renumber(model: PreTrainedModel, ids: Mapping[int, int]) -> None:
    """Give the new ids to the tokens that the model's configs name; a token that is gone is named no more."""
    embeddings: Any = model.get_input_embeddings()
    if (padding := getattr(embeddings, "padding_idx", None)) is not None:
        embeddings.padding_idx = ids.get(padding)
    configs = {
        id(one): one for one in (model.config, text_config(model.config), getattr(model, "generation_config", None))
    }
    for config in filter(None, configs.values()):
        for name, value in [*vars(config).items()]:
            if value is not None and names_tokens(name):
                new = _new_ids(value, ids)
                needs_number = isinstance(config, PretrainedConfig) and name not in OPTIONAL_FIELDS
                needs_number &= isinstance(value, int)
                try:
                    setattr(config, name, NO_TOKEN if new is None and needs_number else new)
                except StrictDataclassFieldValidationError:
                    setattr(config, name, NO_TOKEN)


def _new_ids(value: Any, ids: Mapping[int, int]) -> Any:
    """The new id of a token or None, those of a list that are kept, or the lists of which all are kept.

    Lists may have a bias each, as in `sequence_bias`; where none is kept it is None.
    """
    if not isinstance(value, list):
        return ids.get(value) if isinstance(value, int) else value
    if not any(isinstance(words, list) for words in value):
        return [ids[token] for token in value if token in ids]
    if all(words and isinstance(words[0], list) for words in value):
        return [[[ids[token] for token in words], bias] for words, bias in value if ids.keys() >= {*words}] or None
    return [[ids[token] for token in words] for words in value if ids.keys() >= {*words}] or None


@dataclass(frozen=True)
class _Vocabulary:
    """The tokens of a tokenizer, and what they are merged from."""

    names: dict[int, str]
    ids: dict[str, int]
    content: dict[str, Any]  # of tokenizer.json
    ranks: dict[tuple[str, str], int]  # of the merges; empty where words are looked up whole
    tokenizer: PreTrainedTokenizerBase

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, key: str) -> _Vocabulary:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ModelError(
                f"{key}: expected a tokenizer with a tokenizer.json, got {type(tokenizer).__name__}, which has "
                "none. Keep all tokens."
            )
        content = json.loads(backend.to_str())
        ids, model = tokenizer.get_vocab(), content["model"]
        if model.get("continuing_subword_prefix") and model["type"] == "BPE":
            raise ModelError(f"{key}: expected merges of plain parts, got a prefix of parts. Keep all tokens.")
        merges = (tuple(merge.split(" ")) if isinstance(merge, str) else (*merge,) for merge in model.get("merges", ()))
        ranks = {(left, right): rank for rank, (left, right) in enumerate(merges)}
        return cls({number: token for token, number in ids.items()}, ids, content, ranks, tokenizer)

    def needed(self) -> set[int]:
        """The tokens that are kept in any case."""
        template = str(self.tokenizer.chat_template or "")
        names = {*self.tokenizer.all_special_tokens, *self._alphabet()}
        names |= {
            token["content"]
            for token in self.content["added_tokens"]
            if token["content"] in template or not self.is_free(token["id"])
        }
        model = self.content["model"]
        names.add(model.get("unk_token") or "")
        unknown = {model["unk_id"]} if isinstance(model.get("unk_id"), int) else set()
        padding = self.tokenizer.pad_token_id
        before = range(padding if padding is not None and padding < OFFSET else 0)
        return {self.ids[name] for name in names if name in self.ids} | unknown | {*before}

    def is_free(self, token: int) -> bool:
        """Whether it is an added token that stands for nothing yet."""
        name = self.names[token].lower()
        return name.startswith(("<", "[")) and any(word in name for word in FREE)

    def with_parts(self, token: int) -> set[int]:
        """The token and all that it is merged from; the token alone where it is never merged."""
        name = self.names[token]
        if not self.ranks or name not in self.content["model"]["vocab"]:
            return {token}
        symbols = self._symbols(name)
        made = {*symbols}
        while len(symbols) > 1:
            pairs = [*pairwise(symbols)]
            place = min(range(len(pairs)), key=lambda i: self.ranks.get(pairs[i], len(self.ranks)))
            if pairs[place] not in self.ranks:
                return {token}
            symbols[place : place + 2] = ["".join(pairs[place])]
            made.add(symbols[place])
        return {self.ids[part] for part in made}

    def _symbols(self, name: str) -> list[str]:
        """What merging begins with: characters, or the bytes of those that have no token."""
        suffix = self.content["model"].get("end_of_word_suffix") or ""
        stem = name.removesuffix(suffix) if suffix else name
        symbols = [*stem]
        if stem != name and symbols:
            symbols[-1] += suffix
        parts = ([one] if one in self.ids else [f"<0x{byte:02X}>" for byte in one.encode()] for one in symbols)
        return [part for group in parts for part in group]

    def _alphabet(self) -> set[str]:
        """Tokens of which any text that the tokenizer can encode can be made."""
        if _has_type(self.content, "ByteLevel"):
            return {*ByteLevel.alphabet()}
        if self.content["model"].get("byte_fallback"):
            return BYTES | {SPACE}
        marks = (self.content["model"].get("continuing_subword_prefix") or "", SPACE)
        end = self.content["model"].get("end_of_word_suffix") or ""
        return {name for name in self.ids if len(_bare(name, marks, end)) <= 1}


def _bare(name: str, marks: Sequence[str], end: str) -> str:
    """A token without the marks of the begin and end of words."""
    for mark in filter(None, marks):
        name = name.removeprefix(mark)
    return name.removesuffix(end) if end else name


def _has_type(part: Any, name: str) -> bool:
    """Whether a part of tokenizer.json, or one within it, is of a type."""
    if isinstance(part, dict):
        return part.get("type") == name or any(
            _has_type(part[key], name) for key in part if key not in ("vocab", "merges")
        )
    return isinstance(part, list) and any(_has_type(inner, name) for inner in part[:100])


def _trimmed(content: dict[str, Any], ids: Mapping[str, int]) -> dict[str, Any]:
    """A tokenizer.json of the kept tokens, whose new ids are given."""
    model = content["model"]
    if isinstance(model["vocab"], list):  # Unigram's: its places are the ids
        unknown = model.get("unk_id")
        if unknown is not None:
            model["unk_id"] = ids[model["vocab"][unknown][0]]
        model["vocab"] = [piece for piece in model["vocab"] if piece[0] in ids]
    else:
        model["vocab"] = {token: ids[token] for token in model["vocab"] if token in ids}
    if "merges" in model:
        pairs = ((merge, merge.split(" ") if isinstance(merge, str) else merge) for merge in model["merges"])
        model["merges"] = [merge for merge, pair in pairs if {*pair, "".join(pair)} <= ids.keys()]
    content["added_tokens"] = [
        token | {"id": ids[token["content"]]} for token in content["added_tokens"] if token["content"] in ids
    ]
    if content.get("padding"):
        content["padding"]["pad_id"] = ids[content["padding"]["pad_token"]]
    _renumber_processor(content.get("post_processor"), ids)
    return content


def _renumber_processor(processor: Any, ids: Mapping[str, int]) -> None:
    """Give the new ids to the special tokens that a post-processor adds."""
    if not processor:
        return
    for inner in processor.get("processors", ()):
        _renumber_processor(inner, ids)
    for token in processor.get("special_tokens") or {}:
        value = processor["special_tokens"][token]
        value["ids"] = [ids[name] for name in value["tokens"]]
    for name in ("sep", "cls"):  # of BERT and RoBERTa
        if name in processor:
            processor[name] = [processor[name][0], ids[processor[name][0]]]
