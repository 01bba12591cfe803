"""What logits processors may ask about the model, answered from its tokenizer once one of them asks."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

from cacheflow.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from cacheflow.types import TokenizerData


class TokenizerContext:
    """A `ProcessorContext` over tokenizer data.

    Attributes:
        vocab_size: Rows of the logits.
        eos_token_ids: Those that end a text.
    """

    def __init__(self, data: TokenizerData, vocab_size: int) -> None:
        self._data = data
        self.vocab_size = vocab_size
        self.eos_token_ids = tuple(data.eos_token_ids)

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        return Tokenizer(self._data, self.vocab_size)

    def special_token_ids(self) -> frozenset[int]:
        """Ids that steer the model rather than being text."""
        return self._tokenizer.special_ids

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without special tokens."""
        return self._tokenizer.encode(text, add_bos=False)

    def token_bytes(self) -> list[bytes]:
        """The bytes that each token id stands for."""
        return self._tokenizer.token_bytes()
