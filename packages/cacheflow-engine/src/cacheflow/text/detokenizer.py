"""Incremental detokenising of one sequence: what each further token adds to the text, never half a character.

The text of a list of ids is the concatenation of their pieces' bytes, read as UTF-8 with U+FFFD for every maximal part that
is not valid. A character whose bytes have not all come yet is held back. It knows neither stop strings nor requests.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable
from contextlib import suppress

Piece = str | bytes
"""What a token adds: text if it is whole characters, bytes if it begins or ends inside one."""


class PieceTable(dict[int, Piece]):
    """Token id to its piece, filled as tokens are met.

    Args:
        piece_of: The bytes of a token id.
    """

    def __init__(self, piece_of: Callable[[int], bytes]) -> None:
        super().__init__()
        self._piece_of = piece_of

    def __missing__(self, token_id: int) -> Piece:
        data = self._piece_of(token_id)
        piece: Piece = data
        with suppress(UnicodeDecodeError):
            piece = data.decode()
        self[token_id] = piece
        return piece


class Detokenizer:
    """The text of one growing list of token ids.

    The texts that `add` returns, in order, and the one that `flush` returns make up the text of the whole list, for any ids.

    Args:
        inside: What a token adds to a text that has begun.
        at_start: What it adds as the first of a text; None where that is the same, or where the text has begun.
    """

    __slots__ = ("_at_start", "_inside", "_pending")

    def __init__(self, inside: PieceTable, at_start: PieceTable | None = None) -> None:
        self._inside = inside
        self._at_start = at_start
        self._pending = b""

    @property
    def is_complete(self) -> bool:
        """Whether the texts given out so far are the whole text of the ids added so far."""
        return not self._pending

    def add(self, token_id: int) -> str:
        """The text that is certain now and was not before; empty while a character is incomplete."""
        piece = self._inside[token_id]
        if self._at_start is not None and piece:
            piece = self._at_start[token_id]
            self._at_start = None
        if not self._pending and isinstance(piece, str):
            return piece
        data = self._pending + (piece.encode() if isinstance(piece, str) else piece)
        text, num_read = codecs.utf_8_decode(data, "replace", False)
        self._pending = data[num_read:]
        return text

    def flush(self) -> str:
        """What is left when no token will follow: a replacement character for an incomplete one, or nothing."""
        text = self._pending.decode("utf-8", "replace")
        self._pending = b""
        return text
