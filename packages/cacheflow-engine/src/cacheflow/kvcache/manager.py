"""Owns the block tables of all sequences: allocation, sharing, copy-on-write and the prefix cache.

PagedAttention's memory manager (arXiv:2309.06180). It knows token ids as numbers to compare; it holds no tensors.

    a table:     [ 7 | 3 | 12 ]       block_size 4
    its slots:     t0..t3 in block 7, t4..t7 in block 3, t8.. in block 12
    forked:      [ 7 | 3 | 12 ]       all three now have two references; the first to write t9 gets a copy of block 12
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from cacheflow.kvcache.block_pool import BlockPool
from cacheflow.kvcache.prefix_cache import Key, PrefixCache, block_key, root_key
from cacheflow.types import BLOCK_CACHED, BLOCK_FREE, BLOCK_OWNED, BLOCK_SHARED


@dataclass(slots=True)
class BlockTable:
    """The blocks of one sequence, and the keys of those that are full, as far as they were published."""

    root: Key
    blocks: list[int] = field(default_factory=list)
    keys: list[Key] = field(default_factory=list)


class KVManager:
    """Block tables by sequence id.

    A sequence is opened, reserves slots before each step, publishes its full blocks, and is closed. Between `reserve` and the
    step, `take_copies` says which blocks must be copied first; then `commit` or `rollback` ends the step.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self.pool = BlockPool(num_blocks)
        self.cache = PrefixCache()
        self.tables: dict[int, BlockTable] = {}
        self._copies: dict[int, int] = {}

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold so many tokens."""
        return -(-num_tokens // self.block_size)

    def open(self, sequence_id: int, token_ids: Sequence[int], salt: str, *, reuse: bool = True) -> int:
        """A table for a new sequence; returns how many of its tokens are already in the cache.

        The last token is never among them, since its logits are wanted. `reuse=False` (all positions are wanted) takes none.
        """
        assert sequence_id not in self.tables
        table = self.tables[sequence_id] = BlockTable(root_key(salt))
        if reuse:
            num_full = (len(token_ids) - 1) // self.block_size
            for key, block in self.cache.find(self._keys(table.root, token_ids, num_full)):
                self.pool.acquire(block)
                table.blocks.append(block)
                table.keys.append(key)
        return len(table.blocks) * self.block_size

    def num_new_blocks(self, sequence_id: int, start: int, end: int) -> int:
        """Blocks that writing the slots of tokens `start` to `end` would take, copies of shared ones included."""
        table = self.tables[sequence_id]
        return max(0, self.blocks_for(end) - len(table.blocks)) + len(self._shared(table, start, end))

    def reserve(self, sequence_id: int, start: int, end: int) -> bool:
        """Makes the slots of tokens `start` to `end` writable. False, and nothing changed, when there is no room."""
        table = self.tables[sequence_id]
        last = len(table.blocks) - 1
        has_room = start // self.block_size == last and end <= (last + 1) * self.block_size
        if has_room and self.pool.ref_counts[table.blocks[last]] == 1:
            return True  # A decode, nearly always: its own last block has room.
        if self.num_new_blocks(sequence_id, start, end) > self.pool.num_available:
            return False
        for index in self._shared(table, start, end):
            source, block = table.blocks[index], self._take()
            self._copies[block] = source
            self.pool.release(source, keep=False)
            table.blocks[index] = block
        while len(table.blocks) * self.block_size < end:
            table.blocks.append(self._take())
        return True

    def publish(self, sequence_id: int, token_ids: Sequence[int], end: int) -> None:
        """Makes the blocks that are full once tokens up to `end` are computed findable, pending."""
        table = self.tables[sequence_id]
        for index in range(len(table.keys), end // self.block_size):
            tokens = token_ids[index * self.block_size : (index + 1) * self.block_size]
            key = block_key(table.keys[-1] if table.keys else table.root, tokens)
            table.keys.append(key)
            known = self.cache.block_of(key)
            if known is not None and self.pool.is_idle(known):
                # Two copies, and nobody holds the old one: the sequence's siblings shall find the one that it holds.
                self.cache.forget(known)
                self.pool.discard(known)
            self.cache.publish(key, table.blocks[index])

    def fork(self, parent_id: int, child_id: int) -> None:
        """The child shares all of the parent's blocks."""
        parent = self.tables[parent_id]
        assert child_id not in self.tables
        for block in parent.blocks:
            self.pool.acquire(block)
        self.tables[child_id] = BlockTable(parent.root, parent.blocks.copy(), parent.keys.copy())

    def close(self, sequence_id: int) -> None:
        """Gives up a sequence's blocks, the last first: the front of a prefix is forgotten last."""
        for block in reversed(self.tables.pop(sequence_id).blocks):
            if self.pool.release(block, keep=self.cache.holds(block)):
                self._copies.pop(block, None)

    def take_copies(self) -> tuple[tuple[int, int], ...]:
        """The blocks (source, destination) that the coming step must copy first."""
        copies = tuple((source, destination) for destination, source in self._copies.items())
        self._copies.clear()
        return copies

    def commit(self) -> None:
        """The step succeeded."""
        self.cache.commit()

    def rollback(self) -> list[int]:
        """The step failed. Returns the sequences that hold blocks which were not computed: they must be closed."""
        dropped = set(self.cache.drop_pending())
        for block in dropped:
            self.pool.discard(block)
        self._copies.clear()
        return [sequence_id for sequence_id, table in self.tables.items() if not dropped.isdisjoint(table.blocks)]

    def block_map(self, owners: Mapping[int, int]) -> list[int]:
        """What each block is, as in `EngineView.blocks`.

        Args:
            owners: For each sequence, by its id, the number of its request; a block of any other counts as shared.
        """
        kinds = [
            BLOCK_SHARED if count else BLOCK_CACHED if self.pool.is_idle(block) else BLOCK_FREE
            for block, count in enumerate(self.pool.ref_counts)
        ]
        for sequence_id, table in self.tables.items():
            if sequence_id in owners:
                for block in table.blocks:
                    if self.pool.ref_counts[block] == 1:
                        kinds[block] = BLOCK_OWNED + owners[sequence_id]
        return kinds

    def check(self) -> None:
        """Asserts every invariant that ties tables, references and keys together."""
        self.pool.check()
        self.cache.check()
        held = [0] * self.pool.num_blocks
        for table in self.tables.values():
            assert len(set(table.blocks)) == len(table.blocks), "a table holds a block twice"
            for block in table.blocks:
                held[block] += 1
        assert held == self.pool.ref_counts, "reference counts differ from the tables that hold a block"
        unreferenced_keyed = sum(self.cache.holds(block) and not held[block] for block in range(self.pool.num_blocks))
        assert unreferenced_keyed == self.pool.num_idle, "idle blocks are not exactly the findable unreferenced ones"

    def _keys(self, parent: Key, token_ids: Sequence[int], num_blocks: int) -> Iterator[Key]:
        for index in range(num_blocks):
            parent = block_key(parent, token_ids[index * self.block_size : (index + 1) * self.block_size])
            yield parent

    def _shared(self, table: BlockTable, start: int, end: int) -> list[int]:
        """Places in the table of the blocks to be written that others hold too: usually none, at most the last one."""
        written = range(start // self.block_size, min(self.blocks_for(end), len(table.blocks)))
        return [index for index in written if self.pool.ref_counts[table.blocks[index]] > 1]

    def _take(self) -> int:
        block, was_idle = self.pool.take()
        if was_idle:
            self.cache.forget(block)
        return block
