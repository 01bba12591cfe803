"""Where packed weights lie: one after the other in blocks that live as long as what is in them."""

from __future__ import annotations

import gc
import threading
import weakref

import pytest
import torch

from cacheflow_kernels.cpu import weight_memory
from cacheflow_kernels.cpu.weight_memory import place


def test_a_placed_tensor_is_a_contiguous_copy_at_a_cache_line() -> None:
    for given in (torch.arange(15).view(3, 5).T, torch.ones(1, dtype=torch.bfloat16), torch.arange(7, dtype=torch.int8)):
        placed = place(given)
        assert torch.equal(placed, given)
        assert placed.is_contiguous()
        assert placed.data_ptr() % 64 == 0
        assert placed.data_ptr() != given.data_ptr()


@pytest.fixture(autouse=True)
def new_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """None of what other tests have packed."""
    monkeypatch.setattr(weight_memory, "_block", None)


def test_what_is_placed_next_lies_behind_what_was_placed_before() -> None:
    first = place(torch.ones(100, dtype=torch.uint8))
    second = place(torch.full((100,), 2, dtype=torch.uint8))
    assert second.data_ptr() == first.data_ptr() + 128
    assert bool((first == 1).all())


def test_a_tensor_larger_than_a_block_gets_one_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_memory, "_BLOCK", 1 << 20)
    given = torch.arange(5 << 20, dtype=torch.uint8)
    small, placed, behind = place(torch.ones(3)), place(given), place(torch.full((3,), 2.0))
    assert torch.equal(placed, given)
    assert small.tolist() == [1.0] * 3
    assert behind.tolist() == [2.0] * 3


def test_a_block_goes_with_the_last_tensor_in_it() -> None:
    first = place(torch.ones(10))
    block = weight_memory._block
    assert block is not None
    memory = block()
    assert memory is not None
    gone = weakref.ref(memory)
    del memory
    second = place(torch.ones(10))
    del first
    gc.collect()
    assert second.tolist() == [1.0] * 10
    del second
    gc.collect()
    assert gone() is None


def test_a_tensor_without_elements_needs_no_place() -> None:
    assert place(torch.empty(0, 3)).shape == (0, 3)


def test_threads_get_places_of_their_own() -> None:
    placed: list[torch.Tensor] = []

    def work(number: int) -> None:
        placed.extend(place(torch.full((1000,), number, dtype=torch.int16)) for _ in range(50))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(placed) == 200
    assert all(tensor.unique().numel() == 1 for tensor in placed)
    assert len({tensor.data_ptr() for tensor in placed}) == 200
