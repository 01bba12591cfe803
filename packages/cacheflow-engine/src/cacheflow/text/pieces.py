"""What each token id adds to a text, as bytes: the one table that decoding, streaming and structured output share.

The `tokenizers` library decodes whole lists of ids. Taking a decoder apart into a piece per id makes decoding a plain
concatenation of bytes, which can be done token by token and gives the same text however the ids arrive. Three kinds of
decoder are told apart: byte-level BPE (GPT-2, OPT, Llama 3, SmolLM2), byte fallback (Llama 2, Mistral, Gemma), and all
others, whose tokens are whole characters. This module knows nothing of sequences or of which tokens are special.
"""

from __future__ import annotations

import json
import re
from typing import Any

import tokenizers

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TokenPieces:
    """The bytes that every token of one tokenizer stands for.

    Args:
        library_tokenizer: The `tokenizers` library's object.
    """

    def __init__(self, library_tokenizer: tokenizers.Tokenizer) -> None:
        self._tokenizer = library_tokenizer
        kinds = _decoder_kinds(json.loads(library_tokenizer.to_str()).get("decoder"))
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


def _decoder_kinds(decoder: dict[str, Any] | None) -> set[str]:
    if decoder is None:
        return set()
    kinds = {str(decoder["type"])}
    for part in decoder.get("decoders", ()):
        kinds |= _decoder_kinds(part)
    return kinds


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
