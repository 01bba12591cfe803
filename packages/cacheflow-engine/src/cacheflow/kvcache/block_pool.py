"""Owns the ids of all KV blocks and how often each is referenced. It does not know what a block holds."""

from __future__ import annotations

from collections import OrderedDict


class BlockPool:
    """Reference counts over a fixed number of blocks. Every operation is O(1).

    An unreferenced block is either *free* (nothing worth keeping) or *idle* (its content may be found again); idle blocks
    are given up last, least recently used first. free + idle + referenced = total, always.
    """

    def __init__(self, num_blocks: int) -> None:
        self.ref_counts = [0] * num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))
        self._idle: OrderedDict[int, None] = OrderedDict()

    @property
    def num_blocks(self) -> int:
        """All blocks."""
        return len(self.ref_counts)

    @property
    def num_free(self) -> int:
        """Blocks that hold nothing worth keeping."""
        return len(self._free)

    @property
    def num_idle(self) -> int:
        """Unreferenced blocks kept for their content."""
        return len(self._idle)

    @property
    def num_available(self) -> int:
        """Blocks that `take` can give."""
        return len(self._free) + len(self._idle)

    def is_idle(self, block: int) -> bool:
        """Whether the block is unreferenced and kept for its content."""
        return block in self._idle

    def take(self) -> tuple[int, bool]:
        """A block with one reference, and whether it was idle, so that its content must be forgotten. One must be available."""
        if self._free:
            block, was_idle = self._free.pop(), False
        else:
            (block, _), was_idle = self._idle.popitem(last=False), True
        assert self.ref_counts[block] == 0
        self.ref_counts[block] = 1
        return block, was_idle

    def acquire(self, block: int) -> None:
        """One more reference to an idle or referenced block."""
        if self.ref_counts[block] == 0:
            del self._idle[block]
        self.ref_counts[block] += 1

    def release(self, block: int, *, keep: bool) -> bool:
        """One reference less; returns whether it was the last. `keep`: the content may be found again."""
        assert self.ref_counts[block] > 0
        self.ref_counts[block] -= 1
        if self.ref_counts[block]:
            return False
        if keep:
            self._idle[block] = None
        else:
            self._free.append(block)
        return True

    def discard(self, block: int) -> None:
        """An idle block whose content was forgotten becomes free; a referenced one is left alone."""
        if block in self._idle:
            del self._idle[block]
            self._free.append(block)

    def check(self) -> None:
        """Asserts that every block is in exactly one state."""
        free, idle = set(self._free), set(self._idle)
        assert len(free) == len(self._free), "a block is free twice"
        assert not free & idle, "a block is free and idle"
        unreferenced = {block for block, count in enumerate(self.ref_counts) if count == 0}
        assert free | idle == unreferenced, "free and idle blocks are not exactly the unreferenced ones"
