"""Owns the content keys of full blocks: which block holds which tokens after which prefix. It does not count references."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from hashlib import sha256

Key = bytes


def root_key(salt: str) -> Key:
    """The parent of a first block's key; different salts never share blocks."""
    return sha256(salt.encode()).digest()


def block_key(parent: Key, token_ids: Sequence[int]) -> Key:
    """The key of a full block with these tokens behind `parent`: SHA-256, so nobody can make two prefixes collide."""
    return sha256(parent + array("q", token_ids).tobytes()).digest()


class PrefixCache:
    """A two-way map between keys and blocks.

    A key is *pending* from the moment its block is scheduled until the step has succeeded. It can be found meanwhile: requests
    of the same step may share the block, since each layer stores before it attends.
    """

    def __init__(self) -> None:
        self._block_of: dict[Key, int] = {}
        self._key_of: dict[int, Key] = {}
        self._pending: set[int] = set()

    def __len__(self) -> int:
        return len(self._block_of)

    def find(self, keys: Iterator[Key]) -> Iterator[tuple[Key, int]]:
        """The blocks of the longest known run of `keys`, from the first one on."""
        for key in keys:
            block = self._block_of.get(key)
            if block is None:
                return
            yield key, block

    def block_of(self, key: Key) -> int | None:
        """The block that holds a key's content."""
        return self._block_of.get(key)

    def holds(self, block: int) -> bool:
        """Whether the block can be found by a key."""
        return block in self._key_of

    def is_pending(self, block: int) -> bool:
        """Whether the block is still to be computed by the current step."""
        return block in self._pending

    def publish(self, key: Key, block: int) -> None:
        """Makes a full block findable, pending. Of two blocks with the same content the first one stays."""
        if key in self._block_of:
            return
        assert block not in self._key_of, "a block has two keys"
        self._block_of[key] = block
        self._key_of[block] = key
        self._pending.add(block)

    def commit(self) -> None:
        """The step succeeded: what was pending is computed."""
        self._pending.clear()

    def drop_pending(self) -> list[int]:
        """The step failed: what was pending is forgotten. Returns those blocks."""
        blocks = list(self._pending)
        for block in blocks:
            self.forget(block)
        return blocks

    def forget(self, block: int) -> None:
        """The block's content is about to be overwritten."""
        key = self._key_of.pop(block)
        del self._block_of[key]
        self._pending.discard(block)

    def check(self) -> None:
        """Asserts that both directions agree."""
        assert {block: key for key, block in self._block_of.items()} == self._key_of
        assert self._pending <= self._key_of.keys()
