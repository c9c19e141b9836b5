"""Which bytes each token of a tokenizer stands for, and which tokens it reads in given bytes."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from potstill.errors import VocabularyError

BLANK = "\u2581"  # what SentencePiece writes for a space
BYTE = re.compile(r"<0x([0-9A-F]{2})>")
# Ordinary text that a usable tokenizer must give back: two cases, accents, line ends, runs of spaces, other scripts.
PROBE = "Ab  c\n\tDé 12,345 «x»\n\n    return 'ñ' # 中文 Привет\n"


class Spelled(NamedTuple):
    """A token and how many bytes of a text it stands for; not exact where it only stands in their place."""

    id: int
    size: int
    exact: bool = True


class Pieces:
    """The bytes of each token: of byte-level BPE, or of pieces with a mark for the space, as SentencePiece has them.

    Args:
        tokenizer: a fast one.
        whose: teacher or student, for errors.

    Attributes:
        of: token id -> its bytes; None for a special token, which stands for none.
        ids: bytes -> the token id that says them; where several do, one that is no single byte's fallback.
        adds_space: it puts a space before every text.

    Raises:
        VocabularyError: the tokenizer is slow, or does not keep the bytes of a text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, whose: str) -> None:
        self.tokenizer = tokenizer
        self._whose = whose
        if not tokenizer.is_fast:
            raise self._refuse("a slow one", "It does not say which bytes its tokens stand for.")
        self._backend: Any = tokenizer.backend_tokenizer
        state = json.loads(self._backend.to_str())
        kinds = {part["type"] for part in _parts(state["decoder"])}
        marks = {
            *(part["replacement"] for part in _parts(state["decoder"]) if part["type"] == "Metaspace"),
            *(
                part["pattern"]["String"]
                for part in _parts(state["decoder"])
                if part["type"] == "Replace" and part["content"] == " " and "String" in part["pattern"]
            ),
        }
        if "ByteLevel" not in kinds and not marks:
            kind = ", ".join(sorted(kinds)) or state["model"]["type"]
            raise self._refuse(f"one that does not keep them ({kind})", "Its tokens leave out spaces.")
        self._alphabet = _byte_alphabet() if "ByteLevel" in kinds else None
        self._mark = None if self._alphabet else marks.pop()
        added = tokenizer.added_tokens_decoder
        special = {*tokenizer.all_special_ids} | {id for id, token in added.items() if token.special}
        self._content = {id: token.content for id, token in added.items()}
        self.of: dict[int, bytes | None] = {}
        self.ids: dict[bytes, int] = {}
        fallback = {}
        for token, id in tokenizer.get_vocab().items():
            piece = None if id in special else token.encode() if id in added else self._bytes_of(token)
            self.of[id] = piece
            self._content.setdefault(id, token)
            if piece and self._alphabet is None and BYTE.fullmatch(token):
                fallback[piece] = id
            elif piece:
                self.ids.setdefault(piece, id)
        self._bytes = {piece: id for piece, id in self.ids.items() if len(piece) == 1} | fallback
        self.ids = {**fallback, **self.ids}
        self.adds_space = self._joined(self._encode("a")) == b" a"
        self._must_give_back()

    def spell(self, ids: list[int]) -> list[Spelled]:
        """The tokens with the number of bytes that each stands for; a space that is put before texts counts as none."""
        spelled = [Spelled(id, len(self.of[id] or b"")) for id in ids]
        if spelled and self.adds_space and (self.of[ids[0]] or b"").startswith(b" "):
            spelled[0] = Spelled(ids[0], spelled[0].size - 1)
        return spelled

    def text(self, spelled: list[Spelled]) -> bytes:
        """The bytes that tokens stand for."""
        return b"".join((self.of[token.id] or b"")[-token.size :] if token.size else b"" for token in spelled)

    def content(self, id: int) -> bytes:
        """The characters of a special token, where it was found in plain text."""
        return self._content[id].encode()

    def read(self, text: bytes) -> list[Spelled] | None:
        """The tokens of a text, which may begin or end within a character; None where it has none for some of it.

        Where the tokens say something else (a normaliser has changed it), the line is not exact.
        """
        spelled: list[Spelled] = []
        for run in re.findall(r"[\udc80-\udcff]|[^\udc80-\udcff]+", text.decode("utf-8", "surrogateescape")):
            if "\udc80" <= run[0] <= "\udcff":
                byte = run.encode("utf-8", "surrogateescape")
                id = self._bytes.get(byte, self.tokenizer.unk_token_id)
                found = [] if id is None else [Spelled(id, 1, byte in self._bytes)]
            else:
                found = self._read(run)
            if not found:
                return None
            spelled += found
        return spelled

    def _read(self, text: str) -> list[Spelled]:
        """The tokens of whole characters."""
        ids, said = self._encode(text), text.encode()
        pieces = [self.content(id) if self.of[id] is None else self.of[id] or b"" for id in ids]
        sizes, joined = [len(piece) for piece in pieces], b"".join(pieces)
        known = self.tokenizer.unk_token_id not in ids
        if known and joined == said:
            return [Spelled(*one) for one in zip(ids, sizes, strict=True)]
        if known and joined == b" " + said:
            return [Spelled(ids[0], sizes[0] - 1), *(Spelled(*one) for one in zip(ids[1:], sizes[1:], strict=True))]
        lines = text.splitlines(keepends=True)
        if len(lines) > 1:
            return [token for line in lines for token in self._read(line)]
        return [Spelled(id, len(said) if i == len(ids) - 1 else 0, False) for i, id in enumerate(ids)]

    def opening(self) -> list[int]:
        """The special tokens that it puts before every text."""
        whole: list[int] = self.tokenizer("a")["input_ids"]
        bare = self._encode("a")
        places = [i for i in range(len(whole)) if whole[i : i + len(bare)] == bare]
        return whole[: places[0]] if places else []

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        return ids

    def _joined(self, ids: list[int]) -> bytes:
        return b"".join(self.of[id] or b"" for id in ids)

    def _bytes_of(self, token: str) -> bytes:
        if self._alphabet is not None:
            known = [self._alphabet.get(character) for character in token]
            return bytes(b for b in known if b is not None) if None not in known else token.encode()
        if byte := BYTE.fullmatch(token):
            return bytes([int(byte[1], 16)])
        assert self._mark is not None
        return token.replace(self._mark, " ").encode()

    def _must_give_back(self) -> None:
        """Ordinary text comes back byte for byte, as far as there are tokens for it."""
        unknown = self.tokenizer.unk_token_id
        for text in (PROBE, *PROBE.split()):
            ids = self._encode(text)
            said = self._joined(ids).decode("utf-8", "replace")
            if unknown not in ids and said not in (text, f" {text}"):
                raise self._refuse(f"one that reads {text!r} as {said!r}", "What is lost cannot be compared.")

    def _refuse(self, what: str, why: str) -> VocabularyError:
        return VocabularyError(
            f"the {self._whose}'s tokenizer: expected one whose tokens stand for the bytes of a text (byte-level BPE, "
            f"or SentencePiece), got {what}. {why} Use a {self._whose} with such a tokenizer."
        )


def _parts(state: Any) -> Iterator[Any]:
    """A component of a tokenizer, or the components that it is a sequence of."""
    if state is None:
        return
    if state["type"] != "Sequence":
        yield state
        return
    for key in ("decoders", "pretokenizers", "normalizers"):
        for part in state.get(key, []):
            yield from _parts(part)


def _byte_alphabet() -> dict[str, int]:
    """The characters with which byte-level BPE writes bytes: printable ones as they are, the others from U+0100 on."""
    shown = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + i): byte for i, byte in enumerate(hidden)}
