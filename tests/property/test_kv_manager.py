"""The KV manager's invariants, under any order of its operations."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from cacheflow.kvcache.manager import KVManager

BLOCK_SIZE = 4


class KVManagerMachine(RuleBasedStateMachine):
    """Drives a manager as a scheduler would, and remembers which tokens each slot should hold."""

    def __init__(self) -> None:
        super().__init__()
        self.kv = KVManager(num_blocks=16, block_size=BLOCK_SIZE)
        self.tokens: dict[int, list[int]] = {}
        self.computed: dict[int, int] = {}
        self.memory: dict[int, int] = {}
        self.next_id = 0

    def slot(self, sequence_id: int, position: int) -> int:
        return self.kv.tables[sequence_id].blocks[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=20), salt=st.sampled_from(["", "a"]), reuse=st.booleans())
    def open(self, tokens: list[int], salt: str, reuse: bool) -> None:
        num_cached = self.kv.open(self.next_id, tokens, salt, reuse=reuse)
        assert num_cached < len(tokens)
        assert num_cached == 0 or reuse
        self.tokens[self.next_id], self.computed[self.next_id] = tokens, num_cached
        self.next_id += 1

    @precondition(lambda self: self.tokens)
    @rule(data=st.data(), fails=st.booleans())
    def step(self, data: st.DataObject, fails: bool) -> None:
        chosen = data.draw(st.lists(st.sampled_from(sorted(self.tokens)), unique=True, max_size=4))
        ready: list[tuple[int, int, int]] = []
        for sequence_id in chosen:
            start = self.computed[sequence_id]
            if start == len(self.tokens[sequence_id]):
                self.tokens[sequence_id].append(data.draw(st.integers(0, 1)))
            end = data.draw(st.integers(start + 1, len(self.tokens[sequence_id])))
            available = self.kv.pool.num_available
            needed = self.kv.num_new_blocks(sequence_id, start, end)
            assert self.kv.reserve(sequence_id, start, end) is (needed <= available)
            if needed <= available:
                assert available - self.kv.pool.num_available == needed
                self.kv.publish(sequence_id, self.tokens[sequence_id], end)
                ready.append((sequence_id, start, end))
        before = dict(self.memory)
        for source, destination in self.kv.take_copies():
            for i in range(BLOCK_SIZE):
                if source * BLOCK_SIZE + i in before:
                    self.memory[destination * BLOCK_SIZE + i] = before[source * BLOCK_SIZE + i]
        if fails:
            for sequence_id in {*self.kv.rollback(), *(sequence_id for sequence_id, _, _ in ready)}:
                self.close(sequence_id)
            return
        written: set[int] = set()
        for sequence_id, start, end in ready:
            for position in range(start, end):
                slot = self.slot(sequence_id, position)
                block = slot // BLOCK_SIZE
                assert slot not in written, "two tokens of a step are stored in one slot"
                assert self.kv.pool.ref_counts[block] == 1 or self.kv.cache.is_pending(block), "a shared block is written"
                assert not self.kv.cache.holds(block) or self.kv.cache.is_pending(block), "a computed keyed block is written"
                written.add(slot)
                self.memory[slot] = self.tokens[sequence_id][position]
            self.computed[sequence_id] = end
        self.kv.commit()

    @precondition(lambda self: self.tokens)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        parent = data.draw(st.sampled_from(sorted(self.tokens)))
        self.kv.fork(parent, self.next_id)
        self.tokens[self.next_id] = self.tokens[parent][: self.computed[parent]] + [data.draw(st.integers(0, 1))]
        self.computed[self.next_id] = self.computed[parent]
        self.next_id += 1

    @precondition(lambda self: self.tokens)
    @rule(data=st.data())
    def close_one(self, data: st.DataObject) -> None:
        self.close(data.draw(st.sampled_from(sorted(self.tokens))))

    def close(self, sequence_id: int) -> None:
        self.kv.close(sequence_id)
        del self.tokens[sequence_id], self.computed[sequence_id]

    @invariant()
    def books_balance(self) -> None:
        self.kv.check()
        pool = self.kv.pool
        referenced = sum(count > 0 for count in pool.ref_counts)
        assert pool.num_free + pool.num_idle + referenced == pool.num_blocks

    @invariant()
    def every_computed_token_is_where_its_table_says(self) -> None:
        for sequence_id, tokens in self.tokens.items():
            for position in range(self.computed[sequence_id]):
                assert self.memory[self.slot(sequence_id, position)] == tokens[position]


TestKVManager = KVManagerMachine.TestCase
TestKVManager.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)
