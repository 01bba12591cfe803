"""A small vocabulary for sampling tests."""

from __future__ import annotations

import pytest

VOCAB_SIZE = 1000


class Characters:
    """A `ProcessorContext` whose token ids are the codes of characters."""

    vocab_size = VOCAB_SIZE
    eos_token_ids = (2,)

    def encode(self, text: str) -> list[int]:
        return [ord(character) for character in text]

    def token_bytes(self) -> list[bytes]:
        return [chr(token).encode() for token in range(VOCAB_SIZE)]


@pytest.fixture
def context() -> Characters:
    return Characters()
