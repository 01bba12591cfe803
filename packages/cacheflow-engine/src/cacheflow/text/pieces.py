"""What each token id adds to a text, as bytes: the one table that decoding, streaming and structured output share.

The `tokenizers` library decodes whole lists of ids. Taking a decoder apart into a piece per id makes decoding a plain
concatenation of bytes, which can be done token by token and gives the same text however the ids arrive. Three kinds of
decoder are told apart: byte-level BPE (GPT-2, OPT, Llama 3, SmolLM2), byte fallback (Llama 2, Mistral, Gemma), and all
others, whose tokens are whole characters. This module knows nothing of sequences or of which tokens are special.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import tokenizers

_KEEP_ALL_TEXT = {"ByteLevel", "Digits", "Metaspace", "Prepend", "Replace", "Sequence", "Split"}
"""Steps before the model that drop nothing of a text, as far as `_keeps_all_text` looks at their settings too."""
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TokenPieces:
    """The bytes that every token of one tokenizer stands for.

    Args:
        library_tokenizer: The `tokenizers` library's object.
    """

    def __init__(self, library_tokenizer: tokenizers.Tokenizer) -> None:
        self._tokenizer = library_tokenizer
        settings = json.loads(library_tokenizer.to_str())
        self._keeps_all_text = _keeps_all_text(settings)
        self._falls_back = bool(settings["model"].get("byte_fallback"))
        kinds = {step["type"] for step in _steps(settings.get("decoder"))}
        self._byte_of_char = _byte_of_char() if "ByteLevel" in kinds else None
        self._has_byte_tokens = "ByteFallback" in kinds
        self._anchor, self._anchor_text = (0, "") if self._byte_of_char else self._find_anchor()

    def inside(self, token_id: int) -> bytes:
        """What the token adds to a text that has already begun; nothing for an id that no token has."""
        token = self._tokenizer.id_to_token(token_id)
        if token is None:
            return b""
        if self._byte_of_char is not None:
            return _byte_level(token, self._byte_of_char)
        byte_token = _BYTE_TOKEN.fullmatch(token) if self._has_byte_tokens else None
        if byte_token:
            return bytes.fromhex(byte_token[1])
        text = self._decode(self._anchor, token_id)
        # Other decoders treat a token by itself and the start of the text apart, so what it adds behind one token it adds
        # behind all.
        text = text[len(self._anchor_text) :] if text.startswith(self._anchor_text) else self._decode(token_id)
        return text.encode()

    def at_start(self, token_id: int) -> bytes:
        """What the token adds as the first of a text: some decoders drop a space there."""
        piece = self.inside(token_id)
        if self._byte_of_char is not None or (len(piece) == 1 and piece >= b"\x80"):
            return piece
        return self._decode(token_id).encode()

    def min_tokens(self, text: bytes) -> int:
        """A number of tokens that `text` has at least; 0 if nothing is known."""
        longest, lost = self._longest_and_lost
        return -(-len(text.translate(None, lost)) // longest) if longest else 0

    @cached_property
    def _longest_and_lost(self) -> tuple[int, bytes]:
        """Most bytes of a text that one token can stand for, 0 if there is no limit; and the bytes that no token stands for."""
        vocabulary = self._tokenizer.get_vocab()
        lost = bytes(byte for char, byte in (self._byte_of_char or {}).items() if char not in vocabulary)
        falls_back = self._falls_back and all(f"<0x{byte:02X}>" in vocabulary for byte in range(256))
        if not self._keeps_all_text or not (self._byte_of_char or falls_back):
            return 0, b""
        # Tokens are spelled with at least one byte for each that they stand for.
        return max(len(token.encode()) for token in vocabulary), lost

    def _decode(self, *token_ids: int) -> str:
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=False))

    def _find_anchor(self) -> tuple[int, str]:
        """An ordinary token to put in front of another one, and its text."""
        for token_id in range(self._tokenizer.get_vocab_size()):
            token = self._tokenizer.id_to_token(token_id)
            text = self._decode(token_id)
            if token is not None and text.strip() and not _BYTE_TOKEN.fullmatch(token):
                return token_id, text
        return 0, ""


def _steps(part: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """The settings of a normalizer, pre-tokenizer or decoder, and of those that it is made of."""
    if part is not None:
        yield part
        for name in ("normalizers", "pretokenizers", "decoders"):
            for inner in part.get(name, ()):
                yield from _steps(inner)


def _keeps_all_text(settings: dict[str, Any]) -> bool:
    """Whether all bytes of a text reach the model, and added tokens take in no spaces around them."""
    for step in (*_steps(settings.get("normalizer")), *_steps(settings.get("pre_tokenizer"))):
        if step["type"] not in _KEEP_ALL_TEXT or step.get("behavior") == "Removed":
            return False
        if step["type"] == "Replace" and (step["pattern"] != {"String": " "} or not step["content"]):
            return False
    return not any(token["lstrip"] or token["rstrip"] for token in settings.get("added_tokens", ()))


def _byte_level(token: str, byte_of_char: dict[str, int]) -> bytes:
    try:
        return bytes(byte_of_char[char] for char in token)
    except KeyError:  # An added token: it is written in plain text, not in the alphabet of bytes.
        return token.encode()


def _byte_of_char() -> dict[str, int]:
    """The byte-level alphabet: printable Latin-1 characters are their own bytes, U+0100 and up the other bytes in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = sorted(set(range(256)) - set(printable))
    alphabet = {chr(byte): byte for byte in printable}
    alphabet.update((chr(0x100 + number), byte) for number, byte in enumerate(others))
    return alphabet
