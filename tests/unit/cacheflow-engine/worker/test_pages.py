from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from cacheflow.worker import pages

MIB = 1 << 20
STATM = Path("/proc/self/statm")


def resident_bytes() -> int:
    return int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_a_tensor_of_zeros_begins_at_a_cache_line() -> None:
    tensor = pages.zeros((3, 5, 7), torch.bfloat16)

    assert tensor.data_ptr() % 64 == 0
    assert tensor.shape == (3, 5, 7)
    assert not tensor.any()


def test_first_pages_of_a_tensor_that_is_smaller_than_its_share_are_all_of_it() -> None:
    tensor = pages.zeros((10,), torch.float32)

    pages.take_first([tensor], MIB)

    assert not tensor.any()


@pytest.mark.skipif(not STATM.exists(), reason="resident memory is read from /proc")
def test_only_first_pages_are_taken_from_the_system() -> None:
    tensors = [pages.zeros((64 * MIB,), torch.uint8) for _ in range(4)]
    before = resident_bytes()

    pages.take_first(tensors, 64 * MIB)

    taken = resident_bytes() - before
    # A huge page more for each, where a share ends within one.
    assert 60 * MIB <= taken <= 80 * MIB
