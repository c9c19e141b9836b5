"""The bytes of each token of a tokenizer, and the tokens of given bytes."""

from __future__ import annotations

import json
import re
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from potstill.errors import VocabularyError

BYTE = re.compile(r"<0x([0-9A-F]{2})>")  # a byte token of SentencePiece
# Ordinary text that a usable tokenizer must give back: two cases, accents, line ends, runs of spaces, other scripts.
PROBE = "Ab  c\n\tDé 12,345 «x»\n\n    return 'ñ' # 中文 Привет\n"


class TokenSpan(NamedTuple):
    id: int
    size: int  # bytes that it covers
    exact: bool = True  # whether they are its own


class TokenBytes:
    """The bytes of each token, for byte-level BPE and for SentencePiece; `owner` is teacher or student, for errors.

    Raises:
        VocabularyError: the tokenizer is slow, or does not keep the bytes of a text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, owner: str) -> None:
        self.tokenizer = tokenizer
        self._owner = owner
        if not tokenizer.is_fast:
            raise self._refuse("a slow one", "It does not give the bytes of its tokens.")
        self._backend: Any = tokenizer.backend_tokenizer
        state = json.loads(self._backend.to_str())
        decoders = _components(state["decoder"])
        kinds = {part["type"] for part in decoders}
        marks = {part["replacement"] for part in decoders if part["type"] == "Metaspace"}
        replaced = [part for part in decoders if part["type"] == "Replace" and part["content"] == " "]
        marks |= {part["pattern"]["String"] for part in replaced if "String" in part["pattern"]}
        if "ByteLevel" not in kinds and not marks:
            kind = ", ".join(sorted(kinds)) or state["model"]["type"]
            raise self._refuse(f"one that does not keep them ({kind})", "Its tokens leave out spaces.")
        self._alphabet = {char: byte for byte, char in bytes_to_unicode().items()} if "ByteLevel" in kinds else None
        self._space = None if self._alphabet else marks.pop()
        added = tokenizer.added_tokens_decoder
        special = {*tokenizer.all_special_ids} | {id for id, token in added.items() if token.special}
        self._content = {id: token.content for id, token in added.items()}
        self.bytes_of: dict[int, bytes | None] = {}  # None for a special token
        self.ids: dict[bytes, int] = {}  # byte tokens of SentencePiece only where there is no other
        byte_tokens = {}
        for token, id in tokenizer.get_vocab().items():
            piece = None if id in special else token.encode() if id in added else self._decode(token)
            self.bytes_of[id] = piece
            self._content.setdefault(id, token)
            if piece and self._alphabet is None and BYTE.fullmatch(token):
                byte_tokens[piece] = id
            elif piece:
                self.ids.setdefault(piece, id)
        self._single_bytes = {piece: id for piece, id in self.ids.items() if len(piece) == 1} | byte_tokens
        self.ids = {**byte_tokens, **self.ids}
        # Whether the tokenizer puts a space before every text.
        self.adds_space = self._join(self._encode("a")) == b" a"
        # Ordinary text must come back byte for byte, as far as there are tokens for it.
        for text in (PROBE, *PROBE.split()):
            ids = self._encode(text)
            decoded = self._join(ids).decode("utf-8", "replace")
            if tokenizer.unk_token_id not in ids and decoded not in (text, f" {text}"):
                raise self._refuse(f"one that reads {text!r} as {decoded!r}", "Lost text cannot be compared.")

    def spans(self, ids: list[int]) -> list[TokenSpan]:
        """The bytes that each token covers; a space that the tokenizer puts before texts is not counted."""
        spans = [TokenSpan(id, len(self.bytes_of[id] or b"")) for id in ids]
        if spans and self.adds_space and (self.bytes_of[ids[0]] or b"").startswith(b" "):
            spans[0] = TokenSpan(ids[0], spans[0].size - 1)
        return spans

    def text(self, spans: list[TokenSpan]) -> bytes:
        return b"".join((self.bytes_of[span.id] or b"")[-span.size :] if span.size else b"" for span in spans)

    def content(self, id: int) -> bytes:
        return self._content[id].encode()

    def tokenize(self, text: bytes) -> list[TokenSpan] | None:
        """Tokenize bytes, which may begin or end within a character; None if there is no token for some of them.

        Lines whose tokens have other bytes, because a normaliser has changed the text, are not exact.
        """
        spans: list[TokenSpan] = []
        for run in re.findall(r"[\udc80-\udcff]|[^\udc80-\udcff]+", text.decode("utf-8", "surrogateescape")):
            if "\udc80" <= run[0] <= "\udcff":
                byte = run.encode("utf-8", "surrogateescape")
                id = self._single_bytes.get(byte, self.tokenizer.unk_token_id)
                tokens = [] if id is None else [TokenSpan(id, 1, byte in self._single_bytes)]
            else:
                tokens = self._tokenize(run)
            if not tokens:
                return None
            spans += tokens
        return spans

    def _tokenize(self, text: str) -> list[TokenSpan]:
        ids, expected = self._encode(text), text.encode()
        pieces = [self.content(id) if self.bytes_of[id] is None else self.bytes_of[id] or b"" for id in ids]
        joined = b"".join(pieces)
        if self.tokenizer.unk_token_id not in ids and joined in (expected, b" " + expected):
            sizes = [len(piece) for piece in pieces]
            sizes[0] -= len(joined) - len(expected)  # a space that the tokenizer has added
            return [TokenSpan(id, size) for id, size in zip(ids, sizes, strict=True)]
        lines = text.splitlines(keepends=True)
        if len(lines) > 1:
            return [token for line in lines for token in self._tokenize(line)]
        return [TokenSpan(id, len(expected) if i == len(ids) - 1 else 0, False) for i, id in enumerate(ids)]

    def prefix(self) -> list[int]:
        """The special tokens that the tokenizer puts before every text."""
        ids: list[int] = self.tokenizer("a")["input_ids"]
        bare = self._encode("a")
        starts = [i for i in range(len(ids)) if ids[i : i + len(bare)] == bare]
        return ids[: starts[0]] if starts else []

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        return ids

    def _join(self, ids: list[int]) -> bytes:
        return b"".join(self.bytes_of[id] or b"" for id in ids)

    def _decode(self, token: str) -> bytes:
        if self._alphabet is not None:
            known = [self._alphabet.get(character) for character in token]
            return bytes(b for b in known if b is not None) if None not in known else token.encode()
        if byte := BYTE.fullmatch(token):
            return bytes([int(byte[1], 16)])
        assert self._space is not None
        return token.replace(self._space, " ").encode()

    def _refuse(self, got: str, why: str) -> VocabularyError:
        return VocabularyError(
            f"the {self._owner}'s tokenizer: expected one whose tokens stand for the bytes of a text (byte-level BPE, "
            f"or SentencePiece), got {got}. {why} Use a {self._owner} with such a tokenizer."
        )


def _components(state: Any) -> list[Any]:
    """The decoder of a tokenizer, or the decoders in a sequence."""
    if state is not None and state["type"] == "Sequence":
        return [part for inner in state["decoders"] for part in _components(inner)]
    return [] if state is None else [state]
